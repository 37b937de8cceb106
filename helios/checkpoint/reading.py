"""Reading a checkpoint: its record, whether it is whole, its trees.

``docs/format.md`` says what is in the folder: safetensors files, and ``helios.json``,
the record, which has a checksum of itself and of each 64 MiB of the files.
"""

import json
import re
import stat
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from torch import Tensor

from helios.checkpoint.codec import Place, decode
from helios.checkpoint.tensors import begin_sums, check_size, compare_sums, map_tensors
from helios.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
)

FORMAT = 2
RECORD = "helios.json"
SUFFIX = ".safetensors"
#: Larger ones would take much memory to read.
MAX_RECORD_BYTES = 1 << 26
_SMALL_BYTES = 1 << 20
_ENVELOPE = re.compile(
    rb'\{"checksum": "crc32:([0-9a-f]{8})", "record": (\{.*\})\}\n', re.DOTALL
)
# What reading any file may raise. MemoryError, say, does not tell of a damaged one.
_DAMAGE = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError),
    SafetensorError,
)

Advance: TypeAlias = Callable[[int], object]  # `abs` does nothing


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, by group and name its tensors, which are read where they are used.

    They can be written to, which changes neither the file nor another `Checkpoint`.
    """

    path: Path
    record: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]

    def tree(
        self,
        group: str,
        *,
        own: bool = False,
        device: torch.device | None = None,
        copied: Place = (),
        has_classes: bool = True,
    ) -> Any:
        """Decode one group.

        Its tensors are those of `tensors`, which are of use as long as nobody truncates
        the files; with `own`, they have memory of their own. Those that were on a GPU
        go there, without a copy on the host, if `device` is one. Neither is for those
        below the place `copied`, which whoever gets the tree copies himself.
        `has_classes=False` puts names where the program's own enums, named tuples and
        registered types were.
        """
        made = dict[tuple[str, str], Tensor]()
        copies = list[Future[Tensor]]()

        def find(path: Place, file: str, name: str, there: str = "cpu") -> Tensor:
            mapped = self.tensors[file][name]
            moves = device is not None and "cpu" not in (there, device.type)
            if (copied and path[: len(copied)] == copied) or not (own or moves):
                return mapped
            if (file, name) in made:  # it is one tensor, in several places
                return made[file, name]
            made[file, name] = found = torch.empty_like(
                mapped, device=device if moves else None
            )
            if moves or found.nbytes < _SMALL_BYTES:  # numbers are looked at at once
                found.copy_(mapped)
            else:
                copies.append(pool.submit(found.copy_, mapped))
            return found

        if group not in self.record["trees"]:
            raise CheckpointError(f"{self.path} has no {group!r}")
        plain = self.record["trees"][group]
        # Side by side: the first use of memory takes longer than the copy. What is made
        # in inference mode would carry its restrictions along.
        with torch.inference_mode(False), ThreadPoolExecutor() as pool:
            tree = decode(plain, find, has_classes=has_classes)
            for copy in copies:
                copy.result()
        return tree


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
    record, tensors = read_record(path), dict[str, dict[str, Tensor]]()
    damage = _find_damage(path, record, None)
    if verify and not damage:
        damage = _find_damage(path, record, advance)
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
    return _find_damage(Path(path), read_record(Path(path)), advance)


def _find_damage(
    path: Path, record: Mapping[str, Any], advance: Advance | None
) -> dict[str, str]:
    """As `find_damage`; without `advance` by the files' sizes only."""
    found, sums = dict[str, str](), dict[str, Any]()
    with ThreadPoolExecutor() as pool:  # of all files: most have but one chunk
        for name, entry in record["files"].items():
            try:
                if Path(name).name != name:
                    raise ValueError("it is a file elsewhere")
                check_size(path / name, entry)
                if advance is not None:
                    sums[name] = begin_sums(pool, path / name, entry)
            except _DAMAGE as error:
                found[name] = str(error)
        for name, begun in sums.items():
            try:
                compare_sums(record["files"][name], begun, advance or abs)
            except _DAMAGE as error:
                found[name] = str(error)
    return found


def read_record(path: Path) -> dict[str, Any]:
    """Read and verify a record; errors as for :func:`read_checkpoint`."""
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
        if record["format"] not in range(1, FORMAT + 1):
            raise CheckpointError(
                f"{path} has format {record['format']}, and {FORMAT} is the newest one "
                "that this version of Helios reads"
            )
        created = datetime.fromisoformat(record["created"])
        record["created"] = created.replace(tzinfo=UTC)
        if not all(type(record[key]) is dict for key in ("trees", "files", "progress")):
            raise ValueError("`trees`, `files` or `progress` is of another type")
    except _DAMAGE as error:
        raise CheckpointCorruptError(f"{path / RECORD}: {error}") from error
    return record
