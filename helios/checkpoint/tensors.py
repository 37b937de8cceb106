"""One safetensors file: written and checked in a single pass, read by memory map.

The library's `save_file` copies all first, and is to be read again for checksums.
"""

import contextlib
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any, BinaryIO, Self

import torch
from safetensors import safe_open
from torch import Tensor

#: A checksum covers so many bytes of a file, the last one what is left.
CHUNK_BYTES = 1 << 26
_PIECE_BYTES = 1 << 22
# Writing back so many bytes is begun while the next ones are written.
_BEHIND_BYTES = 1 << 24
#: By dtype: its name in such a file, of those that every reader knows.
FORMS = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def split(tensors: Mapping[str, Tensor], most: int) -> list[list[str]]:
    """The names of each shard; a tensor that is larger than one has its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def write_tensors(
    out: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, Any]:
    """Write tensors in host memory; return the file's size and its checksums."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    # The wide ones first: so each begins where its numbers may.
    order = sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n))
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": FORMS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with _Summing(out) as writer:
        writer.write(memoryview(len(text).to_bytes(8, "little") + text))
        for name in order:
            flat = flat_of(tensors[name])
            if flat.numel():
                data: Any = flat.view(torch.uint8).numpy()
                writer.write(memoryview(data))
    return writer.entry()


class _Summing:
    """Writes to a file, and sums up each chunk meanwhile, on a thread of its own.

    An executor would not do: none takes anything on once the main thread has ended, and
    a checkpoint may be in work then.
    """

    def __init__(self, out: BinaryIO) -> None:
        self._out, self._size = out, 0
        self._begun = 0  # bytes that are on their way to the disk
        self._sums = list[str]()
        self._pieces = Queue[memoryview | None](8)
        self._thread = Thread(target=self._sum_up, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._pieces.put(None)
        self._thread.join()

    def write(self, data: memoryview) -> None:
        start = 0
        while start < len(data):
            left = CHUNK_BYTES - self._size % CHUNK_BYTES
            piece = data[start : start + min(left, _PIECE_BYTES)]
            self._pieces.put(piece)
            self._out.write(piece)
            self._size += len(piece)
            start += len(piece)
            self._write_back()

    def _write_back(self) -> None:
        """Have the disk begin: at the end it would have all to do."""
        new = self._size - self._begun
        if new >= _BEHIND_BYTES and hasattr(os, "posix_fadvise"):
            # Of pages that have not been written back yet, it drops none.
            advice = os.POSIX_FADV_DONTNEED
            with contextlib.suppress(OSError):  # it is no more than advice
                os.posix_fadvise(self._out.fileno(), self._begun, new, advice)
            self._begun = self._size

    def _sum_up(self) -> None:
        size = total = 0
        while (piece := self._pieces.get()) is not None:
            size, total = size + len(piece), zlib.crc32(piece, total)
            if size == CHUNK_BYTES:  # no piece reaches into the next one
                self._sums.append(f"{total:08x}")
                size = total = 0
        if size:
            self._sums.append(f"{total:08x}")

    def entry(self) -> dict[str, Any]:
        return {"size_bytes": self._size, "crc32": self._sums}


def flat_of(tensor: Tensor) -> Tensor:
    """The numbers one after the other; torch keeps the strides of a single one."""
    flat = tensor.contiguous().reshape(-1)
    return flat.as_strided(flat.shape, (1,))


def begin_sums(
    pool: ThreadPoolExecutor, path: Path, entry: Mapping[str, Any]
) -> list[Future[str]]:
    """Begin to read a file's checksums, for :func:`compare_sums`.

    Raises:
        ValueError: it should have more or fewer.
    """
    starts = range(0, entry["size_bytes"], CHUNK_BYTES)
    if len(starts) != len(entry["crc32"]):
        raise ValueError(f"{len(entry['crc32'])} checksums are not those of its size")
    return [pool.submit(_sum_chunk, path, start) for start in starts]


def compare_sums(
    entry: Mapping[str, Any],
    sums: Sequence[Future[str]],
    advance: Callable[[int], object],
) -> None:
    """Compare a file with what `write_tensors` returned.

    `advance` is called with the number of bytes that have been compared since.

    Raises:
        ValueError: it is another file; the message says where.
        OSError: it cannot be read.
    """
    start = 0
    for saved, found in zip(entry["crc32"], sums, strict=True):
        end = start + CHUNK_BYTES
        if found.result() != saved:
            raise ValueError(f"it is altered, between the bytes {start} and {end}")
        advance(min(CHUNK_BYTES, entry["size_bytes"] - start))
        start = end


def check_size(path: Path, entry: Mapping[str, Any]) -> None:
    """Raise a ValueError where a file has another size, or is no plain file."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no plain file")
    if found.st_size != entry["size_bytes"]:
        raise ValueError(
            f"it is truncated or altered: {found.st_size} bytes, of "
            f"{entry['size_bytes']}"
        )


def _sum_chunk(path: Path, start: int) -> str:
    found, end = 0, start + CHUNK_BYTES
    buffer = memoryview(bytearray(1 << 20))
    # Of its own: the system reads ahead for each open file by itself.
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while start < end and (count := file.readinto(buffer[: end - start])):
            found = zlib.crc32(buffer[:count], found)
            start += count
    return f"{found:08x}"


def map_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors of a file, which is read where a tensor is used.

    They may be written to; the file stays as it is.

    Raises:
        SafetensorError: it is no such file.
    """
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  # it is no mapping
            yield name, file.get_tensor(name)
