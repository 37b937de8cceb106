"""Run by test_sharded.py on each rank: FSDP2 (or DDP), through Accelerate.

Arguments: a folder, and in JSON a list of runs, each with the folder of its checkpoints
and its options, and the Accelerator's options. What comes of each run is written down.
On CPUs, unless a ``backend`` is named: the ranks are then on a GPU, which they share.
"""

import json
import pathlib
import sys

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from support import RandomData, StopAt, digest, train
from torch import nn
from torch.utils.data import default_collate

import helios

torch.set_num_threads(1)


class Network(nn.Module):
    """Parts that don't divide evenly, a tied weight, buffers, dropout."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.2))
        self.head, self.tied = nn.Linear(5, 1), nn.Linear(5, 1)
        self.tied.weight = self.head.weight

    def forward(self, inputs):
        hidden = self.body(inputs)
        return (self.head(hidden) + self.tied(hidden.square()))[:, 0]


class ShardedModel(helios.Model):
    """With a frozen teacher, a schedule, and gradients that are clipped."""

    def setup(self, for_inference=False):
        self.net = Network()
        self.teacher = nn.Linear(4, 1).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.02)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.8)

    def train_step(self, batch, state):
        _, inputs, targets = batch
        loss = (self.net(inputs) - targets - self.teacher(inputs)[:, 0]).square().mean()
        self.backward(loss)
        self.clip_gradients(self.net.parameters(), self.optimizer, 0.5)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.log("loss", loss)


class Plain(ShardedModel):
    """Its steps depend on the samples of the global batch alone, not on the ranks."""

    def setup(self, for_inference=False):
        super().setup()
        self.net.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.02)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.8)


class TwoNetworks(ShardedModel):
    def setup(self, for_inference=False):
        super().setup()
        self.teacher.requires_grad_(True)


KINDS = {"mixed": ShardedModel, "plain": Plain, "two": TwoNetworks}


def whole(value):
    """The same tree with whole tensors; every rank must call."""
    if isinstance(value, dict):
        return {key: whole(member) for key, member in value.items()}
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def run(folder, accelerator, options):
    kind = KINDS[options.pop("kind", "mixed")]
    model = kind("sharded")
    stop = StopAt(batch=options.pop("stop", None))
    options = {"total_steps": 2, "print_frequency": 1, **options}
    data = RandomData(length=24, batch_size=options.pop("batch_size", 2))
    if kind is Plain:
        data.params["collate_fn"] = default_collate  # it draws nothing for a batch
    root = folder / options.pop("root")
    try:
        finished, _ = train(model, data, root, stop, accelerator=accelerator, **options)
    except helios.HeliosError as failure:
        return {"error": str(failure)}
    found = whole({"net": model.net.state_dict(), "o": model.optimizer.state_dict()})
    accelerator.free_memory()
    return {
        "finished": finished,
        "weights": digest(found),
        "networks": digest(found["net"]),
        "last": [tensor.flatten().tolist() for tensor in found["net"].values()],
        "type": type(next(model.net.parameters())).__name__,
        "device": str(next(model.net.parameters()).device),
    }


def make_accelerator(fsdp_version=2, backend=None, **options):
    if backend is not None:
        options["kwargs_handlers"] = [InitProcessGroupKwargs(backend=backend)]
    if fsdp_version is None:
        return Accelerator(cpu=backend is None, **options)
    if backend is None:
        state = PartialState(cpu=True)
        # Accelerate shards on GPUs only; torch can do so on any device.
        state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(fsdp_version=fsdp_version)
    return Accelerator(fsdp_plugin=plugin, **options)


def main():
    folder, runs = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
    accelerator = make_accelerator(**json.loads(sys.argv[3]))
    results = [run(folder, accelerator, options) for options in runs]
    (folder / f"rank_{accelerator.process_index}.json").write_text(json.dumps(results))
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
