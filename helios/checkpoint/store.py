"""Folders of checkpoints: written as a whole, verified, found, retained.

A checkpoint is a folder of safetensors files and ``helios.json``, written last::

    {"checksum": "crc32:<8 hex digits>", "record": <record>}

The checksum is that of the record's bytes as they stand there. The record is::

    {"format": 1, "created": "<UTC time>", "progress": {...}, "identity": {...},
     "trees": {"<group>": <plain data of the codec>},
     "files": {"<name>.safetensors": {"group": "<group>", "size_bytes": n,
                                      "crc32": ["<8 hex digits>", ...]}}}

A file has a checksum for each 64 MiB of it. A group with more tensors than fit in one
file is split into shards, with an index; both as the Hugging Face Hub has them.
``created`` rises from one checkpoint of a folder to the next, whatever the clock does.
A folder whose name begins with a dot is being written or deleted. Tests inject faults
into this module's ``os``, ``open`` and ``shutil``.
"""

import errno
import json
import os
import re
import shutil
import stat
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeAlias

from safetensors import SafetensorError
from torch import Tensor

from helios.checkpoint.codec import decode
from helios.checkpoint.tensors import (
    allocate,
    begin_sums,
    check_size,
    compare_sums,
    map_tensors,
    split,
    write_tensors,
)
from helios.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
)

FORMAT = 1
RECORD = "helios.json"
SUFFIX = ".safetensors"
INDEX = ".safetensors.index.json"
#: Larger ones would take much memory to read.
MAX_RECORD_BYTES = 1 << 26
MAX_SHARD_BYTES = 5 * 10**9
_ENVELOPE = re.compile(
    rb'\{"checksum": "crc32:([0-9a-f]{8})", "record": (\{.*\})\}\n', re.DOTALL
)
_NAME = re.compile(r"(?!\.)[^/\0]+(?<!\.replaced)")
# What reading any file may raise. MemoryError, say, does not tell of a damaged one.
_DAMAGE = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError),
    SafetensorError,
)

Report: TypeAlias = Callable[[str], None]
Advance: TypeAlias = Callable[[int], object]  # `abs` does nothing


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, by group and name its tensors, which are read where they are used.

    They can be written to, which changes neither the file nor another `Checkpoint`.
    """

    path: Path
    record: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]

    def tree(self, group: str, *, own: bool = False, has_classes: bool = True) -> Any:
        """Decode one group.

        `own`: with tensors in memory of their own. Else with those of `tensors`, which
        are of use as long as nobody truncates the files. `has_classes=False` puts names
        where the program's own enums, named tuples and registered types were.
        """
        if group not in self.record["trees"]:
            raise CheckpointError(f"{self.path} has no {group!r}")
        tensors: Mapping[str, Mapping[str, Tensor]] = self.tensors
        if own:
            tensors = {name: _Cloned(found) for name, found in self.tensors.items()}
        return decode(self.record["trees"][group], tensors, has_classes=has_classes)


class _Cloned(dict[str, Tensor]):
    """Tensors that are copied where they are asked for, each once."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __missing__(self, name: str) -> Tensor:
        mapped = self._tensors[name]
        self[name] = allocate(mapped.shape, mapped.dtype).copy_(mapped)
        return self[name]


