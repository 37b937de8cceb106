"""Ordinary loaders made resumable, also those that Accelerate has prepared."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from helios import rng
from helios.data import fetching, loader
from helios.data.batches import Loaded, Plan, SampleBatches
from helios.data.feed import Feed
from helios.data.packages import is_of_datasets, is_stream
from helios.data.params import DataLoaderParams
from helios.data.streams import StreamedDataset
from helios.errors import DataError, ResumeError

_SETTINGS = ("num_workers", "pin_memory", "pin_memory_device", "persistent_workers")


class AdoptedLoader(loader.ResumableDataLoader):
    """A resumable loader in the place of an ordinary one.

    Where it stands is its `state_dict`, for those who save it themselves, with what
    `register_for_checkpointing` does for example. The batch that was given out last
    counts as done, and an iteration goes on behind it after `load_state_dict`.
    """

    _is_accelerate_prepared = True  # so that Accelerate leaves it as it is
    # What Accelerate asks of the loader that is being read.
    end_of_dataloader = False
    remainder = -1

    def __init__(
        self, dataset: Any, plan: Plan, *, draws: bool = True, **options: Any
    ) -> None:
        self._draws = draws
        self._at: tuple[int, int, Any] = (0, 0, None)
        self._is_sought = True
        self.device: Any = None
        self.gradient_state: Any = None
        super().__init__(dataset, plan, **options)

    def seek(self, epoch: int, batch: int = 0, cursor: Any = None) -> None:
        super().seek(epoch, batch, cursor)
        self._at, self._is_sought = (epoch, batch, cursor), True

    def set_epoch(self, epoch: int) -> None:
        """Have the next iteration be that of an epoch; inside of it, go on there."""
        if epoch != self._at[0]:
            self.seek(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, as plain values."""
        epoch, batch, cursor = self._at
        place = {"epoch": epoch, "batch": batch, "cursor": cursor}
        return {**place, "streams": self.plan.streams}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Have the next iteration go on where :meth:`state_dict` was asked for.

        Raises:
            ResumeError: it cannot go on there.
        """
        if state["streams"] != self.plan.streams:
            raise ResumeError(
                f"the data set was read in {state['streams']} streams, and is read in "
                f"{self.plan.streams}, which would change the order; set `num_workers` "
                "as it was"
            )
        self.seek(state["epoch"], state["batch"], state["cursor"])

    def fetch(self) -> Any:
        epoch, batch, _ = self._at
        # Torch's loaders draw a seed for their workers, whether they have any or not:
        # what a script draws after it, for dropout for example, is to stay the same.
        is_first = epoch == 0 or not self.persistent_workers
        if self._draws and batch == 0 and is_first:
            torch.empty((), dtype=torch.int64, device="cpu").random_()
        return super().fetch()

    def __iter__(self) -> Any:
        epoch, done, cursor = self._at
        if not self._is_sought and done:  # the last iteration was broken off
            epoch, done, cursor = epoch + 1, 0, self.plan.next_epoch(cursor)
        self.seek(epoch, done, cursor)
        self._is_sought = False
        feed = Feed(self, self._place)
        with self.reported():
            while feed.peek():
                loaded = feed.take()
                self.mark(loaded, feed)
                done, cursor = done + 1, loaded.cursor
                self._at = (epoch, done, cursor)
                yield loaded.data
            feed.check()
        self._at = (epoch + 1, 0, self.plan.next_epoch(cursor))

    @contextlib.contextmanager
    def reported(self) -> Iterator[None]:
        """Tell Accelerate that this loader is being read.

        Its `accumulate` and `gather_for_metrics` ask whether a batch is the last one,
        which is for the reader to set, and how many samples it then has.
        """
        self.end_of_dataloader, self.remainder = False, -1
        if isinstance(self.plan, SampleBatches) and not self.plan.drop_last:
            whole = self.plan.batch_size * self.plan.world_size
            self.remainder = (self.plan.num_samples or 0) % whole
        if self.gradient_state is not None:
            self.gradient_state._add_dataloader(self)
        try:
            yield
        finally:
            if self.gradient_state is not None:
                self.gradient_state._remove_dataloader(self)

    def mark(self, loaded: Loaded, feed: Feed) -> None:
        """Tell Accelerate whether a batch is the last one, and how many samples it has.

        Those of a stream are known only now.
        """
        self.end_of_dataloader = feed.ends_with(loaded)
        if loaded.total is not None:
            self.remainder = loaded.total

    def _place(self, batch: Any) -> Any:
        if self.device is None:
            return batch
        # Imported here: workers import this module, and have no use for Accelerate.
        from helios.engine import send_to_device

        return send_to_device(batch, self.device, non_blocking=True)


class EvenBatches(SampleBatches):
    """Deals samples out as Accelerate does.

    All batches are full: what the last ones lack is taken from the start of the epoch.
    """

    def cut(self, epoch: int, first: int) -> Iterator[tuple[Any, int, bool]]:
        whole, size = self.sampler.batch_size, self.batch_size
        full, rest = divmod(len(self.sampler), whole)
        if self._parts == 1 or self.drop_last or not rest:
            yield from super().cut(epoch, first)
            return
        yield from islice(super().cut(epoch, first), max(full - first, 0))
        if first <= full:
            batch = list(islice(self._order(epoch, full, full * whole), whole))
            batch += islice(cycle(self._order(epoch, 0, 0)), whole - len(batch))
            start = self._part * size
            real = min(max(rest - start, 0), size)
            yield batch[start : start + size], real, False


def make_resumable(
    dataloader: DataLoader[Any], *, seed: int | None = None
) -> AdoptedLoader:
    """Make a loader that can go on anywhere, in the place of an ordinary one.

    It has the batches of this rank. Of several ranks all must call it, with the same
    `seed`; None is torch's own, as ``set_seed`` has set it.

    The order of the samples is that of the sampler, which is run again to get to a
    place. A plain ``shuffle=True``, which torch draws anew each time, becomes a shuffle
    by seed and epoch; other samplers that draw do so from numbers of (seed, epoch), and
    so do data sets and collate functions: see `create_dataloader`.

    One that Accelerate has prepared is taken to pieces: its batches are placed on the
    device, and `accumulate` and `gather_for_metrics` work with it. What this returns,
    `prepare` leaves alone.

    Raises:
        DataError: it has something that cannot be taken over, or could yield nothing.
        TypeError: it is no loader of torch.
    """
    seed = torch.initial_seed() if seed is None else seed
    return adopt(dataloader, rng.derive_key(seed, 0, 0), "dataloader")


def adopt(
    dataloader: Any, key: int, name: str, streams: int | None = None
) -> AdoptedLoader:
    """As `make_resumable`, with the key of its order; `name` is for messages."""
    check_loader(dataloader, name)
    if isinstance(dataloader, AdoptedLoader):
        if streams not in (None, dataloader.plan.streams):
            dataloader.load_state_dict({"streams": streams})  # which says why not
        return dataloader
    params = {field: getattr(dataloader, field) for field in _SETTINGS}
    for field in ("timeout", "multiprocessing_context"):
        params[field] = getattr(dataloader, field)
    if dataloader.num_workers:
        params["prefetch_factor"] = dataloader.prefetch_factor
    if dataloader.collate_fn is not default_collate:
        params["collate_fn"] = dataloader.collate_fn
    dataset = dataloader.dataset
    if _is_shared_out(dataset):
        dataset = dataset.dataset
    params |= (_of_stream if is_stream(dataset) else _of_samples)(dataloader, name)
    found, _ = loader.create_dataloader(dataset, params, seed=key, streams=streams)
    adopted = _as_accelerate_deals(found, DataLoaderParams.from_dict(params))
    adopted._draws = dataloader.generator is None
    if (own := dataloader.worker_init_fn) is not None:
        adopted.worker_init_fn = functools.partial(_init_worker, own)
    adopted.gradient_state = getattr(dataloader, "gradient_state", None)
    dispatcher = getattr(dataloader, "state", None)
    adopted.device = getattr(dataloader, "device", getattr(dispatcher, "device", None))
    return adopted


def check_loader(dataloader: Any, name: str) -> None:
    """Raise a TypeError or DataError where it cannot be adopted, whatever its data."""
    if not isinstance(dataloader, DataLoader):
        raise TypeError(
            f"`{name}` must be a torch DataLoader, prepared by Accelerate or not, got "
            f"{type(dataloader).__name__}"
        )
    if isinstance(dataloader, AdoptedLoader):
        return
    inner = getattr(dataloader, "base_dataloader", dataloader)
    kind = type(inner)
    if isinstance(inner, loader.ResumableDataLoader):
        raise DataError(
            f"`{name}` is a loader of Helios already; pass the ordinary DataLoader, "
            "with its data set"
        )
    is_known = kind.__iter__ is DataLoader.__iter__ or "torchdata" in kind.__module__
    if not is_known:
        raise DataError(
            f"`{name}` is a {kind.__name__}, whose own `__iter__` cannot be entered "
            "anywhere; put what it does into the data set or the `collate_fn`"
        )
    if getattr(dataloader, "skip_batches", 0) or hasattr(
        dataloader.batch_sampler, "skip_batches"
    ):
        raise DataError(
            f"`{name}` skips its first batches; leave out `skip_first_batches`: a "
            "resumed loader goes on behind the last batch that is done"
        )


def _is_shared_out(dataset: Any) -> bool:
    """Whether Accelerate has put around a stream what shares it out to the ranks."""
    return type(dataset).__name__ == "IterableDatasetShard"


def _of_stream(dataloader: Any, name: str) -> dict[str, Any]:
    """The parameters of the batches of an iterable data set."""
    world_size = loader._ranks(DataLoaderParams(), None, None)[1]
    is_shared_out = _is_shared_out(dataloader.dataset)
    is_dispatched = hasattr(dataloader, "split_batches")
    is_prepared = hasattr(dataloader, "gradient_state")
    if world_size > 1 and is_prepared and not (is_shared_out or is_dispatched):
        if is_of_datasets(dataloader.dataset):
            raise DataError(
                f"`{name}` has one rank's shards of a stream, so that the whole is not "
                "to be had; pass the loader as it was before `prepare`"
            )
    size = dataloader.batch_size
    if size is None:
        raise DataError(
            f"`{name}` has `batch_size=None`, for items that are batches already; give "
            "a `batch_size`, and samples as items"
        )
    is_split = getattr(dataloader, "split_batches", False)
    drop_last = dataloader.drop_last or getattr(dataloader, "_drop_last", False)
    size = size // world_size if is_split else size
    return {"batch_size": size, "drop_last": drop_last}


def _of_samples(dataloader: Any, name: str) -> dict[str, Any]:
    """The parameters of the batches of a data set with items by index."""
    batches, ranks = dataloader.batch_sampler, 1
    if hasattr(batches, "even_batches"):  # Accelerate has dealt it out to the ranks
        if not batches.even_batches and batches.num_processes > 1:
            raise DataError(
                f"`{name}` has `even_batches=False`, with which ranks have different "
                "numbers of batches; leave it out, and count with `gather_for_metrics`"
            )
        ranks = batches.num_processes if batches.split_batches else 1
        batches = batches.batch_sampler
    if batches is None:
        raise DataError(
            f"`{name}` has `batch_size=None`, so that nothing makes batches; give a "
            "`batch_size` or a `batch_sampler`"
        )
    if type(batches) is not BatchSampler:
        return {"sampler": batches}
    if getattr(dataloader, "split_batches", False):  # of what the main rank deals out
        ranks = loader._ranks(DataLoaderParams(), None, None)[1]
    sampler: Any = batches.sampler
    sizes = {"batch_size": batches.batch_size // ranks, "drop_last": batches.drop_last}
    is_whole = getattr(sampler, "data_source", None) is dataloader.dataset
    if is_whole and type(sampler) is SequentialSampler:
        return sizes
    if is_whole and type(sampler) is RandomSampler and not sampler.replacement:
        if sampler.num_samples == len(dataloader.dataset):
            return {**sizes, "shuffle": True}
    return {**sizes, "sampler": sampler}


def _as_accelerate_deals(
    found: loader.ResumableDataLoader, params: DataLoaderParams
) -> AdoptedLoader:
    """The same loader, an `AdoptedLoader`, and with `EvenBatches` or blocks."""
    plan = found.plan
    if isinstance(found.dataset, StreamedDataset):
        found.dataset.settings = found.dataset.settings._replace(in_blocks=True)
    if type(plan) is SampleBatches:
        plan = EvenBatches(
            plan.sampler,
            batch_size=plan.batch_size,
            drop_last=plan.drop_last,
            seed=plan.seed,
            rank=plan.rank,
            world_size=plan.world_size,
        )
    names = [*_SETTINGS, "timeout", "multiprocessing_context"]
    if found.num_workers:
        names.append("prefetch_factor")
    options = {name: getattr(found, name) for name in names}
    adopted = AdoptedLoader(found.dataset, plan, **options)
    adopted.identity = found.identity
    return adopted


def _init_worker(own: Callable[[int], None], worker_id: int) -> None:
    fetching.init_worker(worker_id)
    own(worker_id)
