"""Folders of checkpoints: written as a whole, found, retained.

A folder is written under a name that begins with a dot, its record last, and then
renamed. `created` rises from one checkpoint of a store to the next, whatever the clock
does: it is their order. What changes the disk goes through `open`, `os` and `shutil` of
this module only: there tests inject faults.
"""

import builtins
import json
import os
import re
import shutil
import socket
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from helios.checkpoint.reader import (
    CHUNK_BYTES,
    FORMAT,
    RECORD,
    SUFFIX,
    FileRecord,
    check_name,
    find_problems,
    is_checkpoint,
    read_record,
)
from helios.checkpoint.tensorfile import pack
from helios.errors import CheckpointError

__all__ = ["CheckpointInfo", "CheckpointStore", "find_last_checkpoint"]

_STALE_S = 3600.0  # after which a silent writer on another host counts as dead
_TEMPORARY = re.compile(r"\.helios-(\d+)-[0-9a-f]{32}-(.*)")


@dataclass(frozen=True)
class CheckpointInfo:
    """One folder as `CheckpointStore.list` finds it.

    Attributes:
        created: From the record, or when the folder was changed if that is unreadable.
        record: Without ``trees``; empty if it is unreadable.
        problem: Why the record cannot be used, or None. Other files are not looked at.
    """

    path: Path
    created: datetime
    record: dict[str, Any] = field(repr=False)
    problem: str | None = None


class CheckpointStore:
    """The checkpoints in one folder. One process at a time may begin and commit."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._last_created: datetime | None = None

    def begin(self, name: str) -> Path:
        """Makes the folder to write into, and removes what dead writers left behind.

        Any rank may then `write_file` into it; the one that began it commits it.
        """
        check_name(name)
        if not self.root.exists():
            os.makedirs(self.root, exist_ok=True)
            _sync_folder(self.root.parent)
        for entry in _folders(self.root):
            if _is_litter(entry):
                shutil.rmtree(entry, ignore_errors=True)
        folder = self.root / _temporary_name()
        os.mkdir(folder)
        return folder

    def write_file(
        self,
        folder: Path,
        file: str,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str] | None = None,
    ) -> FileRecord:
        """Writes ``<file>.safetensors`` and waits until it is on the disk."""
        check_name(file)
        checksum = size_bytes = 0
        with open(folder / f"{file}{SUFFIX}", "xb") as out:
            for data in pack(tensors, metadata or {}):
                for begin in range(0, len(data), CHUNK_BYTES):
                    chunk = data[begin : begin + CHUNK_BYTES]
                    checksum = zlib.crc32(chunk, checksum)
                    size_bytes += len(chunk)
                    out.write(chunk)
            _sync(out)
        return {"size_bytes": size_bytes, "checksum": f"crc32:{checksum:08x}"}

    def commit(self, folder: Path, name: str, record: Mapping[str, Any]) -> Path:
        """Makes `folder` the checkpoint `name`, in the place of one of that name.

        Args:
            folder: From `begin`.
            name: The checkpoint's name.
            record: ``trees``, ``files`` (by name without suffix: what `write_file`
                returned, of all ranks), and whatever else the record is to hold.
        """
        check_name(name)
        files = {f"{file}{SUFFIX}": entry for file, entry in record["files"].items()}
        for file, entry in files.items():
            if os.stat(folder / file).st_size != entry["size_bytes"]:
                raise CheckpointError(f"{folder / file} is not what was written to it")
        created = self._new_created()
        defaults = {"progress": {}, "world_size": 1, "versions": {}}
        content = {"format": FORMAT, "created": created.isoformat(), **defaults}
        content |= {**record, "files": files}
        body = json.dumps(content, allow_nan=False).encode()
        with open(folder / RECORD, "xb") as out:
            head = f'{{"checksum": "crc32:{zlib.crc32(body):08x}", "record": '
            out.write(head.encode() + body + b"}\n")
            _sync(out)
        _sync_folder(folder)
        final = self.root / name
        aside = f"{name}.replaced-"  # no dot: until the new one is there, it counts
        if final.exists():
            os.rename(final, self.root / f"{aside}{uuid.uuid4().hex}")
        os.rename(folder, final)
        _sync_folder(self.root)
        self._last_created = created
        for entry in _folders(self.root):
            if entry.name.startswith(aside):
                self._remove(entry)
        return final

    def list(self) -> list[CheckpointInfo]:
        """All checkpoints, newest first, those without a usable record too."""
        paths = (p for p in _folders(self.root) if not p.name.startswith("."))
        infos = [_info(path) for path in paths if is_checkpoint(path)]
        return sorted(infos, key=lambda info: info.created, reverse=True)

    def verify(self, path: Path) -> builtins.list[str]:
        """The problems of one checkpoint: every file is read. None: it is whole."""
        return find_problems(Path(path), deep=True)

    def find_last(self, report: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that is whole; `report` hears why others are not."""
        return _first_whole(self.list(), report)

    def prune(self, keep_last: int) -> builtins.list[Path]:
        """Deletes all but the newest `keep_last` whole ones, and damaged newer ones.

        Here "whole" is judged by the record and the sizes of the files. Folders whose
        record cannot be read are left alone. Returns what was deleted.
        """
        if keep_last < 1:
            raise ValueError(f"`keep_last` must be >= 1, got {keep_last}")
        kept, deleted = 0, []
        for info in self.list():
            if kept >= keep_last and info.problem is None:
                self._remove(info.path)
                deleted.append(info.path)
            elif not find_problems(info.path, deep=False):
                kept += 1
        return deleted

    def _remove(self, path: Path) -> None:
        doomed = self.root / _temporary_name()  # half a folder is no checkpoint
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _new_created(self) -> datetime:
        if self._last_created is None:
            created = (i.created for i in self.list() if i.problem is None)
            self._last_created = max(created, default=datetime.min.replace(tzinfo=UTC))
        return max(datetime.now(UTC), self._last_created + timedelta(microseconds=1))