class CheckpointStore:
    """The checkpoints in one folder. One process at a time may begin and commit."""

    def __init__(
        self, root: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        self.root, self.max_shard_bytes = Path(root), max_shard_bytes

    def begin(self, name: str, *, size_bytes: int = 0) -> Path:
        """Make the folder to write into; remove what dead writers left behind.

        Raises:
            OSError: it cannot be made, or the disk has no room for that size.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"`name` must be that of a plain folder, got {name!r}")
        os.makedirs(self.root, exist_ok=True)
        aside = [p for p in self.root.glob("*.replaced") if p.with_suffix("").exists()]
        for litter in (*self.root.glob(".helios-*"), *aside):
            shutil.rmtree(litter, ignore_errors=True)
        if (free := shutil.disk_usage(self.root).free) < size_bytes:
            raise OSError(
                errno.ENOSPC,
                f"{os.strerror(errno.ENOSPC)}: {size_bytes} bytes are needed in "
                f"{self.root}, {free} are free",
            )
        folder = self.root / f".helios-{uuid.uuid4().hex}"
        os.mkdir(folder)
        return folder

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
        with open(folder / f"{group}{INDEX}", "xb") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
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
        _write_record(partial, {**_read_record(path), **values})
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

    def find_last(self, report: Report = lambda why: None) -> Path | None:
        """The newest checkpoint that is whole; ``report`` hears why others are not."""
        damaged = [path for path, record in self._scan() if record is None]
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
            self.remove(path)

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
                    yield path, _read_record(path)
            except CheckpointNotFoundError:
                continue
            except CheckpointError:
                yield path, None


def find_last_checkpoint(root: str | Path) -> Path | None:
    """The newest whole checkpoint in ``root`` and its direct subfolders."""
    folders = [Path(root), *Path(root).glob("[!.]*/")]
    found = [path for path in (CheckpointStore(f).find_last() for f in folders) if path]
    return max(found, key=lambda path: _read_record(path)["created"], default=None)


def read_checkpoint(
    path: str | Path, *, verify: bool = True, advance: Advance = abs
) -> Checkpoint:
    """Open a checkpoint, whose tensors are then read where they are used.

    `verify=False` compares the sizes of its files only, and not their checksums.
    `advance` is called with the number of bytes that have been compared since.

    Raises:
        CheckpointNotFoundError: ``path`` is none.
        CheckpointCorruptError: a file of it is missing, truncated or altered.
    """
    path = Path(path)
    record, tensors = _read_record(path), dict[str, dict[str, Tensor]]()
    damage = _find_damage(path, record, has_sums=False)
    if verify and not damage:
        damage = _find_damage(path, record, advance=advance)
    for name, why in damage.items():
        raise CheckpointCorruptError(f"{path / name}: {why}")
    for name, entry in record["files"].items():
        try:
            if name.endswith(SUFFIX):
                tensors.setdefault(entry["group"], {}).update(map_tensors(path / name))
        except _DAMAGE as error:
            raise CheckpointCorruptError(f"{path / name}: {error}") from error
    return Checkpoint(path, record, tensors)


def find_damage(path: str | Path, *, advance: Advance = abs) -> dict[str, str]:
    """What is wrong with each file of a checkpoint, by name; empty where it is whole.

    `advance` as for `read_checkpoint`.

    Raises:
        CheckpointError: it is none, or its record cannot be read.
    """
    return _find_damage(Path(path), _read_record(Path(path)), advance=advance)


def _find_damage(
    path: Path,
    record: Mapping[str, Any],
    *,
    has_sums: bool = True,
    advance: Advance = abs,
) -> dict[str, str]:
    found, sums = dict[str, str](), dict[str, Any]()
    with ThreadPoolExecutor() as pool:  # of all files: most have but one chunk
        for name, entry in record["files"].items():
            try:
                if Path(name).name != name:
                    raise ValueError("it is a file elsewhere")
                check_size(path / name, entry)
                if has_sums:
                    sums[name] = begin_sums(pool, path / name, entry)
            except _DAMAGE as error:
                found[name] = str(error)
        for name, begun in sums.items():
            try:
                compare_sums(record["files"][name], begun, advance)
            except _DAMAGE as error:
                found[name] = str(error)
    return found


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    record = {**record, "created": record["created"].isoformat()}
    # Not escaped: JSON takes two escaped lone surrogates for one character.
    body = json.dumps(record, ensure_ascii=False).encode(errors="surrogatepass")
    if len(body) > MAX_RECORD_BYTES:
        raise CheckpointError(
            f"the state's plain values take {len(body) >> 20} MiB, of at most "
            f"{MAX_RECORD_BYTES >> 20}; keep long lists of numbers as arrays"
        )
    with open(path, "xb") as out:
        checksum = b"crc32:%08x" % zlib.crc32(body)
        out.write(b'{"checksum": "%s", "record": %s}\n' % (checksum, body))
        out.flush()
        os.fsync(out.fileno())


def _read_record(path: Path) -> dict[str, Any]:
    try:
        if not any(path.glob(f"*{SUFFIX}")) and not (path / RECORD).exists():
            raise CheckpointNotFoundError(f"{path} is not the folder of a checkpoint")
        found = (path / RECORD).lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > 2 * MAX_RECORD_BYTES:
            raise ValueError("it is no plain file, or too large")
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
