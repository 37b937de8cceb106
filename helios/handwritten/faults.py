"""What is done about the faults of a loop that its user has written."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import TypeVar

from helios.callbacks.base import Callback, overridden
from helios.failures.bundle import Wish, write_bundle
from helios.failures.ending import advise, native_crashes, place_of, refuse_success
from helios.failures.replay import Replayed, tell_unreplayed
from helios.handwritten.stopped import RunStopped
from helios.session import Session

#: Going back would be the loop's business, which goes on behind its batch.
POLICIES = ("warn", "stop", "skip", None)
_TOLD = "_helios_has_told"  # of an exception
T = TypeVar("T")


@contextlib.contextmanager
def failures_told(session: Session, wish: Wish) -> Iterator[Callable[..., None]]:
    """Have the exception that ends the program told, and its step kept.

    Gives what does so, for an exception that somebody has at hand. Each is told once.
    """
    is_open = True

    def tell(error: BaseException) -> None:
        if hasattr(error, _TOLD):
            return
        setattr(error, _TOLD, True)
        session.stops.fail()
        session.tell_unread(error)
        advise(error, session)
        what = f"rank {session.engine.rank} failed {place_of(session)}"
        session.logger.critical("%s", what, exc_info=error)
        hooks = overridden(session.callbacks, Callback.on_exception)
        actions: list[Callable[..., None]] = [partial(write_bundle, wish), *hooks]
        for action in actions:
            try:
                action(session, error)
            except Exception as other:  # the first failure is the one to be raised
                other.__context__ = None
                session.logger.critical("%s, while it ended", what, exc_info=other)

    def hook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if is_open and not isinstance(error, SystemExit):
            tell(error)
        before(kind, error, trace)

    before, sys.excepthook = sys.excepthook, hook
    try:
        with native_crashes():
            yield tell
    finally:
        tell_unreplayed(session.callbacks)
        is_open = False  # another session's may lie on top
        if sys.excepthook is hook:
            sys.excepthook = before


def passed_on(given: Iterator[T], tell: Callable[..., None]) -> Iterator[T]:
    """Give a loop what is for it; an exit from there with status 0 is a failure.

    One that the loop itself asks for does not come by here: it is the loop's business.
    """
    try:
        yield from given
    except SystemExit as error:
        if not isinstance(error, RunStopped | Replayed) and refuse_success(error):
            tell(error)
        raise
