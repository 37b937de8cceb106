"""The order of samples and its cut into batches: pure functions of a position."""

import enum
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DistributedSampler, Sampler

from helios import rng
from helios.data.permutation import Permutation

__all__ = [
    "KeyedBatch",
    "ReplayedSampler",
    "ResumableBatchSampler",
    "ResumableDistributedSampler",
    "ResumableRandomSampler",
    "ResumableSampler",
    "ResumableSamplerType",
    "ResumableSequentialSampler",
]


class ResumableSamplerType(enum.Enum):
    """The samplers that `DataLoaderParams.sampler` can name."""

    RANDOM = "random"
    SEQUENTIAL = "sequential"
    DISTRIBUTED = "distributed"


class KeyedBatch(NamedTuple):
    """What a loader's workers are sent."""

    key: int  # of (seed, epoch): the same on all ranks
    number: int  # within the epoch
    indices: list[int]  # of this rank


class ResumableSampler(Sampler[int]):
    """Base of samplers whose epoch can be entered at any batch: override `order`.

    `start_iter`, in batches, concerns the next iteration only. Overriding `__iter__`
    works too, if it leaves out the first `start_iter * batch_size` samples. The batch
    sampler sets `batch_size`: that of all ranks together, unless `is_sharded`.
    """

    #: Whether the sampler yields the part of one rank, rather than all ranks' samples.
    is_sharded = False

    def __init__(
        self,
        data_source: Any,
        *,
        batch_size: int = 1,
        seed: int | None = None,
        start_iter: int = 0,
    ) -> None:
        self.data_source = data_source
        self.batch_size = batch_size
        self.seed = rng.get_default_seed() if seed is None else seed
        self.start_iter, self.epoch = start_iter, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self, epoch: int, start: int) -> Iterator[int]:
        """Yield the samples from position `start` on: of (seed, epoch, start) alone."""
        raise NotImplementedError(f"{type(self).__name__} must override `order`")

    def __iter__(self) -> Iterator[int]:
        """Yield the epoch's order from `start_iter` on, and clear that, now."""
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


class ResumableDistributedSampler(ResumableSampler):
    """One rank's samples, cut as `ResumableBatchSampler` cuts them."""

    is_sharded = True

    def __init__(
        self,
        data_source: Any,
        *,
        num_replicas: int,
        rank: int,
        shuffle: bool = True,
        drop_last: bool = False,
        batch_size: int = 1,
        seed: int | None = None,
        start_iter: int = 0,
    ) -> None:
        super().__init__(
            data_source, batch_size=batch_size, seed=seed, start_iter=start_iter
        )
        self.num_replicas, self.rank = num_replicas, rank
        self.shuffle, self.drop_last = shuffle, drop_last

    def order(self, epoch: int, start: int) -> Iterator[int]:
        kind = ResumableRandomSampler if self.shuffle else ResumableSequentialSampler
        whole = kind(self.data_source, seed=self.seed)
        sizes = {"batch_size": self.batch_size, "world_size": self.num_replicas}
        batches = ResumableBatchSampler(
            whole, **sizes, rank=self.rank, drop_last=self.drop_last, seed=self.seed
        )
        first, offset = divmod(start, self.batch_size)
        parts = itertools.chain.from_iterable(batches.cut(epoch, first))
        return itertools.islice(parts, offset, None)

    def __len__(self) -> int:
        full, rest = divmod(len(self.data_source), self.batch_size * self.num_replicas)
        share = -(-rest // self.num_replicas)
        return full * self.batch_size + (0 if self.drop_last else share)


class ReplayedSampler(ResumableSampler):
    """Makes any sampler resumable: replays its epoch, indices only, up to the start.

    Each epoch runs under random numbers of its own, those of (seed, epoch), and touches
    no others. Indices are drawn ahead, 1024 at a time.
    """

    def __init__(self, sampler: Iterable[int], *, seed: int | None = None) -> None:
        if isinstance(sampler, Iterator):
            raise TypeError(f"`sampler` must be re-iterable, got iterator {sampler!r}")
        super().__init__(sampler, seed=seed)
        self.sampler = sampler
        if isinstance(sampler, DistributedSampler):
            self.is_sharded, self.data_source = True, sampler.dataset

    def order(self, epoch: int, start: int) -> Iterator[int]:
        key = rng.derive_key(self.seed, epoch)
        return itertools.islice(_draw_apart(self._replay(epoch, key), key), start, None)

    def _replay(self, epoch: int, key: int) -> Iterator[int]:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
        if isinstance(g := getattr(self.sampler, "generator", None), torch.Generator):
            g.manual_seed(key)
        yield from self.sampler

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]  # the TypeError is meant


