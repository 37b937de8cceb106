"""Deaths of loaders' workers: told to the fetch that they concern, not to a step."""

from __future__ import annotations

import contextlib
import inspect
import signal
import threading
import types
from multiprocessing import popen_fork, popen_forkserver
from typing import Any

from torch.utils.data._utils import signal_handling

# Where an exception is lost, and where it takes along what the system told of a child.
_LOSING_NAMES = ("__del__", "kill_workers")
_LOSING_CODE = (popen_fork.Popen.poll.__code__, popen_forkserver.Popen.poll.__code__)


def kill_workers(workers: list[Any]) -> None:
    """Kill a loader's workers, for whose end an exit of Python would wait for ever."""
    for worker in workers:
        with contextlib.suppress(RuntimeError):  # torch's handler of SIGCHLD, if any
            worker.kill()
            worker.join()


def _loses(frame: types.FrameType | None) -> bool:
    """Whether a signal's handler must not raise where the signal has come."""
    while frame is not None:
        code = frame.f_code
        if code.co_name in _LOSING_NAMES or code in _LOSING_CODE:
            return True
        frame = frame.f_back
    return False


def _check_workers() -> None:
    """Raise torch's RuntimeError for a worker that has died, once."""
    signal_handling._error_if_any_worker_fails()  # type: ignore[attr-defined]


class _Deaths:
    """Keeps torch's report of a dead worker for the next fetch.

    Its handler of SIGCHLD raises wherever the main thread is: in the middle of a step,
    whose state could not be saved then.
    """

    def __init__(self) -> None:
        self._users: Any = None
        self._is_fetching = self._is_pending = False

    def watch(self) -> None:
        """Take the place of torch's handler."""
        if threading.current_thread() is not threading.main_thread():
            return
        # One that a user has set since is left alone: it may pass the signal on.
        handler: Any = signal.getsignal(signal.SIGCHLD)
        if getattr(handler, "__module__", None) == signal_handling.__name__:
            # Of before the first worker: torch's handler would call it.
            self._users = inspect.getclosurevars(handler).nonlocals.get(
                "previous_handler"
            )
            signal.signal(signal.SIGCHLD, self._on_child)

    def _on_child(self, number: int, frame: Any) -> None:
        if callable(self._users):
            self._users(number, frame)
        if self._is_fetching and not _loses(frame):
            _check_workers()
        else:
            self._is_pending = True

    def __enter__(self) -> None:
        if self._is_pending:
            self._is_pending = False
            _check_workers()
        self._is_fetching = True

    def end(self, iterator_id: int, workers: list[Any]) -> None:
        """Kill the workers of an iterator; nobody is told of their deaths."""
        with contextlib.suppress(ValueError):  # torch has forgotten them already
            signal_handling._remove_worker_pids(iterator_id)  # type: ignore[attr-defined]
            # For torch, which will want to do the same.
            signal_handling._set_worker_pids(iterator_id, ())  # type: ignore[attr-defined]
        kill_workers(workers)

    def __exit__(self, *_: object) -> None:
        self._is_fetching = False


deaths = _Deaths()
