"""Signals that ask a run to save itself, and to end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_POLITE = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextlib.contextmanager
def stop_on_signals(
    request_stop: Callable[[str], None], request_save: Callable[[], None] | None = None
) -> Iterator[None]:
    """Turn signals into requests.

    SIGTERM, SIGINT and SIGUSR1 ask for a stop, and a second SIGINT ends at once;
    SIGUSR2 asks for a checkpoint.
    """
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

    def handle_save(number: int, frame: FrameType | None) -> None:
        if request_save is not None:
            request_save()

    before = {number: signal.signal(number, handle) for number in _POLITE}
    before[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, handle_save)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
