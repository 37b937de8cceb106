"""TensorBoard: one run folder, continued where a checkpoint left it."""

from __future__ import annotations

import pathlib
from typing import Any

from helios.loggers.text import get_root_logger


class NullWriter:
    """Takes every call of a ``SummaryWriter`` and does nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


_current: Any = NullWriter()


def get_tensorboard_writer() -> Any:
    """The ``SummaryWriter`` of the run in progress; outside of one, a null object."""
    return _current


def open_writer(folder: pathlib.Path | None, purge_step: int | None = None) -> Any:
    """Make the current writer; the null one for ``None``.

    TensorBoard hides what earlier processes wrote of ``purge_step`` and later ones.
    """
    global _current
    if folder is None:
        _current = NullWriter()
    else:
        # Imported here: it takes longer than the rest of Helios together.
        from torch.utils.tensorboard import SummaryWriter

        try:
            _current = SummaryWriter(str(folder), purge_step=purge_step)
        except OSError as error:  # logs never stop a run
            get_root_logger().error("THERE IS NO LOG FOR TENSORBOARD: %s", error)
            _current = NullWriter()
    return _current
