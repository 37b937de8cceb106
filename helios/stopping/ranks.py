"""What ranks and who has started them tell each other of stops."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import signal
import sys
from typing import NamedTuple

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


def mark_stopped() -> None:
    """Tell what has started this rank, if Helios has, that its run was stopped."""
    if (folder := starter_folder()) is not None:
        (folder / STOPPED).touch()


def end_with_launcher() -> None:
    """Have this process told when the launcher dies that has started it, if one has.

    It is told at once, if the launcher has died already.
    """
    if (folder := starter_folder()) is not None:
        # An attempt before this one may have left it: nobody stops before all are here.
        (folder / STOPPED).unlink(missing_ok=True)
    launcher = _launcher
    if launcher is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, launcher.number)
        if os.getppid() != launcher.process:
            os.kill(os.getpid(), launcher.number)


class _Launcher(NamedTuple):
    process: int
    number: int  # of the signal by which its end is told


def _find_launcher() -> _Launcher | None:
    """The launcher that has started this process, by its parent and its environment."""
    process = os.getppid()
    starter = os.environ.get(STARTER)
    if starter == str(process) or (starter is not None and _was_killed(starter)):
        return _Launcher(int(starter), signal.SIGKILL)  # the command may be run again
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # The second one, where an impatient user has sent two.
        return _Launcher(process, signal.SIGINT)
    if "ACCELERATE_MIXED_PRECISION" in os.environ and _is_accelerate(process):
        # With one process it passes nothing on. A terminal's SIGINT has come already.
        return _Launcher(process, signal.SIGTERM)
    return None


def _was_killed(starter: str) -> bool:
    """Whether it has died, and left its folder, which it deletes at its end."""
    state = "X"
    with contextlib.suppress(OSError):
        state = pathlib.Path(f"/proc/{starter}/stat").read_text().rpartition(") ")[2]
    is_dead = state[0] in "XZ"  # whoever has started it may not have asked how it ended
    return is_dead and os.path.exists(os.environ.get(STARTER_FOLDER, ""))


def _is_accelerate(process: int) -> bool:
    """Whether it is its launcher, and not a shell that has its variables."""
    path = pathlib.Path(f"/proc/{process}/cmdline")
    with contextlib.suppress(OSError):
        words = path.read_bytes().split(b"\0")
        return not _ACCELERATE.isdisjoint(map(os.path.basename, words))
    return False


def _look_for_launcher() -> None:
    global _launcher
    _launcher = _find_launcher()


# As Helios is imported, which takes place before torch is, in most programs: later it
# may have died, and whose child this was could not be said.
_launcher: _Launcher | None = None
_look_for_launcher()
os.register_at_fork(after_in_child=_look_for_launcher)
