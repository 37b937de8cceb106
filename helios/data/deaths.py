"""Deaths of loaders' workers: told to the fetch that they concern, not to a step."""

from __future__ import annotations

import signal
import threading
import types
from collections.abc import Callable
from multiprocessing import popen_fork, popen_forkserver
from typing import Any

from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from helios.data import fetching

# Where an exception would be lost, or what the system has just told of a child.
_LOSING = {
    fetching.kill_workers.__code__,
    _MultiProcessingDataLoaderIter.__del__.__code__,
    popen_fork.Popen.poll.__code__,
    popen_forkserver.Popen.poll.__code__,
}


def _loses(frame: types.FrameType | None) -> bool:
    """Whether a signal's handler must not raise where the signal has come."""
    while frame is not None and frame.f_code not in _LOSING:
        frame = frame.f_back
    return frame is not None


class _Deaths:
    """Keeps torch's report of a dead worker for the next fetch.

    Its handler of SIGCHLD raises wherever the main thread is: in the middle of a step,
    whose state could not be saved then.
    """

    def __init__(self) -> None:
        self._report: Callable[..., Any] | None = None
        self._is_fetching = self._is_pending = False

    def watch(self) -> None:
        """Take the place of the handler that torch installs with its first worker."""
        if threading.current_thread() is not threading.main_thread():
            return
        handler: Any = signal.getsignal(signal.SIGCHLD)
        # A user's is left alone: it may pass the signal on to this one.
        if getattr(handler, "__module__", None) == signal_handling.__name__:
            self._report = handler
            signal.signal(signal.SIGCHLD, self._on_child)

    def _on_child(self, number: int, frame: Any) -> None:
        if self._is_fetching and self._report is not None and not _loses(frame):
            self._report(number, frame)
        else:
            self._is_pending = True

    def __enter__(self) -> None:
        if self._is_pending and self._report is not None:
            self._is_pending = False
            self._report(signal.SIGCHLD, None)
        self._is_fetching = True

    def __exit__(self, *_: object) -> None:
        self._is_fetching = False


deaths = _Deaths()
