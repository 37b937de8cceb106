"""The loader of map-style data sets that can be entered at any batch; its settings."""

import dataclasses
import difflib
import operator
import signal
from collections.abc import Callable, Mapping
from inspect import formatannotation
from multiprocessing import context, resource_tracker, util
from typing import Any, get_args, get_origin

import torch
from torch.utils.data import DataLoader, IterableDataset

from helios.data import samplers, seeding
from helios.errors import DataError

_LEAST = {"batch_size": 1, "num_workers": 0, "prefetch_factor": 1, "timeout": 0}
_MULTI = {"prefetch_factor", "persistent_workers", "timeout", "multiprocessing_context"}
_PASSED_ON = {"num_workers", "pin_memory", "pin_memory_device", *_MULTI}


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
    sampler: samplers.ResumableSamplerType | samplers.ResumableSampler | None = None
    collate_fn: Callable[[Any], Any] | None = None
    prefetch_factor: int | None = None
    persistent_workers: bool = False
    pin_memory_device: str = ""
    timeout: int | float = 0.0  # seconds; 0: waits for ever
    multiprocessing_context: str | context.BaseContext | None = None
    debug_mode: bool = False  # no workers, and none of their settings

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, kind, value = field.name, field.type, getattr(self, field.name)
            kinds: Any = tuple(get_origin(k) or k for k in get_args(kind) or [kind])
            if not isinstance(value, kinds) or (value is True and bool not in kinds):
                hint = "; others are not supported yet" if name == "sampler" else ""
                expected = formatannotation(kind)
                raise TypeError(f"`{name}` must be {expected}, got {value!r}{hint}")
            if name in _LEAST and value is not None and not value >= _LEAST[name]:
                raise ValueError(f"`{name}` must be >= {_LEAST[name]}, got {value}")
            if name in _MULTI and value and not (self.num_workers or self.debug_mode):
                raise ValueError(f"`{name}` needs `num_workers` >= 1, got {value!r}")
        if self.shuffle and self.sampler is not None:
            raise ValueError(f"`shuffle` must be False with `sampler` {self.sampler!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the parameters by name; the values are not copied."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DataLoaderParams":
        """Make parameters of a mapping; ValueError for a name that is none of them."""
        for name in sorted(values.keys() - cls.__dataclass_fields__):
            near = difflib.get_close_matches(name, cls.__dataclass_fields__, 1, 0)[0]
            raise ValueError(f"`{name}` is no loader parameter; the nearest: `{near}`")
        return cls(**values)


class ResumableDataLoader(DataLoader[Any]):
    """A `DataLoader` that iterates from where `seek` says, else over the next epoch."""

    batch_sampler: samplers.ResumableBatchSampler  # type: ignore[assignment]

    def seek(self, epoch: int, batch: int = 0) -> None:
        """Have the next iteration begin at a batch of an epoch, both counted from 0."""
        self.batch_sampler.seek(epoch, batch)

    @property
    def batches_per_epoch(self) -> int:
        return len(self.batch_sampler)

    @property
    def num_samples(self) -> int:
        return self.batch_sampler.num_samples  # of all ranks, without padding

    def _get_iterator(self) -> Any:
        if self.multiprocessing_context is not None:
            resource_tracker.ensure_running()  # its start would unblock the signals
        before = signal.pthread_sigmask(signal.SIG_BLOCK, seeding.IGNORED_SIGNALS)
        try:
            iterator = super()._get_iterator()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        workers = getattr(iterator, "_workers", [])
        util.Finalize(iterator, seeding.kill_workers, (workers,), exitpriority=0)
        return iterator


def create_dataloader(
    dataset: Any,
    params: DataLoaderParams | Mapping[str, Any] | None = None,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    **overrides: Any,
) -> tuple[ResumableDataLoader, samplers.ResumableSampler]:
    """Make a map-style data set's loader; DataError where that could yield nothing."""
    given = params.to_dict() if isinstance(params, DataLoaderParams) else params or {}
    params = DataLoaderParams.from_dict({**given, **overrides})
    kind, sampler = type(dataset).__name__, params.sampler
    if isinstance(dataset, IterableDataset):
        raise DataError(f"iterable data sets are not supported yet, got {kind}")
    rank, world_size = (0, 1) if params.is_distributed is False else (rank, world_size)
    seed = seed if params.random_seed is None else params.random_seed
    if params.shuffle or sampler is samplers.ResumableSamplerType.RANDOM:
        sampler = samplers.ResumableRandomSampler(dataset, seed=seed)
    elif not isinstance(sampler, samplers.ResumableSampler):
        sampler = samplers.ResumableSequentialSampler(dataset, seed=seed)
    if (count := operator.length_hint(sampler)) == 0:
        raise DataError(f"the data set is empty: {kind} has a length of 0, or none")
    batches = samplers.ResumableBatchSampler(
        sampler, params.batch_size, params.drop_last, seed, rank, world_size
    )
    if len(batches) == 0:
        raise DataError(
            f"{count} samples fill no batch; lower `batch_size` or turn `drop_last` off"
        )
    names = {"pin_memory"} if params.debug_mode else _PASSED_ON
    options: Any = {k: v for k, v in vars(params).items() if v and k in names}
    options |= {"batch_sampler": batches, "generator": torch.Generator()}
    options |= {
        "collate_fn": operator.itemgetter(0),
        "worker_init_fn": seeding.init_worker,
    }
    wrapped = seeding.SeededDataset(dataset, params.collate_fn)
    return ResumableDataLoader(wrapped, **options), sampler
