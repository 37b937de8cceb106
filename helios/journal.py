"""What a run logs: kept until its time has come, reduced, and written everywhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from helios.callbacks.base import Callback, overridden
from helios.engine import REDUCTIONS
from helios.loggers.tensorboard import NullWriter

if TYPE_CHECKING:
    from helios.session import Session


class Journal:
    """The values of a session, and TensorBoard's ``writer``.

    ``latest`` and ``reductions`` are those that wait for a log point: they are saved.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.writer: Any = NullWriter()
        self.latest: dict[str, Any] = {}
        self.reductions: dict[str, str] = {}
        self._logged: dict[str, tuple[float, int]] = {}
        self.keeps: str | None = None  #: see `keep`; "means" in evaluations only
        # By name: the sum, or another fold, of the values so far, and their number.
        self._folds: dict[str, tuple[Any, int]] = {}
        self._hooks = overridden(session.callbacks, Callback.on_log)

    def metrics(self) -> dict[str, float]:
        """What was logged last under each name, if that was at the current step."""
        step = self._session.state.current_iteration
        return {name: value for name, (value, at) in self._logged.items() if at == step}

    def restore_metrics(self, values: Mapping[str, Any]) -> None:
        """Know again what was logged at the current step, by a checkpoint's record."""
        step = self._session.state.current_iteration
        for name, value in values.items():
            self._logged[name] = (float("nan" if value is None else value), step)

    def keep(self, what: str | None) -> None:
        """Keep the "latest" or the "means" for :meth:`flush`; None: write at once."""
        self.keeps = what
        self._folds = {}

    def log(self, values: Mapping[str, Any], reduce: str | None = None) -> None:
        """See :meth:`helios.Model.log_dict`."""
        if reduce not in (None, *REDUCTIONS):
            raise ValueError(
                f"`reduce` must be one of {list(REDUCTIONS)} or None, got {reduce!r}"
            )
        if self.keeps is None:
            if reduce is not None:
                values = self._reduce(values, dict.fromkeys(values, reduce))
            self._emit(values)
            return
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                value = value.detach()
            if reduce is not None:
                self.reductions[name] = reduce
            if self.keeps == "latest":
                self.latest[name] = value
            elif name in self._folds:
                old, count = self._folds[name]
                self._folds[name] = (_fold(old, value, reduce), count + 1)
            else:
                self._folds[name] = (value, 1)

    def flush(self) -> None:
        """Write what was kept; every rank must call."""
        how, self.reductions = dict(self.reductions), {}
        if self.keeps == "means" and self._folds:
            folds, self._folds = self._folds, {}
            how = {name: how.get(name, "mean") for name in folds}
            values = {
                name: fold / count if how[name] == "mean" else fold
                for name, (fold, count) in folds.items()
            }
            self._emit(self._reduce(values, how))
        elif self.keeps == "latest" and self.latest:
            values, self.latest = self.latest, {}
            self._emit(self._reduce(values, how))

    def _reduce(self, values: Mapping[str, Any], how: Mapping[str, str]) -> Any:
        found = {name: values[name] for name in values if name in how}
        return {**values, **self._session.engine.reduce(found, how)}

    def _emit(self, values: Mapping[str, Any]) -> None:
        session = self._session
        if not session.engine.is_main:
            return
        numbers = {}
        for name, value in values.items():
            try:
                numbers[name] = float(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(
                    f"`{name}` is logged, and is no number: {error}"
                ) from error
        state = session.state
        step = state.current_iteration
        self._logged |= {name: (number, step) for name, number in numbers.items()}
        for name, number in numbers.items():
            self._write(partial(self.writer.add_scalar, name, number, step))
        if session.engine.accelerator.trackers:
            self._track(session.engine.accelerator.log, numbers, step=step)
        shown = "  ".join(f"{name} {number:.4g}" for name, number in numbers.items())
        epoch = state.global_epoch + (state.dataset_iter > 0)
        session.logger.info("epoch %d  step %d  %s", epoch, step, shown)
        for hook in self._hooks:
            hook(session, numbers)

    def flush_writer(self) -> None:
        """Have TensorBoard's log on the disk."""
        self._write(lambda: self.writer.flush())

    def close(self) -> None:
        """End TensorBoard's log, and the trackers."""
        self._write(lambda: self.writer.close())
        # Not by end_training, which also ends the process group: a test may follow.
        with contextlib.ExitStack() as stack:  # all of them, whatever fails
            for tracker in self._session.engine.accelerator.trackers:
                stack.callback(self._track, tracker.finish)

    def _track(self, call: Callable[..., Any], *args: Any, **options: Any) -> None:
        try:
            call(*args, **options)
        except OSError as error:  # logs never stop a run
            self._session.logger.error("A TRACKER COULD NOT WRITE: %s", error)

    def _write(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self._session.logger.error("TensorBoard's log ends here: %s", error)
            self.writer = NullWriter()


def _fold(old: Any, value: Any, reduce: str | None) -> Any:
    if reduce in ("max", "min"):
        pair = torch.stack([torch.as_tensor(old), torch.as_tensor(value)])
        return pair.amax(0) if reduce == "max" else pair.amin(0)
    return old + value
