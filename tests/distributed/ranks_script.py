"""Run by test_ranks.py on each rank: trains, and writes down what it saw."""

import json
import os
import pathlib
import sys

import torch
from support import IdModel, IndexData, RandomData, RandomModel, StopAt, digest, train
from torch import nn

from helios.errors import ModelError

torch.set_num_threads(1)
OPTIONS = {"total_steps": 3, "valid_frequency": 1, "accumulation_steps": 2}


class RankModel(RandomModel):
    """Without what each rank has of its own: statistics of batches."""

    def setup(self, for_inference=False):
        super().setup()
        self.net[1] = nn.Identity()
        self.temperature = torch.ones(())
        body = torch.optim.AdamW(self.net.parameters(), lr=0.02)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(body, 30)
        self.optimizers = (body, self.optimizers[1])
        self.schedulers = [cosine, self.schedulers[1]]


class Loose(IdModel):
    """Trains a parameter that is in no network."""

    def setup(self, for_inference=False):
        super().setup()
        self.scale = nn.Parameter(torch.ones(1))
        self.optimizer.add_param_group({"params": [self.scale]})


folder, *stops = sys.argv[1:]
folder, rank = pathlib.Path(folder), int(os.environ["RANK"])
ids, is_finished, logged = [], [], []
for stop in [*map(int, stops), None]:
    model = RankModel()
    data = RandomData(length=22, batch_size=4)
    # Only one rank asks to stop: all must.
    stop_at = StopAt(batch=stop if rank == 1 else None)
    done, recorder = train(model, data, folder / "checkpoints", stop_at, **OPTIONS)
    is_finished.append(done)
    ids += model.ids
    logged += recorder.logged
try:
    train(Loose(), IndexData(4), None, total_steps=1)
    refusal = None
except ModelError as error:
    refusal = str(error)

state = model.state_dict()
report = {
    "is_finished": is_finished,
    "ids": ids,
    "logged": logged,
    "networks": digest(state["networks"]),
    "optimizers": digest(state["optimizers"]),
    "refusal": refusal,
}
(folder / f"rank_{rank}.json").write_text(json.dumps(report))
torch.distributed.barrier()  # ranks leave together
torch.distributed.destroy_process_group()
