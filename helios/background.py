"""Writing behind the training: a copy in host memory, and one thread."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

import torch
from torch import Tensor

from helios.errors import CheckpointError

Files: TypeAlias = dict[str, dict[str, Tensor]]


class BackgroundWriter:
    """Runs at most one job at a time, on a thread that stays: to start one takes time.

    The interpreter does not end in the middle of a job.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "helios-writer")
        self._job: Future[None] | None = None
        self._worker: threading.Thread | None = None  # while a job runs
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
        devices = {t.device for tensors in files.values() for t in tensors.values()}
        # A copy made in inference mode would carry its restrictions along.
        with torch.inference_mode(False), torch.no_grad():
            for file, tensors in files.items():
                for name, live in tensors.items():
                    buffer = old.pop((file, name), None)
                    traits = live.shape, live.dtype
                    if buffer is None or (buffer.shape, buffer.dtype) != traits:
                        buffer = torch.empty(
                            live.shape, dtype=live.dtype, pin_memory=live.is_cuda
                        )
                    self._buffers[file, name] = buffer.copy_(
                        live, non_blocking=live.is_cuda
                    )
            for device in devices:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
        return {
            file: {n: self._buffers[file, n] for n in files[file]} for file in files
        }

    def submit(self, job: Callable[[], None]) -> None:
        """Run ``job`` in the background, once the one in flight is done."""
        self.wait()
        try:
            self._job = self._thread.submit(self._run, job)
        except RuntimeError:  # the main thread has ended: no other begins any more
            self._run(job)

    @property
    def is_busy(self) -> bool:
        """Whether a job is in flight."""
        return self._job is not None and not self._job.done()

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
        """Wait for the job in flight; :meth:`check` tells how it went.

        Raises:
            RuntimeError: it is that job which calls.
        """
        if self._worker is threading.current_thread():
            raise RuntimeError(
                "the writer of checkpoints cannot wait for itself: "
                "`on_checkpoint_saved` is called by it"
            )
        if self._job is not None:
            self._job.result()
            self._job = None

    def close(self) -> None:
        """Wait for the job in flight, and end the thread: no other can follow."""
        self.wait()
        self._thread.shutdown()

    def _run(self, job: Callable[[], None]) -> None:
        self._worker = threading.current_thread()
        try:
            job()
        except BaseException as error:  # nothing may end the thread unnoticed
            self._error = self._error or error
        finally:
            self._worker = None
