"""Run by test_launching.py: trains on ranks that it starts, and tells how it went."""

import json
import os
import pathlib
import signal
import sys
import time

import torch
from support import RandomData, digest, train
from torch import nn

import helios

torch.set_num_threads(1)


class NetModel(helios.Model):
    """A network with dropout; one rank of it may fail, or be killed."""

    def setup(self, for_inference=False):
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
        self.optimizer = torch.optim.Adam(self.net.parameters())

    def train_step(self, batch, state):
        fails = how in ("raise", "kill") or (how == "kill once" and not has_failed)
        is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
        at = (0, 6) if is_alone else (1, 3)  # after the first epoch
        if (self.rank, state.global_iteration) == at and fails:
            (folder / "failed_at_s").write_text(str(time.time()))
            if how == "raise":
                raise ValueError("on purpose")
            os.kill(os.getpid(), signal.SIGKILL)
        if state.global_iteration == 3 and self.rank == 1 and how == "hang":
            (folder / "failed_at_s").write_text(str(time.time()))
            self.wait_for_ever()
        if state.global_iteration == 3 and how == "stop once" and not has_failed:
            os.kill(os.getpid(), signal.SIGTERM)
        if state.global_iteration >= 3 and how == "wait":
            (folder / f"waits_{self.rank}").write_text(str(os.getpid()))
            time.sleep(0.5)  # the signal comes meanwhile
        self.backward((self.net(batch[1])[:, 0] - batch[2]).square().mean())
        self.optimizer.step()
        self.optimizer.zero_grad()

    def on_training_batch_end(self, state, should_log=False):
        super().on_training_batch_end(state, should_log)
        if state.global_iteration == 4 and self.rank == 1 and how == "hang later":
            (folder / "failed_at_s").write_text(str(time.time()))
            self.wait_for_ever()

    def on_training_end(self):
        super().on_training_end()
        if how == "end":
            (folder / f"waits_{self.rank}").write_text(str(os.getpid()))
            time.sleep(2)  # the signal comes meanwhile

    def wait_for_ever(self):
        while True:
            time.sleep(1)


how, folder = sys.argv[1], pathlib.Path(sys.argv[2])
options = json.loads(sys.argv[3])
has_failed = (folder / "failed_at_s").exists()
model = NetModel("net")
try:
    is_finished, _ = train(model, RandomData(), folder / "runs", **options)
except SystemExit:  # it was stopped, and one rank does not even come to its end
    if model.rank == 1:
        (folder / "failed_at_s").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    raise
rank = os.environ.get("RANK", "0")
report = {"is_finished": is_finished, "weights": digest(model.net.state_dict())}
report["world_size"] = os.environ.get("WORLD_SIZE", "1")
(folder / f"rank_{rank}.json").write_text(json.dumps(report))
