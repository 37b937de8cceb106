"""Accumulation with clipping, with Accelerate and a Session of Helios.

    accelerate launch examples/porting/accumulation_session.py runs/port

On CPUs this is one rank, and `helios launch --cpu --num_processes 2 ...` starts two.

Which digit a network sees, as a number: a regression, with means over the ranks.
The 1350 samples are 85 batches, or 43 on each of two ranks, so that the last window of
four batches is a short one.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import helios


def main(args):
    accelerator = Accelerator(cpu=args.cpu, gradient_accumulation_steps=4)
    set_seed(args.seed)

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images))
    images = torch.tensor(images / 16, dtype=torch.float32)[order]
    targets = torch.tensor(labels, dtype=torch.float32)[order] / 10
    train = TensorDataset(images[:1350], targets[:1350])
    valid = TensorDataset(images[1350:], targets[1350:])
    train_loader = DataLoader(train, batch_size=16, num_workers=1)
    valid_loader = DataLoader(valid, batch_size=100)

    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 1)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer, train_loader, valid_loader = accelerator.prepare(
        model, optimizer, train_loader, valid_loader
    )

    session = helios.Session(accelerator, args.folder, train_loader)
    for epoch in session.epochs(args.epochs):
        model.train()
        for images, targets in session.batches(train_loader):
            with accelerator.accumulate(model):
                loss = (model(images)[:, 0] - targets).square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()

        model.eval()
        errors = []
        for images, targets in session.batches(valid_loader):
            with torch.no_grad():
                error = (model(images)[:, 0] - targets).abs()
            errors.append(accelerator.gather_for_metrics(error))
        accelerator.print(f"epoch {epoch}: off by {10 * torch.cat(errors).mean():.2f}")

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
