"""Ranks that MPI or SLURM have started: what they say of them, in torch's words."""

from __future__ import annotations

import os
import re
import zlib

import torch

from helios.errors import LaunchError

#: What launchers leave in the environment: torchrun and `accelerate launch`, MPI.
LAUNCHED = (
    *("WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"),
    *("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
)
_OWN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# The same of Open MPI, of MVAPICH, and of Intel's.
_MPI = (
    *(
        tuple(f"{name}_COMM_WORLD_{what}" for what in which)
        for name in ("OMPI", "MV2")
        for which in [("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")]
    ),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def adopt_ranks() -> None:
    """Say to torch what MPI or SLURM say of the processes that they have started.

    Where torchrun or `accelerate launch` have said it, nothing changes.

    Raises:
        LaunchError: it is not said which rank this one is, or where the main one is.
    """
    if any(name in os.environ for name in ("WORLD_SIZE", "LOCAL_RANK")):
        return
    many = [names for names in _MPI if int(os.environ.get(names[0], "1")) > 1]
    whole = [names for names in many if all(name in os.environ for name in names)]
    if whole:
        _adopt_mpi(whole[0])
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        _adopt_slurm()
    elif many:
        missing = [name for name in many[0] if name not in os.environ]
        raise LaunchError(
            f"there are {os.environ[many[0][0]]} processes ({many[0][0]}), and nothing "
            f"says which this one is: {', '.join(missing)} not set; start them with "
            "`helios launch` or `torchrun`, or set WORLD_SIZE, RANK and LOCAL_RANK"
        )
    else:
        return
    if not torch.cuda.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")


def _adopt_mpi(names: tuple[str, ...]) -> None:
    found = {own: os.environ[name] for own, name in zip(_OWN, names, strict=True)}
    if found["WORLD_SIZE"] == found["LOCAL_WORLD_SIZE"]:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    elif "MASTER_ADDR" not in os.environ:
        raise LaunchError(
            f"MPI has started {found['WORLD_SIZE']} processes on several hosts, and "
            "MASTER_ADDR is not set; set it for all of them to the name of the host of "
            "rank 0 (with Open MPI: `mpirun -x MASTER_ADDR=...`)"
        )
    names_job = os.environ.get("PMIX_NAMESPACE", os.environ.get("SLURM_JOB_ID", ""))
    os.environ.setdefault("MASTER_PORT", _port(names_job))
    os.environ.update(found)


def _adopt_slurm() -> None:
    # "node[003-007,9],other" begins with node003.
    nodes = re.match(r"([^\[,]+)(?:\[(\d+))?", os.environ["SLURM_STEP_NODELIST"])
    assert nodes is not None
    os.environ.setdefault("MASTER_ADDR", "".join(p for p in nodes.groups() if p))
    step = f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_STEP_ID', '')}"
    os.environ.setdefault("MASTER_PORT", _port(step))
    os.environ |= {
        "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
    }


def _port(job: str) -> str:
    """A job's port: all ranks have to come to the same one, without a word."""
    # Below those that systems give to outgoing connections.
    return str(20_000 + zlib.crc32(job.encode()) % 10_000)
