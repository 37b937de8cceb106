"""Writing behind the training: copies into reused host memory, and one thread."""

import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from helios.errors import CheckpointError

__all__ = ["BackgroundWriter"]


class BackgroundWriter:
    """Runs at most one job at a time on a thread of its own.

    The thread is not a daemon, and lives as long as its job: there is none before the
    first `submit`, and the interpreter does not end in the middle of one.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def snapshot(
        self, tensors: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, dict[str, Tensor]]:
        """Copies live tensors, by file and name, into buffers on the host.

        Waits for the job in flight first, since that reads the same buffers. They are
        kept from call to call (fresh memory costs as much as writing to a disk), and
        pinned where a tensor comes from CUDA. After the call the live ones may change.
        """
        self.wait()
        old, self._buffers = self._buffers, {}
        cuda = set()
        # Buffers made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            for file, named in tensors.items():
                for name, source in named.items():
                    buffer = old.pop((file, name), None)
                    if (
                        buffer is None
                        or buffer.shape != source.shape
                        or buffer.dtype != source.dtype
                    ):
                        buffer = torch.empty(
                            source.shape,
                            dtype=source.dtype,
                            device="cpu",
                            pin_memory=source.is_cuda,
                        )
                    buffer.copy_(source, non_blocking=source.is_cuda)
                    self._buffers[file, name] = buffer
                    if source.is_cuda:
                        cuda.add(source.device)
        for device in cuda:
            torch.cuda.synchronize(device)
        return {
            file: {name: self._buffers[file, name] for name in named}
            for file, named in tensors.items()
        }

    def submit(self, job: Callable[[], None]) -> None:
        """Runs `job` in the background, once the one in flight is done."""
        self.wait()
        self._thread = threading.Thread(
            target=self._run, args=(job,), name="helios-checkpoint-writer", daemon=False
        )
        self._thread.start()

    def check(self) -> None:
        """Raises, once, the error of a job that failed since the last call.

        Raises:
            CheckpointError: caused by it. Of several, the first.
        """
        error, self._error = self._error, None
        if error is not None:
            raise CheckpointError(
                f"a checkpoint could not be written: {type(error).__name__}: {error}"
            ) from error

    def wait(self) -> None:
        """Waits for the job in flight. Raises nothing: call `check`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Waits, ends the thread, and gives the buffers back. Then call `check`."""
        self.wait()
        self._buffers = {}

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # nothing may end the thread unnoticed
            if self._error is None:
                self._error = error
