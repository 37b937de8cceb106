"""Samplers that were not made for Helios: replayed, indices only, up to the start."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from torch.utils.data import BatchSampler, DistributedSampler, Sampler

from helios import rng
from helios.data.samplers import ResumableSampler
from helios.errors import DataError, ResumeError

_DRAWN_AHEAD = 1024  # what a user's sampler is asked for at once


class ReplayedSampler(ResumableSampler):
    """Makes any sampler, or batch sampler, resumable.

    Each epoch runs under random numbers of its own, those of (seed, epoch), the
    sampler's own generators included, and touches no others. `fingerprint` tells, at a
    resume, that the order is the same.
    """

    def __init__(self, sampler: Iterable[Any], *, seed: int | None = None) -> None:
        if isinstance(sampler, Iterator):
            raise TypeError(f"`sampler` must be re-iterable, got iterator {sampler!r}")
        super().__init__(sampler, seed=seed)
        self.sampler = sampler
        self.fingerprint: int | None = None
        self.expected: int | None = None
        self.is_sharded = any(hasattr(p, "num_replicas") for p in _parts(sampler))

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        for part in _parts(self.sampler):  # its length may depend on it
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def order(self, epoch: int, start: int) -> Iterator[Any]:
        key = rng.derive_key(self.seed, epoch)
        generators = [p for p in _parts(self.sampler) if isinstance(p, rng.GENERATORS)]
        items = draw_apart(lambda: self._replay(epoch, key), key, generators)
        begin = list(islice(items, _DRAWN_AHEAD))
        found = zlib.crc32(repr([_plain(item) for item in begin]).encode())
        expected, self.expected = self.expected, None
        if expected not in (None, found):
            raise ResumeError(
                f"{type(self.sampler).__name__} yields another order for epoch {epoch} "
                "than before the stop: it depends on something that is not saved; "
                "give it a `set_epoch`, or derive it from helios.data.ResumableSampler"
            )
        self.fingerprint = found
        return islice(chain(begin, items), start, None)

    def check(self) -> None:
        """Iterate twice, for a moment; DataError where the orders differ."""
        is_torch = type(self.sampler).__module__.startswith("torch.utils.data")
        if is_torch and not isinstance(self.sampler, BatchSampler):
            return  # their only state are generators
        self.order(0, 0)
        first, _ = self.fingerprint, self.order(0, 0)
        if self.fingerprint != first:
            raise DataError(
                f"{type(self.sampler).__name__} yields another order when it is "
                "iterated again with the same seeds, so that a resume could not repeat "
                "it; keep no state between iterations: use `set_epoch`"
            )

    def identity(self) -> dict[str, Any]:
        return {"sampler": type(self.sampler).__name__}

    def real(self, rank: int) -> int:
        if type(self.sampler) is not DistributedSampler:
            return len(self)  # what others repeat, they may mean to
        dataset: Any = self.sampler.dataset
        share = -(-(len(dataset) - rank) // self.sampler.num_replicas)
        return min(len(self), share)

    def _replay(self, epoch: int, key: int) -> Iterator[Any]:
        # The inner ones first: what a sampler does with those inside of it counts more.
        for number, part in reversed(list(enumerate(_parts(self.sampler)))):
            own = rng.derive_key(key, number)
            if isinstance(part, rng.GENERATORS):
                rng.seed_generator(part, own)
            elif hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        yield from self.sampler

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]  # the TypeError is meant


def draw_apart(
    make: Callable[[], Iterator[Any]], key: int, generators: Sequence[Any] = ()
) -> Iterator[Any]:
    """Yield from a user's iterator, made and run under random numbers of its own.

    So are those of its `generators`, which others may use between two of its items.
    """
    drawn: list[Any] = [None]
    state = items = None
    while drawn:
        others = [*map(rng.generator_state, generators)]
        with rng.isolated_rng(key):
            if state is not None:
                rng.restore_rng(state[0])
                for generator, own in zip(generators, state[1], strict=True):
                    rng.set_generator_state(generator, own)
            items = make() if items is None else items
            drawn = list(islice(items, _DRAWN_AHEAD))
            state = rng.capture_rng(), [*map(rng.generator_state, generators)]
        for generator, own in zip(generators, others, strict=True):
            rng.set_generator_state(generator, own)
        yield from drawn


def yields_batches(sampler: ResumableSampler) -> bool:
    """Whether it is a batch sampler; asks it for the first item of epoch 0."""
    if sampler.overridden() == "at":
        return False
    key = rng.derive_key(sampler.seed, 0)
    epoch, start = sampler.epoch, sampler.start_iter
    sampler.epoch, sampler.start_iter = 0, 0
    first = next(draw_apart(sampler.__iter__, key), 0)
    sampler.epoch, sampler.start_iter = epoch, start
    return isinstance(first, list | tuple) or getattr(first, "ndim", 0) > 0


def _parts(sampler: Any, seen: tuple[Any, ...] = ()) -> Iterator[Any]:
    """A sampler, the samplers inside of it, and the generators that they hold."""
    yield sampler
    seen = (*seen, sampler)
    for name, member in getattr(sampler, "__dict__", {}).items():
        if isinstance(member, rng.GENERATORS):
            yield member
        elif isinstance(member, Sampler) or name in ("sampler", "batch_sampler"):
            if not any(member is one for one in seen):
                yield from _parts(member, seen)


def _plain(item: Any) -> Any:
    return item.tolist() if hasattr(item, "tolist") else item
