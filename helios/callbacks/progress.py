"""The progress bar."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from helios.callbacks.base import Callback
from helios.state import TrainingUnit

if TYPE_CHECKING:
    from helios.session import Session

__all__ = ["ProgressBar"]


class ProgressBar(Callback):
    """A bar for training and one for each validation, on a terminal's standard error.

    Training in epochs shows the batches of each epoch; training in iterations shows
    the steps of the run. The values logged last stand behind it.
    """

    def __init__(self) -> None:
        self._bar = self._valid = tqdm(disable=True)

    def on_training_start(self, session: Session) -> None:
        if session.schedule.unit is TrainingUnit.ITERATION:
            total, done = session.schedule.total_steps, session.state.current_iteration
            self._bar = _open(session, "training", "step", total, done)

    def on_training_epoch_start(self, session: Session) -> None:
        if session.schedule.unit is TrainingUnit.EPOCH:
            self._bar.close()
            state, total = session.state, session.schedule.total_steps
            of = "" if total == math.inf else f"/{total}"
            title = f"epoch {state.global_epoch + 1}{of}"
            batches = session.batches_per_epoch
            self._bar = _open(session, title, "batch", batches, state.dataset_iter)

    def on_training_batch_end(self, session: Session) -> None:
        if session.schedule.unit is TrainingUnit.EPOCH:
            self._bar.update()
        else:
            self._bar.update(session.state.current_iteration - self._bar.n)

    def on_validation_start(self, session: Session) -> None:
        self._valid = _open(session, "validation", "batch", session.valid_batches)

    def on_validation_batch_end(self, session: Session, step: int) -> None:
        self._valid.update()

    def on_validation_end(self, session: Session) -> None:
        self._valid.close()

    def on_log(self, session: Session, values: dict[str, float]) -> None:
        self._bar.set_postfix(values, refresh=False)

    def on_training_end(self, session: Session) -> None:
        self._bar.close()

    def on_exception(self, session: Session, error: BaseException) -> None:
        self._valid.close()
        self._bar.close()


def _open(
    session: Session, title: str, unit: str, total: float | None, done: int = 0
) -> Any:
    return tqdm(
        desc=title,
        unit=unit,
        total=None if total == math.inf else total,
        initial=done,
        leave=False,
        dynamic_ncols=True,
        # None: off where standard error is not a terminal.
        disable=None if session.engine.is_main else True,
    )
