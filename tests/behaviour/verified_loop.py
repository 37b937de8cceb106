"""Run by test_verifying.py: a loop on a Session, of a kind that its argument names."""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

import helios

torch.set_num_threads(1)
kind = sys.argv[1]
accelerator = Accelerator(cpu=True)
set_seed(1)
data = TensorDataset(torch.randn(20, 4), torch.randn(20, 1))
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer, loader = accelerator.prepare(
    model, optimizer, DataLoader(data, batch_size=4)
)
session = helios.Session(accelerator, "runs/loop", loaders=loader)
n = worse = 0
history = {"ema": [0.0]}
carried = {"carried": ["n"], "computing": ["history"], "kept_last": ["last"]}
if kind == "kept":
    n = session.notes.get("n", n)
total = 4
if kind == "longer":
    total = 4 if session.state.current_iteration < 20 else 5
if kind == "failing" and session.state.current_iteration:
    raise ValueError("it does not resume")
for _ in session.epochs(total, carry=carried.get(kind, [])):
    for inputs, targets in session.batches():
        loss = (model(inputs) - targets).square().mean()
        if kind in ("variable", "kept", "carried"):
            loss = loss * (1 + 0.1 * n)
        accelerator.backward(loss)
        if kind == "rate":
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + n)
        if kind == "drawing" and n % 4 == 3:
            torch.rand(1)
        optimizer.step()
        optimizer.zero_grad()
        n, last = n + 1, loss.item()
        if kind == "computing":
            history["ema"][0] = 0.9 * history["ema"][0] + n
        if kind == "kept":
            session.notes["n"] = n
        session.log({"loss": loss})
        if kind == "leaving" and n % 4 == 0:
            break
    if kind == "summing":  # by the accelerator, past the session
        accelerator.log({"batches": n, "kind": kind}, step=worse)
    if kind == "patience":
        worse += 1
        if worse > 2:
            break
    if kind == "early" and session.state.current_iteration >= 13:
        break
if kind in ("last", "kept_last"):
    print(f"the last loss was {last}")
