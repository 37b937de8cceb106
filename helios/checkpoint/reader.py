"""Reading one checkpoint: its record, its tensors, and what is wrong with it.

A checkpoint is a folder of safetensors files and ``helios.json``::

    {"checksum": "crc32:<8 hex digits>", "record": <record>}

The checksum is that of the record's bytes as they stand there. The record is::

    {"format": 1, "created": "<UTC time>", "progress": {...}, "world_size": 1,
     "versions": {...}, "trees": {"<group>": <plain data of the codec>},
     "files": {"<name>.safetensors": {"size_bytes": n, "checksum": "crc32:..."}}}

and what the writer adds. Nothing in a folder is trusted: whatever it holds, reading it
gives what was written, or a `CheckpointError`.
"""

import io
import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from helios.checkpoint.codec import decode
from helios.checkpoint.tensorfile import unpack
from helios.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
)

__all__ = [
    "Checkpoint",
    "FileRecord",
    "find_problems",
    "read_checkpoint",
    "read_record",
]

FORMAT = 1
RECORD = "helios.json"
SUFFIX = ".safetensors"
CHUNK_BYTES = 1 << 20  # hashed while it is in the processor's cache
_MAX_RECORD_BYTES = 1 << 28
_ENVELOPE = re.compile(
    rb'\{"checksum": "(crc32:[0-9a-f]{8})", "record": (\{.*\})\}\n', re.DOTALL
)


class FileRecord(TypedDict):
    """What the record says of one file."""

    size_bytes: int
    checksum: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        tensors: By file (``"model"``) and name, on the CPU, in memory of their own.
    """

    path: Path
    record: dict[str, Any] = field(repr=False)
    tensors: dict[str, dict[str, Tensor]] = field(repr=False)

    def tree(self, group: str) -> Any:
        """Decodes one group. It gets the tensors themselves, so decode it once."""
        trees = self.record["trees"]
        if group not in trees:
            raise CheckpointError(f"{self.path} has no {group!r}, only {list(trees)}")
        try:
            return decode(trees[group], self.tensors)
        except CheckpointCorruptError as error:
            raise CheckpointCorruptError(f"{self.path}, {group!r}: {error}") from error


def read_checkpoint(
    path: str | Path, *, files: Iterable[str] | None = None, verify: bool = True
) -> Checkpoint:
    """Reads the record and the tensors of `files` (``"model"``; None: all of them).

    Args:
        path: The checkpoint's folder.
        files: Groups that refer to tensors of other files cannot be decoded.
        verify: Whether checksums are compared while reading. Sizes always are.

    Raises:
        CheckpointNotFoundError: if `path` is no checkpoint.
        CheckpointCorruptError: if anything in it is wrong.
    """
    path = Path(path)
    if not path.is_dir() or not is_checkpoint(path):
        raise CheckpointNotFoundError(f"{path} is not a checkpoint's folder")
    record = read_record(path)
    entries: dict[str, FileRecord] = record["files"]
    if files is None:
        files = [name.removesuffix(SUFFIX) for name in entries]
    tensors = {}
    for file in files:
        name = f"{file}{SUFFIX}"
        if name not in entries:
            raise CheckpointError(f"{path} has no file {name!r}, only {list(entries)}")
        with _reading(path / name, entries[name], verify=verify) as fill:
            tensors[file] = unpack(fill, entries[name]["size_bytes"])
    return Checkpoint(path, record, tensors)


def read_record(path: Path) -> dict[str, Any]:
    """The verified record of the checkpoint in folder `path`."""
    try:
        with _open_regular(path / RECORD) as file:
            text = file.read(_MAX_RECORD_BYTES + 1)
        match = _ENVELOPE.fullmatch(text)
        if len(text) > _MAX_RECORD_BYTES or match is None:
            raise ValueError("is not a record: truncated, altered, or too large")
        if match[1] != b"crc32:%08x" % zlib.crc32(match[2]):
            raise ValueError("is altered: its checksum is another one")
        record: dict[str, Any] = json.loads(match[2])
        if record["format"] != FORMAT:
            raise CheckpointError(
                f"{path} is of format {record['format']}, and this version of Helios "
                f"reads format {FORMAT}; use a newer one"
            )
        if datetime.fromisoformat(record["created"]).tzinfo is None:
            raise ValueError("has a `created` without time zone")
        for name, entry in record["files"].items():
            check_name(name)
            is_entry = (
                type(entry["size_bytes"]) is int and type(entry["checksum"]) is str
            )
            if not is_entry or not name.endswith(SUFFIX):
                raise ValueError(f"has a malformed entry {name!r} in `files`")
        if type(record["trees"]) is not dict or type(record["progress"]) is not dict:
            raise ValueError("has `trees` or `progress` of another type")
    except CheckpointError:
        raise
    except Exception as error:
        raise _corrupt(path / RECORD, error) from error
    return record


def find_problems(path: Path, *, deep: bool) -> list[str]:
    """What is wrong; without `deep` only the record and the sizes are looked at."""
    try:
        files = read_record(path)["files"]
    except CheckpointError as error:
        return [str(error)]
    problems = []
    scratch = memoryview(bytearray(CHUNK_BYTES if deep else 0))
    for name, entry in files.items():
        try:
            with _reading(path / name, entry, verify=deep) as fill:
                for begin in range(0, entry["size_bytes"] if deep else 0, CHUNK_BYTES):
                    fill(scratch[: entry["size_bytes"] - begin])
        except CheckpointCorruptError as error:
            problems.append(str(error))
    return problems


def is_checkpoint(path: Path) -> bool:
    # Without the record, tensors still tell one that was damaged from other folders.
    try:
        names = os.listdir(path)
    except OSError:
        return False
    return any(name == RECORD or name.endswith(SUFFIX) for name in names)


def check_name(name: str) -> None:
    if not name or name.startswith(".") or set(name) & set("/\\\0"):
        raise ValueError(f"{name!r} is no plain name of a file or folder")


@contextmanager
def _reading(
    path: Path, entry: FileRecord, *, verify: bool
) -> Iterator[Callable[[memoryview], None]]:
    """Gives what fills buffers from the file; any failure is that of a corrupt file."""
    checksum = 0

    def fill(data: memoryview) -> None:
        nonlocal checksum
        for begin in range(0, len(data), CHUNK_BYTES):
            chunk = data[begin : begin + CHUNK_BYTES]
            if file.readinto(chunk) != len(chunk):
                raise ValueError("ends too early")
            if verify:
                checksum = zlib.crc32(chunk, checksum)

    try:
        with _open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry["size_bytes"]:
                raise ValueError(f"has {size} bytes, not {entry['size_bytes']}")
            yield fill
        if verify and f"crc32:{checksum:08x}" != entry["checksum"]:
            raise ValueError(f"is altered: its checksum is not {entry['checksum']}")
    except Exception as error:
        raise _corrupt(path, error) from error


def _open_regular(path: Path) -> io.BufferedReader:
    # Neither a link to elsewhere nor a pipe that would block.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("is not a regular file")
    return open(handle, "rb")


def _corrupt(path: Path, error: Exception) -> CheckpointCorruptError:
    if isinstance(error, FileNotFoundError):
        return CheckpointCorruptError(f"{path} is missing")
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
        return CheckpointCorruptError(f"{path} {error}")
    reason = f"{type(error).__name__}: {error}"
    return CheckpointCorruptError(f"{path} cannot be read: {reason}")
