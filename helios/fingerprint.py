"""What exactness depends on: recorded at every save, compared at a resume."""

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

from helios._version import __version__

_ORDER = "the order of the samples would be another"
_COURSE = "the course of the training would be another"
_BITS = "the last bits of the results may differ"
_DEVICE = "the random numbers of a device are of no use to another"
#: What a difference costs, by name; the costly ones first.
_COSTS = {
    "train_data": _ORDER,
    "accumulation_steps": _COURSE,
    "mixed_precision": _COURSE,
    "device_type": _DEVICE,
    "world_size": f"other random numbers on the ranks, and {_BITS}",
    "deterministic": _BITS,
    "versions": _BITS,
}


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide on bits."""
    names = ("torch", "accelerate", "numpy", "safetensors")
    packages = {name: importlib.metadata.version(name) for name in names}
    return {"helios-ml": __version__, "python": platform.python_version(), **packages}


def compare(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, bool]:
    """What differs, in words, the costly first, and whether it costs more than bits."""
    found = {}
    for name, cost in _COSTS.items():
        old, new = saved.get(name), now[name]
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            keys = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
            old, new = ({k: side.get(k) for k in keys} for side in (old, new))
        text = f"`{name}` was {old}, is {new}: {cost}"
        found[text] = cost in (_ORDER, _COURSE, _DEVICE)
    return found
