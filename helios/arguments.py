"""The checks of a Trainer's arguments that concern one argument, or a pair."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from helios.callbacks.base import Callback

if TYPE_CHECKING:
    from helios.trainer import Trainer

__all__ = ["check_arguments"]

_PRECISIONS = ("no", "bf16", "fp16", "fp8", None)
_PATHS = ("chkpt_root", "log_root", "log_path", "run_path", "src_root")
_LOGS = (("enable_file_logging", "log_path"), ("enable_tensorboard", "run_path"))
_EXCLUSIVE = (
    ("use_cpu", "gpus", "a run is on one kind of device"),
    (
        "enable_cudnn_benchmark",
        "enable_deterministic",
        "timing kernels may choose another one every time",
    ),
)


def check_arguments(trainer: Trainer) -> None:
    """Raise a ValueError or TypeError on wrong arguments, before anything is made."""
    name = trainer.run_name
    if not isinstance(name, str) or not name or "/" in name or name.startswith("."):
        raise ValueError(f"`run_name` must be a plain file name, got {name!r}")
    precision = trainer.mixed_precision
    if precision not in _PRECISIONS:
        raise ValueError(
            f"`mixed_precision` must be one of {_PRECISIONS}, got {precision!r}"
        )
    for argument in ("keep_last", "num_processes", "accumulation_steps"):
        value = getattr(trainer, argument)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(
                f"`{argument}` must be an int >= 1, got {value!r}; use None for the "
                "default"
            )
    seed = trainer.random_seed
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"`random_seed` must be an int, got {seed!r}")
    for callback in trainer.callbacks:
        if not isinstance(callback, Callback):
            raise TypeError(f"`callbacks` must be helios.Callback's, got {callback!r}")
    for argument in _PATHS:
        value = getattr(trainer, argument)
        if value is not None and not isinstance(value, str | os.PathLike):
            raise TypeError(f"`{argument}` must be a path, got {value!r}")
    for flag, own in _LOGS:
        if getattr(trainer, flag) and not (getattr(trainer, own) or trainer.log_root):
            raise ValueError(f"`{flag}` needs a folder to write to; set `log_root`")
    for one, other, why in _EXCLUSIVE:
        if getattr(trainer, one) and getattr(trainer, other):
            raise ValueError(
                f"`{one}` and `{other}` exclude each other: {why}; set one"
            )
    count, gpus = torch.cuda.device_count(), trainer.gpus or []
    wrong = [i for i in gpus if not isinstance(i, int) or not 0 <= i < count]
    if wrong:
        raise ValueError(
            f"`gpus` names {wrong}, and this machine shows {count} GPU(s), from 0 on"
        )
    if len(gpus) > 1 and os.environ.get("WORLD_SIZE") is None:
        raise ValueError(
            f"`gpus` names {len(gpus)} devices, and this is one process; start it with "
            "`accelerate launch --gpu_ids`"
        )
