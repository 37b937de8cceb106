"""Run by test_session.py: a loop by hand that knows nothing of stops.

It says when a batch is done, and waits then for as long as it is told to; or its step
depends on a variable that nobody saves; or it leaves its loop in the third epoch; or
nothing of it is written; or it begins when its parent has died.
"""

import os
import pathlib
import sys
import time

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import helios

folder, *held = sys.argv[1:]
folder = pathlib.Path(folder)
if held == ["early"]:
    print("early", flush=True)
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.01)
accelerator = Accelerator(cpu=True)
set_seed(3)
net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
loader = DataLoader(TensorDataset(torch.randn(20, 3)), batch_size=4, shuffle=True)
net, optimizer, loader = accelerator.prepare(net, optimizer, loader)

session = helios.Session(
    accelerator, folder / "run", loaders=loader, net=net, optimizer=optimizer
)
if held == ["loses"]:
    session.saver = None
seen = 0
for epoch in session.epochs(4):
    for (inputs,) in session.batches():
        seen += held == ["forgets"]
        loss = net(inputs).square().mean() * (1 + seen)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        session.log({"loss": loss})
        if f"{session.state.global_iteration}" == "".join(held[:1]):
            print("ready", flush=True)
            if held[1:] == ["raise"]:
                raise RuntimeError("of the loop")
            sys.stdin.readline()
    if held == ["breaks"] and epoch == 2:
        break
torch.save(net.state_dict(), folder / "final.pt")
