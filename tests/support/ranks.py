"""Several gloo ranks on this machine, which meet at a port that the system chooses."""

import atexit
import functools
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import tempfile
import time

_TESTS = pathlib.Path(__file__).resolve().parents[1]
_START_S = 100  # a nursery's imports


@functools.cache
def _nursery(tests_pid):
    """What forks ranks (see `nursery.py`): one for each process of tests."""
    path = os.pathsep.join([str(_TESTS.parent), str(_TESTS)])
    nursery = subprocess.Popen(
        [sys.executable, _TESTS / "support" / "nursery.py"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,  # `select` sees what was not read
    )
    atexit.register(nursery.stdin.close)
    return nursery


def run_ranks(script, ranks, *args, cwd, timeout_s=120):
    """Run ``script`` on so many CPU ranks; its output, if every rank succeeds.

    The script may import ``support`` and must use ``use_cpu=True``.
    """
    nursery = _nursery(os.getpid())
    path = os.pathsep.join([str(_TESTS.parent), str(_TESTS)])
    with tempfile.NamedTemporaryFile("r") as output:
        request = {
            "script": str(script),
            "ranks": ranks,
            "arguments": [str(each) for each in args],
            "cwd": str(cwd),
            "environment": {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            "output": output.name,
        }
        nursery.stdin.write(json.dumps(request).encode() + b"\n")
        leader = int(_line(nursery, _START_S))
        try:
            status = int(_line(nursery, timeout_s))
        except TimeoutError:
            for number in (signal.SIGABRT, signal.SIGKILL):  # the first shows stacks
                time.sleep(1)
                os.killpg(leader, number)
            _line(nursery, _START_S)
            raise AssertionError(
                f"no end after {timeout_s} s:\n{output.read()}"
            ) from None
        said = output.read()
    assert status == 0, said
    return said


def _line(nursery, timeout_s):
    if not select.select([nursery.stdout], [], [], timeout_s)[0]:
        raise TimeoutError
    return nursery.stdout.readline()
