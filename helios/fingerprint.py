"""What exactness depends on: recorded at every save, compared at a resume."""

import enum
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from helios._version import __version__
from helios.errors import LaunchError


class Cost(enum.Enum):
    """What a difference between the run and the checkpoint costs."""

    EXACTNESS = "exactness"  # refused, unless it is allowed
    BITS = "bits"
    NOTHING = "nothing"


_ORDER = "the order of the samples would be another"
_COURSE = "the course of the training would be another"
_BITS = "the last bits of the results may differ"
_DEVICE = "the random numbers of a device are of no use to another"
_UNKNOWN = "what that costs can't be told"
#: What a difference costs, by name; the costly ones first.
_COSTS = {
    "train_data": (_ORDER, Cost.EXACTNESS),
    "accumulation_steps": (_COURSE, Cost.EXACTNESS),
    "mixed_precision": (_COURSE, Cost.EXACTNESS),
    "device_type": (_DEVICE, Cost.EXACTNESS),
    "data_fingerprint": (f"the data may be others: {_UNKNOWN}", Cost.BITS),
    "code": (f"the program is another: {_UNKNOWN}", Cost.BITS),
    "world_size": (f"other random numbers on the ranks, and {_BITS}", Cost.BITS),
    "deterministic": (_BITS, Cost.BITS),
    "versions": (_BITS, Cost.BITS),
    "hardware": (_BITS, Cost.BITS),
    "loading": ("that costs nothing", Cost.NOTHING),
}


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide on bits."""
    names = ("torch", "accelerate", "numpy", "safetensors")
    packages = {name: importlib.metadata.version(name) for name in names}
    return {"helios-ml": __version__, "python": platform.python_version(), **packages}


def hardware(device: torch.device) -> dict[str, Any]:
    """What computes: the bits of a sum depend on it."""
    facts: dict[str, Any] = {"threads": torch.get_num_threads()}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        facts |= {"device": name, "cuda": torch.version.cuda}
    return facts


def git_commit() -> str | None:
    """The commit of the repository that the program's file is in, if it is in one."""
    folder = os.path.dirname(os.path.abspath(sys.argv[0]))
    command = ["git", "-C", folder, "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def disagreements(ranks: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is not the same on all ranks, in words, by the facts of each rank."""
    found = []
    for name in dict.fromkeys(name for facts in ranks for name in facts):
        values = [facts.get(name) for facts in ranks]
        other = next((r for r, value in enumerate(values) if value != values[0]), 0)
        if other:
            found.append(
                f"`{name}` is {values[0]} on rank 0 and {values[other]} on rank {other}"
            )
    return found


def compare(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Cost]:
    """What differs, in words, the costly first, and what it costs."""
    found = {}
    for name, (words, cost) in _COSTS.items():
        old, new = saved.get(name), now[name]
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            keys = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
            old, new = ({k: side.get(k) for k in keys} for side in (old, new))
            if any(key.startswith("seed of") for key in keys):
                words += "; a script that sets no seed has another at each start"
        found[f"`{name}` was {old}, is {new}: {words}"] = cost
    return found


def check_agreement(ranks: Sequence[Mapping[str, Any]]) -> None:
    """Raise a LaunchError where the facts of the ranks are not the same."""
    if found := disagreements(ranks):
        lines = "\n  ".join(found)
        raise LaunchError(
            f"the ranks do not agree:\n  {lines}\nstart all of them with the same "
            "program, arguments and data"
        )
