"""The codec: a tree to plain JSON data and named tensors, and back, without pickle.

``None``, bools, ints, finite floats, strings, lists, and dicts with string keys stand
for themselves; all else is ``{"$": tag, "v": payload}``, a tensor ``[file, name]``, and
its device and the order of its dimensions where they are not as usual; a sharded one
``[name, shape, dimension, dtype]``, of whose pieces each rank has its own. Not kept:
gaps and overlaps of views, which of several devices, ``requires_grad``, and which lists
and dicts are the same one.
"""

import math
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeAlias

import torch
from torch import Tensor

from helios import sharding
from helios.checkpoint.tensors import FORMS, flat_of
from helios.checkpoint.types import (
    BACK,
    BACK_WITHOUT_CLASSES,
    CODES,
    MAPPINGS,
    from_registered,
    kind_of,
)
from helios.errors import CheckpointCorruptError, CheckpointError, UnstorableError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Place: TypeAlias = tuple[str | int, ...]  # the keys on the way to a value
#: Gets a tensor's place in the tree, its file (None for a sharded one), and what else
#: its node has; gives the tensor, or who is going to have it.
Find: TypeAlias = Callable[..., Tensor | Future[Tensor]]

_MAX_DEPTH = 100
_MAX_KEYS = 1 << 15
_HASHING = ("set", "frozenset", "dict", "OrderedDict", "Counter")
_UNSAFE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_TENSORS = (Tensor, torch.nn.Parameter)


class Encoder:
    """Encodes the trees of one checkpoint; a tensor that is in several is stored once.

    Attributes:
        files: the tensors by file and by name, which is the path to the tensor.
        aliases: by file, the further names of tensors that are stored under another.
        pieces: by name, this rank's pieces of sharded tensors, to be encoded last.
    """

    def __init__(self, pieces: dict[str, sharding.Piece | None] | None = None) -> None:
        self.files: dict[str, dict[str, Tensor]] = {}
        self.aliases: dict[str, dict[str, str]] = {}
        self.pieces = {} if pieces is None else pieces
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

    def _encode(self, value: Any, path: Place, file: str) -> Json:
        kind = type(value)
        is_finite = kind is float and math.isfinite(value)
        if value is None or kind in (bool, str) or is_finite or _is_small(value):
            return value  # type: ignore[no-any-return]  # mypy does not follow `kind`
        if isinstance(value, Tensor):
            return self._tensor(value, path, file)
        if len(path) > _MAX_DEPTH:
            raise _refusal(path, "is nested too deep, or contains itself")
        if kind is list:
            return [self._encode(v, (*path, i), file) for i, v in enumerate(value)]
        if kind is dict and all(type(key) is str and key != "$" for key in value):
            return {k: self._encode(v, (*path, k), file) for k, v in value.items()}
        try:
            found = from_registered(value)
        except ValueError as error:
            raise _refusal(path, f"cannot be stored: {error}") from error
        if found is not None:
            return {"$": "type", "v": [found[0], self._encode(found[1], path, file)]}
        kind = kind_of(value)
        if kind not in CODES:
            kind = type(value)
            raise _refusal(path, f"is a {kind.__module__}.{kind.__qualname__}")
        tag, to_tree, _ = CODES[kind]
        try:
            tree = to_tree(value)
        except ValueError as error:
            raise _refusal(path, f"cannot be stored: {error}") from error
        if kind in MAPPINGS:  # paths name keys, not pairs
            payload: list[Json] = []
            for n, (key, v) in enumerate(value.items()):
                at = (*path, key if type(key) is str or _is_small(key) else f"key {n}")
                payload.append([self._encode(key, at, file), self._encode(v, at, file)])
            return {"$": tag, "v": payload}
        return {"$": tag, "v": self._encode(tree, path, file)}

    def _tensor(self, tensor: Tensor, path: Place, file: str) -> Json:
        if sharding.is_sharded(tensor):
            return self._sharded(tensor, path, file)
        if tensor.is_quantized:
            raise _refusal(path, "is quantised; keep `dequantize()` of it instead")
        if type(tensor) not in _TENSORS or tensor.layout is not torch.strided:
            kind = type(tensor).__qualname__
            raise _refusal(path, f"is a {kind} of {tensor.dtype}, {tensor.layout}")
        address = tensor.untyped_storage().data_ptr() if tensor.numel() else id(tensor)
        if tensor.is_nested or tensor.is_meta or not address:
            raise _refusal(path, "is a nested tensor, or one without data")
        stored = tensor.detach().resolve_conj().resolve_neg()
        is_known = tensor.dtype in FORMS  # the others go as bytes
        shape = (tensor.storage_offset(), tensor.shape, tensor.stride())
        lazy = (tensor.is_conj(), tensor.is_neg())
        key = (tensor.device, address, *shape, tensor.dtype, *lazy)
        name = _UNSAFE.sub("_", ".".join(map(str, path))) or "value"
        if key in self._places:
            home, first, _ = self._places[key]
            if home == file and first != name:
                self.aliases[file][name] = first
        else:
            while name in self.files[file] or name == "__metadata__":
                name = f"{name}~{len(self.files[file])}"
            self.files[file][name] = stored if is_known else _bytes(stored)
            self._places[key] = (file, name, tensor)
            home, first = file, name
        order = _order(tensor) if is_known else None
        where: list[Json] = [tensor.device.type, order]
        if order is None:
            where = [] if tensor.device.type == "cpu" else where[:1]
        plain: Json = {"$": "tensor", "v": [home, first, *where]}
        if is_known:
            return plain
        return {"$": "viewed", "v": [str(tensor.dtype), list(tensor.shape), plain]}

    def _sharded(self, tensor: Any, path: Place, file: str) -> Json:
        try:
            dim, piece = sharding.shard_dim(tensor), sharding.piece_of(tensor)
        except ValueError as error:
            raise _refusal(path, f"cannot be stored: {error}") from error
        # A name that all ranks have for it: each of them has the same tree.
        kind = file.partition("_")[0]
        name = ".".join(_UNSAFE.sub("_", str(part)) for part in (kind, *path))
        while name in self.pieces:
            name += "~"
        if piece is not None:
            key = ("sharded", piece[1].data_ptr(), tensor.shape)
            _, name, _ = self._places.setdefault(key, (file, name, piece[1]))
        self.pieces.setdefault(name, piece)
        return {"$": "sharded", "v": [name, [*tensor.shape], dim, str(tensor.dtype)]}


