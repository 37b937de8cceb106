"""The end of a run, in any case: what failed is told, and everything is closed."""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from helios.callbacks.base import Callback, overridden
from helios.data.fetching import shape_of
from helios.engine import Engine
from helios.failures.bundle import Wish, write_bundle
from helios.failures.replay import refuse_end
from helios.health.numbers import samples_of
from helios.loggers.tensorboard import open_writer
from helios.loggers.text import get_root_logger
from helios.session import Session

if TYPE_CHECKING:
    from helios.trainer import Trainer

_OOM_ADVICE = (
    "to need less memory: a smaller `batch_size`, with as many more "
    "`accumulation_steps` that the global batch stays, which the Trainer's "
    '`batch_size="auto"` finds by itself; `mixed_precision="bf16"`; activation '
    "checkpointing; FSDP; fewer programs on the device"
)


@contextlib.contextmanager
def ending(trainer: Trainer, engine: Engine, silent: Sequence[Any]) -> Iterator[None]:
    """End a run: log what it raises, but for the types of `silent`, and close all.

    The first failure is raised; those that come after it, in the end itself, are
    logged. Each thing is closed whatever happens to the others.
    """
    failures = list[BaseException]()

    def note(error: BaseException) -> None:
        failures.append(error)
        if error.__context__ is failures[0]:  # has been told
            error.__context__ = None
        if isinstance(error, tuple(silent)):
            return
        refuse_success(error)
        is_first = len(failures) == 1
        what = f"rank {engine.rank} failed {place_of(trainer._session)}"
        get_root_logger().critical(
            "%s", what if is_first else f"{what}, while it ended", exc_info=error
        )

    def attempt(action: Callable[..., Any], *args: Any) -> None:
        try:
            action(*args)
        except BaseException as error:  # also an impatient interrupt
            note(error)

    raised: BaseException | None = None
    try:
        with native_crashes():
            yield
            refuse_end(trainer._hooks, "training was stopped")
    except BaseException as error:
        raised = error
    model, datamodule = trainer.model, trainer.datamodule
    session = trainer._session
    if raised is not None:
        if session is not None:
            session.tell_unread(raised)
        advise(raised, session)
        note(raised)
        if session is not None and not isinstance(raised, tuple(silent)):
            folder = trainer.log_root or trainer.log_path or trainer.chkpt_root
            name, parts = trainer.run_name, trainer._parts
            wish = Wish(trainer.crash_bundle, folder, name, parts)
            attempt(write_bundle, wish, session, raised)
    attempt(datamodule._end)
    attempt(datamodule.teardown)
    if failures and session is not None:
        for hook in overridden(trainer._hooks, Callback.on_exception):
            attempt(hook, session, failures[0])
    attempt(trainer._bar.close)
    if session is not None:
        attempt(session.close)
    trainer._session = model._session = None
    trainer._stops.request_save = lambda: None  # which has held the session
    attempt(open_writer, None)
    if failures:
        first, raised = failures[0], None
        failures.clear()  # no frame is to keep what the traceback's frames hold
        raise first


def refuse_success(error: BaseException) -> bool:
    """Whether it is an exit with status 0; it gets 1, as the run is not finished."""
    if not isinstance(error, SystemExit) or error.code not in (None, 0):
        return False
    error.code = 1
    error.add_note("Helios: the run is not finished, so the exit status is 1, not 0")
    return True


def place_of(session: Session | None) -> str:
    """Where in a run this rank is, in words."""
    if session is None:
        return "before training"
    state, loaded = session.state, session.engine.loaded
    after = f"after step {state.current_iteration} (epoch {state.global_epoch})"
    if loaded is None:
        return after
    samples = samples_of(loaded.indices)
    if session.journal.keeps == "means":
        return f"in an evaluation {after}: in its batch {loaded.number}, {samples}"
    if loaded.number < state.dataset_iter:
        return f"{after}; its last batch was {loaded.number}, {samples}"
    step = state.current_iteration + 1
    at = f"step {step} (epoch {state.global_epoch}, batch {loaded.number})"
    return f"in {at}, {samples}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory, or the host's, was too small."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    texts = ("can't allocate memory", "CUDNN_STATUS_ALLOC_FAILED", "out of memory")
    return isinstance(error, RuntimeError) and any(t in str(error) for t in texts)


def advise(error: BaseException, session: Session | None) -> None:
    """Add to an error of too little memory what was in work, and what to try."""
    if is_out_of_memory(error):
        loaded = None if session is None else session.engine.loaded
        what = "" if loaded is None else shape_of(loaded.data)
        what = what and f"the batch has the shapes {what}; "
        error.add_note(f"Helios: {what}{_OOM_ADVICE}")


@contextlib.contextmanager
def native_crashes() -> Iterator[None]:
    """Have a crash in native code show all stacks, unless that is set up already."""
    is_ours = False
    if not faulthandler.is_enabled():
        # Without a standard error that is a file, as in a notebook, it stays off.
        with contextlib.suppress(ValueError, OSError, RuntimeError, AttributeError):
            faulthandler.enable()
            is_ours = True
    try:
        yield
    finally:
        if is_ours:
            faulthandler.disable()
