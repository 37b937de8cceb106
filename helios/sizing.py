"""A batch size that fits into memory: found by trying, before a run begins."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.nn.parallel import DistributedDataParallel

from helios.checkpoint import CheckpointStore
from helios.checkpoint.records import read_record
from helios.data.datamodule import DataModule
from helios.engine import find_executable_batch_size
from helios.errors import LaunchError
from helios.failures.ending import is_out_of_memory
from helios.loggers.text import get_root_logger, text_logging
from helios.model.model import Model
from helios.state import TrainingState

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
    """Into how many parts to cut each batch of the DataModule; every rank must call.

    The accumulation steps are to be as many times more, so that the global batch
    stays. A run that goes on has as many as its checkpoint says.

    Raises:
        LaunchError: there is no such size, or a step cannot be tried by each rank.
    """
    if trainer.batch_size != AUTO:
        return trainer._parts
    with text_logging(None), contextlib.ExitStack() as stack:
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.INFO)  # what a trial has to say
        return _find(trainer, model, datamodule)


def _find(trainer: Trainer, model: Model, datamodule: DataModule) -> int:
    trial = dataclasses.replace(trainer, **_TRIAL)
    with trial._running(model, datamodule, ()) as engine:
        # One host may have the checkpoints alone.
        if saved := engine.broadcast(_saved(trainer, model)):
            return int(saved)
        if engine.is_sharded:
            raise LaunchError(
                '`batch_size` is "auto", and the ranks share the network out by FSDP: '
                "they compute together, so that one would wait for another that is out "
                "of memory; give the size to the DataModule"
            )
        trial._set_up_data(engine, datamodule)
        largest = math.gcd(*(p.params.batch_size for p in datamodule._phases()))

    def attempt(size: int) -> int:
        trial._parts = largest // size
        try:
            with _each_by_itself(model) as is_full:
                trial.fit(model, datamodule)
        except Exception as error:
            if engine.world_size > 1:  # the others wait for this rank
                raise
            # Any other one is for the run to meet, which says what there is to say.
            is_full = [is_out_of_memory(error)]
        if not engine.agree(any(is_full)):
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


@contextlib.contextmanager
def _each_by_itself(model: Model) -> Iterator[list[bool]]:
    """Have no step wait for another rank's; gives what tells of one out of memory.

    The gradients stay each rank's own, and a rank that is out of memory comes along
    without a step, to where all of them meet.
    """
    is_full, train_step = list[bool](), model.train_step

    def step(batch: Any, state: TrainingState) -> None:
        for net in model.engine._networks:
            if isinstance(net, DistributedDataParallel):
                net.require_backward_grad_sync = False
                net.require_forward_param_sync = False
        try:
            if not is_full:
                train_step(batch, state)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            is_full.append(True)
        # What is logged is averaged over ranks that all have it.
        assert model._session is not None, "the trial runs"
        journal = model._session.journal
        for kept in (model._loss_items, journal.latest, journal.reductions):
            kept.clear()

    vars(model)["train_step"] = step
    try:
        yield is_full
    finally:
        del vars(model)["train_step"]


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
