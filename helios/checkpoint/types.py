"""Which types have a stored form besides those of JSON, tensors and dicts."""

import base64
import struct
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import torch

__all__ = ["DTYPES", "FROM_TREE", "TO_TREE", "qualified_name", "register_type"]

T = TypeVar("T")

#: By type: its tag and what turns a value into a tree.
TO_TREE: dict[type, tuple[str, Callable[[Any], object]]] = {}
#: By tag: its type and what turns the tree back.
FROM_TREE: dict[str, tuple[type, Callable[[Any], object]]] = {}
#: torch's dtypes by their `str`.
DTYPES = {str(v): v for v in vars(torch).values() if isinstance(v, torch.dtype)}


def register_type(
    cls: type[T],
    name: str,
    to_tree: Callable[[T], object],
    from_tree: Callable[[Any], T],
) -> None:
    """Lets checkpoints hold values of exactly the type `cls` (no subclasses).

    Args:
        cls: The type: an enum, a dataclass, a named tuple, anything.
        name: What files call it. Choose one that stays when the code moves.
        to_tree: Gives a tree of storable values, registered types among them.
        from_tree: Rebuilds the value from what `to_tree` gave.

    Raises:
        ValueError: if another type has that name.
    """
    old = FROM_TREE.get(f"@{name}", (cls,))[0]
    # A notebook cell that is run again makes a new class of the same qualified name.
    if qualified_name(old) != qualified_name(cls):
        raise ValueError(
            f"`name` {name!r} is that of {qualified_name(old)}: use another"
        )
    _add(cls, f"@{name}", to_tree, from_tree)


def qualified_name(cls: type) -> str:
    """The name with the module."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _add(
    cls: type,
    tag: str,
    to_tree: Callable[[Any], object],
    from_tree: Callable[[Any], object],
) -> None:
    TO_TREE[cls], FROM_TREE[tag] = (tag, to_tree), (cls, from_tree)


def _numeric(text: str) -> np.dtype[Any]:
    if np.dtype(text).kind not in "biufc":
        raise ValueError(f"numpy values of dtype {text} have no stored form")
    return np.dtype(text)


def _array_to_tree(array: np.ndarray[Any, Any]) -> object:
    # A copy: torch warns of read-only arrays. As bytes, for every dtype and byte order.
    data = np.array(array, dtype=_numeric(array.dtype.str), order="C").reshape(-1)
    tensor = torch.from_numpy(data.view(np.uint8))
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": tensor}


def _array_from_tree(tree: dict[str, Any]) -> object:
    return tree["data"].numpy().view(_numeric(tree["dtype"])).reshape(tree["shape"])


def _number_to_tree(value: np.generic) -> object:
    return [_numeric(value.dtype.str).str, value.tobytes()]


def _number_from_tree(tree: list[Any]) -> object:
    return np.frombuffer(tree[1], _numeric(tree[0])).reshape(())[()]


def _datetime_to_tree(value: datetime) -> object:
    time = value.replace(tzinfo=None).isoformat()
    return {"time": time, "fold": value.fold, "tzinfo": value.tzinfo}


def _datetime_from_tree(tree: dict[str, Any]) -> datetime:
    time = datetime.fromisoformat(tree["time"])
    return time.replace(fold=tree["fold"], tzinfo=tree["tzinfo"])


_D, _DD = struct.Struct(">d"), struct.Struct(">dd")
# The ints, floats and strings here are those that JSON cannot hold.
_add(int, "int", hex, lambda v: int(v, 16))
_add(float, "float", _D.pack, lambda v: _D.unpack(v)[0])
_add(
    complex,
    "complex",
    lambda v: _DD.pack(v.real, v.imag),
    lambda v: complex(*_DD.unpack(v)),
)
_add(bytes, "bytes", lambda v: base64.b64encode(v).decode(), base64.b64decode)
_add(tuple, "tuple", list, tuple)
_add(set, "set", lambda v: sorted(v, key=repr), set)
_add(frozenset, "frozenset", lambda v: sorted(v, key=repr), frozenset)
_add(type(Path()), "path", str, Path)
_add(PurePosixPath, "pure_path", str, PurePosixPath)
_add(timezone, "timezone", lambda v: list(v.__getinitargs__()), lambda v: timezone(*v))
_add(datetime, "datetime", _datetime_to_tree, _datetime_from_tree)
_add(torch.dtype, "dtype", str, DTYPES.__getitem__)
_add(torch.device, "device", str, torch.device)
_add(torch.Size, "size", list, torch.Size)
_add(np.ndarray, "array", _array_to_tree, _array_from_tree)
_add(np.generic, "number", _number_to_tree, _number_from_tree)
_add(
    str,
    "str",
    lambda v: v.encode("utf-8", "surrogatepass"),
    lambda v: v.decode("utf-8", "surrogatepass"),
)
_add(
    timedelta,
    "timedelta",
    lambda v: [v.days, v.seconds, v.microseconds],
    lambda v: timedelta(*v),
)
