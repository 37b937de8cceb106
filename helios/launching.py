"""Starting ranks: how many a run asks for, and the same command once for each of them.

Where a launcher has started the process, it starts nothing: the ranks are those that
there are.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from typing import NoReturn

import torch

from helios.errors import LaunchError
from helios.loggers.text import get_root_logger

# What launchers leave in the environment: torchrun and `accelerate launch`, MPI.
_LAUNCHED = (
    *("WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"),
    *("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
)
#: The GPUs that were chosen for the ranks, which see no others.
CHOSEN = "HELIOS_GPUS"
_STARTER = "HELIOS_STARTER"  # who has started this rank
_PR_SET_PDEATHSIG = 1


def start_ranks_if_asked(
    *,
    use_cpu: bool | None,
    gpus: Sequence[int] | None,
    num_processes: int | None,
    max_restarts: int = 0,
) -> None:
    """Start this program's ranks, if it needs any; then it does not return.

    The ranks run the same command. This process waits for them, passes SIGTERM and
    SIGINT on, and ends with the exit status of the one that failed first, or 0. Before
    that it starts all of them anew where one has failed, `max_restarts` times.

    Raises:
        LaunchError: there are not so many GPUs, or the command is not known.
    """
    _adopt_slurm()
    if os.environ.get(_STARTER) == str(os.getppid()) and sys.platform == "linux":
        # A rank does not outlive who started it: the same command may be run again.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if any(name in os.environ for name in _LAUNCHED):
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


def _adopt_slurm() -> None:
    """Say to torch what SLURM says of the tasks that `srun` has started."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if int(tasks) < 2 or any(name in os.environ for name in _LAUNCHED):
        return
    # "node[003-007,9],other" begins with node003.
    nodes = re.match(r"([^\[,]+)(?:\[(\d+))?", os.environ["SLURM_STEP_NODELIST"])
    assert nodes is not None
    os.environ |= {
        "WORLD_SIZE": tasks,
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "MASTER_ADDR": "".join(part for part in nodes.groups() if part),
        # All tasks have to come to the same one, without a word between them.
        "MASTER_PORT": str(20_000 + int(os.environ["SLURM_JOB_ID"]) % 20_000),
    }


def _start(count: int, max_restarts: int) -> NoReturn:
    # Imported here: it takes a second that only this process has to wait.
    from torch.distributed.elastic.multiprocessing import (
        DefaultLogsSpecs,
        SignalException,
    )
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ[_STARTER] = str(os.getpid())
    # The ranks' store lives as long as they: those of a second attempt would read the
    # first one's addresses in the launcher's.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    logger = get_root_logger()
    try:
        with tempfile.TemporaryDirectory() as folder:  # else one would stay there
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=count,
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                max_restarts=max_restarts,
                logs_specs=DefaultLogsSpecs(folder),
            )
            elastic_launch(config, sys.executable)(*sys.orig_argv[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        logger.critical(
            "rank %d failed first, with exit status %d", rank, failure.exitcode
        )
        # A signal that ended it is a negative number here, and 128 more in a shell.
        code = failure.exitcode
        raise SystemExit(code if code > 0 else 128 - code) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
    raise SystemExit(0)
