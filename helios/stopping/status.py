"""The end of a process: its status, which a scheduler goes by, and its length."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import os

from helios.stopping.ranks import STOPPED, starter_folder

#: A run that was stopped, and goes on when it is started again: EX_TEMPFAIL of
#: sysexits.h. 0: it has come to its end. Any other one: it has failed.
EXIT_STOPPED = 75
#: A second SIGINT has ended it, as a shell would say.
EXIT_INTERRUPTED = 130

_is_to_end_soon = False


def exit_status() -> int:
    """The status with which a process ends whose run was stopped.

    A launcher takes a rank's for a failure, and may start it anew. A starter of our own
    is told in another way, and ends with `EXIT_STOPPED` itself.
    """
    if (folder := starter_folder()) is not None:
        (folder / STOPPED).touch()
        return 0
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    return EXIT_STOPPED if restarts == "0" else 0


def end_soon() -> None:
    """Have this process, once it ends, not look for garbage: for one that only waits.

    All that torch consists of makes that a second.
    """
    global _is_to_end_soon
    _is_to_end_soon = True


@atexit.register  # as Helios is imported: after what the program registers
def _freeze() -> None:
    if _is_to_end_soon:
        for each in gc.get_objects():
            # Files that nobody has closed, and only garbage holds, come to it here.
            if issubclass(type(each), io.IOBase):
                with contextlib.suppress(OSError, ValueError):
                    each.flush()
        gc.freeze()
