"""The loader: batches of any data set, from any batch on."""

from __future__ import annotations

import collections
import contextlib
import copy
import operator
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from multiprocessing import connection, resource_tracker, util
from typing import Any

import torch
from torch import distributed
from torch.utils.data import DataLoader, Sampler

from helios.data import fetching, replay, samplers
from helios.data.batches import GivenBatches, Loaded, Plan, RankBatches, SampleBatches
from helios.data.packages import is_stream, streams_of
from helios.data.params import WORKER_SETTINGS, DataLoaderParams
from helios.data.parts import StreamSettings
from helios.data.requests import StreamRequests
from helios.data.streams import StreamedDataset
from helios.errors import DataError
from helios.rng import get_default_seed
from helios.workers import WorkersIterator, end_workers, forking

# A worker's tensors come through a socket, which may be felt to break first.
_SIGNS_OF_DEATH = (RuntimeError, OSError, EOFError)
_PASSED_ON = {"num_workers", "pin_memory", "pin_memory_device", *WORKER_SETTINGS}


class ResumableDataLoader(DataLoader[Any]):
    """A `DataLoader` that iterates from where `plan.seek` says, else the next epoch.

    With map-style data sets the batches are the same whatever the number of workers.
    """

    def __init__(self, dataset: Any, plan: Plan, **options: Any) -> None:
        self.plan = plan
        #: What the order of the samples depends on, as plain values.
        self.identity: dict[str, Any] = {}
        self._asked = _Asked(plan)
        super().__init__(
            dataset,
            batch_sampler=self._asked,
            collate_fn=operator.itemgetter(0),
            worker_init_fn=fetching.init_worker,
            generator=torch.Generator(),  # so that none is drawn from the global one
            **options,
        )

    def seek(self, epoch: int, batch: int = 0, cursor: Any = None) -> None:
        """Have the next iteration begin at a batch of an epoch, both counted from 0.

        `cursor` is that of the batch before: streams cannot be entered without it.
        """
        self.plan.seek(epoch, batch, cursor)

    def fetch(self) -> Iterator[Loaded]:
        """Iterate over the batches with what the loop has to know of them.

        Raises:
            DataError: a worker died; it names the signal, and what it was loading.
        """
        # Made now, and not at the first batch: so are its workers.
        try:
            iterator = super().__iter__()
        except _SIGNS_OF_DEATH as error:
            self._check_workers(self._iterator, collections.deque(), error)
            raise
        asked = self._asked.open
        if isinstance(iterator, WorkersIterator):
            # Nothing of the loader itself, which may have to be let go of with it.
            iterator.expected = partial(_describe_next, self.plan, asked)
        return self.plan.receive(self._results(iterator, asked))

    def __iter__(self) -> Any:
        batches = self.fetch()
        return (loaded.data for loaded in batches)

    @property
    def batches_per_epoch(self) -> int | None:
        """Batches of an epoch on this rank; None where only reading can tell."""
        return self.plan.batches_per_epoch

    @property
    def num_samples(self) -> int | None:
        """Samples of an epoch on all ranks, without padding; None as above."""
        return self.plan.num_samples

    def __len__(self) -> int:
        if (count := self.batches_per_epoch) is None:
            raise TypeError("the length of a stream is not known before it is read")
        return count

    def _results(
        self, iterator: Any, asked: collections.deque[Any]
    ) -> Iterator[tuple[Any, Any]]:
        """Put each result beside its request: they come in the same order."""
        while True:
            try:
                data = next(iterator)
            except StopIteration:
                return
            except _SIGNS_OF_DEATH as error:
                self._check_workers(iterator, asked, error)
                raise
            yield asked.popleft(), data

    def _check_workers(
        self, iterator: Any, asked: collections.deque[Any], error: Exception
    ) -> None:
        """Raise a DataError if a worker died: how, and what it was loading."""
        workers = getattr(iterator, "_workers", [])
        # Its end may have been felt before it is gone.
        gone = connection.wait([w.sentinel for w in workers], 0.2) if workers else []
        for number, worker in enumerate(workers):
            if worker.sentinel not in gone:
                continue
            worker.join()
            # Requests are dealt out in turn. Some of its answers may be on their way,
            # but one that was cut off could not be read to its end.
            open_ones = enumerate(asked, iterator._rcvd_idx)
            mine = [one for i, one in open_ones if i % self.num_workers == number]
            what = ", then ".join(map(self.plan.describe, mine)) or "nothing"
            end_workers(id(iterator), workers)
            self._iterator = None
            raise DataError(
                f"worker {number} of the loader died ({_reason(worker.exitcode)}) "
                f"while it had to load {what}; the run can be started again from the "
                "batch before"
            ) from error

    def _get_iterator(self) -> Any:
        if self.num_workers == 0:
            return super()._get_iterator()
        self.check_worker_number_rationality()
        if self.multiprocessing_context is not None:
            resource_tracker.ensure_running()  # its start would unblock the signals
        with forking(fetching.IGNORED_SIGNALS):
            iterator = WorkersIterator(self)
        ended = id(iterator), iterator._workers
        util.Finalize(iterator, end_workers, ended, exitpriority=0)
        return iterator


