"""Where there is no command to run again: an interpreter that is typed into."""

import os
import subprocess
import sys

from support.commands import ROOT, TIMEOUT_S

CELLS = """
import os, sys
from accelerate import notebook_launcher
from support import IdModel, IndexData, digest, train
assert not hasattr(sys.modules["__main__"], "__file__")

def job():
    model = IdModel()
    done, _ = train(model, IndexData(), None, total_steps=1, num_processes=2)
    rank, state = os.environ["RANK"], digest(model.net.state_dict())
    print(f"\\nrank {rank}: {done} {model.batches} {state}\\n", end="", flush=True)

anywhere = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
notebook_launcher(job, num_processes=2, **anywhere)
model = IdModel()
print("alone:", train(model, IndexData(), None, total_steps=1)[0], len(model.batches))
try:
    train(model, IndexData(), None, total_steps=1, num_processes=2)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_session_trains_in_one_process_or_through_accelerates_launcher(tmp_path):
    (tmp_path / "cells.py").write_text(CELLS)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    clean = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    done = subprocess.run(
        [sys.executable, "-i", "-q"],
        input=f"exec(open({str(tmp_path / 'cells.py')!r}).read())\n",
        env={**clean, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))
    assert len(lines) == 2, done
    (first, second) = (line.split(": ", 1)[1].split("] ") for line in lines)
    assert first[0] == "True [[0]" or first[0].startswith("True [[0], [2]")
    assert second[0].startswith("True [[1], [3]")
    assert first[-1] == second[-1]
    assert "alone: True 12" in done.stdout, done
    assert "LaunchError `num_processes` is 2: there is no command here" in done.stdout
    assert "call `accelerate.notebook_launcher(function, num_pro" in done.stdout
