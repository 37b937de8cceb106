"""Plain values of a run: the training unit, the schedule, and how far it has come."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any

from helios.errors import CheckpointError


def check_name(what: str, name: object) -> None:
    """Raise a ValueError where ``name`` could not be that of a file or folder."""
    if not isinstance(name, str) or not name or name[0] == "." or {*name} & {*"/\\\0"}:
        raise ValueError(f"`{what}` must be a plain file name, got {name!r}")


class TrainingUnit(enum.Enum):
    """What ``total_steps`` and the frequencies of a Trainer count."""

    EPOCH = "epoch"
    ITERATION = "iteration"

    @classmethod
    def from_str(cls, label: str | TrainingUnit) -> TrainingUnit:
        """The unit of that name, in any case; a ValueError where there is none."""
        for unit in cls:
            if label is unit or str(label).lower() == unit.value:
                return unit
        names = " or ".join(repr(unit.value) for unit in cls)
        raise ValueError(f"`train_unit` must be {names}, got {label!r}")


class EpochStage(enum.StrEnum):
    """How far the epoch in progress has come, beside its batches."""

    CLOSED = "closed"  # between two epochs
    OPEN = "open"  # its start hooks have run
    COMPLETE = "complete"  # its batches are done, and its end hooks are to come


class Boundary(enum.Enum):
    """A place between two batches, where a run can be validated, saved and stopped."""

    START = "start"
    READY = "ready"  # a batch is to be trained on: neither saved nor stopped
    BATCH = "batch"  # inside an accumulation window: saved and stopped only
    STEP = "step"
    EPOCH = "epoch"


@dataclasses.dataclass(slots=True)
class TrainingState:
    """How far training has come; every counter counts finished things."""

    current_iteration: int = 0  #: steps (optimizer updates)
    global_iteration: int = 0  #: batches
    global_epoch: int = 0  #: epochs
    validation_cycles: int = 0  #: validations
    dataset_iter: int = 0  #: batches of the epoch in progress
    early_stop_count: int = 0  #: validations in a row without an improvement
    average_iter_time: float = 0.0  #: seconds a step, since the last log point
    running_iter: int = 0  #: batches that the running losses hold
    dataset_phase: int = 0  #: index of the training phase whose data are used
    epoch_stage: str = EpochStage.CLOSED  #: "closed", "open" or "complete"

    def dict(self) -> dict[str, Any]:
        """The values by name."""
        return dataclasses.asdict(self)

    def load(self, values: Mapping[str, Any]) -> None:
        """Take the values that :meth:`dict` gave.

        Raises:
            CheckpointError: one of them is missing.
        """
        names = [field.name for field in dataclasses.fields(self)]
        if missing := [name for name in names if name not in values]:
            raise CheckpointError(f"the checkpoint's `progress` is without {missing}")
        for name in names:
            setattr(self, name, values[name])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """When a run validates, saves, logs and ends, as the Trainer's arguments say.

    Raises:
        TypeError, ValueError: wrong values, naming the argument.
    """

    train_unit: TrainingUnit
    total_steps: float
    valid_frequency: int | None = None
    chkpt_frequency: int | None = None
    print_frequency: int | None = None
    early_stop_cycles: int | None = None
    accumulation_steps: int = 1

    def __post_init__(self) -> None:
        total = self.total_steps
        if type(total) is not int and total != math.inf:
            raise TypeError(
                f"`total_steps` must be an int or float('inf'), got {total!r}"
            )
        if total <= 0:
            raise ValueError(
                f"`total_steps` must be >= 1, got {total}; or float('inf')"
            )
        for field in dataclasses.fields(self)[2:]:
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if type(value) is not int or value < 1:
                kind = ValueError if type(value) is int else TypeError
                raise kind(
                    f"`{field.name}` must be an int >= 1, got {value!r}; use "
                    f"{field.default} for none"
                )
        if self.early_stop_cycles is not None and self.valid_frequency is None:
            raise ValueError("`early_stop_cycles` needs `valid_frequency`; set that")

    def is_over(self, state: TrainingState) -> bool:
        """Whether the run has come to its end."""
        if state.early_stop_count >= (self.early_stop_cycles or math.inf):
            return True
        is_epochs = self.train_unit is TrainingUnit.EPOCH
        done = state.global_epoch if is_epochs else state.current_iteration
        return done >= self.total_steps

    def is_due(
        self, frequency: int | None, boundary: Boundary, state: TrainingState
    ) -> bool:
        """Whether something of that frequency happens at this boundary."""
        if frequency is None:
            return False
        if self.train_unit is TrainingUnit.EPOCH:
            return boundary is Boundary.EPOCH and state.global_epoch % frequency == 0
        return boundary is Boundary.STEP and state.current_iteration % frequency == 0
