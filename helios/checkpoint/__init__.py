"""Checkpoints: pickle-free, atomic, verified, written in the background."""

from helios.background import BackgroundWriter as BackgroundWriter
from helios.checkpoint.codec import Encoder as Encoder
from helios.checkpoint.codec import decode as decode
from helios.checkpoint.reading import Checkpoint as Checkpoint
from helios.checkpoint.reading import find_damage as find_damage
from helios.checkpoint.reading import read_checkpoint as read_checkpoint
from helios.checkpoint.store import CheckpointStore as CheckpointStore
from helios.checkpoint.store import find_last_checkpoint as find_last_checkpoint
from helios.checkpoint.trees import load as load
from helios.checkpoint.trees import save as save
from helios.checkpoint.types import register_type as register_type
