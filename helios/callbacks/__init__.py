"""What is attached to a run."""

from helios.callbacks.base import Callback
from helios.callbacks.progress import ProgressBar

__all__ = ["Callback", "ProgressBar"]
