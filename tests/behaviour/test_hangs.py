"""A run in which nothing goes on is ended, and says where it is."""

import os
import re
import subprocess
import sys
import time

import pytest
from support import IdModel, IndexData, train

import helios
from helios.stopping.status import EXIT_STOPPED

SCRIPT = """
import sys, time
import helios
from support import IdModel, IndexData, IndexDataset

place, root = sys.argv[1:]

def hang(where):
    while where == place:
        time.sleep(1)

class HangingDataset(IndexDataset):
    def __init__(self, length, where):
        super().__init__(length)
        self.where = where
    def __getitem__(self, index):
        if index == 5:
            hang(self.where)
        return index

class HangingData(IndexData):
    def setup(self):
        super().setup()
        self._train_phases.clear()
        params = {"batch_size": 4, "num_workers": 2}
        self._add_train_phase(HangingDataset(12, "worker"), params)
        self._add_valid_dataset(HangingDataset(12, "validation worker"), params)

class HangingModel(IdModel):
    def train_step(self, batch, state):
        super().train_step(batch, state)
        if state.current_iteration == 1:
            hang("step")
    def valid_step(self, batch, step):
        hang("validation")
    def test_step(self, batch, step):
        hang("test")
    def on_training_epoch_end(self, current_epoch):
        hang("hook")

trainer = helios.Trainer(
    use_cpu=True, total_steps=1, valid_frequency=1, hang_timeout_s=2, log_root=root,
    enable_file_logging=True, chkpt_root=root, run_name="run", print_banner=False,
)
model, data = HangingModel(), HangingData()
trainer.fit(model, data)
trainer.test(model, data)
"""
WAIT = (
    r"it waits for worker 1 of the loader: "
    r"samples \[4, 5, 6, 7\] \(epoch 0, batch 1\)\n"
)
PLACES = {
    "step": r"in hang, .*, epoch 0, step 1, batch 1",
    "validation": r"in hang, .*, epoch 1, step 3, batch 3",
    "hook": r"in hang, .*, step 3, batch 3",
    "test": r"in hang, .*, epoch 1, step 3, batch 3",
    "worker": r"in <module>, .*, epoch 0, step 1, batch 1; " + WAIT,
    "validation worker": r"in <module>, .*, epoch 1, step 3, batch 3; " + WAIT,
}


@pytest.mark.parametrize("place", PLACES)
def test_run_in_which_nothing_goes_on_is_ended_and_says_where_it_is(tmp_path, place):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", place, tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1, done.stderr
    for said in (done.stderr, (tmp_path / "run.log").read_text()):
        assert re.search(r"NO BATCH HAS ENDED FOR 2 S; it is " + PLACES[place], said)
        assert "thread MainThread:" in said
        assert said.count("NO BATCH") == 1
        assert ("it waits for" in said) == ("worker" in place)


BY_HAND = """
import sys, time
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
import helios
from support import IndexDataset

class HangingDataset(IndexDataset):
    def __getitem__(self, index):
        while index == 5:
            time.sleep(1)
        return torch.tensor([float(index)])

accelerator = Accelerator(cpu=True)
net = torch.nn.Linear(1, 1)
optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
loader = DataLoader(HangingDataset(12), batch_size=4, num_workers=2)
net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
session = helios.Session(
    accelerator, sys.argv[1], loaders=loader, net=net, optimizer=optimizer,
    hang_timeout_s=2,
)
for epoch in session.epochs(1):
    for inputs in session.batches():
        accelerator.backward(net(inputs).square().mean())
        optimizer.step()
        optimizer.zero_grad()
"""


def test_loop_by_hand_that_waits_for_a_worker_says_for_which_samples(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BY_HAND, tmp_path / "run"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1, done.stderr
    assert re.search(r"NO BATCH HAS ENDED FOR 2 S; .*, batch 1; " + WAIT, done.stderr)


def test_run_that_goes_on_is_left_alone(tmp_path):
    class Slow(IdModel):  # all of it takes longer than what is granted to a batch
        def train_step(self, batch, state):
            time.sleep(0.2)
            super().train_step(batch, state)

    data = IndexData(8, batch_size=1)
    assert train(Slow(), data, tmp_path, total_steps=1, hang_timeout_s=1)[0]


LOG = """
import fcntl, os, pathlib, signal, sys, time
import helios
from support import IdModel, IndexData

limit, root = sys.argv[1], pathlib.Path(sys.argv[2])
os.mkfifo(root / "run.log")
log = os.open(root / "run.log", os.O_RDWR | os.O_NONBLOCK)

class HangingModel(IdModel):
    def train_step(self, batch, state):
        super().train_step(batch, state)
        if state.global_iteration == 3:
            for size in (4096, 1):  # until nothing more fits
                try:
                    while True:
                        os.write(log, bytes(size))
                except BlockingIOError:
                    pass
            if limit == "stop_grace_s":
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)

helios.Trainer(
    use_cpu=True, total_steps=3, log_root=root, chkpt_root=root / "runs",
    enable_file_logging=True, run_name="run", print_banner=False,
    exit_when_stopped=True, **{limit: 1},
).fit(HangingModel(), IndexData(20))
"""


@pytest.mark.parametrize(
    ("limit", "status"), [("stop_grace_s", EXIT_STOPPED), ("hang_timeout_s", 1)]
)
def test_log_whose_disk_hangs_does_not_keep_a_run_alive(tmp_path, limit, status):
    done = subprocess.run(
        [sys.executable, "-c", LOG, limit, tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=60,
        check=False,
    )
    assert done.returncode == status


@pytest.mark.parametrize("value", [0, -1, "1", True])
def test_time_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match="`hang_timeout_s` must be > 0 or None"):
        helios.Trainer(total_steps=1, hang_timeout_s=value)
