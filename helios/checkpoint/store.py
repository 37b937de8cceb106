"""Folders of checkpoints: written as a whole, found, retained.

``created`` rises from one checkpoint of a folder to the next, whatever the clock does.
A folder whose name begins with a dot is being written or deleted. Tests inject faults
into this module's ``os``, ``open`` and ``shutil``.
"""

import errno
import json
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from helios.checkpoint.codec import check_keys
from helios.checkpoint.reading import read_checkpoint
from helios.checkpoint.records import FORMAT, RECORD, SUFFIX, check_room, read_record
from helios.checkpoint.tensors import split, write_tensors
from helios.errors import CheckpointError, CheckpointNotFoundError

INDEX = ".safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
_NAME = re.compile(r"(?!\.)[^/\0]+(?<!\.replaced)")

Report: TypeAlias = Callable[[str], None]


class CheckpointStore:
    """The checkpoints in one folder. One process at a time may begin and commit."""

    def __init__(
        self, root: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        self.root, self.max_shard_bytes = Path(root), max_shard_bytes

    def begin(self, name: str, size_bytes: int = 0) -> Path:
        """Make the folder to write into.

        Raises:
            OSError: it cannot be made, or the disk has no room for that size.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"`name` must be that of a plain folder, got {name!r}")
        os.makedirs(self.root, exist_ok=True)
        self.clean()
        if (free := shutil.disk_usage(self.root).free) < size_bytes:
            what = f"{size_bytes} bytes are needed in {self.root}, {free} are free"
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {what}")
        folder = self.root / f".helios-{uuid.uuid4().hex}"
        os.mkdir(folder)
        return folder

    def clean(self) -> None:
        """Remove what dead writers left behind."""
        for name in os.listdir(self.root) if self.root.is_dir() else ():
            path = self.root / name
            is_aside = path.suffix == ".replaced" and path.with_suffix("").exists()
            if is_aside or name.startswith(".helios-"):
                shutil.rmtree(path, ignore_errors=True)

    def write_group(
        self,
        folder: Path,
        group: str,
        tensors: Mapping[str, Tensor],
        aliases: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Write a group's files to the disk; what the record says of them, by name."""
        shards = split(tensors, self.max_shard_bytes)
        entries, places = dict[str, Any](), dict[str, str]()
        if len(shards) == 1:
            notes = {**(metadata or {}), **(aliases or {})}
            return self._write_file(folder, f"{group}{SUFFIX}", group, tensors, notes)
        for number, names in enumerate(shards, 1):
            file = f"{group}-{number:05}-of-{len(shards):05}{SUFFIX}"
            shard = {name: tensors[name] for name in names}
            notes = {a: n for a, n in (aliases or {}).items() if n in shard}
            notes |= metadata or {}
            entries |= self._write_file(folder, file, group, shard, notes)
            places |= dict.fromkeys(names, file)
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        text = json.dumps(index, indent=2).encode()
        _write_synced(folder / f"{group}{INDEX}", text)
        entry = {"size_bytes": len(text), "crc32": [f"{zlib.crc32(text):08x}"]}
        return {**entries, f"{group}{INDEX}": entry}

    def _write_file(
        self,
        folder: Path,
        file: str,
        group: str,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str],
    ) -> dict[str, Any]:
        with open(folder / file, "xb") as out:
            entry = write_tensors(out, tensors, metadata)
            out.flush()
            os.fsync(out.fileno())
        return {file: {"group": group, **entry}}

    def commit(
        self,
        folder: Path,
        name: str,
        record: Mapping[str, Any],
        others: Mapping[Path, Mapping[str, Any]] | None = None,
    ) -> Path:
        """Make ``folder`` the checkpoint ``name``, in the place of one of that name.

        ``record`` has ``trees``, ``files`` (what :meth:`write_group` returned, of all
        groups and ranks), and what else it is to hold. ``others`` is what
        :meth:`records` gives, for those who have asked already.
        """
        known = self.records() if others is None else others
        after = [r["created"] + timedelta(microseconds=1) for r in known.values()]
        now = max([datetime.now(UTC), *after])
        _write_record(folder / RECORD, {"format": FORMAT, "created": now, **record})
        _sync_folder(folder)
        final, aside = self.root / name, self.root / f"{name}.replaced"
        if final.exists():
            os.rename(final, aside)  # no dot: until the new one is there, it counts
        os.rename(folder, final)
        _sync_folder(self.root)
        if aside.exists():
            self.remove(aside)
        return final

    def amend(self, path: Path, **values: Any) -> None:
        """Change values of a record, as a whole."""
        partial = path / f".{RECORD}"
        partial.unlink(missing_ok=True)
        _write_record(partial, {**read_record(path), **values})
        os.replace(partial, path / RECORD)
        _sync_folder(path)

    def records(self) -> dict[Path, dict[str, Any]]:
        """The checkpoints with a readable record, newest first, and the records."""
        found = [(r["created"], path, r) for path, r in self._scan() if r is not None]
        newest_first = sorted(found, key=lambda one: one[:2], reverse=True)
        return {path: record for _, path, record in newest_first}

    def list(self) -> Sequence[Path]:
        """The checkpoints with a readable record, newest first."""
        return list(self.records())

    def candidates(self) -> Sequence[Path]:
        """All that are there, also those whose record cannot be read."""
        return [path for path, _ in self._scan()]

    def find_last(
        self,
        report: Report = lambda why: None,
        reading: Callable[[Sequence[Path]], Any] = lambda paths: nullcontext(abs),
    ) -> Path | None:
        """The newest checkpoint that is whole; ``report`` hears why others are not.

        What ``reading`` gives for some checkpoints is called with each number of bytes.
        """
        damaged = [path for path, record in self._scan() if record is None]
        for path in (*damaged, *self.list()):
            try:
                with reading([path]) as advance:
                    return read_checkpoint(path, advance=advance).path
            except CheckpointError as error:
                report(f"skipped the checkpoint {path.name}: {error}")
        return None

    def remove(self, path: Path) -> None:
        """Delete a checkpoint, as a whole."""
        doomed = self.root / f".helios-{uuid.uuid4().hex}"  # never half of one
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _scan(self) -> Iterator[tuple[Path, dict[str, Any] | None]]:
        """Each checkpoint, and its record; None: that cannot be read."""
        for path in sorted(self.root.glob("[!.]*/")):
            try:
                if not path.is_symlink():  # another name, such as "latest"
                    yield path, read_record(path)
            except CheckpointNotFoundError:
                continue
            except CheckpointError:
                yield path, None


def find_last_checkpoint(root: str | Path) -> Path | None:
    """The newest whole checkpoint in ``root`` and its direct subfolders."""
    folders = [Path(root), *Path(root).glob("[!.]*/")]
    found = [path for path in (CheckpointStore(f).find_last() for f in folders) if path]
    return max(found, key=lambda path: read_record(path)["created"], default=None)


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    record = {**record, "created": record["created"].isoformat()}
    # Not escaped: JSON takes two escaped lone surrogates for one character.
    body = json.dumps(record, ensure_ascii=False).encode(errors="surrogatepass")
    try:
        check_room(body)
        check_keys(record["trees"])
    except ValueError as error:
        raise CheckpointError(
            f"the state is too large: {error}; keep long lists of numbers as arrays"
        ) from error
    checksum = b"crc32:%08x" % zlib.crc32(body)
    _write_synced(path, b'{"checksum": "%s", "record": %s}\n' % (checksum, body))


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "xb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
