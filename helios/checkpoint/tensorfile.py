"""One safetensors file: its bytes, made and read without a second copy of them.

The package's own writer and reader give the same bytes, but hash nothing on the way,
write from or into a whole copy, or return views of the mapped file.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

__all__ = ["CODES", "pack", "unpack"]

_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_NAMES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz"},
    **{"F8_E5M2": "float8_e5m2", "F8_E5M2FNUZ": "float8_e5m2fnuz"},
    **{"F8_E8M0": "float8_e8m0fnu", "C64": "complex64", "BOOL": "bool"},
}
# `hasattr`: some came after torch 2.6.
_DTYPES = {
    code: getattr(torch, name) for code, name in _NAMES.items() if hasattr(torch, name)
}
#: The dtypes that safetensors knows, with its names for them.
CODES: dict[torch.dtype, str] = {dtype: code for code, dtype in _DTYPES.items()}


def pack(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterator[memoryview]:
    """Yields the bytes of the file: the header, then each tensor in turn.

    Tensors may lie on any device and with any strides; one at a time is copied where
    its bytes do not lie in host memory in order.
    """
    # Widest first, as safetensors does: every tensor is then aligned.
    items = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in items:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for _, tensor in items:
        yield _bytes_of(tensor.detach().cpu().resolve_conj().resolve_neg().contiguous())


def unpack(fill: Callable[[memoryview], None], size_bytes: int) -> dict[str, Tensor]:
    """Reads a file of `size_bytes` through `fill` into new tensors, front to back.

    Args:
        fill: Fills what it is given with the next bytes of the file, or raises.
        size_bytes: Bounds what is allocated, whatever the header claims.

    Raises:
        Exception: of any type, if the bytes are no safetensors file.
    """
    prefix = bytearray(8)
    fill(memoryview(prefix))
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > min(_MAX_HEADER_BYTES, size_bytes - 8):
        raise ValueError(f"its header claims {header_bytes} bytes")
    text = bytearray(header_bytes)
    fill(memoryview(text))
    header = json.loads(text)
    header.pop("__metadata__", None)
    tensors = {}
    position = 0
    for name, entry in sorted(header.items(), key=lambda e: e[1]["data_offsets"]):
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        begin, end = entry["data_offsets"]
        if (
            begin != position
            or end != begin + math.prod(shape) * dtype.itemsize
            or end > size_bytes - 8 - header_bytes
        ):
            raise ValueError(f"tensor {name!r} does not lie where the header says")
        tensors[name] = torch.empty(shape, dtype=dtype, device="cpu")
        fill(_bytes_of(tensors[name]))
        position = end
    if position != size_bytes - 8 - header_bytes:
        raise ValueError("there are bytes behind the last tensor")
    return tensors


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
