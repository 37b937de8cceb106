"""Ranks that Helios has started, and that are asked to stop while one is stuck."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from helios.checkpoint import CheckpointStore
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
            if place == "long":
                time.sleep(35)
                return
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
    with started(tmp_path, place, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="3") as process:
        if place == "setup":
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == EXIT_STOPPED


@pytest.mark.slow
def test_ranks_have_the_time_that_they_need_to_save(tmp_path):
    with started(tmp_path, "long") as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == EXIT_STOPPED
    record = next(iter(CheckpointStore(tmp_path / "runs/ids").records().values()))
    assert record["progress"]["current_iteration"] == 4


@contextlib.contextmanager
def started(root, place, **environment):
    """The script, once both ranks are where they stay."""
    (root / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, "script.py", place, root],
        cwd=root,
        env={
            **{k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"},
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 60
        while len([*root.glob("there_*")]) < 2:
            assert time.monotonic() < until
            time.sleep(0.05)
        time.sleep(1)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
