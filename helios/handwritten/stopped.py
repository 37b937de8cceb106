"""How a loop ends that was asked to."""

from helios.stopping.status import exit_status


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