class _Asked(Sampler[Any]):
    """Passes requests on, and keeps those that are not answered yet."""

    def __init__(self, requests: Sampler[Any]) -> None:
        self._requests = requests
        self.open: collections.deque[Any] = collections.deque()

    def __iter__(self) -> Iterator[Any]:
        self.open = collections.deque()  # of this iteration; others may be under way
        return self._pass_on(self.open)

    def _pass_on(self, asked: collections.deque[Any]) -> Iterator[Any]:
        for request in self._requests:
            asked.append(request)
            yield request

    def __len__(self) -> int:
        return len(self._requests)  # type: ignore[arg-type]  # the loader knows better


def _describe_next(plan: Plan, asked: collections.deque[Any]) -> str:
    # A copy: the thread of the loop may go on while another one asks.
    return "".join(map(plan.describe, tuple(asked)[:1]))


def create_dataloader(
    dataset: Any,
    params: DataLoaderParams | Mapping[str, Any] | None = None,
    *,
    seed: int | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    streams: int | None = None,
    **overrides: Any,
) -> tuple[ResumableDataLoader, samplers.ResumableSampler | None]:
    """Make a data set's loader; `overrides` are parameters that count more.

    It has the samples of one rank: of this process, unless `rank` and `world_size` say
    of which, and all of them with `is_distributed=False`. `streams` is in how many an
    iterable data set is read on each rank, where that is not for `num_workers` to say.
    The sampler is None for iterable data sets.

    Raises:
        DataError: it could yield nothing.
        TypeError, ValueError: wrong parameters.
    """
    given = params.to_dict() if isinstance(params, DataLoaderParams) else params or {}
    params = DataLoaderParams.from_dict({**given, **overrides})
    if params.random_seed is not None:
        seed = params.random_seed
    seed = get_default_seed() if seed is None else seed
    rank, world_size = _ranks(params, rank, world_size)
    names = {"pin_memory"} if params.debug_mode else _PASSED_ON
    options: Any = {k: v for k, v in vars(params).items() if k in names and v}
    if is_stream(dataset):
        loader = _stream_loader(
            dataset, params, seed, rank, world_size, streams, options
        )
        sampler, own = None, {"sampler": "a stream"}
    else:
        ranks = {"seed": seed, "rank": rank, "world_size": world_size}
        sampler = _sampler(dataset, params, **ranks)
        batches = _batches(dataset, sampler, params, **ranks)
        fetched = fetching.SeededDataset(dataset, params.collate_fn)
        loader = ResumableDataLoader(fetched, batches, **options)
        own = sampler.identity()
    loader.identity = {
        **own,
        "samples": loader.num_samples,
        "global batch": params.batch_size * world_size,
        "drop_last": params.drop_last,
        "seed": seed,
    }
    return loader, sampler


