"""Run by test_verifying.py: trains a model of a kind that its argument names."""

import os
import random
import sys

import numpy as np
import torch
from support import IdModel, IndexData, RandomData, RandomModel
from support.data import AugmentedDataset
from support.kinds import LENGTH, KindData, augmented

import helios
from helios.data import ResumableSampler

torch.set_num_threads(1)


class Counting(RandomModel):
    """Its steps depend on an attribute that is not saved."""

    seen = 0

    def train_step(self, batch, state):
        self.seen += 1
        ids, inputs, targets = batch
        super().train_step((ids, inputs * (1 + 0.01 * self.seen), targets), state)


class Saving(Counting):
    """It is saved."""

    def user_state_dict(self):
        return {**super().user_state_dict(), "seen": self.seen}

    def load_user_state_dict(self, state, for_inference):
        super().load_user_state_dict(state, for_inference)
        self.seen = state["seen"]


class Reporting(RandomModel):
    """Has something to report of, where it has trained."""

    def train_step(self, batch, state):
        super().train_step(batch, state)
        self.report = state.global_iteration


class Drawing(Counting):
    """Draws a number more with every third step."""

    def train_step(self, batch, state):
        self.seen += 1
        if self.seen % 3 == 0:
            torch.rand(1)
        RandomModel.train_step(self, batch, state)


class Unseeded(RandomModel):
    """Depends on numbers that nobody can repeat."""

    def train_step(self, batch, state):
        ids, inputs, targets = batch
        noise = int.from_bytes(os.urandom(2), "big") / 1e6
        super().train_step((ids, inputs + noise, targets), state)


class OwnGenerator(AugmentedDataset):
    """Draws from a generator that goes on from sample to sample."""

    def __init__(self, length):
        super().__init__(length)
        self.generator = np.random.default_rng(1)

    def __getitem__(self, index):
        found, inputs, target = super().__getitem__(index)
        return found, inputs + float(self.generator.normal()), target


class OwnOrder(ResumableSampler):
    """A sampler that says that it knows the order by the epoch, and does not."""

    def order(self, epoch, start):
        order = list(range(len(self)))
        random.Random(os.urandom(8)).shuffle(order)
        yield from order[start:]


def main():
    kind = sys.argv[1]
    models = {"counting": Counting, "saving": Saving, "drawing": Drawing}
    models |= {"reporting": Reporting, "unseeded": Unseeded, "ids": IdModel}
    data = IndexData(length=24) if kind == "ids" else RandomData()
    if kind == "own_generator":
        data = KindData(lambda: OwnGenerator(LENGTH))
    if kind == "own_order":
        data = KindData(lambda: (augmented(), {"sampler": OwnOrder(range(LENGTH))}))
    if kind == "failing":
        raise ValueError("it fails")
    if kind == "idle":
        return
    trainer = helios.Trainer(
        use_cpu=True, total_steps=3, print_frequency=2, chkpt_root="mine"
    )
    model = models.get(kind, RandomModel)()
    if trainer.fit(model, data) and kind == "twice":
        trainer.fit(RandomModel("second"), data)
    if kind == "reporting":
        print("trained on batch", model.report)
    assert not os.path.exists("mine")


if __name__ == "__main__":
    main()
