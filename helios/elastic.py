"""Ranks of this host under torch's elastic launcher, and how they end."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any, NoReturn

from helios.loggers.text import get_root_logger
from helios.stopping.ranks import STARTER, STARTER_FOLDER, STOPPED, pass_signals_on
from helios.stopping.status import EXIT_STOPPED

_POLITE = (128 + signal.SIGTERM, 128 + signal.SIGINT)


def on_one_host() -> dict[str, Any]:
    """Settings of a LaunchConfig by which ranks meet at a port that nobody else has."""
    endpoint = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    return {**endpoint, "run_id": uuid.uuid4().hex}


@contextlib.contextmanager
def log_folder() -> Iterator[str]:
    """A folder for what torch writes about ranks; its own would stay there."""
    with tempfile.TemporaryDirectory(prefix="helios-ranks-") as folder:
        yield folder


def run_ranks(config: Any, program: Any, *arguments: str, folder: str) -> NoReturn:
    """Run a program as often as a LaunchConfig says, and end as it ends.

    Signals are passed on, and the ranks waited for. The exit status is `EXIT_STOPPED`
    where a run on them was stopped and says so, else that of the rank that failed
    first, 128 and the number of the signal that ended it or this process, or 0. What
    ranks have to tell goes to ``folder``.
    """
    # Imported here: it takes a second that only this process has to wait.
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    ranks = pathlib.Path(folder) / "ranks"
    ranks.mkdir()
    os.environ |= {STARTER: str(os.getpid()), STARTER_FOLDER: str(ranks)}
    pass_signals_on(ranks)
    # The ranks' store lives as long as they: those of a second attempt would read the
    # first one's addresses in the launcher's.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    code = 0
    try:
        elastic_launch(config, program)(*arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        get_root_logger().critical(
            "rank %d failed first, with exit status %d", rank, failure.exitcode
        )
        # A signal that ended it is a negative number here, and 128 more in a shell.
        code = failure.exitcode
        code = code if code > 0 else 128 - code
    except SignalException as error:
        code = 128 + error.sigval
    is_stopped = code in (0, *_POLITE) and (ranks / STOPPED).exists()
    raise SystemExit(EXIT_STOPPED if is_stopped else code)
