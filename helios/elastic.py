"""Ranks of this host under torch's elastic launcher, and how they end."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import uuid
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

from helios.loggers.text import get_root_logger
from helios.stopping.ranks import STARTER, STARTER_FOLDER, STOPPED
from helios.stopping.status import EXIT_STOPPED, end_soon

#: How long ranks that are asked to stop may take to save. Who asks has a limit, or the
#: run has `stop_grace_s`; torch would kill them after 30 seconds.
_PATIENCE_S = 3600
_POLITE = {0, *(128 + s for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))}


def on_one_host() -> dict[str, Any]:
    """Settings of a LaunchConfig by which ranks meet at a port that nobody else has."""
    endpoint = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    return {**endpoint, "run_id": uuid.uuid4().hex}


@contextlib.contextmanager
def log_folder() -> Iterator[str]:
    """A folder for what torch writes about ranks; its own would stay there."""
    with tempfile.TemporaryDirectory(prefix="helios-ranks-") as folder:
        yield folder


def run_ranks(config: Any, program: Any, *arguments: str) -> NoReturn:
    """Run a program as often as a LaunchConfig says, and end as it ends.

    SIGTERM, SIGINT and SIGUSR1 are passed on, and the ranks waited for; SIGUSR2 is
    passed on. The exit status is that of the rank that failed first, 128 and the number
    of the signal that ended it or this process, or 0; `EXIT_STOPPED`, if they say so.
    """
    # Imported here: it takes a second that only this process has to wait.
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    def stop(number: int, frame: FrameType | None) -> None:
        raise SignalException("asked to stop", signal.Signals(number))

    # torch has handlers of its own for the others.
    signal.signal(signal.SIGUSR1, stop)
    signal.signal(signal.SIGUSR2, _pass_on)
    if "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in os.environ:
        config.shutdown_timeout = _PATIENCE_S  # an older torch has no such limit to set
    os.environ[STARTER] = str(os.getpid())
    # The ranks' store lives as long as they: those of a second attempt would read the
    # first one's addresses in the launcher's.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    code = 0
    with log_folder() as folder:
        os.environ[STARTER_FOLDER] = folder
        try:
            elastic_launch(config, program)(*arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            get_root_logger().critical(
                "rank %d failed first, with exit status %d", rank, failure.exitcode
            )
            # A signal that ended it is a negative number here, and 128 more in a shell.
            code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        except SignalException as error:
            code = 128 + error.sigval
        is_stopped = code in _POLITE and os.path.exists(os.path.join(folder, STOPPED))
    end_soon()
    raise SystemExit(EXIT_STOPPED if is_stopped else code)


def _pass_on(number: int, frame: FrameType | None) -> None:
    """Pass a signal on to the ranks, and to nothing else that was started here."""
    import psutil

    own = str(os.getpid())
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if child.environ().get(STARTER) == own:
                child.send_signal(number)
