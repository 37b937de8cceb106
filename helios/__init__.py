"""Helios: a PyTorch trainer whose runs can be stopped at any time and end the same."""

import importlib
from typing import TYPE_CHECKING, Any

from helios._version import __version__ as __version__
from helios.stopping import ranks as _ranks  # noqa: F401  # finds who has started this

if TYPE_CHECKING:
    from helios.callbacks.base import Callback as Callback
    from helios.data.datamodule import DataModule as DataModule
    from helios.data.params import DataLoaderParams as DataLoaderParams
    from helios.errors import HeliosError as HeliosError
    from helios.handwritten import RunStopped as RunStopped
    from helios.handwritten import Session as Session
    from helios.model.model import BatchPhase as BatchPhase
    from helios.model.model import Model as Model
    from helios.retention import KeepBest as KeepBest
    from helios.state import TrainingState as TrainingState
    from helios.state import TrainingUnit as TrainingUnit
    from helios.stopping.status import EXIT_STOPPED as EXIT_STOPPED
    from helios.trainer import Trainer as Trainer

_HOMES = {
    "helios.callbacks.base": ["Callback"],
    "helios.data.datamodule": ["DataModule"],
    "helios.data.params": ["DataLoaderParams"],
    "helios.errors": ["HeliosError"],
    "helios.handwritten": ["RunStopped", "Session"],
    "helios.model.model": ["BatchPhase", "Model"],
    "helios.retention": ["KeepBest"],
    "helios.state": ["TrainingState", "TrainingUnit"],
    "helios.stopping.status": ["EXIT_STOPPED"],
    "helios.trainer": ["Trainer"],
}
__all__ = ["__version__", *(name for names in _HOMES.values() for name in names)]


def __getattr__(name: str) -> Any:
    # Names are imported when they are used: `helios --help` must not wait for torch.
    if name in ("checkpoint", "data"):
        return importlib.import_module(f"helios.{name}")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'helios' has no attribute {name!r}")
