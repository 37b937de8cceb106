"""What is done about the faults of a loop that its user has written."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import TracebackType

from helios.callbacks.base import Callback, overridden
from helios.failures.bundle import Wish, write_bundle
from helios.failures.ending import advise, native_crashes, place_of
from helios.session import Session

#: Going back would be the loop's business, which goes on behind its batch.
POLICIES = ("warn", "stop", "skip", None)


@contextlib.contextmanager
def failures_told(session: Session, wish: Wish) -> Iterator[Callable[..., None]]:
    """Have the exception that ends the program told, and its step kept.

    Gives what does so, for an exception that somebody has at hand. Each is told once.
    """
    told: BaseException | None = None

    def tell(error: BaseException) -> None:
        nonlocal told
        if error is told or isinstance(error, SystemExit):
            return
        told = error
        advise(error, session)
        what = f"rank {session.engine.rank} failed {place_of(session)}"
        session.logger.critical("%s", what, exc_info=error)
        write_bundle(wish, session, error)
        for hook in overridden(session.callbacks, Callback.on_exception):
            hook(session, error)

    def hook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        tell(error)
        before(kind, error, trace)

    before, sys.excepthook = sys.excepthook, hook
    try:
        with native_crashes():
            yield tell
    finally:
        if sys.excepthook is hook:
            sys.excepthook = before
