"""Run by test_curves.py on each rank: trains without random numbers, logs each step."""

import json
import os
import pathlib
import sys

import torch
from support import IndexDataset, RecordingCallback, StopAt
from torch import nn

import helios

torch.set_num_threads(1)
SAMPLES, GLOBAL_BATCH = 48, 12


class Curve(helios.Model):
    """A network whose loss is a mean over samples."""

    def setup(self, for_inference=False):
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.02)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.9)

    def train_step(self, batch, state):
        inputs = batch.float()[:, None] / SAMPLES
        loss = (self.net(inputs) - inputs.sin()).square().mean()
        self.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.log("loss", loss, reduce="mean")
        self.log("lr", self.scheduler.get_last_lr()[0])


class Data(helios.DataModule):
    """As many samples a rank as the global batch asks for."""

    def __init__(self, batch_size):
        super().__init__()
        self.batch_size = batch_size

    def setup(self):
        params = {"batch_size": self.batch_size, "shuffle": True}
        self._add_train_phase(IndexDataset(SAMPLES), params)


folder, options = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
ranks = int(os.environ["WORLD_SIZE"])
recorder, stop = RecordingCallback(), options.pop("stop", None)
size = options.pop("batch_size", GLOBAL_BATCH // ranks)
trainer = helios.Trainer(
    total_steps=3,
    print_frequency=1,
    chkpt_root=folder / options.pop("root"),
    callbacks=[recorder, StopAt(batch=stop)],
    use_cpu=True,
    enable_progress_bar=False,
    **options,
)
report = {}
try:
    report["finished"] = trainer.fit(Curve("curve"), Data(size))
except helios.HeliosError as error:
    report["error"] = f"{type(error).__name__}: {error}"
report["logged"] = [(s, n, float.fromhex(v)) for s, n, v in recorder.logged]
(folder / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(report))
if torch.distributed.is_initialized():
    torch.distributed.barrier()  # ranks leave together
    torch.distributed.destroy_process_group()
