"""Fetching of batches, under random numbers of (seed, epoch, sample) alone."""

import operator
import signal
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch.utils.data import (
    Dataset,
    StackDataset,
    Subset,
    TensorDataset,
    default_collate,
    get_worker_info,
)

from helios.data.samplers import KeyedBatch
from helios.errors import DataError
from helios.rng import derive_key, isolated_rng, seed_globals

__all__ = ["IGNORED_SIGNALS", "SeededDataset", "init_worker"]

IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOWN = 8


def init_worker(worker_id: int) -> None:
    """Have a loader's worker ignore SIGINT and SIGTERM, and unblock them.

    A signal to the whole process group must not take the workers from a run that is
    about to be saved. `ResumableDataLoader` starts them with these signals blocked, and
    ends them.
    """
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)


class SeededDataset(Dataset[Any]):
    """A data set that is asked for collated batches, and seeds what they draw.

    `torch`, `random` and `numpy.random` are seeded before each sample with (seed,
    epoch, index); before the collate function, or a data set's own `__getitems__`,
    with (seed, epoch, batch, first index), which tells ranks apart. In the main process
    the generators' states are put back.

    A plain `TensorDataset` with the default collate function draws nothing, and is
    gathered at once, to the same bits.
    """

    def __init__(
        self, dataset: Any, collate_fn: Callable[[Any], Any] | None = None
    ) -> None:
        self.dataset = dataset
        self.collate_fn = default_collate if collate_fn is None else collate_fn
        self._fetches_batches = _fetches_batches(dataset)
        self._is_gathered = (
            type(dataset) is TensorDataset
            and self.collate_fn is default_collate
            and all(map(_is_plain, dataset.tensors))
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]

    def __getitems__(self, batch: KeyedBatch) -> Any:
        """Return the collated batch.

        Raises:
            DataError: for a StopIteration, which would end the epoch in silence.
            Exception: what the data set or the collate function raised, with a note.
        """
        if self._is_gathered:
            return self._gather(batch)
        if get_worker_info() is not None:
            return self._fetch(batch)
        with isolated_rng(batch.key):
            return self._fetch(batch)

    def _gather(self, batch: KeyedBatch) -> list[torch.Tensor]:
        index = torch.tensor(batch.indices)
        try:
            return [t.index_select(0, index.to(t.device)) for t in self.dataset.tensors]
        except Exception as error:
            _fail(
                error, f"in samples {_shorten(batch.indices)} of batch {batch.number}"
            )

    def _fetch(self, batch: KeyedBatch) -> Any:
        key, number, indices = batch
        first = _number(indices[0])
        items: list[Any] = []
        try:
            if self._fetches_batches:
                # Of four parts: the key of no sample, which is of two.
                seed_globals(derive_key(key, number, first, 0))
                items = self.dataset.__getitems__(indices)
            else:
                for index in indices:
                    seed_globals(derive_key(key, _number(index)))
                    items.append(self.dataset[index])
        except Exception as error:
            failed = indices if self._fetches_batches else indices[len(items)]
            _fail(error, f"in sample {_shorten(failed)} of batch {number}")
        seed_globals(derive_key(key, number, first, 1))
        try:
            return self.collate_fn(items)
        except Exception as error:
            shapes = _shorten([_shape(item) for item in items])
            _fail(
                error,
                f"in collating batch {number}: samples {_shorten(indices)}, "
                f"shapes {shapes}",
            )


def _fetches_batches(dataset: Any) -> bool:
    """Whether a user's `__getitems__` is at work; torch's own only pass calls on."""
    if not callable(getattr(dataset, "__getitems__", None)):
        return False
    method = getattr(type(dataset), "__getitems__", None)
    if method is Subset.__getitems__:
        return _fetches_batches(dataset.dataset)
    if method is StackDataset.__getitems__:
        parts = dataset.datasets
        return any(map(_fetches_batches, getattr(parts, "values", lambda: parts)()))
    return True


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether default_collate would stack the rows into a plain tensor."""
    return (
        type(tensor) is torch.Tensor
        and tensor.layout is torch.strided
        and not tensor.is_nested
    )


def _number(index: Any) -> int:
    """Return the number of an index that a user's sampler may have made of anything."""
    try:
        return operator.index(index)
    except TypeError:
        return zlib.crc32(repr(index).encode())


def _fail(error: Exception, note: str) -> NoReturn:
    error.add_note(f"Helios: {note}")
    if isinstance(error, StopIteration):
        raise DataError(f"StopIteration {note}; raise another error") from error
    raise error


def _shape(item: Any) -> Any:
    """Return an item with shapes, or type names, in place of its leaves."""
    if hasattr(item, "shape"):
        return tuple(item.shape)
    if isinstance(item, Mapping):
        return {name: _shape(value) for name, value in item.items()}
    if isinstance(item, tuple | list):
        return [_shape(value) for value in item[:_SHOWN]]
    return type(item).__name__


def _shorten(value: Any) -> str:
    """Return the repr, of a long list that of its first values only."""
    if isinstance(value, list) and len(value) > _SHOWN:
        return f"{value[:_SHOWN]} and {len(value) - _SHOWN} more"
    return repr(value)
