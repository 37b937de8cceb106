"""Data of many kinds, each made anew for every run."""

import random

import torch
from torch import nn
from torch.utils import data

import helios
from helios.data import (
    ResumableLengthGroupedSampler,
    ResumableRandomSampler,
    ResumableSampler,
    ResumableSamplerType,
    ResumableSubsetRandomSampler,
    ResumableWeightedRandomSampler,
    sample_rng,
)
from support.data import AugmentedDataset, random_collate
from support.models import RandomModel

LENGTH = 18  # with batches of 4, the last one is short
WEIGHTS = [1.0 + i % 5 for i in range(LENGTH)]


class KindModel(RandomModel):
    """Takes batches of one sample, too."""

    norm = nn.LayerNorm


class KindData(helios.DataModule):
    """Any training data, and some for validation."""

    def __init__(self, make, **params):
        super().__init__()
        self.make = make
        self.params = {"collate_fn": random_collate, "batch_size": 4, **params}

    def setup(self):
        found = self.make()
        dataset, own = found if isinstance(found, tuple) else (found, {})
        params = {**self.params, **own}
        if hasattr(own.get("sampler"), "yields_batches"):
            del params["batch_size"]
        self._add_train_phase(dataset, params)
        self._add_valid_dataset(AugmentedDataset(6), {"batch_size": 3})


def augmented():
    return AugmentedDataset(LENGTH)


def sampled(make_sampler):
    """Augmented data in the order of a sampler."""

    def make():
        return augmented(), {"sampler": make_sampler()}

    return make


class Rotated(ResumableSampler):
    """A user's sampler that computes positions."""

    def at(self, epoch, positions):
        return (positions * 7 + epoch) % len(self)


class Walked(ResumableSampler):
    """A user's sampler that walks, and draws from the global generators."""

    def order(self, epoch, start):
        order = torch.randperm(len(self)).tolist()
        yield from order[start:]


class Older(ResumableSampler):
    """A sampler as older projects have them."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed % 2**40 + self.epoch)
        order = torch.randperm(len(self.data_source), generator=generator).tolist()
        yield from order[self.start_iter * self.batch_size :]


class Batches(ResumableSampler):
    """A user's batch sampler: batches of 2, 3 and 4 samples in turn."""

    yields_batches = True

    def order(self, epoch, start):
        shuffled = list(range(LENGTH))
        random.Random(epoch).shuffle(shuffled)
        for number in range(start, len(self)):
            first = number // 3 * 9 + (0, 2, 5)[number % 3]
            yield shuffled[first : first + 2 + number % 3]

    def __len__(self):
        return LENGTH // 9 * 3


def batch_sampler():
    found = data.BatchSampler(data.RandomSampler(range(LENGTH)), 5, drop_last=True)
    found.yields_batches = True
    return found


class Fetched(AugmentedDataset):
    """Fetches a batch at a time, and draws for the batch as a whole."""

    def __getitems__(self, indices):
        scale = random.random() + torch.rand(()).item()
        rows = [super(Fetched, self).__getitem__(i) for i in indices]
        return [(index, inputs * scale, target) for index, inputs, target in rows]


class OwnNumbers(AugmentedDataset):
    """Draws from generators of the sample."""

    def __getitem__(self, index):
        numpy, generator = sample_rng()
        noise = torch.randn(4, generator=generator) + numpy.normal()
        return index, (self.inputs[index] + noise).float(), self.inputs[index, 0].sign()


class Stream(data.IterableDataset):
    """A stream of augmented samples that cannot say where it is."""

    def __init__(self, length=LENGTH):
        self.source, self.epoch = AugmentedDataset(length), 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def order(self):
        order = list(range(len(self.source)))
        random.Random(self.epoch).shuffle(order)
        return order

    def __iter__(self):
        for index in self.order():
            if index % 5 != 4 or random.random() < 0.9:  # its length is random
                yield self.source[index]


class ShardedStream(Stream):
    """Gives each worker its share."""

    def __iter__(self):
        info = data.get_worker_info()
        number, count = (0, 1) if info is None else (info.id, info.num_workers)
        for index in self.order()[number::count]:
            yield self.source[index]


class StatefulStream(Stream):
    """Can say where it is; its next epoch depends on how far the last one came."""

    def __init__(self):
        super().__init__()
        self.position, self.drawn = 0, 0.0

    def __iter__(self):
        order = self.order()
        while self.position < len(order):
            self.position += 1
            self.drawn = 0.5 * self.drawn + random.random()
            index, inputs, target = self.source[order[self.position - 1]]
            yield index, inputs + self.drawn, target
        self.position = 0

    def state_dict(self):
        return {"position": self.position, "drawn": self.drawn}

    def load_state_dict(self, state):
        self.position, self.drawn = state["position"], state["drawn"]


class StatefulShards(StatefulStream):
    """Gives each worker its share, and shuffles by a count of its own epochs."""

    def __init__(self, length):
        super().__init__()
        self.source = AugmentedDataset(length)

    finished = 0
    set_epoch = property()  # it has none

    def order(self):
        info = data.get_worker_info()
        number, count = (0, 1) if info is None else (info.id, info.num_workers)
        order = list(range(len(self.source)))[number::count]
        random.Random(self.finished).shuffle(order)
        return order

    def __iter__(self):
        yield from super().__iter__()
        self.finished += 1

    def state_dict(self):
        return {**super().state_dict(), "finished": self.finished}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.finished = state["finished"]


KINDS = {
    "sequential": augmented,
    "random": sampled(lambda: ResumableSamplerType.RANDOM),
    "distributed": sampled(lambda: ResumableSamplerType.DISTRIBUTED),
    "weighted": sampled(lambda: ResumableWeightedRandomSampler(WEIGHTS)),
    "weighted_once": sampled(
        lambda: ResumableWeightedRandomSampler(WEIGHTS, 12, replacement=False)
    ),
    "subset": sampled(lambda: ResumableSubsetRandomSampler(range(1, LENGTH, 2))),
    "by_length": sampled(
        lambda: ResumableLengthGroupedSampler(WEIGHTS, window_batches=2)
    ),
    "own_seed": sampled(lambda: ResumableRandomSampler(range(LENGTH), seed=3)),
    "at": sampled(lambda: Rotated(range(LENGTH))),
    "order": sampled(lambda: Walked(range(LENGTH))),
    "older": sampled(lambda: Older(range(LENGTH))),
    "batches": sampled(lambda: Batches(None)),
    "torch_random": sampled(lambda: data.RandomSampler(range(LENGTH))),
    "torch_weighted": sampled(
        lambda: data.WeightedRandomSampler(
            WEIGHTS, 15, generator=torch.Generator().manual_seed(1)
        )
    ),
    "torch_batches": sampled(batch_sampler),
    "fetches_batches": lambda: Fetched(LENGTH),
    "sample_rng": lambda: OwnNumbers(LENGTH),
    "concatenated": lambda: data.ConcatDataset(
        [data.Subset(augmented(), range(5, 15)), Fetched(8)]
    ),
    "stream": Stream,
    "sharded_stream": lambda: ShardedStream(17),  # for two ranks 9 and 8
    "stateful_stream": StatefulStream,
    "stateful_shards": lambda: StatefulShards(21),  # for two ranks 11 and 10
}
