"""What ranks and who has started them tell each other of stops."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import signal
import sys

#: In a rank's environment: the process that has started it, and a folder, in
#: which there is a file `stopped`, if a run was.
STARTER, STARTER_FOLDER = "HELIOS_STARTER", "HELIOS_STARTER_FOLDER"
STOPPED = "stopped"
_PR_SET_PDEATHSIG = 1
# Words of its command line, whether it is a program or a module.
_ACCELERATE = {b"accelerate", b"accelerate-launch"}
_ACCELERATE |= {b"accelerate.commands.launch", b"accelerate.commands.accelerate_cli"}


def starter_folder() -> pathlib.Path | None:
    """That folder, in a rank that Helios has started; else None."""
    if os.environ.get(STARTER) != str(os.getppid()):
        return None
    return pathlib.Path(os.environ[STARTER_FOLDER])


def end_with_launcher() -> None:
    """Have this process told when the launcher dies that has started it, if one has."""
    number = None
    if (folder := starter_folder()) is not None:
        number = signal.SIGKILL  # the same command may be run again
        # An attempt before this one may have left it: nobody stops before all are here.
        (folder / STOPPED).unlink(missing_ok=True)
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        number = signal.SIGINT  # the second one, where an impatient user has sent two
    elif "ACCELERATE_MIXED_PRECISION" in os.environ and _is_under_accelerate():
        # With one process it passes nothing on. A terminal's SIGINT has come already.
        number = signal.SIGTERM
    if number is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _is_under_accelerate() -> bool:
    """Whether the parent is its launcher, and not a shell that has its variables."""
    path = pathlib.Path(f"/proc/{os.getppid()}/cmdline")
    with contextlib.suppress(OSError):
        words = path.read_bytes().split(b"\0")
        return not _ACCELERATE.isdisjoint(map(os.path.basename, words))
    return False
