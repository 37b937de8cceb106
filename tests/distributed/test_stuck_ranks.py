"""Ranks that Helios has started, and that are asked to stop while one is stuck."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from support import run_ranks
from torch.distributed.launcher.api import LaunchConfig

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


WAITING = """
import time
from datetime import timedelta
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
import helios
from support import IdModel, IndexData

torch.set_num_threads(1)

class Model(IdModel):
    def train_step(self, batch, state):
        super().train_step(batch, state)
        if state.global_iteration == 3 and self.rank == 1:
            self.wait_too_long()

    def wait_too_long(self):
        time.sleep(7)

limit = InitProcessGroupKwargs(timeout=timedelta(seconds=5))
accelerator = Accelerator(cpu=True, kwargs_handlers=[limit])
trainer = helios.Trainer(accelerator=accelerator, total_steps=3, print_banner=False)
try:
    trainer.fit(Model(), IndexData(40))
except RuntimeError:
    pass
else:
    raise AssertionError("a collective has a limit")
"""


def test_ranks_say_where_they_are_before_a_collective_times_out(tmp_path):
    (tmp_path / "script.py").write_text(WAITING)
    said = run_ranks(tmp_path / "script.py", 2, cwd=tmp_path)
    report = said.index("NO BATCH HAS ENDED FOR 4 S")
    assert said.count("NO BATCH HAS ENDED FOR 4 S") == 2
    assert "rank 1: in wait_too_long" in said
    assert re.search(r"^behind: rank 1$", said, re.M)
    assert report < said.index("rank 0 failed")


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(LaunchConfig, "shutdown_timeout"), reason="torch has 30 seconds"
)
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
