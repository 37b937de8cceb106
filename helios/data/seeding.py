"""Fetching of batches, under random numbers of (seed, epoch, sample) alone."""

import contextlib
import operator
import reprlib
import signal
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import data

from helios.data.samplers import KeyedBatch
from helios.errors import DataError
from helios.rng import derive_key, isolated_rng, seed_globals

IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def init_worker(worker_id: int) -> None:
    """Have a loader's worker ignore SIGINT and SIGTERM, and unblock them."""
    # A signal to all processes must not take the workers of a run that is to be saved.
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)


def kill_workers(workers: list[Any]) -> None:
    """Kill a loader's workers, for whose end an exit of Python would wait for ever."""
    for worker in workers:
        with contextlib.suppress(RuntimeError):  # torch's handler of SIGCHLD, if any
            worker.kill()
            worker.join()


class SeededDataset(data.Dataset[Any]):
    """A data set that is asked for collated batches, and seeds what they draw.

    `torch`, `random` and `numpy.random` are seeded before each sample with (seed,
    epoch, index); before the collate function with (seed, epoch, batch, first index),
    which tells ranks apart. In the main process the generators' states are put back.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[Any], Any] | None) -> None:
        self.dataset = dataset
        self.collate_fn = data.default_collate if collate_fn is None else collate_fn
        self._is_gathered = (  # at once, to the same bits: nothing is drawn
            type(dataset) is data.TensorDataset
            and self.collate_fn is data.default_collate
            and all(map(_is_plain, dataset.tensors))
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]

    def __getitems__(self, batch: KeyedBatch) -> list[Any]:
        """Return the collated batch, as the only item; errors name the sample."""
        if self._is_gathered or data.get_worker_info() is not None:
            return [self._fetch(batch)]
        with isolated_rng(batch.key):
            return [self._fetch(batch)]

    def _fetch(self, batch: KeyedBatch) -> Any:
        key, number, indices = batch
        at: Any = indices
        try:
            if self._is_gathered:
                index, tensors = torch.tensor(indices), self.dataset.tensors
                return [t.index_select(0, index.to(t.device)) for t in tensors]
            first, items = operator.index(indices[0]), []
            for at in indices:
                seed_globals(derive_key(key, operator.index(at)))
                items.append(self.dataset[at])
            at = indices
            # Of three parts: the key of no sample, which is of two.
            seed_globals(derive_key(key, number, first))
            return self.collate_fn(items)
        except Exception as error:
            note = f"in sample {reprlib.repr(at)} of batch {number}"
            error.add_note(f"Helios: {note}")
            if isinstance(error, StopIteration):  # it would end the epoch in silence
                raise DataError(f"StopIteration {note}; raise another error") from error
            raise


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether default_collate would stack the rows into a plain tensor."""
    is_strided = tensor.layout is torch.strided and not tensor.is_nested
    return type(tensor) is torch.Tensor and is_strided
