"""A loop by hand that is random in every way, stopped where one likes."""

import contextlib
import dataclasses
import math
import random

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.utils.data import DataLoader

import helios
from helios.checkpoint import find_last_checkpoint, read_checkpoint
from support.data import AugmentedDataset, random_collate
from support.runs import RecordingCallback, digest


@dataclasses.dataclass(frozen=True)
class Stop:
    """Where a loop is asked to stop; `batch` counts from 0, over all epochs."""

    batch: int | None = None
    at_start: bool = False
    in_validation: int | None = None  # of an epoch
    after_epoch: int | None = None  # behind its validation


@dataclasses.dataclass
class ByHand:
    """A loop's settings, and what it did."""

    root: object
    window: int = 1
    epochs: int = 3
    workers: int = 0
    length: int = 22
    is_prepared: bool = True
    is_seedable: bool = True
    rank: int = 0  # which is to stop
    spoiled: tuple = ()  # its batches, counted from 0, that have bad numbers
    spoils: str = "inputs"  # or "loss": the gradients are finite
    carried: tuple = ("best", "totals", "total", "count")  # of two functions
    options: dict = dataclasses.field(default_factory=dict)

    def make(self):
        """The accelerator, objects and loaders of one process."""
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
        config = DataLoaderConfiguration(use_seedable_sampler=self.is_seedable)
        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=self.window, dataloader_config=config
        )
        set_seed(5)
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Dropout(0.3)
        )
        self.head = nn.Linear(8, 1)
        body, head = self.net.parameters(), self.head.parameters()
        self.optimizers = [
            torch.optim.AdamW(body, lr=0.02),
            torch.optim.SGD(head, lr=0.05, momentum=0.9),
        ]
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizers[0], 60
        )
        self.generator = torch.Generator().manual_seed(1)
        self.train_loader = DataLoader(
            AugmentedDataset(self.length),
            batch_size=4,
            shuffle=True,
            num_workers=self.workers,
            collate_fn=random_collate,
        )
        self.valid_loader = DataLoader(AugmentedDataset(6), batch_size=3)
        if self.is_prepared:
            (
                self.net,
                self.head,
                *self.optimizers,
                self.scheduler,
                self.train_loader,
                self.valid_loader,
            ) = self.accelerator.prepare(
                self.net,
                self.head,
                *self.optimizers,
                self.scheduler,
                self.train_loader,
                self.valid_loader,
            )

    def run(self, stop=None):
        """Train until the end, or a stop; whether it came to the end."""
        stop = Stop() if stop is None else stop
        self.ids, self.recorder = [], RecordingCallback()
        self.make()
        session = helios.Session(
            self.accelerator,
            self.root,
            loaders={"train": self.train_loader, "valid": self.valid_loader},
            net=self.net,
            head=self.head,
            optimizers=self.optimizers,
            scheduler=self.scheduler,
            generator=self.generator,
            callbacks=[self.recorder],
            **self.options,
        )
        is_mine = self.accelerator.process_index == self.rank
        if not self.is_prepared:
            self.net, self.head = session["net"], session["head"]
            self.optimizers = session["optimizers"]
            self.scheduler = session["scheduler"]
        with contextlib.suppress(helios.RunStopped), session:
            if stop.at_start and is_mine:
                session.request_stop("the test")
            best, totals = -math.inf, []
            for epoch in session.epochs(self.epochs, carry=self.carried):
                totals.append(self.train(session, stop.batch if is_mine else None))
                score = self.validate(session, stop.in_validation == epoch and is_mine)
                best = max(best, score)
                session.log({"score": score, "best": best, "total": sum(totals)})
                session.notes["scores"] = [*session.notes.get("scores", []), score]
                if stop.after_epoch == epoch and is_mine:
                    session.request_stop("the test")
        return session.stop_reason is None

    def noise(self):
        shared = random.random() + np.random.random() + torch.rand(1).item()
        return shared + torch.rand(1, generator=self.generator).item()

    def loss(self, inputs, targets):
        output = self.head(self.net(inputs))[:, 0] + 0.01 * self.noise()
        return (output - targets).square().mean()

    def train(self, session, stop_at):
        for module in (self.net, self.head):
            module.train()
        total, count = torch.zeros(()), 0
        reads = self.train_loader if self.is_prepared else "train"
        for ids, inputs, targets in session.batches(reads):
            self.ids.append(ids.tolist())
            is_mine = self.accelerator.process_index == self.rank
            kind = None
            if is_mine and session.state.global_iteration in self.spoiled:
                kind = self.spoils
            if kind == "inputs":
                inputs = inputs * math.nan
            with session.accumulate():
                loss = self.loss(inputs, targets)
                loss = loss + math.inf if kind == "loss" else loss
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.net.parameters(), 1.0)
                for one in (*self.optimizers, self.scheduler):
                    one.step()
                for optimizer in self.optimizers:
                    optimizer.zero_grad()
            session.log({"loss": loss})
            total, count = total + loss.detach(), count + 1
            if session.state.global_iteration == stop_at:
                session.request_stop("the test")
        return (total / count).item()

    def validate(self, session, stops):
        for module in (self.net, self.head):
            module.eval()
        losses = []
        with torch.no_grad():
            for _, inputs, targets in session.batches(self.valid_loader):
                losses.append(self.loss(inputs, targets))
                if stops:
                    session.request_stop("the test")
        return -float(torch.stack(losses).mean())

    def outcome(self):
        """All that two loops are compared by: bits, as texts."""
        unwrap = self.accelerator.unwrap_model
        networks = [unwrap(net).state_dict() for net in (self.net, self.head)]
        checkpoint = read_checkpoint(find_last_checkpoint(self.root))
        rank = checkpoint.tree(f"rank_{self.accelerator.process_index}")
        progress = checkpoint.record["progress"]
        return {
            "weights": digest(networks),
            "optimizers": digest([one.state_dict() for one in self.optimizers]),
            "state": digest(checkpoint.tree("training")),
            "rank": digest(rank),
            "progress": {k: v for k, v in progress.items() if "time" not in k},
            "ids": self.ids,
            "logged": self.recorder.logged,
        }

    def chained(self, *stops):
        """The outcome of a run for each stop, and one to the end, one after another."""
        ids, logged = [], []
        for stop in stops:
            assert not self.run(stop), stop
            ids += self.ids
            logged += self.recorder.logged
        assert self.run()
        self.ids[:0], self.recorder.logged[:0] = ids, logged
        return self.outcome()
