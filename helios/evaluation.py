"""The loop of evaluations: validations and tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from helios.callbacks.base import Callback, overridden
from helios.data.batches import Loaded
from helios.data.feed import Feed
from helios.data.loader import ResumableDataLoader
from helios.engine import Engine
from helios.errors import DataError
from helios.model.model import BatchPhase, Model
from helios.session import Session
from helios.stopping.validation import Votes, is_interrupted


def batch_preparer(model: Model, phase: BatchPhase) -> Callable[[Any], Any]:
    """What the model makes of a batch that is on the device."""
    if type(model).batch_to_device is Model.batch_to_device:
        return lambda batch: batch
    return lambda batch: model.batch_to_device(batch, phase)


def may_differ(engine: Engine, loader: ResumableDataLoader, feed: Feed) -> bool:
    """Whether the ranks may have different numbers of batches; every rank must call."""
    if engine.world_size == 1:
        return False
    if (count := loader.batches_per_epoch) is not None:
        # They differ where a user's sampler is that of one rank.
        return len(set(engine.gather_objects(count))) > 1
    feed.peek()  # which shows how the data set is shared out
    return engine.agree(loader.plan.is_sharded)


def to_the_end_of_all(
    engine: Engine, loader: ResumableDataLoader, feed: Feed
) -> Iterator[Loaded]:
    """The batches of an evaluation; all ranks have as many.

    A rank that is at its end repeats its last batch, with none of its rows real.
    """
    differs = may_differ(engine, loader, feed)
    if differs and engine.agree(not feed.peek()):
        feed.check()
        raise DataError(
            "a rank has no samples to evaluate: the data set has fewer shards, or "
            "samples, than there are ranks"
        )
    last = None
    while True:
        has_more = feed.peek()
        feed.check()
        if has_more:
            last = feed.take()
        elif last is not None:
            last = last._replace(real=0, is_full=False)
        if not (engine.agree(has_more) if differs else has_more):
            return
        assert last is not None
        yield last


def evaluate(
    session: Session, model: Model, loader: Any, phase: BatchPhase, cycle: int = 0
) -> bool:
    """Run a validation, or a test, without gradients; every rank must call.

    A stop that is asked for ends it (False), unless hooks have changed the weights that
    are to be saved: then it waits for the end.
    """
    is_test, callbacks = phase is BatchPhase.TEST, session.callbacks
    if is_test:
        start, end = model.on_testing_start, model.on_testing_end
        before, step = model.on_testing_batch_start, model.test_step
        after, callbacks = model.on_testing_batch_end, []
    else:
        start = partial(model.on_validation_start, cycle)
        before, step = model.on_validation_batch_start, model.valid_step
        after = model.on_validation_batch_end
        end = partial(model.on_validation_end, cycle)
    engine, prepare, number = session.engine, batch_preparer(model, phase), -1
    hooks = overridden(callbacks, Callback.on_validation_batch_end)
    session.journal.keep(None)
    engine.loaded = None
    model.eval()
    start()
    for hook in overridden(callbacks, Callback.on_validation_start):
        hook(session)
    loader.seek(cycle)
    votes = Votes(engine.agree_each)
    session.journal.keep("means")
    with torch.no_grad():
        feed = Feed(loader, engine.place)
        for number, loaded in enumerate(to_the_end_of_all(engine, loader, feed)):
            engine.loaded = loaded
            before(number)
            step(prepare(loaded.data), number)
            after(number)
            for hook in hooks:
                hook(session, number)
            session.beats += 1
            if is_interrupted(session, votes):
                return False
    engine.loaded = None
    if number < 0:
        raise DataError(f"the {phase.value} loader yielded nothing; lower `batch_size`")
    session.journal.flush()
    session.journal.keep(None)
    end()
    if not is_test:
        session.state.validation_cycles += 1
        session.state.running_iter = 0
    for hook in overridden(callbacks, Callback.on_validation_end):
        hook(session)
    return True
