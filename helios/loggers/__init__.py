"""Where a run writes what it has to say."""

from helios.loggers.tensorboard import NullWriter, get_tensorboard_writer
from helios.loggers.text import get_root_logger

__all__ = ["NullWriter", "get_root_logger", "get_tensorboard_writer"]