def find_last_checkpoint(
    root: str | Path, report: Callable[[str], None] = lambda reason: None
) -> Path | None:
    """The newest whole checkpoint in `root` and its direct subfolders."""
    folders = [Path(root), *_folders(Path(root))]
    infos = [info for folder in folders for info in CheckpointStore(folder).list()]
    return _first_whole(infos, report)


def _info(path: Path) -> CheckpointInfo:
    try:
        record = read_record(path)
    except CheckpointError as error:
        modified = path.stat().st_mtime if path.exists() else 0.0
        return CheckpointInfo(
            path, datetime.fromtimestamp(modified, UTC), {}, str(error)
        )
    del record["trees"]
    return CheckpointInfo(path, datetime.fromisoformat(record["created"]), record)


def _first_whole(
    infos: Iterable[CheckpointInfo], report: Callable[[str], None]
) -> Path | None:
    for info in sorted(infos, key=lambda info: info.created, reverse=True):
        problems = (
            [info.problem] if info.problem else find_problems(info.path, deep=True)
        )
        if not problems:
            return info.path
        report(f"checkpoint {info.path.name} is passed over: {'; '.join(problems)}")
    return None


def _folders(root: Path) -> list[Path]:
    try:
        with os.scandir(root) as entries:
            return [Path(e.path) for e in entries if e.is_dir(follow_symlinks=False)]
    except OSError:  # not there, or not ours to read
        return []


def _temporary_name() -> str:
    return f".helios-{os.getpid()}-{uuid.uuid4().hex}-{socket.gethostname()}"


def _is_litter(path: Path) -> bool:
    match = _TEMPORARY.fullmatch(path.name)
    if match is None:
        return False
    if match[2] == socket.gethostname():
        if int(match[1]) == os.getpid() or not os.path.exists(f"/proc/{match[1]}"):
            return True
    times = [item.stat().st_mtime for item in (path, *path.iterdir())]
    return time.time() - max(times) > _STALE_S


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
