"""A batch size that fits into memory: found by trying, before a run begins."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import pathlib
from typing import TYPE_CHECKING, Any

from helios.checkpoint import CheckpointStore
from helios.checkpoint.records import read_record
from helios.data.datamodule import DataModule
from helios.engine import find_executable_batch_size
from helios.errors import LaunchError
from helios.failures.ending import is_out_of_memory
from helios.loggers.text import get_root_logger, text_logging
from helios.model.model import Model

if TYPE_CHECKING:
    from helios.trainer import Trainer

AUTO = "auto"
_STEPS = 2  # from the second one on the optimizers have their states
#: Arguments of a trial: it trains, and leaves nothing behind.
_TRIAL: dict[str, Any] = {
    **dict.fromkeys(("valid_frequency", "chkpt_frequency", "print_frequency")),
    **dict.fromkeys(("early_stop_cycles", "chkpt_interval_s", "hang_timeout_s")),
    **dict.fromkeys(("chkpt_root", "log_root", "log_path", "run_path", "src_root")),
    **dict.fromkeys(("keep_last", "keep_every", "keep_best", "log_with")),
    **dict.fromkeys(("bad_numbers", "crash_bundle", "batch_size")),
    **dict.fromkeys(("enable_tensorboard", "enable_file_logging"), False),
    **dict.fromkeys(("enable_progress_bar", "print_banner"), False),
    "train_unit": "iteration",
    "total_steps": _STEPS,
    "resume": "never",
    "callbacks": (),
    "train_exceptions": (Exception,),
}


def find_parts(trainer: Trainer, model: Model, datamodule: DataModule) -> int:
    """Into how many parts to cut each batch of the DataModule.

    The accumulation steps are to be as many times more, so that the global batch
    stays. A run that goes on has as many as its checkpoint says.

    Raises:
        LaunchError: there is no such size, or there are several ranks.
    """
    if trainer.batch_size != AUTO:
        return trainer._parts
    if saved := _saved(trainer, model):
        return saved
    with text_logging(None), contextlib.ExitStack() as stack:
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.INFO)  # what a trial has to say
        return _find(trainer, model, datamodule)


def _find(trainer: Trainer, model: Model, datamodule: DataModule) -> int:
    trial = dataclasses.replace(trainer, **_TRIAL)
    with trial._running(model, datamodule, ()) as engine:
        if engine.world_size > 1:
            raise LaunchError(
                f'`batch_size` is "auto", and there are {engine.world_size} ranks, of '
                "which one would wait for another that is out of memory; find the size "
                "on one of them, and give it to the DataModule"
            )
        trial._set_up_data(engine, datamodule)
        largest = math.gcd(*(p.params.batch_size for p in datamodule._phases()))
    sizes = [n for n in range(largest, 0, -1) if largest % n == 0]
    smaller = iter(sizes[1:])

    def attempt(size: int) -> int:
        trial._parts = largest // size
        try:
            trial.fit(model, datamodule)
        except Exception as error:
            if is_out_of_memory(error):
                get_root_logger().warning("batches of %d do not fit into memory", size)
                raise
            # Any other is for the run to meet, which says what there is to say.
        return size

    find = find_executable_batch_size(attempt, largest, lambda: next(smaller, 0))
    try:
        parts = largest // int(find())
    except RuntimeError as error:
        raise LaunchError(
            f'`batch_size` is "auto", and no part of the batch of {largest} fits into '
            "memory; take a smaller network or samples, or share it out by FSDP"
        ) from error
    accumulation = (trainer.accumulation_steps or 1) * parts
    get_root_logger().warning(
        "batches of %d fit, with `accumulation_steps` of %d",
        *(largest // parts, accumulation),
    )
    return parts


def _saved(trainer: Trainer, model: Model) -> int | None:
    """The parts of the run that is to go on, if there is one."""
    records = list[dict[str, Any]]()
    if trainer.resume not in ("auto", "must", "never"):
        records = [read_record(pathlib.Path(trainer.resume))]
    elif trainer.resume != "never" and trainer.chkpt_root is not None:
        root = pathlib.Path(trainer.chkpt_root) / model.save_name
        records = list(CheckpointStore(root).records().values())
    steps = [record["identity"].get("accumulation_steps") for record in records[:1]]
    return int(steps[0]) // (trainer.accumulation_steps or 1) if any(steps) else None
