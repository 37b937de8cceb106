"""Run by test_mixed_models.py on each rank: one model of many parts, in many ways.

Its arguments are a folder and a JSON list of runs: in which `root`, until which `stop`,
and which of the ways is taken.
"""

import json
import os
import pathlib
import sys

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from support import RandomData, StopAt, digest, train
from torch import nn

import helios

torch.set_num_threads(1)


class Branches(nn.Module):
    """Uses one of its heads, or all of them."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2))
        self.heads = nn.ModuleList([nn.Linear(8, 1), nn.Linear(8, 1)])

    def forward(self, inputs, number):
        hidden = self.body(inputs)
        heads = self.heads if number is None else [self.heads[number]]
        return sum(head(hidden) for head in heads)


class Mixed(helios.Model):
    """A generator and a critic, a frozen teacher, and a network without parameters."""

    def __init__(self, has_unused):
        super().__init__("mixed")
        self.has_unused, self.ids = has_unused, []

    def setup(self, for_inference=False):
        self.net, self.critic = Branches(), nn.Linear(1, 1)
        self.teacher = nn.Sequential(nn.Linear(4, 1), nn.BatchNorm1d(1))
        self.teacher.requires_grad_(False)
        self.squash = nn.Tanh()
        self.optimizers = [
            torch.optim.Adam(self.net.parameters(), lr=0.01),
            torch.optim.SGD(self.critic.parameters(), lr=0.01, momentum=0.9),
        ]
        self.schedulers = [
            torch.optim.lr_scheduler.StepLR(one, 2, gamma=0.9)
            for one in self.optimizers
        ]

    def train_step(self, batch, state):
        ids, inputs, _ = batch
        self.ids.append(ids.tolist())
        number = state.current_iteration % 2 if self.has_unused else None
        output = self.squash(self.net(inputs, number))
        loss = (output - self.teacher(inputs)).square().mean()
        loss = loss + self.critic(output.detach().float()).square().mean()
        self.backward(loss)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for scheduler in self.schedulers:
            scheduler.step()
        self.log("loss", loss, reduce="mean")


def run(folder, way):
    options = {"total_steps": 3, "print_frequency": 1, "random_seed": 3}
    options["mixed_precision"] = way.get("precision")
    window = way.get("window", 1)
    if way.get("unused"):
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        options = {"total_steps": 3, "print_frequency": 1, "random_seed": 3}
        options["use_cpu"] = None
        options["accelerator"] = Accelerator(
            cpu=True,
            mixed_precision=way.get("precision"),
            gradient_accumulation_steps=window,
            kwargs_handlers=[unused],
        )
    else:
        options["accumulation_steps"] = window
    model = Mixed(bool(way.get("unused")))
    # The last batch of an epoch is short, and on some ranks shorter.
    data = RandomData(length=23, batch_size=3, num_workers=way.get("workers", 0))
    stop = StopAt(batch=way.get("stop"))
    finished, recorder = train(model, data, folder / way["root"], stop, **options)
    state = model.state_dict()
    networks, optimizers = state["networks"], state["optimizers"]
    # Statistics of batches in the teacher: each rank has its own.
    trained = [networks[name] for name in networks if not name.startswith("teacher")]
    return {
        "finished": finished,
        "trained": digest([trained, optimizers]),
        "ids": model.ids,
        "logged": recorder.logged,
        "weights": digest([networks, optimizers]),
        "steps": [one.state_dict()["last_epoch"] for one in model.schedulers],
        "done": model.trainer._state.current_iteration,
    }


folder = pathlib.Path(sys.argv[1])
report = [run(folder, way) for way in json.loads(sys.argv[2])]
(folder / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(report))
torch.distributed.barrier()  # ranks leave together
torch.distributed.destroy_process_group()
