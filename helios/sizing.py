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
from helios.engine import Engine, find_executable_batch_size
from helios.errors import HeliosError, LaunchError
from helios.failures.ending import is_out_of_memory
from helios.loggers.text import get_root_logger, text_logging
from helios.loop import OF_ANOTHER
from helios.model.model import Model
from helios.stopping.requests import Stopped
from helios.trials import each_by_itself, note_tried

if TYPE_CHECKING:
    from helios.trainer import Trainer

AUTO = "auto"
_STEPS = 2  # from the second one on the optimizers have their states
#: Arguments of a trial: it trains, and leaves nothing behind.
_TRIAL: dict[str, Any] = {
    **dict.fromkeys(("valid_frequency", "chkpt_frequency", "print_frequency")),
    **dict.fromkeys(("early_stop_cycles", "chkpt_interval_s", "hang_timeout_s")),
    **dict.fromkeys(("chkpt_root", "run_path", "src_root")),
    **dict.fromkeys(("keep_last", "keep_every", "keep_best", "log_with")),
    **dict.fromkeys(("bad_numbers", "crash_bundle", "batch_size")),
    **dict.fromkeys(("enable_tensorboard", "enable_progress_bar"), False),
    "print_banner": False,
    "exit_when_stopped": False,
    "train_unit": "iteration",
    "total_steps": _STEPS,
    "resume": "never",
    "callbacks": (),
    "train_exceptions": (Exception,),
}


def find_parts(trainer: Trainer, model: Model, datamodule: DataModule) -> int | None:
    """Into how many parts to cut each batch of the DataModule; every rank must call.

    The accumulation steps are to be as many times more, so that the global batch
    stays. A run that goes on has as many as its checkpoint says. None: it was asked to
    stop meanwhile.

    Raises:
        LaunchError: there is no such size, or a step cannot be tried by each rank.
    """
    if trainer.batch_size != AUTO:
        return trainer._parts
    before = logging.root.manager.disable
    with text_logging(None) as log:
        try:
            logging.disable(logging.INFO)  # what a trial has to say
            return _find(trainer, model, datamodule)
        except Stopped as stop:
            log.warning("%s: stopped before training, to start again", stop)
            return None
        finally:
            logging.disable(before)


def _find(trainer: Trainer, model: Model, datamodule: DataModule) -> int:
    trial = dataclasses.replace(trainer, **_TRIAL)
    trial._stops = trainer._stops  # of the whole call
    largest = 0
    with trial._running(model, datamodule, ()) as engine:
        if saved := _saved_on_main(trainer, model, engine):
            return saved
        if engine.is_sharded:
            raise LaunchError(
                '`batch_size` is "auto", and the ranks share the network out by FSDP: '
                "they compute together, so that one would wait for another that is out "
                "of memory; give the size to the DataModule"
            )
        trial._set_up_data(engine, datamodule)
        largest = math.gcd(*(p.params.batch_size for p in datamodule._phases()))
        if engine.world_size > 1:
            trial.train_exceptions = ()  # they end the run, and have to be told
    if not largest:
        raise Stopped(trial._stops.reason)

    def attempt(size: int) -> int:
        trial._parts = largest // size
        alone = contextlib.nullcontext(list[bool]())
        is_full, has_ended = False, True
        try:
            with each_by_itself(model) if engine.world_size > 1 else alone as found:
                has_ended = trial._train(model, datamodule)
            is_full = bool(found)
        except Exception as error:
            is_full = is_out_of_memory(error)
            trial._stops.withdraw(OF_ANOTHER)  # as for data that cannot be read
            if engine.world_size > 1 and is_full:
                # Not to be taken for a sign to try less: the others are elsewhere.
                raise LaunchError(
                    '`batch_size` is "auto", and a rank is out of memory outside of '
                    "its `train_step`; give the size to the DataModule"
                ) from error
            if engine.world_size > 1:
                raise
            # Any other one is for the run to meet, which says what there is to say.
        finally:
            note_tried(trial.engine)
        if not has_ended:
            raise Stopped(trial._stops.reason)
        if not engine.agree(is_full):
            return size
        if size == 1:
            raise LaunchError(
                f'`batch_size` is "auto", and no part of the batch of {largest} fits '
                "into memory; take a smaller network or samples, or share it by FSDP"
            )
        if engine.is_main:
            get_root_logger().warning("batches of %d do not fit into memory", size)
        raise RuntimeError("A rank is out of memory.")  # as Accelerate expects it

    sizes = iter([n for n in range(largest, 0, -1) if largest % n == 0][1:])
    find = find_executable_batch_size(attempt, largest, lambda: next(sizes))
    parts = largest // int(find())
    accumulation = (trainer.accumulation_steps or 1) * parts
    if engine.is_main:
        get_root_logger().warning(
            "batches of %d fit, with `accumulation_steps` of %d",
            *(largest // parts, accumulation),
        )
    return parts


def _saved_on_main(trainer: Trainer, model: Model, engine: Engine) -> int | None:
    """The parts of a run that is to go on: one host may have its checkpoints alone."""
    saved: int | HeliosError | None = None
    if engine.is_main:
        try:
            saved = _saved(trainer, model)
        except HeliosError as error:  # for all ranks
            saved = error
    saved = engine.broadcast(saved)
    if isinstance(saved, HeliosError):
        raise saved
    return saved


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
