"""Trees without a run: saved as whole as checkpoints are, and loaded again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from helios.checkpoint.codec import Encoder
from helios.checkpoint.reading import Checkpoint, read_checkpoint
from helios.checkpoint.store import CheckpointStore
from helios.errors import CheckpointError

_GROUP = "tree"


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Save a tree of plain values and tensors as a folder, in place of an older one.

    It is there as a whole or not at all, whatever happens, with checksums, and without
    pickle: nothing in it can run code. It returns when all is on the disk. One process
    may call it: of several ranks the main one, for example.

    Raises:
        UnstorableError: a value has no stored form; the message names its place.
        CheckpointError: there is something else at ``path``.
        OSError: it cannot be written.
    """
    target = Path(os.path.abspath(path))
    encoder = Encoder()
    trees = {_GROUP: encoder.encode(tree, file=_GROUP)}
    if target.exists():
        _open(target)
        shutil.rmtree(_aside(target), ignore_errors=True)
    store = CheckpointStore(target.parent)
    # Of its own name: a store of a run may be at work in the same folder.
    partial = target.parent / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        tensors, aliases = encoder.files[_GROUP], encoder.aliases[_GROUP]
        files = store.write_group(partial, _GROUP, tensors, aliases)
        record = {"progress": {}, "trees": trees, "files": files}
        store.commit(partial, target.name, record, {})
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load(path: str | os.PathLike[str]) -> Any:
    """Load what `save` has saved, in memory of its own; tensors are on the CPU.

    Raises:
        CheckpointNotFoundError: there is nothing.
        CheckpointCorruptError: a file of it is missing, truncated or altered.
        CheckpointError: it is the checkpoint of a run.
    """
    target = Path(path)
    is_moved = _aside(target).exists() and not target.exists()
    return _open(_aside(target) if is_moved else target).tree(_GROUP, own=True)


def _aside(target: Path) -> Path:
    """Where a crash may have left an older tree, before the new one came."""
    return target.parent / f"{target.name}.replaced"


def _open(path: Path) -> Checkpoint:
    checkpoint = read_checkpoint(path)
    if set(checkpoint.record["trees"]) != {_GROUP}:
        raise CheckpointError(
            f"{path} is the checkpoint of a run; read it with `read_checkpoint`"
        )
    return checkpoint
