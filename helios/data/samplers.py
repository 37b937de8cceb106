"""The order of samples: samplers whose epoch can be entered at any position."""

import enum
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from helios import rng
from helios.data.permutation import Permutation
from helios.registry import Registry

SAMPLER_REGISTRY = Registry("sampler")

_BLOCK = 4096


class ResumableSamplerType(enum.Enum):
    """The samplers that `DataLoaderParams.sampler` can name."""

    RANDOM = "random"
    SEQUENTIAL = "sequential"
    DISTRIBUTED = "distributed"


class ResumableSampler(Sampler[Any]):
    """Base of samplers whose epoch can be entered anywhere: override `at` or `order`.

    `at` is the quicker one, and needs no memory; `order` suits what can only be
    computed one after the other. Both must depend on the seed, the epoch and the
    position alone. One that yields lists of indices is a batch sampler; its positions,
    and its length, then count batches.

    `start_iter`, in batches, concerns the next iteration only; the loader sets
    `batch_size`: that of all ranks together, and `seed`, where None was given: that of
    the run. Older samplers override `__iter__`, which works too, if it leaves out
    `start_iter * batch_size` samples.
    """

    #: Whether the sampler yields the part of one rank, rather than all ranks' samples;
    #: all ranks must have as many.
    is_sharded = False
    _plan: Callable[[], Any] | None = None  # what uses it, as long as that lives

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
        self.has_seed = seed is not None
        self.seed = rng.get_default_seed() if seed is None else seed
        self.start_iter, self.epoch = start_iter, 0

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_plan"}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def at(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the samples at positions in [0, len), as an array of their shape."""
        name = type(self).__name__
        raise NotImplementedError(f"{name} must override `at` or `order`")

    def order(self, epoch: int, start: int) -> Iterator[Any]:
        """Yield the epoch's samples from position `start` on."""
        for first in range(start, len(self), _BLOCK):
            last = min(first + _BLOCK, len(self))
            yield from self.at(epoch, np.arange(first, last)).tolist()

    def real(self, rank: int) -> int:
        """Of one that `is_sharded`: how many samples of a rank are no padding."""
        return len(self)

    def identity(self) -> dict[str, Any]:
        """What the order depends on, as plain values."""
        own = {"seed of the sampler": self.seed} if self.has_seed else {}
        return {"sampler": type(self).__name__, **own}

    def __iter__(self) -> Iterator[Any]:
        start, self.start_iter = self.start_iter * self.batch_size, 0
        return self.order(self.epoch, start)

    def __len__(self) -> int:
        return len(self.data_source)

    def overridden(self) -> str:
        """Which of "at", "order" and "__iter__" the most derived class defines."""
        for cls in type(self).__mro__:
            for name in ("__iter__", "order", "at"):
                if name in vars(cls):
                    # Both in one class: `order` is the base's business then.
                    return "at" if "at" in vars(cls) and name == "order" else name
        raise AssertionError("the base defines all of them")


@SAMPLER_REGISTRY.register
class ResumableSequentialSampler(ResumableSampler):
    """The samples in order."""

    def at(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return positions


@SAMPLER_REGISTRY.register
class ResumableRandomSampler(ResumableSampler):
    """The samples in a shuffled order, another one in every epoch."""

    def at(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        key = rng.derive_key(self.seed, epoch)
        return Permutation(len(self), key).at(positions)


@SAMPLER_REGISTRY.register
class ResumableSubsetRandomSampler(ResumableSampler):
    """Some samples, those of `indices`, in a shuffled order."""

    def __init__(self, indices: ArrayLike, **options: Any) -> None:
        found = np.asarray(indices)
        if found.ndim != 1 or found.size == 0 or found.dtype.kind not in "iu":
            raise ValueError(
                f"`indices` must be a list of ints, not empty, got {indices!r:.200}"
            )
        super().__init__(found.astype(np.int64), **options)

    def at(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        key = rng.derive_key(self.seed, epoch)
        found: NDArray[np.int64] = self.data_source[
            Permutation(len(self), key).at(positions)
        ]
        return found

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "indices": checksum(self.data_source)}


@SAMPLER_REGISTRY.register
class ResumableDistributedSampler(ResumableSampler):
    """One rank's samples, as the loader would cut them out of the whole order.

    For older projects: the loader shares every other sampler's order out by itself.
    """

    is_sharded = True

    def __init__(
        self,
        data_source: Any,
        *,
        num_replicas: int,
        rank: int,
        shuffle: bool = True,
        drop_last: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(data_source, **options)
        self.num_replicas, self.rank = num_replicas, rank
        self.shuffle, self.drop_last = shuffle, drop_last

    def at(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        whole, size, ranks = len(self.data_source), self.batch_size, self.num_replicas
        full, rest = divmod(whole, size * ranks)
        found = positions // size * size * ranks + self.rank * size + positions % size
        # The last batch: ceil(rest / ranks) of each rank, the missing ones from the
        # start of the epoch.
        tail = -(-rest // ranks) * self.rank + positions - full * size
        last = np.where(tail < rest, full * size * ranks + tail, (tail - rest) % whole)
        found = np.where(positions < full * size, found, last)
        if not self.shuffle:
            return found
        return Permutation(whole, rng.derive_key(self.seed, epoch)).at(found)

    def real(self, rank: int) -> int:
        full, rest = divmod(len(self.data_source), self.batch_size * self.num_replicas)
        share = -(-rest // self.num_replicas)
        last = 0 if self.drop_last else min(max(rest - rank * share, 0), share)
        return full * self.batch_size + last

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "shuffle": self.shuffle}

    def __len__(self) -> int:
        full, rest = divmod(len(self.data_source), self.batch_size * self.num_replicas)
        share = -(-rest // self.num_replicas)
        return full * self.batch_size + (0 if self.drop_last else share)


def create_sampler(type_name: str, *args: Any, **options: Any) -> ResumableSampler:
    """Make a registered sampler by its class's name."""
    sampler: ResumableSampler = SAMPLER_REGISTRY.get(type_name)(*args, **options)
    return sampler


def checksum(values: ArrayLike) -> int:
    """A checksum of numbers, to know them again."""
    return zlib.crc32(np.ascontiguousarray(values).tobytes())
