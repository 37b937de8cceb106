"""Folders of checkpoints: written as a whole, verified, found, retained.

A checkpoint is a folder of safetensors files and ``helios.json``, written last::

    {"checksum": "crc32:<8 hex digits>", "record": <record>}

The checksum is that of the record's bytes as they stand there. The record is::

    {"format": 1, "created": "<UTC time>", "progress": {...}, "identity": {...},
     "trees": {"<group>": <plain data of the codec>},
     "files": {"<name>.safetensors": {"size_bytes": n, "checksum": "crc32:..."}}}

``created`` rises from one checkpoint of a folder to the next, whatever the clock does.
A folder whose name begins with a dot is being written or deleted. Tests inject faults
into this module's ``os``, ``open``, ``shutil`` and ``save_file``.
"""

import json
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeAlias

import safetensors.torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from helios.checkpoint.codec import decode
from helios.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
)

FORMAT = 1
RECORD = "helios.json"
SUFFIX = ".safetensors"
_ENVELOPE = re.compile(
    rb'\{"checksum": "crc32:([0-9a-f]{8})", "record": (\{.*\})\}\n', re.DOTALL
)
_NAME = re.compile(r"(?!\.)[^/\0]+(?<!\.replaced)")
# What reading any file may raise. MemoryError, say, does not tell of a damaged one.
_DAMAGE = (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError)

