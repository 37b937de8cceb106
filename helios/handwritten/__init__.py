"""Loops that their users have written: what they run on."""

from helios.handwritten.session import Session as Session
from helios.handwritten.stopped import RunStopped as RunStopped
