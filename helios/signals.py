"""Polite stops: signals that ask a run to save itself and end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_POLITE = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextlib.contextmanager
def stop_on_signals(request_stop: Callable[[str], None]) -> Iterator[None]:
    """Turn SIGTERM, SIGINT and SIGUSR1 into a request; a second SIGINT ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can set handlers
        return
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if number == signal.SIGINT and asked:
            raise KeyboardInterrupt
        asked = asked or number == signal.SIGINT
        request_stop(f"received {signal.Signals(number).name}")

    before = {number: signal.signal(number, handle) for number in _POLITE}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
