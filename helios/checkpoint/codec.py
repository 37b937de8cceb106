"""The codec: a tree to plain JSON data and named tensors, and back, without pickle.

``None``, bools, ints, finite floats, strings, lists, and dicts with string keys stand
for themselves; all else is ``{"$": tag, "v": payload}``, a tensor ``[file, name]``. Not
kept: strides, devices, ``requires_grad``, and which lists and dicts are the same one.
"""

import base64
import math
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from helios.errors import CheckpointCorruptError, UnstorableError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Path: TypeAlias = tuple[str | int, ...]

_MAX_DEPTH = 100
_UNSAFE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_DTYPES = {str(v): v for v in vars(torch).values() if isinstance(v, torch.dtype)}
_TENSORS = (Tensor, torch.nn.Parameter)
# The dtypes are those that safetensors both writes and reads.
_NUMBERS = r"bool|u?int(8|16|32|64)|b?float(16|32|64)|float8_e[45]\w+|complex64"
_STORABLE = re.compile(rf"torch\.({_NUMBERS}), torch\.strided")


def _to_array(tree: list[Any]) -> Any:
    dtype = np.dtype(tree[0])
    if dtype.kind not in "biufc":
        raise ValueError(f"numpy values of dtype {dtype} have no stored form")
    return tree[2].numpy().view(dtype).reshape(tree[1])


def _from_array(value: Any) -> list[Any]:
    if value.dtype.kind not in "biufc":
        raise ValueError(f"it has the dtype {value.dtype}")
    data = np.array(value, order="C").reshape(-1).view(np.uint8)
    return [value.dtype.str, list(value.shape), torch.from_numpy(data)]


#: By type: its tag, what turns a value into a tree, and what turns that back.
_CODES: dict[type, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    # The ints, floats and dicts here are those that JSON cannot hold.
    int: ("int", hex, lambda v: int(v, 16)),
    float: ("float", struct.Struct("<d").pack, lambda v: struct.unpack("<d", v)[0]),
    complex: ("complex", lambda v: [v.real, v.imag], lambda v: complex(*v)),
    bytes: ("bytes", lambda v: base64.b64encode(v).decode(), base64.b64decode),
    tuple: ("tuple", list, tuple),
    dict: ("dict", list, dict),
    OrderedDict: ("OrderedDict", list, OrderedDict),
    set: ("set", list, set),
    torch.dtype: ("dtype", str, lambda v: _DTYPES[v]),
    torch.device: ("device", str, torch.device),
    torch.Size: ("size", list, torch.Size),
    np.ndarray: ("array", _from_array, _to_array),
    np.generic: ("number", _from_array, lambda v: _to_array(v)[()]),
}
_BACK = {tag: back for tag, _, back in _CODES.values()}


