"""The plan of an epoch's batches, and the cut of a sampler's order into them."""

from __future__ import annotations

import abc
import weakref
from collections.abc import Iterator
from itertools import chain, cycle, islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from helios import rng
from helios.data.replay import ReplayedSampler, draw_apart
from helios.data.samplers import ResumableSampler

_BLOCK = 4096  # samples that are computed at once
_SHOWN = 8  # indices of a batch that a message names


class KeyedBatch(NamedTuple):
    """What a loader's workers are sent."""

    key: int  # of (seed, epoch): the same on all ranks
    epoch: int
    number: int  # within the epoch
    indices: NDArray[np.int64] | list[Any]  # of this rank
    real: int  # how many of them are no padding; the padded ones come last
    is_full: bool = True  # whether all ranks have as many samples, none of them padded
    cursor: int | None = None  # what tells at a resume that the order is the same


class Loaded(NamedTuple):
    """A batch, as the loop gets it."""

    data: Any
    number: int  # within the epoch, or since the loader was sought
    indices: Any  # of the samples, where they have any
    rows: int  # samples, padding included
    real: int  # how many are no padding; the padded ones come last
    is_full: bool  # whether all ranks have as many rows, none of them padded
    total: int | None = None  # samples of all ranks, of a stream that is read whole
    cursor: Any = None  # with this batch finished, what `seek` needs beside its number


class Plan(Sampler[Any], abc.ABC):
    """What a loader asks its workers for, request by request, and the cursor of it.

    Each iteration is that of the epoch sought last; left alone, of the next one.
    """

    #: Whether the ranks may come to their ends at different times.
    is_sharded = False
    #: In how many streams each rank reads an iterable data set.
    streams = 1

    @abc.abstractmethod
    def seek(self, epoch: int, batch: int = 0, cursor: Any = None) -> None:
        """Have the next iteration begin at a batch; `cursor` is that of the last one.

        Raises:
            ResumeError: it cannot go on there.
        """

    @abc.abstractmethod
    def receive(self, answers: Iterator[tuple[Any, Any]]) -> Iterator[Loaded]:
        """Make batches of the pairs of a request and its answer."""

    @property
    def batches_per_epoch(self) -> int | None:
        """Batches of an epoch on this rank; None where only reading can tell."""
        return None

    @property
    def num_samples(self) -> int | None:
        """Samples of an epoch on all ranks, padding not counted; None as above."""
        return None

    @abc.abstractmethod
    def describe(self, request: Any) -> str:
        """What a request is for, in words."""

    def next_epoch(self, cursor: Any = None) -> Any:
        """The cursor with which the next epoch begins, at the end of this one.

        `cursor` is that of the last batch, after which other ranks had no more.
        """
        return None

    def replayed(self) -> tuple[int, float]:
        """Samples that a seek has to read again, and the seconds that they took."""
        return 0, 0.0


