"""What is known of other packages' streams: their states, their parts, their traps."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch.utils import data

from helios.data import seeding
from helios.rng import derive_key


class _EpochSampler:
    """One of torch's random samplers, its order a function of (seed, epoch)."""

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        own = copy.copy(self.sampler)  # others may still read, in threads
        key = derive_key(self.seed, self.epoch)
        own.generator = torch.Generator().manual_seed(key)
        return iter(own)

    def __len__(self) -> int:
        return len(self.sampler)


def make_repeatable(dataset: Any, seed: int) -> None:
    """Have the packages' streams depend on nothing but a seed, an epoch and a state.

    The nodes of torchdata save an epoch and a position, and not a sampler's generator.
    `datasets` shares the epoch's number among workers, which set it at the same time.
    """
    kinds = data.RandomSampler | data.SubsetRandomSampler | data.WeightedRandomSampler
    for number, stage in enumerate(_stages(dataset)):
        if is_of_datasets(stage):
            stage._epoch = torch.tensor(int(stage._epoch))
        elif type(stage).__name__ == "SamplerWrapper":
            if isinstance(stage.sampler, kinds):
                stage.sampler = _EpochSampler(stage.sampler, derive_key(seed, number))


def is_stream(dataset: Any) -> bool:
    """Whether a data set can only be iterated."""
    if isinstance(dataset, data.IterableDataset):
        return True
    return hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__")


def has_state(holder: Any) -> bool:
    """Whether it follows torchdata's protocol of state."""
    return hasattr(holder, "state_dict") and hasattr(holder, "load_state_dict")


def streams_of(dataset: Any, num_workers: int, world_size: int) -> int:
    """How many streams a rank is to have."""
    shards, sharers = getattr(dataset, "num_shards", None), world_size
    if is_part_of_rank(dataset):
        sharers = 1
    most = num_workers if shards is None else min(num_workers, shards // sharers)
    return max(1, most)


def initial_states(dataset: Any) -> dict[str, Any]:
    """The states of a data set that is not read yet, as far as it has any."""
    if is_of_datasets(dataset):
        return {"epoch": None}  # its state would be that of the last look into it
    if has_state(dataset):
        with contextlib.suppress(Exception):  # some have one only once they are read
            state = copy.deepcopy(dataset.state_dict())
            if getattr(dataset, "_iter_for_state_dict", False):
                iter(dataset)  # torchdata's Loader would pass over what it loads next
            return {"dataset": state}
    return {}


def _stages(stream: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """A stream, and the streams that it is made of."""
    seen = set() if seen is None else seen
    if id(stream) in seen:
        return
    seen.add(id(stream))
    yield stream
    for value in list(getattr(stream, "__dict__", {}).values()):
        inner = value.values() if isinstance(value, Mapping) else value
        listed = inner if isinstance(value, Mapping | list | tuple) else [value]
        for further in takewhile(is_stream, listed):
            yield from _stages(further, seen)


def is_of_datasets(dataset: Any) -> bool:
    """Whether it is a stream of `datasets`, which each epoch begins anew."""
    return hasattr(dataset, "_ex_iterable")


def is_part_of_rank(dataset: Any) -> bool:
    """Whether the user shared it out to the ranks (`split_dataset_by_node`)."""
    return getattr(dataset, "_distributed", None) is not None


def loses_samples(dataset: Any, *, is_shard: bool) -> bool:
    """Whether a state of `datasets` leaves something out, or cannot be loaded.

    What waits in a shuffle's buffer is not in it. Of shards it is loaded into the
    whole pipeline first, which does not fit where that joins more shards.
    """
    for stage in _stages(dataset):
        name = type(stage).__name__
        if "BufferShuffled" in name and stage.buffer_size > 1:
            return True
        if is_shard and ("InterleavedShards" in name or "VerticallyConcat" in name):
            return True
    return False


def computes_ahead(dataset: Any) -> bool:
    """Whether samples are made several at once, and made again after a resume.

    That would draw other random numbers: of `datasets`, batched and asynchronous maps.
    """
    return any(
        getattr(stage, "batched", False)
        or inspect.iscoroutinefunction(getattr(stage, "function", None))
        or type(stage).__name__ == "Unbatcher"  # of torchdata
        for stage in _stages(dataset)
    )


def has_drawn(seed: Callable[[], None]) -> bool:
    """Whether numbers were drawn since `seed` was called, which is called again: 15 µs.

    What the generators give next is then of no use.
    """
    if seeding._current.made is not None:
        return True
    found = _draw()
    seed()
    return found != _draw()


def _draw() -> tuple[float, ...]:
    own = torch.rand((), dtype=torch.float64, device="cpu").item()
    return random.random(), np.random.random(), own
