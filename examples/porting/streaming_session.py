"""A recurrent network on a stream, with Accelerate and a Session of Helios.

    accelerate launch examples/porting/streaming_session.py runs/port

On CPUs this is one rank, and `helios launch --cpu --num_processes 2 ...` starts two.

It reads the sources of Python's standard library, and says which byte comes next.
"""

import argparse
import math
import os
import random
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import helios

WINDOW = 64  # bytes


class Sources(IterableDataset):
    """Windows of some files, which come in another order in each epoch."""

    def __init__(self, pattern, n_files):
        self.files = sorted(Path(os.__file__).parent.glob(pattern))[:n_files]
        self.epoch = 0

    def set_epoch(self, epoch):  # Accelerate calls it
        self.epoch = epoch

    def __iter__(self):
        rng = random.Random(self.epoch)
        for file in rng.sample(self.files, len(self.files)):
            with open(file, "rb") as source:
                while len(window := source.read(WINDOW)) == WINDOW:
                    yield torch.tensor(list(window))


class Reader(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.memory = nn.GRU(width, width, batch_first=True)
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(width, 256))

    def forward(self, windows):
        states, _ = self.memory(self.bytes(windows[:, :-1]))
        logits = self.head(states).transpose(1, 2)
        return nn.functional.cross_entropy(logits, windows[:, 1:], reduction="none")


def main(args):
    accelerator = Accelerator(cpu=args.cpu)
    set_seed(args.seed)

    train_loader = DataLoader(Sources("c*.py", 5), batch_size=16, drop_last=True)
    valid_loader = DataLoader(Sources("b*.py", 3), batch_size=50)

    model = Reader()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model, optimizer, train_loader, valid_loader = accelerator.prepare(
        model, optimizer, train_loader, valid_loader
    )

    session = helios.Session(accelerator, args.folder, train_loader)
    for epoch in session.epochs(args.epochs):
        model.train()
        for windows in session.batches(train_loader):
            loss = model(windows).mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

        model.eval()
        losses = []
        for windows in session.batches(valid_loader):
            with torch.no_grad():
                loss = model(windows)
            losses.append(accelerator.gather_for_metrics(loss))
        bits = torch.cat(losses).mean() / math.log(2)
        accelerator.print(f"epoch {epoch}: {bits:.3f} bits a byte")

    accelerator.save_model(model, f"{args.folder}/final")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--cpu", action="store_true")
    main(parser.parse_args())
