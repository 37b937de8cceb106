"""Run by test_session_on_ranks.py on each rank: loops by hand, and what they did."""

import json
import os
import pathlib
import sys

import torch
from support import ByHand, Stop
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import helios
from helios.errors import LaunchError, ModelError

torch.set_num_threads(1)
folder, stops, *options = sys.argv[1:]
folder, rank = pathlib.Path(folder), int(os.environ["RANK"])
settings = json.loads(options[0]) if options else {}
# Only one rank asks to stop: all must.
loop = ByHand(folder / "run", rank=1, **settings)
report = {"outcome": loop.chained(*[Stop(**stop) for stop in json.loads(stops)])}

loop.make()
net, head = nn.Linear(4, 1), nn.Linear(1, 1)
net, optimizer = loop.accelerator.prepare(
    net, torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.1)
)
loader = DataLoader(TensorDataset(torch.randn(9 + rank, 4)), batch_size=2)
report["refusals"] = []
for objects in ({"net": net, "head": head}, {"net": net, "nets": [head]}):
    try:
        helios.Session(
            loop.accelerator,
            folder / "refused",
            loaders=DataLoader(TensorDataset(torch.randn(8, 4))),
            optimizer=optimizer,
            **objects,
        )
    except ModelError as error:
        report["refusals"].append(str(error))
net, optimizer = nn.Linear(4, 1), None
net, optimizer = loop.accelerator.prepare(
    net, torch.optim.SGD(net.parameters(), lr=0.1)
)
try:
    helios.Session(
        loop.accelerator,
        folder / "refused",
        loaders=loader,
        net=net,
        optimizer=optimizer,
    )
except LaunchError as error:
    report["refusals"].append(str(error))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(7))


session = helios.Session(
    loop.accelerator,
    folder / "counted",
    loaders={"train": DataLoader(range(8)), "stream": DataLoader(Stream(), 2)},
    net=net,
    optimizer=optimizer,
)
gather = loop.accelerator.gather_for_metrics
report["counted"] = [gather(batch).tolist() for batch in session.batches("stream")]
session.close()
session = helios.Session(
    loop.accelerator,
    folder / "trained",
    loaders=DataLoader(Stream(), 2),
    net=net,
    optimizer=optimizer,
)
report["trained"] = [
    gather(batch).tolist() for _ in session.epochs(1) for batch in session.batches()
]
session.close()
(folder / f"rank_{rank}.json").write_text(json.dumps(report))
torch.distributed.barrier()  # ranks leave together
torch.distributed.destroy_process_group()