Report: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint; its tensors, by file and name, are in memory of their own."""

    path: Path
    record: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]

    def tree(self, group: str) -> Any:
        """Decode one group. It gets the tensors themselves: decode it once."""
        if group not in self.record["trees"]:
            raise CheckpointError(f"{self.path} has no {group!r}")
        return decode(self.record["trees"][group], self.tensors)


class CheckpointStore:
    """The checkpoints in one folder. One process at a time may begin and commit."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def begin(self, name: str) -> Path:
        """Make the folder to write into; remove what dead writers left behind."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"`name` must be that of a plain folder, got {name!r}")
        os.makedirs(self.root, exist_ok=True)
        aside = [p for p in self.root.glob("*.replaced") if p.with_suffix("").exists()]
        for litter in (*self.root.glob(".helios-*"), *aside):
            shutil.rmtree(litter, ignore_errors=True)
        folder = self.root / f".helios-{uuid.uuid4().hex}"
        os.mkdir(folder)
        return folder

    def write_file(
        self,
        folder: Path,
        file: str,
        tensors: Mapping[str, Tensor],
        aliases: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Write ``<file>.safetensors`` to the disk; the tensors share no memory."""
        path = folder / f"{file}{SUFFIX}"
        contents = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            save_file(contents, path, metadata=dict(aliases or {}) or None)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        checksum = 0
        with open(path, "rb") as written:
            os.fchmod(written.fileno(), folder.stat().st_mode & 0o666)  # not 0600
            while chunk := written.read(1 << 20):
                checksum = zlib.crc32(chunk, checksum)
            os.fsync(written.fileno())
            return {"size_bytes": written.tell(), "checksum": f"crc32:{checksum:08x}"}

    def commit(self, folder: Path, name: str, record: Mapping[str, Any]) -> Path:
        """Make ``folder`` the checkpoint ``name``, in the place of one of that name.

        ``record`` has ``trees``, ``files`` (by name without suffix, what
        :meth:`write_file` returned, of all ranks), and what else it is to hold.
        """
        files = {f"{file}{SUFFIX}": entry for file, entry in record["files"].items()}
        after = [at + timedelta(microseconds=1) for _, at in self._scan() if at]
        now = max([datetime.now(UTC), *after])
        head = {"format": FORMAT, "created": now.isoformat()}
        # Not escaped: JSON takes two escaped lone surrogates for one character.
        text = json.dumps({**head, **record, "files": files}, ensure_ascii=False)
        body = text.encode(errors="surrogatepass")
        with open(folder / RECORD, "xb") as out:
            checksum = b"crc32:%08x" % zlib.crc32(body)
            out.write(b'{"checksum": "%s", "record": %s}\n' % (checksum, body))
            out.flush()
            os.fsync(out.fileno())
        _sync_folder(folder)
        final, aside = self.root / name, self.root / f"{name}.replaced"
        if final.exists():
            os.rename(final, aside)  # no dot: until the new one is there, it counts
        os.rename(folder, final)
        _sync_folder(self.root)
        if aside.exists():
            self._remove(aside)
        return final

    def list(self) -> Sequence[Path]:
        """The checkpoints with a readable record, newest first."""
        found = [(at, path) for path, at in self._scan() if at is not None]
        return [path for _, path in sorted(found, reverse=True)]

    def find_last(self, report: Report = lambda why: None) -> Path | None:
        """The newest checkpoint that is whole; ``report`` hears why others are not."""
        damaged = [path for path, at in self._scan() if at is None]
        for path in (*damaged, *self.list()):
            try:
                return read_checkpoint(path).path
            except CheckpointError as error:
                report(f"skipped the checkpoint {path.name}: {error}")
        return None

    def prune(self, keep_last: int) -> None:
        """Delete all but the newest ``keep_last``, unread: call it after a commit."""
        assert keep_last >= 1
        for path in self.list()[keep_last:]:
            self._remove(path)

    def _scan(self) -> Iterator[tuple[Path, datetime | None]]:
        """Each checkpoint, and when it was made; None: its record cannot be read."""
        for path in sorted(self.root.glob("[!.]*/")):
            try:
                if not path.is_symlink():  # another name, such as "latest"
                    yield path, _read_record(path)["created"]
            except CheckpointNotFoundError:
                continue
            except CheckpointError:
                yield path, None

    def _remove(self, path: Path) -> None:
        doomed = self.root / f".helios-{uuid.uuid4().hex}"  # never half of one
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def find_last_checkpoint(root: str | Path) -> Path | None:
    """The newest whole checkpoint in ``root`` and its direct subfolders."""
    folders = [Path(root), *Path(root).glob("[!.]*/")]
    found = [path for path in (CheckpointStore(f).find_last() for f in folders) if path]
    return max(found, key=lambda path: _read_record(path)["created"], default=None)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        CheckpointNotFoundError: ``path`` is none.
        CheckpointCorruptError: a file of it is missing, truncated or altered.
    """
    path, tensors = Path(path), {}
    record = _read_record(path)
    for name, entry in record["files"].items():
        try:
            if Path(name).name != name:
                raise ValueError("it is a file elsewhere")
            data = (path / name).read_bytes()
            size, checksum = len(data), f"crc32:{zlib.crc32(data):08x}"
            if entry != {"size_bytes": size, "checksum": checksum}:
                raise ValueError("it is truncated or altered")
            tensors[name.removesuffix(SUFFIX)] = safetensors.torch.load(data)
        except (*_DAMAGE, SafetensorError) as error:
            raise CheckpointCorruptError(f"{path / name}: {error}") from error
    return Checkpoint(path, record, tensors)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        if not any(path.glob(f"*{SUFFIX}")) and not (path / RECORD).exists():
            raise CheckpointNotFoundError(f"{path} is not the folder of a checkpoint")
        parts = _ENVELOPE.fullmatch((path / RECORD).read_bytes())
        if parts is None or parts[1] != b"%08x" % zlib.crc32(parts[2]):
            raise ValueError("it is truncated or altered")
        record: dict[str, Any] = json.loads(parts[2])
        if record["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has format {record['format']}, not {FORMAT}: Helios is too old"
            )
        created = datetime.fromisoformat(record["created"])
        record["created"] = created.replace(tzinfo=UTC)
        if not all(type(record[key]) is dict for key in ("trees", "files", "progress")):
            raise ValueError("`trees`, `files` or `progress` is of another type")
    except _DAMAGE as error:
        raise CheckpointCorruptError(f"{path / RECORD}: {error}") from error
    return record


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
