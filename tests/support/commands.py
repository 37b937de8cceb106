"""Commands that train on ranks, run by tests: started, waited for, and their reports.

The script is `distributed/launched_script.py`, which says what a command can ask of it.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "distributed" / "launched_script.py"
OPTIONS = {"total_steps": 3, "chkpt_frequency": 1}
TIMEOUT_S = 90


HELIOS = ("-c", "from helios.cli import main; main()")


def start(folder, how="plain", env=(), command=(str(SCRIPT),), under=(), **options):
    """Start a command for the interpreter, ``under`` another one that starts it."""
    folder.mkdir(exist_ok=True)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    clean = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    return subprocess.Popen(
        [
            *under,
            sys.executable,
            *command,
            how,
            folder,
            json.dumps({**OPTIONS, **options}),
        ],
        env={**clean, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **dict(env)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process):
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.terminate()  # which its ranks are told
        output, _ = process.communicate(timeout=TIMEOUT_S)
        raise AssertionError(f"no end after {TIMEOUT_S} s:\n{output}") from None
    return process.returncode, output


def reports(folder):
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("rank_*"))]
    for path in folder.glob("rank_*"):
        path.unlink()
    return found


def seconds_since_failure(folder):
    return time.time() - float((folder / "failed_at_s").read_text())


def pids_of_ranks(folder, ranks=2):
    """Wait until the ranks train; their processes."""
    found, until = [], time.monotonic() + TIMEOUT_S
    while len(found) < ranks and time.monotonic() < until:
        time.sleep(0.05)
        found = [path.read_text() for path in folder.glob("waits_*")]
        found = [int(text) for text in found if text]
    assert len(found) == ranks
    return found
