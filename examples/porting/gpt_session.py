"""A character-level GPT, with Accelerate and a Session of Helios.

    accelerate launch examples/porting/gpt_session.py runs/port

On CPUs this is one rank, and `helios launch --cpu --num_processes 2 ...` starts two.

It learns what the sources of Python's standard library look like.
"""

import argparse
import math
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Subset

import helios

CONTEXT = 32  # characters


class Characters(Dataset):
    def __init__(self):
        sources = sorted(Path(os.__file__).parent.glob("a*.py"))
        text = "".join(path.read_text(encoding="utf-8") for path in sources)[:20_000]
        self.letters = sorted(set(text))
        self.tokens = torch.tensor([self.letters.index(letter) for letter in text])

    def __len__(self):
        return (len(self.tokens) - 1) // CONTEXT

    def __getitem__(self, index):
        window = self.tokens[index * CONTEXT :][: CONTEXT + 1]
        return window[:-1], window[1:]


class GPT(nn.Module):
    def __init__(self, n_letters, width=32, n_layers=2, dropout=0.1):
        super().__init__()
        self.letters = nn.Embedding(n_letters, width)
        self.places = nn.Embedding(CONTEXT, width)
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(
            width,
            nhead=4,
            dim_feedforward=4 * width,
            dropout=dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(layer, n_layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, n_letters)

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.dropout(self.letters(tokens) + self.places(places))
        mask = nn.Transformer.generate_square_subsequent_mask(len(places))
        hidden = self.blocks(hidden, mask.to(tokens.device), is_causal=True)
        return self.head(hidden)


def warmup_and_cosine(n_warmup, n_steps):
    def factor(step):
        if step < n_warmup:
            return (step + 1) / n_warmup
        return 0.55 + 0.45 * math.cos(math.pi * (step - n_warmup) / n_steps)

    return factor


def main(args):
    config = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(cpu=args.cpu, dataloader_config=config)
    set_seed(args.seed)

    data = Characters()
    n_train = len(data) * 4 // 5
    train, valid = Subset(data, range(n_train)), Subset(data, range(n_train, len(data)))
    train_loader = DataLoader(train, batch_size=16, shuffle=True, drop_last=True)
    valid_loader = DataLoader(valid, batch_size=32)

    model = GPT(len(data.letters))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    n_steps = args.epochs * len(train_loader)
    scheduler = LambdaLR(optimizer, warmup_and_cosine(n_steps // 10, n_steps))
    model, optimizer, scheduler, train_loader, valid_loader = accelerator.prepare(
        model, optimizer, scheduler, train_loader, valid_loader
    )

    session = helios.Session(accelerator, args.folder, train_loader)
    for epoch in session.epochs(args.epochs):
        model.train()
        for tokens, targets in session.batches(train_loader):
            logits = model(tokens)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

        model.eval()
        losses = []
        for tokens, targets in session.batches(valid_loader):
            with torch.no_grad():
                logits = model(tokens).transpose(1, 2)
            loss = nn.functional.cross_entropy(logits, targets, reduction="none")
            losses.append(accelerator.gather_for_metrics(loss))
        perplexity = torch.cat(losses).mean().exp()
        accelerator.print(f"epoch {epoch}: perplexity {perplexity:.1f}")

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
