"""How a data set is to be loaded."""

from __future__ import annotations

import dataclasses
import difflib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing import context
from typing import Any

from helios.data.samplers import ResumableSampler, ResumableSamplerType

_LEAST = {"batch_size": 1, "num_workers": 0, "prefetch_factor": 1, "timeout": 0}
WORKER_SETTINGS: dict[str, Any] = {
    "prefetch_factor": None,
    "persistent_workers": False,
    "timeout": 0.0,
    "multiprocessing_context": None,
}
_TYPES: dict[str, tuple[Any, str]] = {
    "random_seed": (int | None, "int | None"),
    "batch_size": (int, "int"),
    "shuffle": (bool, "bool"),
    "num_workers": (int, "int"),
    "pin_memory": (bool | None, "bool | None"),
    "drop_last": (bool, "bool"),
    "is_distributed": (bool | None, "bool | None"),
    "prefetch_factor": (int | None, "int | None"),
    "persistent_workers": (bool, "bool"),
    "pin_memory_device": (str, "str"),
    "timeout": (int | float, "int | float"),
    "multiprocessing_context": (
        str | context.BaseContext | None,
        "str | BaseContext | None",
    ),
    "debug_mode": (bool, "bool"),
}


@dataclasses.dataclass
class DataLoaderParams:
    """How a data set is to be loaded; most names are those of torch's `DataLoader`.

    Raises:
        TypeError, ValueError: wrong parameters, naming them.
    """

    random_seed: int | None = None  #: None: that of the run
    batch_size: int = 1  #: of each rank
    shuffle: bool = False
    num_workers: int = 0
    pin_memory: bool | None = None  #: None: where there is a GPU
    drop_last: bool = False
    is_distributed: bool | None = None  #: False: each rank reads all samples
    #: An order of one's own, or batches, if it yields lists; None: see `shuffle`.
    sampler: ResumableSamplerType | ResumableSampler | Iterable[Any] | None = None
    collate_fn: Callable[[Any], Any] | None = None
    prefetch_factor: int | None = None
    persistent_workers: bool = False
    pin_memory_device: str = ""
    timeout: int | float = 0.0  #: seconds; 0: waits for ever
    multiprocessing_context: str | context.BaseContext | None = None
    debug_mode: bool = False  #: no workers, and none of their settings

    def __post_init__(self) -> None:
        for name, (kind, text) in _TYPES.items():
            value = getattr(self, name)
            is_bool = isinstance(value, bool) and "bool" not in text
            if not isinstance(value, kind) or is_bool:
                raise TypeError(f"`{name}` must be {text}, got {value!r}")
        for name, least in _LEAST.items():
            if not ((value := getattr(self, name)) is None or value >= least):
                raise ValueError(f"`{name}` must be >= {least}, got {value}")
        if self.collate_fn is not None and not callable(self.collate_fn):
            raise TypeError(f"`collate_fn` must be callable, got {self.collate_fn!r}")
        self._check_sampler()
        self._check_workers()

    def to_dict(self) -> dict[str, Any]:
        """Return the parameters by name; the values are not copied."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataLoaderParams:
        """Make parameters of a mapping; ValueError for a name that is none of them."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, n=1, cutoff=0)[0]
                raise ValueError(
                    f"`{name}` is no loader parameter; the nearest: `{near}`"
                )
        return cls(**values)

    def _check_sampler(self) -> None:
        sampler = self.sampler
        kinds = (ResumableSamplerType, Iterable, type(None))
        if isinstance(sampler, str | Iterator) or not isinstance(sampler, kinds):
            raise TypeError(
                "`sampler` must be a ResumableSamplerType, or something that can be "
                f"iterated again and again, got {sampler!r}"
            )
        if sampler is not None and self.shuffle:
            raise ValueError(
                f"`shuffle` must be False with a `sampler`, got {sampler!r}; the "
                "sampler decides on the order: leave out one of the two"
            )

    def _check_workers(self) -> None:
        method = self.multiprocessing_context
        methods = multiprocessing.get_all_start_methods()
        if isinstance(method, str) and method not in methods:
            raise ValueError(
                f"`multiprocessing_context` must be one of {methods}, got {method!r}"
            )
        for name in WORKER_SETTINGS:
            value = getattr(self, name)
            if value and not (self.num_workers or self.debug_mode):
                raise ValueError(f"`{name}` needs `num_workers` >= 1, got {value!r}")
