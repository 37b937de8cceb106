"""The record of a checkpoint, ``helios.json``: read, and checked in all that it says.

``docs/format.md`` says what is in the folder: safetensors files, and the record, which
has a checksum of itself and of each 64 MiB of the files.
"""

import json
import re
import stat
import zlib
from datetime import MAXYEAR, UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from helios.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
)
from helios.state import TrainingState

FORMAT = 3
RECORD = "helios.json"
SUFFIX = ".safetensors"
# Larger ones would take much memory and time to read.
MAX_RECORD_BYTES = 1 << 26
_MAX_OBJECTS = 1 << 21
_MAX_FILE_BYTES = MAX_RECORD_BYTES + 100  # with the checksum around it
_ENVELOPE = re.compile(
    rb'\{"checksum": "crc32:([0-9a-f]{8})", "record": (\{.*\})\}\n', re.DOTALL
)
# What reading any file may raise. MemoryError, say, does not tell of a damaged one.
DAMAGE = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError),
    *(ArithmeticError, SafetensorError),
)


def check_room(body: bytes) -> None:
    """Raise a ValueError for a record that would take too much to read."""
    n_objects = body.count(b"{") + body.count(b"[")
    if len(body) > MAX_RECORD_BYTES or n_objects > _MAX_OBJECTS:
        has = f"{len(body) >> 20} MiB of plain values in {n_objects} dicts and lists"
        most = f"{MAX_RECORD_BYTES >> 20} MiB and {_MAX_OBJECTS}"
        raise ValueError(f"{has}; it may have {most}")


def read_record(path: Path) -> dict[str, Any]:
    """Read and verify a record; errors as for `read_checkpoint`."""
    try:
        if not any(path.glob(f"*{SUFFIX}")) and not (path / RECORD).exists():
            raise CheckpointNotFoundError(f"{path} is not the folder of a checkpoint")
        found = (path / RECORD).lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_FILE_BYTES:
            raise ValueError("it is no plain file, or too large")
        parts = _ENVELOPE.fullmatch((path / RECORD).read_bytes())
        if parts is None or parts[1] != b"%08x" % zlib.crc32(parts[2]):
            raise ValueError("it is truncated or altered")
        check_room(parts[2])
        record: dict[str, Any] = json.loads(parts[2])
        if record["format"] not in range(1, FORMAT + 1):
            raise CheckpointError(
                f"{path} has format {record['format']}, and {FORMAT} is the newest one "
                "that this version of Helios reads"
            )
        created = datetime.fromisoformat(record["created"])
        record["created"] = created.replace(tzinfo=UTC)
        if created.year == MAXYEAR:
            raise ValueError(f"`created` is {created}: no other could come after it")
        record = {"identity": {}, "metrics": {}, **record}
        for name in ("trees", "files", "progress", "identity", "metrics"):
            if type(record[name]) is not dict:
                raise ValueError(f"`{name}` is no object")
        for name, entry in record["files"].items():
            kinds = {"size_bytes": int, "crc32": list}
            kinds |= {"group": str} if name.endswith(SUFFIX) else {}
            if any(type(entry.get(key)) is not kind for key, kind in kinds.items()):
                raise ValueError(f"what it says of {name!r} is {entry!r:.60}")
        imported = record.get("imported", {"from": "", "unknown": []})
        if (type(imported["from"]), type(imported["unknown"])) != (str, list):
            raise ValueError(f"`imported` is {imported!r:.60}")
        names = record.get("passed_over", [])
        if type(names) is not list or any(type(name) is not str for name in names):
            raise ValueError(f"`passed_over` is {names!r:.60}")
        for value in record["metrics"].values():
            float("nan" if value is None else value)
        for name, default in TrainingState().dict().items():
            value = record["progress"].get(name, default)
            if not isinstance(value, str if isinstance(default, str) else int | float):
                raise ValueError(f"`{name}` of `progress` is {value!r:.60}")
    except DAMAGE as error:
        raise CheckpointCorruptError(f"{path / RECORD}: {error}") from error
    return record
