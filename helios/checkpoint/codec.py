"""The codec: a tree to plain JSON data and named tensors, and back, without pickle.

Plain data are JSON values. ``None``, bools, ints of 64 bits, finite floats, strings,
lists, and dicts with string keys stand for themselves. Everything else is an object of
two members, ``{"$": tag, "v": payload}``; a tensor is
``{"$": "tensor", "v": [file, name]}``, with its dtype third where it is stored as
another one.

Not kept: whether two places hold the same *list* or *dict* (tensors are kept the same),
attributes set on a dict, strides, ``requires_grad``, the device, and ``Parameter``,
which comes back as a plain tensor. numpy arrays come back in C order.
"""

import itertools
import math
import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from helios.checkpoint.tensorfile import CODES
from helios.checkpoint.types import DTYPES, FROM_TREE, TO_TREE, qualified_name
from helios.errors import CheckpointCorruptError, UnstorableError

__all__ = ["Encoder", "Json", "decode"]

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Tensors: TypeAlias = Mapping[str, Mapping[str, Tensor]]

_MAX_DEPTH = 100  # four JSON levels each at most, within the parser's limit of 1000
_SURROGATE = re.compile("[\ud800-\udfff]")
_UNSAFE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_DICTS: dict[str, Callable[[dict[Any, Any]], object]] = {
    "dict": lambda made: made,
    "OrderedDict": OrderedDict,
    "defaultdict": lambda made: defaultdict(None, made),
}
# Dtypes that safetensors does not know, stored as reals or (packed ones) as bytes.
_STORED_AS_OTHER = {"torch.complex32", "torch.complex128", "torch.float4_e2m1fn_x2"}


