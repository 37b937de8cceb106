"""Several gloo ranks on this machine, started by torchrun on a free port."""

import os
import signal
import subprocess
import sys


def run_ranks(script, ranks, *args, cwd, timeout_s=120):
    """Run ``script`` on so many CPU ranks; its output, if every rank succeeds.

    The script may import ``support`` and must use ``use_cpu=True``.
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(ranks), str(script), *map(str, args)),
    ]
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.pathsep.join([os.path.dirname(tests), tests])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"no end after {timeout_s} s:\n{output}") from None
    assert process.returncode == 0, output
    return output
