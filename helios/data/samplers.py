"""The order of samples and its cut into batches: pure functions of a position."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, count, cycle, islice
from typing import Any, NamedTuple

from torch.utils.data import Sampler

from helios import rng
from helios.data.permutation import Permutation


class ResumableSamplerType(enum.Enum):
    """The samplers that `DataLoaderParams.sampler` can name."""

    RANDOM = "random"
    SEQUENTIAL = "sequential"


class KeyedBatch(NamedTuple):
    """What a loader's workers are sent."""

    key: int  # of (seed, epoch): the same on all ranks
    number: int  # within the epoch
    indices: list[int]  # of this rank


class ResumableSampler(Sampler[int]):
    """Base of samplers whose epoch can be entered at any batch: override `order`.

    `start_iter`, in batches, concerns the next iteration only; the batch sampler sets
    `batch_size`: that of all ranks together. An overridden `__iter__` works too, if it
    leaves out `start_iter * batch_size` samples, and draws of `seed` and `epoch` alone.
    """

    def __init__(self, data_source: Any, *, seed: int | None = None) -> None:
        self.data_source = data_source
        self.seed = rng.get_default_seed() if seed is None else seed
        self.epoch, self.start_iter, self.batch_size = 0, 0, 1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self, epoch: int, start: int) -> Iterator[int]:
        """Yield the samples from position `start` on: of (seed, epoch, start) alone."""
        raise NotImplementedError(f"{type(self).__name__} must override `order`")

    def __iter__(self) -> Iterator[int]:
        start, self.start_iter = self.start_iter * self.batch_size, 0
        return self.order(self.epoch, start)

    def __len__(self) -> int:
        return len(self.data_source)


class ResumableSequentialSampler(ResumableSampler):
    """The samples in order."""

    def order(self, epoch: int, start: int) -> Iterator[int]:
        return iter(range(start, len(self)))


class ResumableRandomSampler(ResumableSampler):
    """The samples in a shuffled order, another one in every epoch."""

    def order(self, epoch: int, start: int) -> Iterator[int]:
        return Permutation(len(self), rng.derive_key(self.seed, epoch)).iterate(start)


@dataclass(eq=False)
class ResumableBatchSampler(Sampler[KeyedBatch]):
    """Cuts a sampler's order into the batches of this rank.

    Global batch b is the positions [b*W*B, (b+1)*W*B) for W ranks of batch size B, and
    rank r has its r-th part. A short last batch of R samples is left out (`drop_last`),
    or each rank has ceil(R/W) of them, the missing ones from the start of the epoch.

    The cursor is the sampler's `epoch` and `start_iter`; left alone, the next epoch.
    """

    sampler: ResumableSampler
    batch_size: int  # of each rank
    drop_last: bool
    seed: int  # of the keys
    rank: int = 0
    world_size: int = 1
    _taken: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.sampler.batch_size = self.batch_size * self.world_size

    def seek(self, epoch: int, batch: int = 0) -> None:
        """Have the next iteration begin there; past the last batch it yields none."""
        if epoch < 0 or batch < 0:
            raise ValueError(f"`epoch`, `batch` must be >= 0, got {epoch}, {batch}")
        self.sampler.set_epoch(epoch)
        self.sampler.start_iter, self._taken = batch, None

    def __iter__(self) -> Iterator[KeyedBatch]:
        """Take the cursor, at the first batch (torch makes two iterators, uses one)."""
        sampler = self.sampler
        if sampler.epoch == self._taken and not sampler.start_iter:
            sampler.set_epoch(self._taken + 1)
        self._taken = epoch = sampler.epoch
        first, sampler.start_iter = sampler.start_iter, 0
        key, order = rng.derive_key(self.seed, epoch), self._order(epoch, first)
        for number in count(first):
            batch = list(islice(order, sampler.batch_size))
            if not batch or (len(batch) < sampler.batch_size and self.drop_last):
                return
            share = -(-len(batch) // self.world_size)
            if missing := share * self.world_size - len(batch):
                batch += islice(cycle(self._order(epoch, 0)), missing)
            yield KeyedBatch(key, number, batch[self.rank * share :][:share])

    def _order(self, epoch: int, first: int) -> Iterator[int]:
        if type(self.sampler).__iter__ is ResumableSampler.__iter__:
            return self.sampler.order(epoch, first * self.sampler.batch_size)
        self.sampler.start_iter = first
        order = iter(self.sampler)
        head = list(islice(order, 1))  # a generator reads `start_iter` only now
        self.sampler.start_iter = 0
        return chain(head, order)

    def __len__(self) -> int:
        full, rest = divmod(len(self.sampler), self.sampler.batch_size)
        return full + (rest > 0 and not self.drop_last)

    @property
    def num_samples(self) -> int:
        """Samples of an epoch on all ranks together, padding not counted."""
        return min(len(self.sampler), len(self) * self.sampler.batch_size)