class Encoder:
    """Encodes the trees of one checkpoint.

    Attributes:
        files: The tensors found, by file and name: the live ones, detached, not copies.
        aliases: By file, the other names under which a tensor of that file was met,
            each with the name it is stored under. As the metadata of a file it is what
            `safetensors.torch.save_model` writes.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, Tensor]] = {}
        self.aliases: dict[str, dict[str, str]] = {}
        # The tensor is kept so that no other one can come to lie at its address.
        self._places: dict[object, tuple[Tensor, list[str]]] = {}
        self._active: set[int] = set()

    def encode(self, tree: object, *, file: str) -> Json:
        """Encodes `tree`; tensors that have no place yet get one in `file`.

        The tensors must not change until they are written or copied.

        Raises:
            UnstorableError: naming the path of a value that has no stored form.
        """
        self.files.setdefault(file, {})
        self.aliases.setdefault(file, {})
        return self._encode(tree, (), file)

    def _encode(self, value: Any, path: tuple[object, ...], file: str) -> Json:
        kind = type(value)
        if (
            value is None
            or kind is bool
            or _is_small(value)
            or (kind is float and math.isfinite(value))
            or (kind is str and not _SURROGATE.search(value))
        ):
            return value  # type: ignore[no-any-return]  # mypy does not follow `kind`
        if isinstance(value, Tensor):
            return self._tensor(value, path, file)
        if id(value) in self._active:
            raise _refusal(path, "contains itself", "break the cycle")
        if len(self._active) >= _MAX_DEPTH:
            raise _refusal(
                path, "is nested too deep", f"stay below {_MAX_DEPTH} levels"
            )
        self._active.add(id(value))
        try:
            if kind is list:
                return [self._encode(v, (*path, i), file) for i, v in enumerate(value)]
            if kind in (dict, OrderedDict, defaultdict):
                return self._dict(value, path, file)
            return self._other(value, path, file)
        finally:
            self._active.discard(id(value))

    def _dict(self, value: dict[Any, Any], path: tuple[object, ...], file: str) -> Json:
        if getattr(value, "default_factory", None) is not None:
            raise _refusal(path, "is a defaultdict with a factory", "make it a dict")
        values = [self._encode(v, (*path, key), file) for key, v in value.items()]
        if type(value) is dict and all(_is_plain_key(key) for key in value):
            return dict(zip(value, values, strict=True))
        keys = [self._encode(key, (*path, key), file) for key in value]
        pairs: list[Json] = [list(pair) for pair in zip(keys, values, strict=True)]
        return _tagged(type(value).__name__, pairs)

    def _other(self, value: Any, path: tuple[object, ...], file: str) -> Json:
        kind = type(value)
        if isinstance(value, np.generic) and kind is value.dtype.type:
            kind = np.generic
        if kind not in TO_TREE:
            raise _refusal(path, f"is of the type {qualified_name(kind)}")
        tag, to_tree = TO_TREE[kind]
        try:
            tree = to_tree(value)
        except Exception as error:
            raise _refusal(path, f"gives no tree ({error})", "correct that") from error
        return _tagged(tag, self._encode(tree, path, file))

    def _tensor(self, tensor: Tensor, path: tuple[object, ...], file: str) -> Json:
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            kind = qualified_name(type(tensor))
            raise _refusal(path, f"is of the type {kind}", "make it a plain tensor")
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise _refusal(path, "is a sparse or nested tensor", "make it dense")
        as_other = str(tensor.dtype) in _STORED_AS_OTHER
        if tensor.dtype not in CODES and not as_other:
            raise _refusal(path, f"is a tensor of {tensor.dtype}", "convert it")
        address = tensor.untyped_storage().data_ptr() if tensor.numel() else id(tensor)
        if tensor.is_meta or not address:
            raise _refusal(path, "is a tensor without data", "materialize it first")
        key = (
            *(tensor.device, address, tensor.storage_offset(), tensor.shape),
            *(tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()),
        )
        if key in self._places:
            place = self._places[key][1]
            if place[0] == file and _joined(path) != place[1]:
                self.aliases[file][_joined(path)] = place[1]
            return _tagged("tensor", [*place])
        place = [file, self._new_name(path, file)]
        stored = tensor.detach()
        if as_other:
            place.append(str(tensor.dtype))
            if tensor.is_complex():
                stored = torch.view_as_real(stored.resolve_conj().resolve_neg())
            else:
                stored = stored.view(torch.uint8)
        self.files[file][place[1]] = stored
        self._places[key] = (tensor, place)
        return _tagged("tensor", [*place])

    def _new_name(self, path: tuple[object, ...], file: str) -> str:
        first = name = _joined(path)
        numbers = itertools.count(1)
        while name in self.files[file] or name == "__metadata__":
            name = f"{first}~{next(numbers)}"
        return name


def decode(plain: object, tensors: Tensors) -> Any:
    """Rebuilds the tree that `Encoder.encode` was given.

    Args:
        plain: What `encode` returned, or what JSON made of that.
        tensors: The tensors by file and name. The tree gets these, not copies; every
            reference to one gets the same object.

    Raises:
        CheckpointCorruptError: if `plain` is not what `encode` makes, in any way.
    """
    try:
        return _decode(plain, tensors, {})
    except CheckpointCorruptError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointCorruptError(f"a stored tree is malformed: {reason}") from error


def _decode(node: Any, tensors: Tensors, seen: dict[tuple[str, ...], Tensor]) -> Any:
    if node is None or type(node) in (bool, int, float, str):
        return node
    if type(node) is list:
        return [_decode(item, tensors, seen) for item in node]
    if type(node) is not dict or not all(type(key) is str for key in node):
        raise CheckpointCorruptError(f"a stored tree holds a {type(node).__name__}")
    if "$" not in node:
        return {key: _decode(value, tensors, seen) for key, value in node.items()}
    if node.keys() != {"$", "v"}:
        raise CheckpointCorruptError(
            "a stored tree holds a tag and no payload, or more"
        )
    tag, payload = node["$"], node["v"]
    if tag == "tensor":
        return _find_tensor(payload, tensors, seen)
    value = _decode(payload, tensors, seen)
    if tag in _DICTS:
        made = dict(value)
        if len(made) != len(value):
            raise CheckpointCorruptError("a stored dict has a key twice")
        return _DICTS[tag](made)
    if tag not in FROM_TREE:
        raise CheckpointCorruptError(
            f"a stored value has the unknown type {tag!r}; if it is one of yours, call "
            "`helios.checkpoint.register_type` before loading"
        )
    return FROM_TREE[tag][1](value)


def _find_tensor(
    place: list[str], tensors: Tensors, seen: dict[tuple[str, ...], Tensor]
) -> Tensor:
    file, name, *dtype = place
    if file not in tensors or name not in tensors[file]:
        raise CheckpointCorruptError(f"tensor {name!r} of file {file!r} is not loaded")
    if not dtype:
        return tensors[file][name]
    if tuple(dtype) not in {(other,) for other in _STORED_AS_OTHER}:
        raise CheckpointCorruptError(f"tensor {name!r} is said to be of {dtype}")
    if tuple(place) not in seen:
        made_of = tensors[file][name]
        if DTYPES[dtype[0]].is_complex:
            made_of = torch.view_as_complex(made_of)
        seen[tuple(place)] = made_of.view(DTYPES[dtype[0]])
    return seen[tuple(place)]


def _joined(path: tuple[object, ...]) -> str:
    """The name for the tensor at `path`: in plain state dicts that of the parameter."""
    parts = (
        str(part) if isinstance(part, str) or _is_small(part) else "key"
        for part in path
    )
    return _UNSAFE.sub("_", ".".join(parts)) or "value"


def _refusal(
    path: tuple[object, ...],
    what: str,
    remedy: str = "register it with `helios.checkpoint.register_type`",
) -> UnstorableError:
    text = ""
    for part in path:
        is_name = isinstance(part, str) and part.isidentifier()
        text += f".{part}" if is_name else f"[{repr(part)[:60]}]"
    return UnstorableError(
        f"`{text.removeprefix('.') or 'the tree'}` {what}: it cannot be stored in a "
        f"checkpoint; {remedy}, or return it from `user_state_dict` in another form"
    )


def _tagged(tag: str, payload: Json) -> Json:
    return {"$": tag, "v": payload}


def _is_small(value: object) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_plain_key(key: object) -> bool:
    # JSON would read two lone surrogates in a row as one character.
    return type(key) is str and key != "$" and not _SURROGATE.search(key)
