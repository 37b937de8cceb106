"""The DataModule: data sets, their loaders, and the phases of training."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from helios.data.loader import DataLoaderParams, ResumableDataLoader, create_dataloader
from helios.data.samplers import ResumableSampler
from helios.errors import DataError
from helios.rng import derive_key, get_default_seed

if TYPE_CHECKING:
    from helios.trainer import Trainer


Params: TypeAlias = DataLoaderParams | Mapping[str, Any] | None

_TRAIN, _VALID, _TEST = range(3)


@dataclasses.dataclass
class Dataset:
    """A data set, and how it is to be loaded."""

    dataset: Any
    params: DataLoaderParams


class DataModule(abc.ABC):
    """Where the samples come from: say so in :meth:`setup`.

    The order of the samples, and the random numbers that a data set and a collate
    function draw from ``torch``, ``random`` and ``numpy.random``, depend on the seed,
    the epoch and the sample alone.
    """

    trainer: Trainer

    def __init__(self) -> None:
        self._train_phases: list[Dataset] = []
        self._train_dataset: Dataset | None = None
        self._valid_dataset: Dataset | None = None
        self._test_dataset: Dataset | None = None
        self._phase = 0

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
        """Download or convert: called once, on the main rank, before :meth:`setup`."""

    @abc.abstractmethod
    def setup(self) -> None:
        """Name the data sets, with ``self._add_train_phase`` and its like."""

    def teardown(self) -> None:
        """After training or testing, also after a failed one."""

    def train_dataloader(self) -> tuple[ResumableDataLoader, ResumableSampler] | None:
        """A new loader of the current training phase, and its sampler."""
        return self._loader(self._current(), _TRAIN, self._phase)

    def valid_dataloader(self) -> tuple[ResumableDataLoader, ResumableSampler] | None:
        """A new loader for validation, and its sampler."""
        return self._loader(self._valid_dataset, _VALID)

    def test_dataloader(self) -> tuple[ResumableDataLoader, ResumableSampler] | None:
        """A new loader for tests, and its sampler."""
        return self._loader(self._test_dataset, _TEST)

    def get_train_steps_per_epoch(self) -> int:
        """Steps (optimizer updates) an epoch of the current training phase."""
        found = self.train_dataloader()
        if found is None:
            raise DataError("there are no training data")
        window = self.trainer.engine.accumulation_steps if self.trainer.engine else 1
        return -(-found[0].batches_per_epoch // window)

    def advance_train_phase(self) -> bool:
        """Go on to the next training phase; False if there is none."""
        if self._phase + 1 >= len(self._train_phases):
            return False
        self._phase += 1
        return True

    def state_dict(self) -> dict[str, Any]:
        """What the user wants saved; the cursor and the phase are saved anyway."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put :meth:`state_dict` back."""

    def identity(self) -> dict[str, Any]:
        """What the order of the training samples depends on."""
        facts: dict[str, Any] = {}
        for i, phase in enumerate(self._train_phases or [self._train_dataset]):
            loader = self._loader(phase, _TRAIN, i)
            if loader is None or phase is None:
                continue
            batch = phase.params.batch_size * self._ranks()["world_size"]
            facts[f"samples of phase {i}"] = loader[0].num_samples
            facts[f"global batch of phase {i}"] = batch
            facts[f"sampler of phase {i}"] = type(loader[1]).__name__
            facts[f"drop_last of phase {i}"] = phase.params.drop_last
            facts[f"seed of phase {i}"] = self._seed(phase, _TRAIN, i)
        return facts

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

    def _begin(self, trainer: Trainer) -> None:
        """Forget an earlier run, for a new one by this trainer."""
        DataModule.__init__(self)
        self.trainer = trainer

    def _current(self) -> Dataset | None:
        phases = self._train_phases
        return phases[self._phase] if phases else self._train_dataset

    def _ranks(self) -> dict[str, int]:
        engine = getattr(self, "trainer", None) and self.trainer.engine
        if engine is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": engine.rank, "world_size": engine.world_size}

    def _seed(self, data: Dataset, split: int, phase: int) -> int:
        seed = data.params.random_seed
        if seed is None:
            seed = self.trainer.seed if hasattr(self, "trainer") else get_default_seed()
        return derive_key(seed, split, phase)

    def _loader(
        self, data: Dataset | None, split: int, phase: int = 0
    ) -> tuple[ResumableDataLoader, ResumableSampler] | None:
        if data is None:
            return None
        seed = self._seed(data, split, phase)
        # The seed of the parameters is in this one.
        own: dict[str, Any] = {"seed": seed, "random_seed": None, **self._ranks()}
        return create_dataloader(data.dataset, data.params, **own)
