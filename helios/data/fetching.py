"""Fetching of batches from map-style data sets, in whichever process it runs."""

from __future__ import annotations

import contextlib
import gc
import signal
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import reduction
from typing import Any, NoReturn

import numpy as np
import torch
from torch.multiprocessing import reductions
from torch.utils import data

from helios.data.batches import KeyedBatch, listed, shorten
from helios.data.gathering import gatherer
from helios.data.seeding import forget_key, number_of, seed_for
from helios.errors import DataError
from helios.rng import isolated_rng

IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_SHOWN = 8


def init_worker(worker_id: int) -> None:
    """Have a loader's worker ignore what asks a run to save or stop, and unblock it."""
    # To let go of its parent's garbage, pinned or on a GPU, would abort the worker.
    gc.freeze()
    gc.enable()
    # A signal to all processes must not take the workers of a run that is to be saved.
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)
    # Torch sends a lazily conjugated or negated tensor as what it was before.
    reduction.ForkingPickler.register(torch.Tensor, _reduce_resolved)


def _reduce_resolved(tensor: torch.Tensor) -> Any:
    resolved = tensor.resolve_conj().resolve_neg()
    return reductions.reduce_tensor(resolved)  # type: ignore[no-untyped-call]


class SeededDataset(data.Dataset[Any]):
    """A data set that is asked for collated batches, and seeds what they draw.

    `torch`, `random` and `numpy.random` are seeded before each sample with (seed,
    epoch, index); before the collate function, or a data set's own `__getitems__`, with
    (seed, epoch, batch, first index), which tells ranks apart. In the main process the
    generators' states are put back.

    In-memory data with the default collate function draw nothing, and are gathered at
    once, to the same bits.
    """

    def __init__(
        self, dataset: Any, collate_fn: Callable[[Any], Any] | None = None
    ) -> None:
        self.dataset = dataset
        self.collate_fn = data.default_collate if collate_fn is None else collate_fn
        self._fetches_batches = _fetches_batches(dataset)
        is_plain = self.collate_fn is data.default_collate
        self._gather = gatherer(dataset) if is_plain else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]

    def __getitems__(self, batch: KeyedBatch) -> list[Any]:
        """Return the collated batch, as the only item.

        Raises:
            DataError: for a StopIteration, which would end the epoch in silence.
            Exception: what the data set or the collate function raised, with a note.
        """
        if self._gather is not None:
            # Where it fails, one by one is tried: that may succeed, as with negative
            # indices, and its errors name the sample.
            with contextlib.suppress(Exception):
                indices = np.asarray(batch.indices)
                if indices.dtype.kind == "i":
                    return [self._gather(indices.astype(np.int64, copy=False))]
        try:
            if data.get_worker_info() is not None:
                return [self._fetch(batch)]
            with isolated_rng(batch.key):
                return [self._fetch(batch)]
        except Exception as error:
            raise sendable(error) from error.__cause__
        finally:
            forget_key()

    def _fetch(self, batch: KeyedBatch) -> Any:
        indices, items = listed(batch.indices), []
        if not indices:
            where = f"epoch {batch.epoch}, batch {batch.number}"
            raise DataError(f"the batch sampler gave a batch without samples ({where})")
        first = number_of(indices[0])
        try:
            if self._fetches_batches:
                # Of four parts: the key of no sample, which is of two.
                seed_for(batch.key, batch.number, first, 0)
                items = self.dataset.__getitems__(indices)
            else:
                for index in indices:
                    seed_for(batch.key, number_of(index))
                    items.append(self.dataset[index])
        except Exception as error:
            at = indices if self._fetches_batches else indices[len(items)]
            _fail(error, f"in sample {shorten(at)}", batch)
        seed_for(batch.key, batch.number, first, 1)
        try:
            return self.collate_fn(items)
        except Exception as error:
            shapes = f"with the shapes {_shapes(indices, items)}"
            _fail(error, f"in collating samples {shorten(indices)} {shapes}", batch)


def sendable(error: Exception) -> Exception:
    """The error, or a DataError where a worker could not send it: it would hang."""
    if data.get_worker_info() is None:
        return error
    try:
        reduction.ForkingPickler.dumps(type(error))
        is_simple = not isinstance(error, ExceptionGroup)  # which torch cannot make
    except Exception:
        is_simple = False
    if is_simple:
        return error
    text = "".join(traceback.format_exception(error))
    return DataError(f"{type(error).__name__}, which a worker cannot send:\n{text}")


def _fetches_batches(dataset: Any) -> bool:
    """Whether a user's `__getitems__` is at work; torch's own only pass calls on."""
    if not callable(getattr(dataset, "__getitems__", None)):
        return False
    method = getattr(type(dataset), "__getitems__", None)
    if method is data.Subset.__getitems__:
        return _fetches_batches(dataset.dataset)
    if method is data.StackDataset.__getitems__:
        parts = dataset.datasets
        return any(map(_fetches_batches, getattr(parts, "values", lambda: parts)()))
    return True


def _fail(error: Exception, where: str, batch: KeyedBatch) -> NoReturn:
    note = f"{where} (epoch {batch.epoch}, batch {batch.number})"
    error.add_note(f"Helios: {note}")
    if isinstance(error, StopIteration):
        raise DataError(f"StopIteration {note}; raise another error") from error
    raise error


def _shapes(indices: list[Any], items: list[Any]) -> str:
    """Each shape that there is, and of which samples: the odd ones are to be seen."""
    found: dict[str, list[Any]] = {}
    for index, item in zip(indices, items, strict=False):
        found.setdefault(str(shape_of(item)), []).append(index)
    rarest = sorted(found, key=lambda shape: len(found[shape]))[:_SHOWN]
    text = "; ".join(f"{shape} of {shorten(found[shape])}" for shape in rarest)
    return text if len(found) <= _SHOWN else f"{text}; and {len(found) - _SHOWN} more"


def shape_of(item: Any) -> Any:
    """An item with shapes, or type names, in place of its leaves."""
    if hasattr(item, "shape"):
        return tuple(item.shape)
    if isinstance(item, Mapping):
        return {name: shape_of(value) for name, value in item.items()}
    if isinstance(item, tuple | list):
        more = [f"and {len(item) - _SHOWN} more"] if len(item) > _SHOWN else []
        return [shape_of(value) for value in item[:_SHOWN]] + more
    return type(item).__name__
