"""What exactness depends on: recorded at every save, compared at a resume."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

from helios._version import __version__

__all__ = ["Difference", "compare", "summary", "versions"]

_ORDER = "the order of the samples would be another"
_COURSE = "the course of the training would be another"
_BITS = "the last bits of the results may differ"
#: What a difference costs, by name; the costly ones first.
_COSTS = {
    "train_data": _ORDER,
    "accumulation_steps": _COURSE,
    "mixed_precision": _COURSE,
    "world_size": _BITS,
    "device_type": _BITS,
    "deterministic": _BITS,
    "versions": _BITS,
}


@dataclasses.dataclass(frozen=True)
class Difference:
    """One thing that is not as it was saved."""

    name: str
    saved: Any
    now: Any

    @property
    def is_inexact(self) -> bool:
        """Whether more than the last bits is lost."""
        return _COSTS[self.name] != _BITS

    def __str__(self) -> str:
        saved, now = self.saved, self.now
        if isinstance(saved, Mapping) and isinstance(now, Mapping):
            changed = sorted(k for k in {*saved, *now} if saved.get(k) != now.get(k))
            saved, now = ({k: side.get(k) for k in changed} for side in (saved, now))
        return f"`{self.name}` was {saved}, is {now}: {_COSTS[self.name]}"


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide on bits."""
    names = ("torch", "accelerate", "numpy", "safetensors")
    packages = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), "helios-ml": __version__, **packages}


def summary() -> str:
    """The versions that a log should begin with."""
    found = versions()
    return f"{__version__}, torch {found['torch']}, accelerate {found['accelerate']}"


def compare(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """What differs, the costly first."""
    names = [name for name in _COSTS if name in now and saved.get(name) != now[name]]
    return [Difference(name, saved.get(name), now[name]) for name in names]