def decode(plain: Any, find: Find, *, has_classes: bool = True) -> Any:
    """Rebuild the tree that :meth:`Encoder.encode` was given, of the tensors found.

    Without the classes of the program that made it, what they stand for is in tuples.

    Raises:
        CheckpointCorruptError: ``plain`` is not what ``encode`` makes, in any way.
        CheckpointError: a class in it is not imported, or not registered.
    """
    try:
        check_keys(plain)
        found = dict[int, Any]()
        _find(plain, (), find, found)
        # All are there before a function of the user's looks at one.
        for key, tensor in found.items():
            found[key] = tensor.result() if isinstance(tensor, Future) else tensor
        return _decode(plain, found, BACK if has_classes else BACK_WITHOUT_CLASSES)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointCorruptError(f"a tree is malformed: {error!r}") from error


def check_keys(plain: Any) -> None:
    """Raise a ValueError for too many keys, or members of sets, that are no strings.

    Some can be made so that Python takes a time that is quadratic in their number.
    """
    left, count = [plain], 0
    while left:
        node = left.pop()
        if type(node) is list:
            left += [item for item in node if type(item) in (dict, list)]
        elif type(node) is dict:
            left += [item for item in node.values() if type(item) in (dict, list)]
            if node.get("$") in _HASHING:
                pairs = "set" not in node["$"]
                keys = [item[0] for item in node["v"]] if pairs else node["v"]
                count += sum(type(key) is dict for key in keys)
    if count > _MAX_KEYS:
        raise ValueError(
            f"{count} keys, or members of sets, are tuples and the like; there may be "
            f"{_MAX_KEYS}"
        )


def _find(node: Any, path: Place, find: Find, found: dict[int, Any]) -> None:
    """Find the tensors below a node; each stands under the ``id`` of its node."""
    if type(node) is list:
        for index, item in enumerate(node):
            _find(item, (*path, index), find, found)
    elif type(node) is dict and "$" not in node:
        for key, value in node.items():
            _find(value, (*path, key), find, found)
    elif type(node) is dict and node["$"] == "tensor":
        found[id(node)] = find(path, *node["v"])
    elif type(node) is dict and node["$"] == "sharded":
        found[id(node)] = find(path, None, *node["v"])
    elif type(node) is dict and node["$"] in ("dict", "OrderedDict", "Counter"):
        for key, value in node["v"]:  # paths name keys, not pairs
            _find(key, path, find, found)
            _find(value, (*path, key if type(key) is str else "key"), find, found)
    elif type(node) is dict:
        _find(node["v"], path, find, found)


def _decode(node: Any, found: Mapping[int, Any], back: Mapping[str, Any]) -> Any:
    if type(node) is list:
        return [_decode(item, found, back) for item in node]
    if type(node) is not dict:
        return node
    if "$" not in node:
        return {key: _decode(value, found, back) for key, value in node.items()}
    if node["$"] in ("tensor", "sharded"):
        return found[id(node)]
    return back[node["$"]](_decode(node["v"], found, back))


def _is_small(value: object) -> bool:
    return type(value) is int and value.bit_length() < 64


def _refusal(path: Place, what: str) -> UnstorableError:
    parts = [f".{p}" if str(p).isidentifier() else f"[{p!r:.60}]" for p in path]
    where = "".join(parts).removeprefix(".") or "the tree"
    return UnstorableError(
        f"`{where}` {what}: it has no stored form; leave "
        "it out of the state, or return it from `user_state_dict` in another form"
    )


def _order(tensor: Tensor) -> list[Json] | None:
    """The dimensions from the outermost in memory on; None: as they are counted."""
    if tensor.is_contiguous():
        return None
    strides = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda dim: -strides[dim])
    return [*order] if tensor.permute(order).is_contiguous() else None  # has gaps


def _bytes(tensor: Tensor) -> Tensor:
    return flat_of(tensor).view(torch.uint8)