class ResumableBatchSampler(Sampler[KeyedBatch]):
    """Cuts a sampler's order into the batches of this rank.

    Global batch b is the positions [b*W*B, (b+1)*W*B) for W ranks of batch size B, and
    rank r has its r-th part. A short last batch of R samples is left out (`drop_last`),
    or each rank has ceil(R/W) of them; what is missing is taken from the start of the
    epoch. The order of a sampler that `is_sharded` is cut into batches only.
    `batch_size` is per rank; `seed` is for the keys.

    The sampler's `epoch` and `start_iter` are the cursor. An iteration that finds them
    as the last one left them takes the next epoch.
    """

    def __init__(
        self,
        sampler: ResumableSampler,
        *,
        batch_size: int,
        drop_last: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.sampler, self.batch_size, self.drop_last = sampler, batch_size, drop_last
        self._seed, self._global_size = seed, batch_size * world_size
        self._rank, self._parts = (0, 1) if sampler.is_sharded else (rank, world_size)
        sampler.batch_size = batch_size * self._parts
        self._taken: int | None = None

    def seek(self, epoch: int, batch: int = 0) -> None:
        """Have the next iteration begin there; past the last batch it yields none."""
        if epoch < 0 or batch < 0:
            raise ValueError(f"`epoch`, `batch` must be >= 0, got {epoch}, {batch}")
        self.sampler.set_epoch(epoch)
        self.sampler.start_iter, self._taken = batch, None

    def __iter__(self) -> Iterator[KeyedBatch]:
        """Take the cursor, at the first batch (torch makes two iterators, uses one)."""
        if self.sampler.epoch == self._taken and not self.sampler.start_iter:
            self.sampler.set_epoch(self._taken + 1)
        self._taken = epoch = self.sampler.epoch
        first, self.sampler.start_iter = self.sampler.start_iter, 0
        key = rng.derive_key(self._seed, epoch)
        for number, indices in enumerate(self.cut(epoch, first), first):
            yield KeyedBatch(key, number, indices)

    def cut(self, epoch: int, first: int) -> Iterator[list[int]]:
        """Yield this rank's batches of the epoch from number `first` on."""
        share, whole = self.batch_size, self.sampler.batch_size
        order = self._order(epoch, first * whole)
        while batch := list(itertools.islice(order, whole)):
            if len(batch) < whole:
                if self.drop_last:
                    return
                share = -(-len(batch) // self._parts)
                if missing := share * self._parts - len(batch):
                    start = itertools.cycle(self._order(epoch, 0))
                    batch += itertools.islice(start, missing)
            yield batch[self._rank * share : (self._rank + 1) * share]

    def _order(self, epoch: int, start: int) -> Iterator[int]:
        sampler = self.sampler
        if type(sampler).__iter__ is ResumableSampler.__iter__:
            return sampler.order(epoch, start)
        indices = self._run(start // sampler.batch_size)
        return _draw_apart(indices, rng.derive_key(sampler.seed, epoch))

    def _run(self, first: int) -> Iterator[int]:
        self.sampler.start_iter = first
        for index in iter(self.sampler):
            self.sampler.start_iter = 0  # it has been read by now, however late
            yield index
        self.sampler.start_iter = 0

    def __len__(self) -> int:
        full, rest = divmod(len(self.sampler), self.sampler.batch_size)
        return full + (rest > 0 and not self.drop_last)

    @property
    def num_samples(self) -> int:
        """Samples of an epoch on all ranks together, padding not counted."""
        source = self.sampler.data_source if self.sampler.is_sharded else self.sampler
        return min(len(source), len(self) * self._global_size)


def _draw_apart(indices: Iterator[int], key: int) -> Iterator[int]:
    """Yield from a generator, run under global random numbers of its own."""
    chunk, state = [0], None
    while chunk:
        with rng.isolated_rng(key):
            if state is not None:
                rng.restore_rng(state)
            chunk = list(itertools.islice(indices, 1024))
            state = rng.capture_rng()
        yield from chunk
