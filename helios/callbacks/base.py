"""The Callback: what users attach to a run without touching its Model."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from helios.session import Session


class Callback:
    """Hooks that run after the Model's of the same name, in the order of the list.

    Each gets the :class:`~helios.session.Session`: progress in ``session.state``,
    ``session.log``, ``session.request_stop``. All ranks call all hooks, but
    :meth:`on_log` and :meth:`on_checkpoint_saved`, which only the main rank calls.
    """

    def on_training_start(self, session: Session) -> None:
        """Before the first step of a run, also after a resume."""

    def on_training_epoch_start(self, session: Session) -> None:
        """Before an epoch, and where a resume goes on inside one."""

    def on_training_batch_end(self, session: Session) -> None:
        """After a batch, with the counters advanced."""

    def on_training_epoch_end(self, session: Session) -> None:
        """After an epoch, with the counters advanced."""

    def on_validation_start(self, session: Session) -> None:
        """Before a validation."""

    def on_validation_batch_end(self, session: Session, step: int) -> None:
        """After a batch of a validation, counted from 0."""

    def on_validation_end(self, session: Session) -> None:
        """After a validation, with the counters advanced."""

    def on_log(self, session: Session, values: dict[str, float]) -> None:
        """When values are written to the loggers."""

    def on_checkpoint_saved(self, session: Session, path: pathlib.Path) -> None:
        """When a checkpoint is safely on the disk; called by the writer's thread."""

    def on_training_end(self, session: Session) -> None:
        """After the last step of a run."""

    def on_exception(self, session: Session, error: BaseException) -> None:
        """When a run fails, before the error is raised."""

    def state_dict(self) -> dict[str, Any]:
        """What is to be saved with the run."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put :meth:`state_dict` back."""


def overridden(
    callbacks: Sequence[Callback], hook: Callable[..., Any]
) -> list[Callable[..., Any]]:
    """The bound methods of those callbacks that have a ``hook`` of their own."""
    name = hook.__name__
    own = [c for c in callbacks if getattr(type(c), name) is not hook]
    return [getattr(callback, name) for callback in own]
