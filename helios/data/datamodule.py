"""The DataModule: data sets, their loaders, and the phases of training."""

from __future__ import annotations

import abc
import dataclasses
import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from helios.data.loader import ResumableDataLoader, create_dataloader
from helios.data.packages import has_state, is_of_datasets, is_stream
from helios.data.params import DataLoaderParams
from helios.data.samplers import ResumableSampler
from helios.errors import DataError
from helios.rng import derive_key, get_default_seed

if TYPE_CHECKING:
    from helios.trainer import Trainer


Params: TypeAlias = DataLoaderParams | Mapping[str, Any] | None
Loading: TypeAlias = tuple[ResumableDataLoader, ResumableSampler | None]


class DatasetSplit(enum.Enum):
    """What a data set is for."""

    TRAIN = 0
    VALID = 1
    TEST = 2

    @classmethod
    def from_str(cls, label: str) -> DatasetSplit:
        """The split of that name, in any case; a ValueError where there is none."""
        for split in cls:
            if label.lower() == split.name.lower():
                return split
        names = ", ".join(split.name.lower() for split in cls)
        raise ValueError(f"`label` must be one of {names}, got {label!r}")


_TRAIN, _VALID, _TEST = DatasetSplit


@dataclasses.dataclass
class Dataset:
    """A data set, and how it is to be loaded."""

    dataset: Any
    params: DataLoaderParams


def loader_of(found: Any, phase: str) -> ResumableDataLoader | None:
    """The loader of what a DataModule's method returned; DataError if it is no such."""
    loader = found[0] if isinstance(found, tuple) and found else found
    if loader is None or isinstance(loader, ResumableDataLoader):
        return loader
    raise DataError(
        f"the {phase} data must come from a loader that can be entered anywhere, got "
        f"{type(loader).__name__}; return `helios.data.create_dataloader(...)`"
    )


def _mark(dataset: Any) -> str:
    """What tells a data set from others: its type, and the mark of a `datasets` one."""
    own = getattr(dataset, "_fingerprint", None)
    name = type(dataset).__name__
    return f"{name} {own}" if isinstance(own, str) else name


