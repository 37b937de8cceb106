"""SLURM: a job that puts itself back into the queue."""

from __future__ import annotations

import os
import subprocess

from helios.loggers.text import get_root_logger

_TIMEOUT_S = 30.0


def requeue() -> None:
    """Have SLURM queue this job again, if it is one; it ends the job when it does.

    What keeps it from that is logged.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    logger = get_root_logger()
    try:
        subprocess.run(
            ["scontrol", "requeue", job],
            check=True,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or "").strip()
        logger.error(
            "THE JOB %s COULD NOT BE QUEUED AGAIN, start it by hand: %s",
            *(job, f"{error}: {said}" if said else error),
        )
    else:
        logger.info("job %s is queued again", job)
