"""Starting ranks: how many a run asks for, and the same command once for each of them.

Where a launcher has started the process, it starts nothing: the ranks are those that
there are.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from helios import elastic
from helios.adopting import LAUNCHED
from helios.errors import LaunchError
from helios.loggers.text import get_root_logger
from helios.stopping.ranks import end_with_launcher

#: The GPUs that were chosen for the ranks, which see no others.
CHOSEN = "HELIOS_GPUS"


def start_ranks_if_asked(
    *,
    use_cpu: bool | None,
    gpus: Sequence[int] | None,
    num_processes: int | None,
    max_restarts: int = 0,
) -> None:
    """Start this program's ranks, if it needs any; then it does not return.

    The ranks run the same command. This process waits for them, passes signals on, and
    ends with the exit status of the one that failed first, or 0, or `EXIT_STOPPED`.
    Before that it starts all of them anew where one has failed, `max_restarts` times.

    Raises:
        LaunchError: there are not so many GPUs, or the command is not known.
    """
    end_with_launcher()
    if any(name in os.environ for name in LAUNCHED):
        return
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return
    shown = 0 if use_cpu else torch.cuda.device_count()
    count = num_processes or len(gpus or ()) or shown
    if count < 2:
        return
    given = {"num_processes": num_processes, "gpus": gpus}
    asked = [f"`{n}` is {value}" for n, value in given.items() if value is not None]
    if shown and count > len(gpus or range(shown)):
        raise LaunchError(f"{' and '.join(asked)}; this machine shows {shown} GPUs")
    if not _has_command():
        if asked:
            raise LaunchError(
                f"{' and '.join(asked)}: there is no command here that would start "
                f"{count} processes; write a script, or in a notebook call "
                f"`accelerate.notebook_launcher(function, num_processes={count})`"
            )
        get_root_logger().warning(
            "one of %d GPUs is used; `accelerate.notebook_launcher` starts all", count
        )
        return
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    if not shown:
        environment["ACCELERATE_USE_CPU"] = "true"
    elif gpus is not None:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        chosen = [seen[i] if len(seen) == shown else str(i) for i in gpus[:count]]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
        os.environ[CHOSEN] = ",".join(map(str, gpus))
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    _start(count, max_restarts)


def _has_command() -> bool:
    """Whether the command of this process starts the same program once more."""
    is_interactive = hasattr(sys, "ps1") or "ipykernel" in sys.modules
    return not is_interactive and "PYTEST_CURRENT_TEST" not in os.environ


def _start(count: int, max_restarts: int) -> NoReturn:
    # Imported here: it takes a second that only this process has to wait.
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    with elastic.log_folder() as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            max_restarts=max_restarts,
            logs_specs=DefaultLogsSpecs(folder),
            **elastic.on_one_host(),
        )
        elastic.run_ranks(config, sys.executable, *sys.orig_argv[1:])
