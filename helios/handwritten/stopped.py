"""How a loop ends: asked to stop, or finished."""

from __future__ import annotations

from pathlib import Path

from helios.failures.replay import refuse_end
from helios.session import Session
from helios.stopping.status import exit_status

_FINISHED = set[Path]()  # the folders of the runs that this process has finished


class RunStopped(SystemExit):
    """Raised in a loop that was asked to stop, when its checkpoint is on the disk.

    Nobody needs to catch it: the process ends with the status 75, which says that the
    same command is to be run again. What stands behind the loop runs only when training
    is finished.
    """

    def __init__(self, reason: str | None) -> None:
        super().__init__(exit_status())
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.reason}: stopped, to go on"


def stopped_run(session: Session) -> RunStopped:
    """Say that a run was stopped, and how far it has come."""
    refuse_end(session.callbacks, "training was stopped")
    stopped = RunStopped(session.stop_reason)
    session.logger.info("%s after %s", stopped, _progress(session))
    return stopped


def finish_run(session: Session, folder: Path | None) -> None:
    """Say that a run is finished."""
    session.logger.info("finished after %s", _progress(session))
    if folder is not None:
        _FINISHED.add(folder)


def warn_if_finished_here(session: Session, folder: Path | None) -> None:
    """Warn who makes a second run where this process has finished one."""
    if folder in _FINISHED:
        session.logger.warning(
            "this process has finished a run in %s already, which is taken up, so that "
            "nothing is left to train; give each run a folder of its own",
            folder,
        )


def _progress(session: Session) -> str:
    state = session.state
    return f"{state.global_epoch} epochs, {state.current_iteration} steps"