class DataModule(abc.ABC):
    """Where the samples come from: say so in :meth:`setup`.

    The order of the samples, and the random numbers that a data set and a collate
    function draw from ``torch``, ``random`` and ``numpy.random``, depend on the seed,
    the epoch and the sample alone.
    """

    trainer: Trainer
    prepare_data_per_host = False  #: for hosts that do not share the data's folder

    def __init__(self) -> None:
        self._train_phases: list[Dataset] = []
        self._train_dataset: Dataset | None = None
        self._valid_dataset: Dataset | None = None
        self._test_dataset: Dataset | None = None
        self._phase = 0
        self._running_loader: ResumableDataLoader | None = None
        # In how many streams each iterable data set is read; see `streams`.
        self._streams: dict[str, int] = {}

    @property
    def is_distributed(self) -> bool:
        """Whether the run has more than one rank."""
        return self._ranks()["world_size"] > 1

    @property
    def train_dataset(self) -> Any:
        """The data set of the current training phase, or None."""
        return getattr(self._current(), "dataset", None)

    @property
    def valid_dataset(self) -> Any:
        """The data set for validation, or None."""
        return getattr(self._valid_dataset, "dataset", None)

    @property
    def test_dataset(self) -> Any:
        """The data set for tests, or None."""
        return getattr(self._test_dataset, "dataset", None)

    def prepare_data(self) -> None:
        """Download or convert: once, on the main rank (or per host), before `setup`."""

    @abc.abstractmethod
    def setup(self) -> None:
        """Name the data sets, with ``self._add_train_phase`` and its like."""

    def teardown(self) -> None:
        """After training or testing, also after a failed one."""

    def train_dataloader(self) -> Loading | None:
        """A new loader of the current training phase, and its sampler."""
        return self._loader(self._current(), _TRAIN, self._phase)

    def valid_dataloader(self) -> Loading | None:
        """A new loader for validation, and its sampler."""
        return self._loader(self._valid_dataset, _VALID)

    def test_dataloader(self) -> Loading | None:
        """A new loader for tests, and its sampler."""
        return self._loader(self._test_dataset, _TEST)

    def get_train_steps_per_epoch(self) -> int:
        """Steps (optimizer updates) an epoch of the current training phase."""
        # A second loader would begin a user's sampler anew.
        loader = self._running_loader or loader_of(self.train_dataloader(), "training")
        if loader is None:
            raise DataError("there are no training data")
        batches = loader.batches_per_epoch
        if batches is None:
            raise DataError(
                "how many steps an epoch of an iterable data set has is not known "
                "before it is read; override `get_train_steps_per_epoch` if you know"
            )
        window = self.trainer.engine.accumulation_steps if self.trainer.engine else 1
        return -(-batches // window)

    def advance_train_phase(self) -> bool:
        """Go on to the next training phase; False if there is none."""
        if self._phase + 1 >= len(self._train_phases):
            return False
        self._phase += 1
        self._running_loader = None
        return True

    def state_dict(self) -> dict[str, Any]:
        """What the user wants saved; the cursor and the phase are saved anyway."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put :meth:`state_dict` back."""

    def identities(self) -> dict[str, dict[str, Any]]:
        """What to compare at a resume, by what a difference costs."""
        phases = list(enumerate(self._phases()))
        used = [p.dataset for _, p in phases]
        used += [] if self._valid_dataset is None else [self._valid_dataset.dataset]
        streams = [d for d in used if is_stream(d) and has_state(d)]
        streams = [d for d in streams if not is_of_datasets(d)]  # begun anew each time
        if len({id(stream) for stream in streams}) < len(streams):
            raise DataError(
                "an iterable data set with a `state_dict` is used twice, and the one "
                "use would change the other's state; make one for each"
            )
        marks = {f"phase {i}": _mark(phase.dataset) for i, phase in phases}
        workers = {
            f"`num_workers` of phase {i}": p.params.num_workers for i, p in phases
        }
        return {
            "train_data": self.identity(),
            "data_fingerprint": marks,
            "loading": workers,
        }

    def identity(self) -> dict[str, Any]:
        """What the order of the training samples depends on."""
        facts: dict[str, Any] = {}
        if type(self).train_dataloader is not DataModule.train_dataloader:
            if (loader := loader_of(self.train_dataloader(), "training")) is not None:
                own = dict(loader.identity)
                if f"train {self._phase}" not in self._streams:  # else they are kept
                    own["streams"] = loader.plan.streams
                facts = {f"{name} of `train_dataloader`": v for name, v in own.items()}
            return facts
        for i, phase in enumerate(self._phases()):
            found = self._loader(phase, _TRAIN, i)
            assert found is not None
            own = found[0].identity
            facts |= {f"{name} of phase {i}": value for name, value in own.items()}
        return facts

    def _common(self, identity: dict[str, Any]) -> dict[str, Any]:
        """What of :meth:`identity` has to be the same on all ranks."""
        phases = enumerate(self._phases())
        own = [n for n, p in phases if p.params.is_distributed is False]  # their data
        names = {f"samples of phase {n}" for n in own}
        names.add("samples of `train_dataloader`")  # likewise, perhaps
        return {name: v for name, v in identity.items() if name not in names}

    def streams(self) -> dict[str, int]:
        """In how many streams each iterable data set is read, on each rank.

        A run begins with as many as there are workers. To change them would change the
        order, so they are saved, and `adopt_streams` takes them up.
        """
        return dict(self._streams)

    def adopt_streams(self, counts: Mapping[str, int]) -> None:
        """Read iterable data sets in as many streams as the run began with."""
        self._streams.update(counts)

    def _create_dataset(self, dataset: Any, params: Params = None) -> Dataset:
        """A data set with a copy of its parameters."""
        values = params.to_dict() if isinstance(params, DataLoaderParams) else params
        return Dataset(dataset, DataLoaderParams.from_dict(values or {}))

    def _add_train_phase(self, dataset: Any, params: Params = None) -> None:
        """Add the data of one training phase; most runs have one."""
        self._train_phases.append(self._create_dataset(dataset, params))

    def _add_valid_dataset(self, dataset: Any, params: Params = None) -> None:
        """Set the data for validation."""
        self._valid_dataset = self._create_dataset(dataset, params)

    def _add_test_dataset(self, dataset: Any, params: Params = None) -> None:
        """Set the data for tests."""
        self._test_dataset = self._create_dataset(dataset, params)

    def _open_train_loader(self) -> ResumableDataLoader:
        """The loader that the run is to use, of the current phase."""
        self._running_loader = loader_of(self.train_dataloader(), "training")
        if self._running_loader is None:
            raise DataError("no training data: call `self._add_train_phase` in `setup`")
        return self._running_loader

    def _begin(self, trainer: Trainer) -> None:
        """Forget an earlier run, for a new one by this trainer."""
        DataModule.__init__(self)
        self.trainer = trainer

    def _end(self) -> None:
        """Let go of the run's loader, with which its workers end."""
        self._running_loader = None

    def _current(self) -> Dataset | None:
        phases = self._phases()
        return phases[self._phase] if phases else None

    def _phases(self) -> list[Dataset]:
        """The data of all training phases."""
        older = self._train_dataset
        return self._train_phases or ([] if older is None else [older])

    def _ranks(self) -> dict[str, int]:
        engine = getattr(self, "trainer", None) and self.trainer.engine
        if engine is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": engine.rank, "world_size": engine.world_size}

    def _seed(self, data: Dataset, split: DatasetSplit, phase: int) -> int:
        seed = data.params.random_seed
        if seed is None:
            seed = self.trainer.seed if hasattr(self, "trainer") else get_default_seed()
        return derive_key(seed, split.value, phase)

    def _loader(
        self, data: Dataset | None, split: DatasetSplit, phase: int = 0
    ) -> Loading | None:
        if data is None:
            return None
        seed = self._seed(data, split, phase)
        # The seed of the parameters is in this one.
        own: Any = {"seed": seed, "random_seed": None, **self._ranks()}
        if data.params.pin_memory is None:
            engine = getattr(self, "trainer", None) and self.trainer.engine
            own["pin_memory"] = engine is not None and engine.device.type == "cuda"
        name = f"train {phase}" if split is _TRAIN else split.name.lower()
        own["streams"] = self._streams.get(name)
        found = create_dataloader(data.dataset, data.params, **own)
        if is_stream(data.dataset):
            self._streams[name] = found[0].plan.streams
        return found
