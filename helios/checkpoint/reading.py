"""Reading a checkpoint: whether it is whole, its trees."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from helios.checkpoint.codec import Place, decode
from helios.checkpoint.records import DAMAGE, SUFFIX, read_record
from helios.checkpoint.tensors import begin_sums, check_size, compare_sums, map_tensors
from helios.errors import CheckpointCorruptError, CheckpointError
from helios.sharding import Layout, Piece, join

_SMALL_BYTES = 1 << 20

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
        copied: Callable[[Place], bool] = lambda path: False,
        has_classes: bool = True,
        layout: Layout = None,
    ) -> Any:
        """Decode one group.

        Its tensors are those of `tensors`, which are of use as long as nobody truncates
        the files. With `own`, they have memory of their own, laid out as it was. What
        was on a GPU goes there, without a copy on the host, if `device` is one. Neither
        is for those at the places that are `copied`: by whoever gets the tree.
        Sharded ones are made to lie as in `layout`; every rank must call then.
        `has_classes=False` puts names where the program's own enums, named tuples and
        registered types were.
        """
        made, joined = dict[tuple[str, str], Tensor | Future[Tensor]](), list[int]()
        n_bytes = sum(t.nbytes for ts in self.tensors.values() for t in ts.values())

        def find(
            path: Place, file: Any, name: str, there: Any = "cpu", *more: Any
        ) -> Tensor | Future[Tensor]:
            if file is None:
                if ("", name) not in made:
                    dim, kind = more[0], getattr(torch, more[1][6:])
                    made["", name] = join(pieces[name], there, dim, kind, layout)
                    # A piece that stands for many would take all memory.
                    joined.extend(tensor.nbytes for _, tensor in pieces[name])
                    if sum(joined) > n_bytes:
                        raise ValueError("there are pieces that are in no file")
                return made["", name]
            order = more[0] if more else None
            mapped = self.tensors[file][name]
            moves = device is not None and "cpu" not in (there, device.type)
            if copied(path) or not (own or moves):
                return mapped
            if (file, name) not in made:  # else it is one tensor, in several places
                empty = torch.empty_permuted(
                    tuple(mapped.shape),
                    tuple(range(mapped.ndim) if order is None else order),
                    dtype=mapped.dtype,
                    device=device if moves else None,
                )
                if moves or empty.nbytes < _SMALL_BYTES:
                    made[file, name] = empty.copy_(mapped)
                else:
                    made[file, name] = pool.submit(empty.copy_, mapped)
            return made[file, name]

        if group not in self.record["trees"]:
            raise CheckpointError(f"{self.path} has no {group!r}")
        plain, pieces = self.record["trees"][group], self._pieces()
        if group.startswith("rank_") and type(plain) is dict:  # no second copy of them
            plain = {name: node for name, node in plain.items() if name != "shards"}
        # Side by side: the first use of memory takes longer than the copy. What is made
        # in inference mode would carry its restrictions along.
        with torch.inference_mode(False), ThreadPoolExecutor() as pool:
            return decode(plain, find, has_classes=has_classes)

    def _pieces(self) -> dict[str, list[Piece]]:
        """The pieces of sharded tensors, of all ranks, by name."""
        found = dict[str, list[Piece]]()
        for group, tree in self.record["trees"].items():
            shards = tree.get("shards", {}) if type(tree) is dict else {}
            if group.startswith("rank_") and shards:
                own = decode(
                    shards, lambda _, file, name, *__: self.tensors[file][name]
                )
                if type(own) is not dict:
                    raise CheckpointCorruptError(f"{self.path}: {group} has no pieces")
                for name, piece in own.items():
                    found.setdefault(name, []).extend([] if piece is None else [piece])
        return found


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
    for check in (None, advance) if verify else (None,):
        for name, why in _damage(path, record, check):
            raise CheckpointCorruptError(f"{path / name}: {why}")
    for name, entry in record["files"].items():
        try:
            if name.endswith(SUFFIX):
                tensors.setdefault(entry["group"], {}).update(map_tensors(path / name))
        except DAMAGE as error:
            raise CheckpointCorruptError(f"{path / name}: {error}") from error
    return Checkpoint(path, record, tensors)


def find_damage(path: str | Path, *, advance: Advance = abs) -> dict[str, str]:
    """What is wrong with each file of a checkpoint, by name; empty where it is whole.

    `advance` as for `read_checkpoint`.

    Raises:
        CheckpointError: it is none, or its record cannot be read.
    """
    return dict(_damage(Path(path), read_record(Path(path)), advance))


def _damage(
    path: Path, record: Mapping[str, Any], advance: Advance | None
) -> Iterator[tuple[str, str]]:
    """The files that are damaged, and why; without `advance` by their sizes only."""
    sums = dict[str, Any]()
    pool = ThreadPoolExecutor()  # of all files: most have but one chunk
    try:
        for name, entry in record["files"].items():
            try:
                if Path(name).name != name:
                    raise ValueError("it is a file elsewhere")
                check_size(path / name, entry)
                if advance is not None:
                    sums[name] = begin_sums(pool, path / name, entry)
            except DAMAGE as error:
                yield name, str(error)
        for name, begun in sums.items():
            try:
                compare_sums(record["files"][name], begun, advance or abs)
            except DAMAGE as error:
                yield name, str(error)
    finally:  # also where one is enough, or at an interrupt
        pool.shutdown(cancel_futures=True)
