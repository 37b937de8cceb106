"""What is due at a time, and signals that come at one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

_SAME_S = 0.25  # one Ctrl-C may come twice: from the terminal, and passed on


class Alarms:
    """Times at which something is due, each once; ``clock`` is in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends_s: dict[str, float] = {}

    def arm(self, name: str, seconds: float | None) -> None:
        """Have ``name`` due in so many seconds; None: never."""
        if seconds is not None:
            self._ends_s[name] = self._clock() + seconds

    def left_s(self) -> float | None:
        """Seconds until the next one; None: there is none."""
        ends_s = [*self._ends_s.values()]
        return max(0.0, min(ends_s) - self._clock()) if ends_s else None

    def disarm(self, name: str) -> None:
        """Have it not due any more, if it was to be."""
        self._ends_s.pop(name, None)

    def due(self) -> list[str]:
        """Those that are due, and were not said to be so before."""
        now_s = self._clock()
        due = [name for name, end_s in [*self._ends_s.items()] if end_s <= now_s]
        for name in due:
            del self._ends_s[name]
        return due


class Interrupts:
    """Counts SIGINTs: those of one moment are one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first_s: float | None = None
        self._is_torchs = "TORCHELASTIC_RUN_ID" in os.environ

    def is_second(self, number: int) -> bool:
        """Note a signal; whether it interrupts once more."""
        # When torch's launcher is interrupted twice, it passes this on the second time.
        is_torchs = self._is_torchs and number == signal.SIGTERM
        if number != signal.SIGINT and not (is_torchs and self._first_s is not None):
            return False
        now_s = self._clock()
        if self._first_s is None:
            self._first_s = now_s
        return now_s - self._first_s >= _SAME_S
