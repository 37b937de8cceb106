"""What is attached to a run."""

from helios.callbacks.base import Callback as Callback
