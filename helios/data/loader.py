"""The loader of map-style data sets that can be entered at any batch; its settings."""

import contextlib
import dataclasses
import difflib
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from inspect import formatannotation
from multiprocessing import context, get_all_start_methods, util
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from helios.data import samplers
from helios.data.samplers import ResumableSampler, ResumableSamplerType
from helios.data.seeding import IGNORED_SIGNALS, SeededDataset, init_worker
from helios.errors import DataError

__all__ = ["DataLoaderParams", "ResumableDataLoader", "create_dataloader"]

_LEAST = {"batch_size": 1, "num_workers": 0, "prefetch_factor": 1, "timeout": 0}
_WORKERS_ONLY: dict[str, Any] = {
    "prefetch_factor": None,
    "persistent_workers": False,
    "timeout": 0.0,
    "multiprocessing_context": None,
}


@dataclasses.dataclass
class DataLoaderParams:
    """How a data set is to be loaded; most names are those of torch's `DataLoader`."""

    random_seed: int | None = None  # None: that of the run
    batch_size: int = 1  # of each rank
    shuffle: bool = False
    num_workers: int = 0
    pin_memory: bool = False
    drop_last: bool = False
    is_distributed: bool | None = None  # False: each rank reads all samples
    sampler: ResumableSamplerType | Iterable[Any] | None = None  # None: see `shuffle`
    collate_fn: Callable[[Any], Any] | None = None
    prefetch_factor: int | None = None
    persistent_workers: bool = False
    pin_memory_device: str = ""
    timeout: int | float = 0.0  # seconds; 0: waits for ever
    multiprocessing_context: str | context.BaseContext | None = None
    debug_mode: bool = False  # no workers, and none of their settings

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name not in ("sampler", "collate_fn"):
                _check_type(field.name, getattr(self, field.name), field.type)
        for name, least in _LEAST.items():
            if not ((value := getattr(self, name)) is None or value >= least):
                raise ValueError(f"`{name}` must be >= {least}, got {value}")
        if self.collate_fn is not None and not callable(self.collate_fn):
            raise TypeError(f"`collate_fn` must be callable, got {self.collate_fn!r}")
        method, methods = self.multiprocessing_context, get_all_start_methods()
        if isinstance(method, str) and method not in methods:
            raise ValueError(
                f"`multiprocessing_context` must be one of {methods}, got {method!r}"
            )
        if isinstance(self.sampler, str | Iterator | BatchSampler) or not isinstance(
            self.sampler, ResumableSamplerType | Iterable | None
        ):
            raise TypeError(
                f"`sampler` must be a ResumableSamplerType, or a re-iterable of single "
                f"indices, got {self.sampler!r}"
            )
        if self.sampler is not None and self.shuffle:
            raise ValueError(
                f"`shuffle` must be False with a `sampler`, got {self.sampler!r}; the "
                f"sampler decides on the order: leave out one of the two"
            )
        if self.debug_mode:
            vars(self).update(_WORKERS_ONLY, num_workers=0)
        for name, default in _WORKERS_ONLY.items():
            if self.num_workers == 0 and (value := getattr(self, name)) != default:
                raise ValueError(
                    f"`{name}` must be {default!r} where `num_workers` is 0, got "
                    f"{value!r}; leave it out, or set `num_workers`"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the parameters by name; the values are not copied."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DataLoaderParams":
        """Make parameters of a mapping; ValueError for a name that is none of them."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, n=1, cutoff=0)[0]
                raise ValueError(
                    f"`{name}` is no loader parameter; the nearest: `{near}`"
                )
        return cls(**values)


class ResumableDataLoader(DataLoader[Any]):
    """A `DataLoader` that iterates from where `seek` says, else over the next epoch."""

    def __init__(
        self,
        dataset: SeededDataset,
        batches: samplers.ResumableBatchSampler,
        params: DataLoaderParams,
    ) -> None:
        options = {name: getattr(params, name) for name in _WORKERS_ONLY}
        if params.pin_memory_device:  # of which newer releases of torch warn
            options["pin_memory_device"] = params.pin_memory_device
        super().__init__(
            dataset,
            batch_sampler=batches,  # type: ignore[arg-type]  # yields KeyedBatch
            collate_fn=_identity,
            num_workers=params.num_workers,
            pin_memory=params.pin_memory,
            worker_init_fn=init_worker,
            generator=torch.Generator(),
            **options,
        )
        self._batches = batches

    def seek(self, epoch: int, batch: int = 0) -> None:
        """Have the next iteration begin at a batch of an epoch, both counted from 0."""
        self._batches.seek(epoch, batch)

    @property
    def batches_per_epoch(self) -> int | None:
        """Batches of an epoch on this rank; None where the sampler has no length."""
        return _length(self._batches)

    @property
    def num_samples(self) -> int | None:
        """Samples of an epoch on all ranks, without padding; None as above."""
        return None if self.batches_per_epoch is None else self._batches.num_samples

    def _get_iterator(self) -> Any:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
        try:
            iterator = super()._get_iterator()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if workers := getattr(iterator, "_workers", None):
            # As they ignore SIGTERM, multiprocessing would wait for them for ever.
            util.Finalize(iterator, _kill, (workers,), exitpriority=0)
        return iterator


def create_dataloader(
    dataset: Any,
    params: DataLoaderParams | Mapping[str, Any] | None = None,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    **overrides: Any,
) -> tuple[ResumableDataLoader, ResumableSampler]:
    """Make a map-style data set's loader; DataError where that could yield nothing."""
    given = params.to_dict() if isinstance(params, DataLoaderParams) else params or {}
    params = DataLoaderParams.from_dict({**given, **overrides})
    kind, sampler, length = type(dataset).__name__, params.sampler, _length(dataset)
    if isinstance(dataset, IterableDataset):
        raise DataError(f"iterable data sets are not supported yet, got {kind}")
    if length is None and _length(sampler) is None:
        raise DataError(f"neither {kind} nor a sampler has a length; add `__len__`")
    if length == 0:
        raise DataError(f"the data set is empty: the length of the {kind} is 0")
    if params.is_distributed is False:
        rank, world_size = 0, 1
    seed = seed if params.random_seed is None else params.random_seed
    sizes: Any = {"batch_size": params.batch_size, "drop_last": params.drop_last}
    if sampler is ResumableSamplerType.DISTRIBUTED:
        sampler = samplers.ResumableDistributedSampler(
            dataset, num_replicas=world_size, rank=rank, seed=seed, **sizes
        )
    elif sampler is ResumableSamplerType.RANDOM or (sampler is None and params.shuffle):
        sampler = samplers.ResumableRandomSampler(dataset, seed=seed)
    elif sampler is ResumableSamplerType.SEQUENTIAL or sampler is None:
        sampler = samplers.ResumableSequentialSampler(dataset, seed=seed)
    elif not isinstance(sampler, ResumableSampler):
        sampler = samplers.ReplayedSampler(sampler, seed=seed)
    batches = samplers.ResumableBatchSampler(
        sampler, seed=seed, rank=rank, world_size=world_size, **sizes
    )
    if _length(batches) == 0:
        raise DataError(
            f"the {_length(sampler)} samples of an epoch fill no batch of "
            f"{sampler.batch_size}; lower `batch_size` or turn `drop_last` off"
        )
    wrapped = SeededDataset(dataset, params.collate_fn)
    return ResumableDataLoader(wrapped, batches, params), sampler


def _check_type(name: str, value: Any, kind: Any) -> None:
    allowed = getattr(kind, "__args__", (kind,))
    if not isinstance(value, kind) or (type(value) is bool and bool not in allowed):
        raise TypeError(f"`{name}` must be {formatannotation(kind)}, got {value!r}")


def _length(sized: Any) -> int | None:
    try:
        return len(sized)
    except TypeError:
        return None


def _identity(batch: Any) -> Any:
    return batch


def _kill(workers: list[Any]) -> None:
    for worker in workers:
        with contextlib.suppress(RuntimeError):  # torch's handler of SIGCHLD, if any
            worker.kill()
            worker.join()
