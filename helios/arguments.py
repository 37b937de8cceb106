"""The checks of a Trainer's arguments that concern one of them, or a pair."""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from helios.callbacks.base import Callback
from helios.engine import Accelerator
from helios.errors import CheckpointError
from helios.failures.bundle import KINDS
from helios.health.watch import POLICIES
from helios.launching import CHOSEN
from helios.sizing import AUTO
from helios.state import check_name

if TYPE_CHECKING:
    from helios.trainer import Trainer

_PATH = (str, os.PathLike, type(None))
_LIST = (list, tuple)
_KINDS: dict[str, tuple[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("chkpt_root", "log_root", "log_path"), ("a path", _PATH)),
    **dict.fromkeys(("run_path", "src_root"), ("a path", _PATH)),
    "resume": ('"auto", "never", "must" or a path', _PATH[:2]),
    "random_seed": ("an int", (int, type(None))),
    "gpus": ("a list of ints", (*_LIST, type(None))),
    "callbacks": ("a list of helios.Callback objects", _LIST),
    "train_exceptions": ("a list of exception types", _LIST),
    "test_exceptions": ("a list of exception types", _LIST),
    "accelerator": ("an Accelerator", (Accelerator, type(None))),
}
_PRECISIONS = ("no", "bf16", "fp16", None)
_LOGS = (("enable_file_logging", "log_path"), ("enable_tensorboard", "run_path"))
_BUILT_WITH = (
    ("mixed_precision", "mixed_precision"),
    ("accumulation_steps", "gradient_accumulation_steps"),
)
_EXCLUSIVE = (
    # Which has its accumulation steps.
    ("batch_size", "accelerator"),
    ("use_cpu", "gpus"),
    # Timing kernels may choose another one every time.
    ("enable_cudnn_benchmark", "enable_deterministic"),
)


def check_arguments(trainer: Trainer) -> None:
    """Raise a ValueError or TypeError on wrong arguments, before anything is made."""
    given = vars(trainer)
    check_name("run_name", trainer.run_name)
    for name, (expected, kinds) in _KINDS.items():
        value = given[name]
        is_right = isinstance(value, kinds) and not isinstance(value, bool)
        if is_right and name == "callbacks":
            is_right = all(isinstance(member, Callback) for member in value)
        if is_right and name.endswith("_exceptions"):
            is_right = all(BaseException in getattr(m, "__mro__", ()) for m in value)
        if not is_right:
            raise TypeError(f"`{name}` must be {expected}, got {value!r}")
    precision = trainer.mixed_precision
    if precision not in _PRECISIONS:
        raise ValueError(
            f"`mixed_precision` must be one of {_PRECISIONS}, got {precision!r}"
        )
    if trainer.batch_size not in (AUTO, None):
        size, known = trainer.batch_size, (AUTO, None)
        raise ValueError(f"`batch_size` must be one of {known}, got {size!r}")
    check_faults(given, POLICIES)
    for name in ("num_processes", "accumulation_steps"):
        value = given[name]
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"`{name}` must be an int >= 1 or None, got {value!r}")
    restarts = trainer.max_restarts
    if type(restarts) is not int or restarts < 0:
        raise ValueError(f"`max_restarts` must be an int >= 0, got {restarts!r}")
    if trainer.random_seed is not None and not -(2**63) <= trainer.random_seed < 2**63:
        raise ValueError(f"`random_seed` must have 64 bits, got {trainer.random_seed}")
    if trainer.src_root is not None and not os.path.isdir(trainer.src_root):
        raise ValueError(f"`src_root` must be a folder, got {trainer.src_root!r}")
    for flag, own in _LOGS:
        if given[flag] and not (given[own] or trainer.log_root):
            raise ValueError(f"`{flag}` needs a folder to write to; set `log_root`")
    for one, other in _EXCLUSIVE:
        if given[one] and given[other]:
            raise ValueError(f"`{one}` and `{other}` exclude each other; set one")
    for name, attribute in _BUILT_WITH:
        have = getattr(trainer.accelerator, attribute, None)
        if None not in (have, given[name]) and have != given[name]:
            raise ValueError(f"`{name}` is {given[name]!r}, `accelerator` has {have!r}")
    count, gpus = torch.cuda.device_count(), trainer.gpus
    is_chosen = gpus is not None and os.environ.get(CHOSEN) == ",".join(map(str, gpus))
    if gpus is not None and not is_chosen:
        if not (gpus and set(gpus) <= set(range(count))):
            raise ValueError(f"`gpus` is {gpus}; this machine shows {count}, from 0 on")


def check_faults(given: Mapping[str, Any], policies: tuple[str | None, ...]) -> None:
    """Raise a ValueError on wrong arguments about faults."""
    for name in ("hang_timeout_s", "max_time_s", "stop_grace_s"):
        value = given[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and value > 0):
            raise ValueError(f"`{name}` must be > 0 or None, got {value!r}")
    for name, known in {"bad_numbers": policies, "crash_bundle": KINDS}.items():
        if given[name] not in known:
            raise ValueError(f"`{name}` must be one of {known}, got {given[name]!r}")


def check_writable(root: pathlib.Path) -> None:
    """Raise a CheckpointError where no checkpoint could be written."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=root).close()
    except OSError as error:
        raise CheckpointError(f"`chkpt_root` cannot be written to: {error}") from error


def check_possible(root: pathlib.Path) -> None:
    """Raise a NotADirectoryError where a folder for logs can never be."""
    for part in (root, *root.parents):
        if part.exists() and not part.is_dir():
            raise NotADirectoryError(f"logs cannot be written below the file {part}")
