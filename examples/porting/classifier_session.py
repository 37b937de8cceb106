"""Handwritten digits, with Accelerate and a Session of Helios.

    accelerate launch examples/porting/classifier_session.py runs/port

On CPUs this is one rank, and `helios launch --cpu --num_processes 2 ...` starts two.

Stop it whenever and however you like: the same command goes on where it was.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset, random_split

import helios


def main(args):
    config = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(cpu=args.cpu, dataloader_config=config)
    set_seed(args.seed)

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    samples = TensorDataset(images, torch.tensor(labels))
    split = torch.Generator().manual_seed(0)
    train, valid = random_split(samples, [1437, 360], split)
    train_loader = DataLoader(train, batch_size=64, shuffle=True)
    valid_loader = DataLoader(valid, batch_size=64)

    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.4),
        nn.Linear(16 * 8 * 8, 10),
    )
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = OneCycleLR(optimizer, 5e-3, args.epochs * len(train_loader))
    model, optimizer, scheduler, train_loader, valid_loader = accelerator.prepare(
        model, optimizer, scheduler, train_loader, valid_loader
    )

    session = helios.Session(accelerator, args.folder, train_loader, save_every=20)
    best = 0.0
    for epoch in session.epochs(args.epochs, carry=["best"]):
        model.train()
        for images, labels in session.batches(train_loader):
            loss = nn.functional.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

        model.eval()
        correct = 0
        for images, labels in session.batches(valid_loader):
            with torch.no_grad():
                guesses = model(images).argmax(-1)
            guesses, labels = accelerator.gather_for_metrics((guesses, labels))
            correct += (guesses == labels).sum().item()
        accuracy = correct / len(valid)
        best = max(best, accuracy)
        accelerator.print(f"epoch {epoch}: accuracy {accuracy:.3f}, best {best:.3f}")

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
