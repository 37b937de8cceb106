"""Loops that their users have written: what they run on."""

from helios.handwritten.session import RunStopped as RunStopped
from helios.handwritten.session import Session as Session
