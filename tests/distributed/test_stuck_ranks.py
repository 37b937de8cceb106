"""Ranks that Helios has started, and that are asked to stop while one is stuck."""

import os
import signal
import subprocess
import sys
import time

import pytest

from helios.stopping.status import EXIT_STOPPED

SCRIPT = """
import pathlib, sys, time
import torch
import helios
from support import IdModel, IndexData

place, root = sys.argv[1], pathlib.Path(sys.argv[2])
torch.set_num_threads(1)

class Data(IndexData):
    def setup(self):
        super().setup()
        engine = self.trainer.engine
        if place == "setup":  # as of `accelerator.main_process_first()`
            (root / f"there_{engine.rank}").touch()
            if engine.is_main:
                time.sleep(600)
            engine.barrier()

class Model(IdModel):
    def train_step(self, batch, state):
        super().train_step(batch, state)
        if state.global_iteration == 3:
            (root / f"there_{self.engine.rank}").touch()
            while self.engine.rank == 1:  # it never comes to a boundary
                time.sleep(1)
            self.trainer.request_stop("of one rank")

helios.Trainer(
    use_cpu=True, num_processes=2, total_steps=3, chkpt_root=root / "runs",
    exit_when_stopped=True, stop_grace_s=1 if place == "training" else None,
    print_banner=False,
).fit(Model(), Data(40))
"""


@pytest.mark.parametrize("place", ["setup", "training"])
def test_rank_that_is_stuck_keeps_no_job_from_its_end(tmp_path, place):
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, "script.py", place, tmp_path],
        cwd=tmp_path,
        env={
            **{k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"},
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": "1",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3",
        },
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 60
        while len([*tmp_path.glob("there_*")]) < 2:
            assert time.monotonic() < until
            time.sleep(0.05)
        if place == "setup":
            time.sleep(1)  # both are inside
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == EXIT_STOPPED
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
