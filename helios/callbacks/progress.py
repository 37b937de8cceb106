"""The progress bar."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from helios.callbacks.base import Callback
from helios.state import TrainingUnit

if TYPE_CHECKING:
    from helios.session import Session


class ProgressBar(Callback):
    """A bar on a terminal, with the values logged last, and one for each validation."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] = tqdm(disable=True)
        self._valid: tqdm[Any] = self._bar

    def on_training_start(self, session: Session) -> None:
        # None: off where standard error is not a terminal.
        disable = None if session.engine.is_main else True
        self._bar = tqdm(disable=disable, leave=False, dynamic_ncols=True)
        total, done = session.schedule.total_steps, session.state.current_iteration
        self._is_by_epoch = session.schedule.train_unit is TrainingUnit.EPOCH
        if not self._is_by_epoch:
            self._begin("training", None if total == math.inf else total, done)

    def on_training_epoch_start(self, session: Session) -> None:
        if self._is_by_epoch:
            title = f"epoch {session.state.global_epoch + 1}"
            done = session.state.dataset_iter
            self._begin(title, session.batches_per_epoch, done)

    def on_training_batch_end(self, session: Session) -> None:
        state = session.state
        done = state.dataset_iter if self._is_by_epoch else state.current_iteration
        self._bar.update(done - self._bar.n)

    def on_validation_start(self, session: Session) -> None:
        total, disable = session.valid_batches, self._bar.disable
        self._valid = tqdm(desc="validation", total=total, leave=False, disable=disable)

    def on_validation_batch_end(self, session: Session, step: int) -> None:
        self._valid.update()

    def on_validation_end(self, session: Session) -> None:
        self._valid.close()

    def on_log(self, session: Session, values: dict[str, float]) -> None:
        if session.state.global_iteration:
            self._bar.set_postfix(values, refresh=False)

    def close(self) -> None:
        self._valid.close()
        self._bar.close()

    def _begin(self, title: str, total: float | None, done: int) -> None:
        self._bar.set_description_str(title, refresh=False)
        self._bar.total = total  # `reset` would leave the old one, for None
        self._bar.reset()
        self._bar.initial = self._bar.n = self._bar.last_print_n = done