class Encoder:
    """Encodes the trees of one checkpoint; a tensor that is in several is stored once.

    Attributes:
        files: the tensors by file and by name, which is the path to the tensor.
        aliases: by file, the further names of tensors that are stored under another.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, Tensor]] = {}
        self.aliases: dict[str, dict[str, str]] = {}
        # The tensor itself too, so that its address is not used again.
        self._places: dict[Any, tuple[str, str, Tensor]] = {}

    def encode(self, tree: object, *, file: str) -> Json:
        """Encode ``tree``; tensors that have no place yet get one in ``file``.

        Raises:
            UnstorableError: naming the path of a value that has no stored form.
        """
        self.files.setdefault(file, {})
        self.aliases.setdefault(file, {})
        return self._encode(tree, (), file)

    def _encode(self, value: Any, path: Path, file: str) -> Json:
        kind = type(value)
        is_finite = kind is float and math.isfinite(value)
        if value is None or kind in (bool, str) or is_finite or _is_small(value):
            return value  # type: ignore[no-any-return]  # mypy does not follow `kind`
        if isinstance(value, Tensor):
            return {"$": "tensor", "v": list(self._tensor(value, path, file))}
        if len(path) > _MAX_DEPTH:
            raise _refusal(path, "is nested too deep, or contains itself")
        if kind is list:
            return [self._encode(v, (*path, i), file) for i, v in enumerate(value)]
        if kind is dict and all(type(key) is str and key != "$" for key in value):
            return {k: self._encode(v, (*path, k), file) for k, v in value.items()}
        if isinstance(value, np.generic) and not isinstance(value, np.void):
            kind = np.generic
        if kind not in _CODES:
            raise _refusal(path, f"is a {kind.__module__}.{kind.__qualname__}")
        tag, to_tree, _ = _CODES[kind]
        try:
            tree = to_tree(value)
        except ValueError as error:
            raise _refusal(path, f"cannot be stored: {error}") from error
        if kind in (dict, OrderedDict):  # paths name keys, not pairs
            payload: list[Json] = []
            for n, (key, v) in enumerate(value.items()):
                at = (*path, key if type(key) is str or _is_small(key) else f"key {n}")
                payload.append([self._encode(key, at, file), self._encode(v, at, file)])
            return {"$": tag, "v": payload}
        return {"$": tag, "v": self._encode(tree, path, file)}

    def _tensor(self, tensor: Tensor, path: Path, file: str) -> tuple[str, str]:
        form, is_plain = f"{tensor.dtype}, {tensor.layout}", type(tensor) in _TENSORS
        if not is_plain or not _STORABLE.fullmatch(form):
            raise _refusal(path, f"is a {type(tensor).__qualname__} of {form}")
        address = tensor.untyped_storage().data_ptr() if tensor.numel() else id(tensor)
        if tensor.is_nested or tensor.is_meta or not address:
            raise _refusal(path, "is a nested tensor, or one without data")
        shape = (tensor.storage_offset(), tensor.shape, tensor.stride())
        lazy = (tensor.is_conj(), tensor.is_neg())
        key = (tensor.device, address, *shape, tensor.dtype, *lazy)
        name = _UNSAFE.sub("_", ".".join(map(str, path))) or "value"
        if key in self._places:
            home, first, _ = self._places[key]
            if home == file and first != name:
                self.aliases[file][name] = first
            return home, first
        while name in self.files[file] or name == "__metadata__":
            name = f"{name}~{len(self.files[file])}"
        self.files[file][name] = tensor.detach().resolve_conj().resolve_neg()
        self._places[key] = (file, name, tensor)
        return file, name


def decode(plain: Any, tensors: Mapping[str, Mapping[str, Tensor]]) -> Any:
    """Rebuild the tree that :meth:`Encoder.encode` was given, of these tensors.

    Raises:
        CheckpointCorruptError: ``plain`` is not what ``encode`` makes, in any way.
    """
    try:
        return _decode(plain, tensors)
    except Exception as error:
        raise CheckpointCorruptError(f"a tree is malformed: {error!r}") from error


def _decode(node: Any, tensors: Mapping[str, Mapping[str, Tensor]]) -> Any:
    if type(node) is list:
        return [_decode(item, tensors) for item in node]
    if type(node) is not dict:
        return node
    if "$" not in node:
        return {key: _decode(value, tensors) for key, value in node.items()}
    tag, payload = node["$"], node["v"]
    if tag == "tensor":
        file, name = payload
        return tensors[file][name]
    return _BACK[tag](_decode(payload, tensors))


def _is_small(value: object) -> bool:
    return type(value) is int and value.bit_length() < 64


def _refusal(path: Path, what: str) -> UnstorableError:
    parts = [f".{p}" if str(p).isidentifier() else f"[{p!r:.60}]" for p in path]
    where = "".join(parts).removeprefix(".") or "the tree"
    return UnstorableError(
        f"`{where}` {what}: it has no stored form; leave "
        "it out of the state, or return it from `user_state_dict` in another form"
    )
