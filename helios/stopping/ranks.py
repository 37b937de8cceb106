"""What ranks and who has started them tell each other of stops."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import signal
import sys
from types import FrameType

#: In a rank's environment: the process that has started it, and a folder, with
#: a file `<pid>` for each rank that hears signals, and `stopped`, if a run was.
STARTER, STARTER_FOLDER = "HELIOS_STARTER", "HELIOS_STARTER_FOLDER"
STOPPED = "stopped"
_PR_SET_PDEATHSIG = 1


def starter_folder() -> pathlib.Path | None:
    """That folder, in a rank that Helios has started; else None."""
    if os.environ.get(STARTER) != str(os.getppid()):
        return None
    return pathlib.Path(os.environ[STARTER_FOLDER])


def end_with_launcher() -> None:
    """Have this process told when the launcher dies that has started it, if one has."""
    number = None
    if os.environ.get(STARTER) == str(os.getppid()):
        number = signal.SIGKILL  # the same command may be run again
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        number = signal.SIGINT  # the second one, where an impatient user has sent two
    elif "ACCELERATE_MIXED_PRECISION" in os.environ:
        # With one process it passes nothing on. A terminal's SIGINT has come already.
        number = signal.SIGTERM
    if number is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def pass_signals_on(folder: pathlib.Path) -> None:
    """Have SIGUSR1 and SIGUSR2 reach the ranks; torch passes the others on.

    Where none says that it hears them, as those of a program without Helios, they reach
    all, and nothing else that was started here.
    """

    def pass_on(number: int, frame: FrameType | None) -> None:
        for rank in [int(file.name) for file in folder.glob("[0-9]*")] or _started():
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, number)

    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, pass_on)


def _started() -> list[int]:
    """The ranks that this process has started."""
    import psutil

    own, found = str(os.getpid()), list[int]()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if child.environ().get(STARTER) == own:
                found.append(child.pid)
    return found
