"""Checkpoints: pickle-free, atomic, verified, written in the background."""

from pathlib import Path
from typing import Any

from helios.checkpoint.codec import Encoder, Json, decode
from helios.checkpoint.reader import Checkpoint, FileRecord, read_checkpoint
from helios.checkpoint.store import (
    CheckpointInfo,
    CheckpointStore,
    find_last_checkpoint,
)
from helios.checkpoint.types import register_type
from helios.checkpoint.writer import BackgroundWriter

__all__ = [
    "BackgroundWriter",
    "Checkpoint",
    "CheckpointInfo",
    "CheckpointStore",
    "Encoder",
    "FileRecord",
    "Json",
    "decode",
    "find_last_checkpoint",
    "load",
    "read_checkpoint",
    "register_type",
    "save",
]


def save(path: str | Path, tree: object) -> Path:
    """Stores any tree as a checkpoint of its own: the folder `path`.

    Raises:
        UnstorableError: naming the path of a value that has no stored form.
    """
    path = Path(path)
    encoder, store = Encoder(), CheckpointStore(path.parent)
    trees = {"tree": encoder.encode(tree, file="tensors")}
    folder = store.begin(path.name)
    files = {
        file: store.write_file(folder, file, tensors, encoder.aliases[file])
        for file, tensors in encoder.files.items()
    }
    return store.commit(folder, path.name, {"trees": trees, "files": files})


def load(path: str | Path) -> Any:
    """Gives back what `save` stored."""
    return read_checkpoint(path).tree("tree")
