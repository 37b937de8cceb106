"""Loaders' workers: their deaths are told to the fetch that waits for them."""

from __future__ import annotations

import contextlib
import gc
import inspect
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import _utils, dataloader
from torch.utils.data._utils import signal_handling

_CHECK_INTERVAL_S = 0.25
_waiting: list[WorkersIterator] = []  # at this moment, for their workers


class WorkersIterator(dataloader._MultiProcessingDataLoaderIter):
    """Torch's iterator, which looks more often for dead workers while it waits.

    Torch leaves that to a handler of SIGCHLD, which raises wherever the main thread is:
    in the middle of a step, whose state could not be saved then, or where an open file
    or a child's status is lost with it. That handler is taken away.
    """

    #: Says what is to come next; None while the workers have not been asked for it.
    expected: Callable[[], str] | None = None

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        _silence_handler()
        self.expected = None
        super()._reset(loader, first_iter)

    def _try_get_data(
        self, timeout: float = _utils.MP_STATUS_CHECK_INTERVAL
    ) -> tuple[bool, Any]:
        end = time.monotonic() + timeout
        _waiting.append(self)
        try:
            while True:
                left = end - time.monotonic()
                wait = max(0.0, min(_CHECK_INTERVAL_S, left))
                is_found, data = super()._try_get_data(wait)  # type: ignore[no-untyped-call]
                if is_found or left <= _CHECK_INTERVAL_S:
                    return is_found, data
        finally:
            _waiting.remove(self)


def awaited() -> str:
    """Which loader's worker this process waits for, and for what; else nothing.

    Any thread may ask.
    """
    return " and ".join(
        f"worker {iterator._rcvd_idx % iterator._num_workers} of the loader: {tell()}"
        if (tell := iterator.expected)
        else "the workers of the loader"
        for iterator in tuple(_waiting)
    )


@contextlib.contextmanager
def forking(ignored: Iterable[signal.Signals]) -> Iterator[None]:
    """Hold back what workers ignore, and must not do, before their first line."""
    before, collects = signal.pthread_sigmask(signal.SIG_BLOCK, ignored), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _silence_handler() -> None:
    """Put the handler that there was before torch's in its place."""
    if threading.current_thread() is not threading.main_thread():
        return
    # One that a user has set since is left alone: it may pass the signal on.
    handler: Any = signal.getsignal(signal.SIGCHLD)
    if getattr(handler, "__module__", None) == signal_handling.__name__:
        users = inspect.getclosurevars(handler).nonlocals.get("previous_handler")
        signal.signal(signal.SIGCHLD, users if callable(users) else signal.SIG_DFL)


def end_workers(iterator_id: int, workers: list[Any]) -> None:
    """Kill an iterator's workers, for whose end an exit of Python would wait for ever.

    Torch forgets them before, so that its handler, if a user has kept it, has no death
    to tell.
    """
    with contextlib.suppress(ValueError):  # torch has forgotten them already
        signal_handling._remove_worker_pids(iterator_id)  # type: ignore[attr-defined]
        # For torch, which will want to do the same.
        signal_handling._set_worker_pids(iterator_id, ())  # type: ignore[attr-defined]
    for worker in workers:
        with contextlib.suppress(RuntimeError):  # of that handler, for another's death
            worker.kill()
            worker.join()
