"""Writing behind the training: a copy in host memory, and one thread."""

import contextlib
import threading
from bisect import bisect
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeAlias

import torch
from torch import Tensor

from helios.errors import CheckpointError

_SHARED_BYTES = 1 << 24  # below, a thread takes longer to start than to copy
Files: TypeAlias = dict[str, dict[str, Tensor]]


class BackgroundWriter:
    """Runs at most one job at a time, on a thread that lives as long as its job.

    It is no daemon: the interpreter does not end in the middle of one.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def prepare(self, files: Files) -> None:
        """Make the buffers for such tensors, in the background.

        The first copy would wait for new memory otherwise, for longer than it takes.
        """
        traits = {
            (file, name): (live.shape, live.dtype, live.is_cuda)
            for file, tensors in files.items()
            for name, live in tensors.items()
        }

        def make() -> None:
            for place, (shape, dtype, is_pinned) in traits.items():
                buffer = torch.empty(shape, dtype=dtype, pin_memory=is_pinned)
                self._buffers[place] = buffer.zero_()

        self.submit(make)

    def snapshot(self, files: Files) -> Files:
        """Copy live tensors, by file and name, to the host, once no job is in flight.

        The buffers of the last copy are used again, so that there is one copy of the
        state at most. Those of tensors on a GPU are pinned.
        """
        self.wait()
        old, self._buffers = self._buffers, {}
        pairs = list[tuple[Tensor, Tensor]]()
        # A copy made in inference mode would carry its restrictions along.
        with torch.inference_mode(False):
            for file, tensors in files.items():
                for name, live in tensors.items():
                    buffer = old.pop((file, name), None)
                    traits = live.shape, live.dtype
                    if buffer is None or (buffer.shape, buffer.dtype) != traits:
                        buffer = torch.empty(
                            live.shape, dtype=live.dtype, pin_memory=live.is_cuda
                        )
                    self._buffers[file, name] = buffer
                    pairs.append((buffer, live))
        _copy_all(pairs)
        return {
            file: {n: self._buffers[file, n] for n in files[file]} for file in files
        }

    def submit(self, job: Callable[[], None]) -> None:
        """Run ``job`` in the background, once the one in flight is done."""
        self.wait()
        self._thread = threading.Thread(
            target=self._run, args=(job,), name="checkpoint writer"
        )
        try:
            self._thread.start()
        except RuntimeError:  # the interpreter is ending, and starts none any more
            self._thread = None
            self._run(job)

    @property
    def is_busy(self) -> bool:
        """Whether a job is in flight."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether :meth:`check` would raise."""
        return self._error is not None

    def check(self) -> None:
        """Raise, once, a CheckpointError for a job that failed since the last call."""
        error, self._error = self._error, None
        if error is not None:
            raise CheckpointError(f"{type(error).__name__}: {error}") from error

    def wait(self) -> None:
        """Wait for the job in flight; :meth:`check` tells how it went."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # nothing may end the thread unnoticed
            self._error = self._error or error


def _copy_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy to each first tensor the second one, with the help of another thread.

    One alone does not take all that memory has to give. Where torch has several
    threads, it is they that copy.
    """
    sizes = list(accumulate(live.nbytes for _, live in pairs))
    half, failed = len(pairs), list[BaseException]()
    helper = None
    if pairs and sizes[-1] >= _SHARED_BYTES and torch.get_num_threads() == 1:
        with contextlib.suppress(RuntimeError):  # as in `submit`
            at = bisect(sizes, sizes[-1] // 2)
            thread = threading.Thread(target=_copy, args=(pairs[at:], failed))
            thread.start()
            half, helper = at, thread
    _copy(pairs[:half], failed)
    if helper is not None:
        helper.join()
    for error in failed:
        raise error
    for device in {live.device for _, live in pairs}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _copy(pairs: Sequence[tuple[Tensor, Tensor]], failed: list[BaseException]) -> None:
    try:
        with torch.inference_mode(False), torch.no_grad():
            for buffer, live in pairs:
                buffer.copy_(live, non_blocking=live.is_cuda)
    except BaseException as error:  # for who waits
        failed.append(error)
