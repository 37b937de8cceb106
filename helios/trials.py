"""Steps that are tried before a run, by each rank for itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from helios.engine import Engine
from helios.errors import ModelError
from helios.failures.ending import is_out_of_memory
from helios.model.model import Model
from helios.state import TrainingState

_TRIED: WeakSet[nn.Module] = WeakSet()  # networks that trials have trained


def check_anew(networks: Iterable[nn.Module]) -> None:
    """Raise a ModelError if one of them is not new: a trial has trained it."""
    if any(_inner(net) in _TRIED for net in networks):
        raise ModelError(
            '`batch_size` is "auto", and a network was made before `setup`, so that '
            "the trials have trained it; make it in `setup`"
        )


def note_tried(engine: Engine | None) -> None:
    """Note the networks of a trial, for :func:`check_anew`."""
    if engine is not None:
        _TRIED.update(map(_inner, engine._networks))


def _inner(net: nn.Module) -> nn.Module:
    return net.module if isinstance(net, DistributedDataParallel) else net


@contextlib.contextmanager
def each_by_itself(model: Model) -> Iterator[list[bool]]:
    """Have no step wait for another rank's; gives what tells of one out of memory.

    The gradients stay each rank's own, and a rank that is out of memory comes along
    without a step, to where all of them meet. What is called after a step, or logged
    there, is left out: it may need what only a step leaves.
    """
    is_full, train_step, before = list[bool](), model.train_step, dict(vars(model))

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
        assert model._session is not None, "the trial runs"
        journal = model._session.journal
        for kept in (journal.latest, journal.reductions):
            kept.clear()

    changes = {"train_step": step, "on_training_batch_end": lambda *_, **__: None}
    vars(model).update(changes)
    try:
        yield is_full
    finally:
        for name in changes:
            vars(model).pop(name)
            if name in before:
                vars(model)[name] = before[name]
