"""What a process says before it is ended, whatever its log's disk is doing."""

from __future__ import annotations

import threading
from collections.abc import Callable

from helios.loggers.text import get_root_logger


def last_words(say: Callable[[], object], limit_s: float = 2.0) -> None:
    """Have something said and the log written out; go on after so long in any case.

    What hangs may be the disk of the log; its lock then belongs to who waits for it.
    """

    def tell() -> None:
        say()
        for handler in get_root_logger().handlers:
            handler.flush()

    thread = threading.Thread(target=tell, daemon=True, name="last words")
    thread.start()
    thread.join(limit_s)