def _batches(
    dataset: Any,
    sampler: samplers.ResumableSampler,
    params: DataLoaderParams,
    **ranks: int,
) -> RankBatches:
    length = 0
    with contextlib.suppress(TypeError):
        length = len(sampler)
    if not length:
        is_own = isinstance(params.sampler, Iterable)
        what = "sampler" if is_own else "data set"
        kind = type(params.sampler if is_own else dataset).__name__
        raise DataError(f"the {what} is empty: {kind} has a length of 0, or none")
    gives_batches = replay.yields_batches(sampler)
    if gives_batches and params.batch_size != 1:
        raise ValueError(
            f"`batch_size` must be left out with a batch sampler "
            f"({type(params.sampler).__name__}), got {params.batch_size}"
        )
    make: Callable[..., RankBatches] = GivenBatches if gives_batches else SampleBatches
    sizes = {"batch_size": params.batch_size, "drop_last": params.drop_last}
    found = make(sampler, **sizes, **ranks)
    if len(found) == 0:
        raise DataError(
            f"{length} samples fill no batch; lower `batch_size` or turn `drop_last` "
            "off"
        )
    return found


def _ranks(
    params: DataLoaderParams, rank: int | None, world_size: int | None
) -> tuple[int, int]:
    if rank is not None and world_size is None:
        raise ValueError(f"`world_size` must be given with `rank`, got {rank} only")
    if params.is_distributed is False:
        return 0, 1
    has_group = distributed.is_available() and distributed.is_initialized()
    if world_size is None and has_group:
        return distributed.get_rank(), distributed.get_world_size()
    return rank or 0, world_size or 1


def _sampler(
    dataset: Any, params: DataLoaderParams, seed: int, rank: int, world_size: int
) -> samplers.ResumableSampler:
    sampler, kinds = params.sampler, samplers.ResumableSamplerType
    if sampler is kinds.DISTRIBUTED:
        return samplers.ResumableDistributedSampler(
            dataset,
            num_replicas=world_size,
            rank=rank,
            shuffle=True,
            drop_last=params.drop_last,
            seed=seed,
            batch_size=params.batch_size,
        )
    if params.shuffle or sampler is kinds.RANDOM:
        return samplers.ResumableRandomSampler(dataset, seed=seed)
    if sampler is None or sampler is kinds.SEQUENTIAL:
        return samplers.ResumableSequentialSampler(dataset, seed=seed)
    if isinstance(sampler, samplers.ResumableSampler):
        # The user's own, who may change it between epochs; one for each loader.
        if sampler._plan is not None and sampler._plan() is not None:
            sampler = copy.copy(sampler)
        if not sampler.has_seed:
            sampler.seed = seed
        return sampler
    assert isinstance(sampler, Iterable)
    replayed = replay.ReplayedSampler(sampler, seed=seed)
    replayed.check()
    return replayed


def _stream_loader(
    dataset: Any,
    params: DataLoaderParams,
    seed: int,
    rank: int,
    world_size: int,
    streams: int | None,
    options: dict[str, Any],
) -> ResumableDataLoader:
    kind = type(dataset).__name__
    for name in ("shuffle", "sampler"):
        if getattr(params, name):
            raise ValueError(
                f"`{name}` must be left out with an iterable data set ({kind}), which "
                "has an order of its own"
            )
    workers = options.pop("num_workers", 0)
    streams = streams or streams_of(dataset, workers, world_size)
    # Each stream must stay with one worker.
    workers = max((n for n in range(1, workers + 1) if streams % n == 0), default=0)
    if workers == 0:
        for name in WORKER_SETTINGS:
            options.pop(name, None)
    settings = StreamSettings(
        params.batch_size, params.drop_last, streams, rank, world_size
    )
    requests = StreamRequests(settings, seed=seed, workers=workers)
    fetched = StreamedDataset(dataset, params.collate_fn, settings)
    return ResumableDataLoader(fetched, requests, num_workers=workers, **options)


def _reason(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit status {exit_code}"
    hint = ", as where memory is short" if -exit_code == signal.SIGKILL else ""
    return f"signal {signal.Signals(-exit_code).name}{hint}"