class RankBatches(Plan):
    """The batches of one rank; `epoch` and `start_iter` of the sampler: the cursor.

    The order of a sampler that `is_sharded` is cut into batches of this rank only.
    """

    def __init__(
        self,
        sampler: ResumableSampler,
        *,
        batch_size: int = 1,  # of each rank, in what the sampler yields
        drop_last: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.sampler, self.drop_last, self.seed = sampler, drop_last, seed
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self._parts = 1 if sampler.is_sharded else world_size
        self._part = 0 if sampler.is_sharded else rank
        sampler.batch_size = batch_size * self._parts
        sampler._plan = weakref.ref(self)
        self._taken: int | None = None

    def seek(self, epoch: int, batch: int = 0, cursor: int | None = None) -> None:
        # Past the last batch there are none.
        if epoch < 0 or batch < 0:
            raise ValueError(f"`epoch`, `batch` must be >= 0, got {epoch}, {batch}")
        self.sampler.set_epoch(epoch)
        self.sampler.start_iter, self._taken = batch, None
        if isinstance(self.sampler, ReplayedSampler):
            self.sampler.expected = cursor

    def __iter__(self) -> Iterator[KeyedBatch]:
        """Take the cursor, at the first batch (torch makes two iterators, uses one)."""
        sampler = self.sampler
        if sampler.epoch == self._taken and not sampler.start_iter:
            sampler.set_epoch(self._taken + 1)
        self._taken = epoch = sampler.epoch
        first, sampler.start_iter = sampler.start_iter, 0
        key = rng.derive_key(self.seed, epoch)
        for number, batch in enumerate(self.cut(epoch, first), first):
            cursor = getattr(sampler, "fingerprint", None)
            yield KeyedBatch(key, epoch, number, *batch, cursor)

    def receive(self, answers: Iterator[tuple[KeyedBatch, Any]]) -> Iterator[Loaded]:
        for (_, _, number, indices, real, is_full, cursor), data in answers:
            rows = len(indices)
            yield Loaded(data, number, indices, rows, real, is_full, cursor=cursor)

    def describe(self, request: KeyedBatch) -> str:
        indices = shorten(listed(request.indices))
        return f"samples {indices} (epoch {request.epoch}, batch {request.number})"

    @abc.abstractmethod
    def cut(self, epoch: int, first: int) -> Iterator[tuple[Any, int, bool]]:
        """Yield indices, `real` and `is_full` of an epoch's batches from `first` on."""

    def __len__(self) -> int:
        full, rest = divmod(len(self.sampler), self.sampler.batch_size)
        return full + (rest > 0 and not self.drop_last)

    @property
    def batches_per_epoch(self) -> int | None:
        return len(self)

    def _order(self, epoch: int, first: int, start: int) -> Iterator[Any]:
        """The order from batch `first`, item `start` on, run apart from all else."""
        sampler = self.sampler
        key = rng.derive_key(sampler.seed, epoch)
        if sampler.overridden() == "__iter__":
            sampler.start_iter = first
            order = draw_apart(sampler.__iter__, key)
            items = list(islice(order, 1))  # a generator reads `start_iter` only now
            sampler.start_iter = 0
            return chain(items, order)
        return draw_apart(lambda: sampler.order(epoch, start), key)

    def _walked(self, epoch: int, first: int) -> Iterator[tuple[Any, int, bool]]:
        """Walk along the order, and take this rank's part of each batch."""
        whole = self.sampler.batch_size
        order = self._order(epoch, first, first * whole)
        while batch := list(islice(order, whole)):
            if (count := len(batch)) < whole and self.drop_last:
                return
            share = -(-count // self._parts)
            if missing := share * self._parts - count:
                batch += islice(cycle(self._order(epoch, 0, 0)), missing)
            start = self._part * share
            real = min(max(count - start, 0), share)
            yield batch[start : start + share], real, not missing


class SampleBatches(RankBatches):
    """Cuts an order of samples into batches.

    Global batch b is the positions [b*W*B, (b+1)*W*B) for W ranks of batch size B, and
    rank r has its r-th part. A short last batch of R samples is left out (`drop_last`),
    or each rank has ceil(R/W) of them, the missing ones from the start of the epoch.
    """

    def cut(self, epoch: int, first: int) -> Iterator[tuple[Any, int, bool]]:
        is_computed = self.sampler.overridden() == "at"
        found = (self._computed if is_computed else self._walked)(epoch, first)
        if not self.sampler.is_sharded:
            yield from found
            return
        # A rank's own order, with padding at its end.
        mine, size = self.sampler.real(self.rank), self.batch_size
        for number, (indices, _, _) in enumerate(found, first):
            real = min(max(mine - number * size, 0), len(indices))
            is_alone = self.world_size == 1 and real == len(indices)
            yield indices, real, is_alone or number + 1 < len(self)

    def _computed(self, epoch: int, first: int) -> Iterator[tuple[Any, int, bool]]:
        """Compute the batches of this rank, many at a time, and no others."""
        sampler, size, whole = self.sampler, self.batch_size, self.sampler.batch_size
        full, rest = divmod(len(sampler), whole)
        step = max(1, _BLOCK // size)
        own = self._part * size + np.arange(size)
        for start in range(first, full, step):
            batches = np.arange(start, min(start + step, full))
            positions = (batches[:, None] * whole + own).ravel()
            for row in sampler.at(epoch, positions).reshape(-1, size):
                yield row, size, True
        if rest and not self.drop_last and first <= full:
            share = -(-rest // self._parts)
            tail = self._part * share + np.arange(share)
            padding = (tail - rest) % len(sampler)
            positions = np.where(tail < rest, full * whole + tail, padding)
            real = int((tail < rest).sum())
            yield sampler.at(epoch, positions), real, share * self._parts == rest

    @property
    def num_samples(self) -> int | None:
        sampler, ranks = self.sampler, self.world_size
        whole = len(sampler)
        if sampler.is_sharded:
            whole = sum(sampler.real(rank) for rank in range(ranks))
        return min(whole, len(self) * self.batch_size * ranks)


class GivenBatches(RankBatches):
    """Deals the batches of a batch sampler out to the ranks.

    Global batch b is the batches [b*W, (b+1)*W) for W ranks, and rank r has the r-th.
    What is missing at the end is left out (`drop_last`), or taken from the start.
    """

    def cut(self, epoch: int, first: int) -> Iterator[tuple[Any, int, bool]]:
        for (batch,), is_real, _ in self._walked(epoch, first):
            # Other ranks' batches may have another size.
            yield list(batch), len(batch) * is_real, self.world_size == 1


def listed(indices: Any) -> list[Any]:
    """Indices as data sets are to see them: ints, not what numpy has for them."""
    found: list[Any] = indices
    return indices.tolist() if isinstance(indices, np.ndarray) else found


def shorten(value: Any) -> str:
    """The repr; of a long list that of its first values only."""
    if isinstance(value, list) and len(value) > _SHOWN:
        return f"{value[:_SHOWN]} and {len(value) - _SHOWN} more"
    return repr(value)
