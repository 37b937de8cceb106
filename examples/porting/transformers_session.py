"""A BERT of transformers, with Accelerate and a Session of Helios.

    accelerate launch examples/porting/transformers_session.py runs/port

On CPUs this is one rank, and `helios launch --cpu --num_processes 2 ...` starts two.

It tells from a line of Python's standard library which package it is from. The network
is made from a configuration, so that nothing has to be downloaded.
"""

import argparse
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, random_split
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    get_linear_schedule_with_warmup,
)

import helios

PACKAGES = ["asyncio", "email", "unittest"]
N_LINES = 200  # of each package
PAD = 0


def read_lines():
    """Lines as bytes, each with the number of its package."""
    lines = []
    for label, package in enumerate(PACKAGES):
        folder = Path(os.__file__).parent / package
        text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
        found = [line.strip() for line in text.splitlines()]
        found = [line[:48] for line in found if len(line) > 12]
        lines += [(line, label) for line in found[:N_LINES]]
    return lines


def collate(lines):
    ids = [torch.tensor(list(line)) for line, _ in lines]
    ids = pad_sequence(ids, batch_first=True, padding_value=PAD)
    labels = torch.tensor([label for _, label in lines])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


def main(args):
    loader_config = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(cpu=args.cpu, dataloader_config=loader_config)
    set_seed(args.seed)

    train, valid = random_split(read_lines(), [0.8, 0.2])
    options = {"batch_size": 16, "collate_fn": collate}
    train_loader = DataLoader(train, shuffle=True, **options)
    valid_loader = DataLoader(valid, **options)

    bert_config = BertConfig(
        vocab_size=256,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=len(PACKAGES),
    )
    model = BertForSequenceClassification(bert_config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    n_steps = args.epochs * len(train_loader)
    scheduler = get_linear_schedule_with_warmup(optimizer, n_steps // 10, n_steps)
    model, optimizer, scheduler, train_loader, valid_loader = accelerator.prepare(
        model, optimizer, scheduler, train_loader, valid_loader
    )

    session = helios.Session(accelerator, args.folder, train_loader)
    for epoch in session.epochs(args.epochs):
        model.train()
        for batch in session.batches(train_loader):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

        model.eval()
        correct = 0
        for batch in session.batches(valid_loader):
            with torch.no_grad():
                guesses = model(**batch).logits.argmax(-1)
            guesses, labels = accelerator.gather_for_metrics((guesses, batch["labels"]))
            correct += (guesses == labels).sum().item()
        accelerator.print(f"epoch {epoch}: accuracy {correct / len(valid):.3f}")

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
