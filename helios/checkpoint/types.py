"""What has a stored form beside JSON's own values: its way to a tree, and back.

Enums, named tuples and registered types are found by name among what the program has
imported. Nothing is imported for a checkpoint's sake: that could run code.
"""

import base64
import enum
import struct
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import fields
from datetime import date, datetime, time, timedelta, timezone
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from helios.errors import CheckpointError

_DTYPES = {str(v): v for v in vars(torch).values() if isinstance(v, torch.dtype)}
_ARRAYS = "biufcmMSU"  # kinds of numpy's dtypes
_FACTORIES = {f.__name__: f for f in (list, dict, set, tuple, int, float, str, Counter)}
_PATHS = {p.__name__: p for p in (PurePosixPath, PureWindowsPath)}


class _Registered(NamedTuple):
    """A type that was registered, and how it goes to a tree and back."""

    cls: type
    to_tree: Callable[[Any], Any]
    from_tree: Callable[[Any], Any]


_registered: dict[str, _Registered] = {}


def register_type(
    cls: type,
    to_tree: Callable[[Any], Any] | None = None,
    from_tree: Callable[[Any], Any] | None = None,
    *,
    name: str | None = None,
) -> type:
    """Let checkpoints hold objects of a type of your own; return the type.

    Call it where the type is defined, as whoever loads the checkpoint needs it too.

    Args:
        cls: the type; its subclasses are not meant.
        to_tree: makes a tree of an object, of what can be stored; a ValueError of it
            says why there is none. A dataclass needs neither function: its fields are
            stored.
        from_tree: makes the object again.
        name: under which it is stored; None: its module and name. Give one if it may
            move, and keep it.

    Raises:
        ValueError: the name is that of another type.
        TypeError: functions are missing.
    """
    if to_tree is None or from_tree is None:
        # One that only inherits from a dataclass has more than its fields.
        if "__dataclass_fields__" not in vars(cls) or to_tree is not from_tree:
            raise TypeError(
                f"`to_tree` and `from_tree` are needed for {cls.__qualname__}: only "
                "dataclasses do without both"
            )
        to_tree, from_tree = _of_dataclass(cls)
    name = name or _name_of(cls)
    # One of the same name is a class whose definition was run again.
    if name in _registered and _name_of(_registered[name].cls) != _name_of(cls):
        raise ValueError(f"`name` {name!r} is taken, by {_registered[name].cls}")
    _registered[name] = _Registered(cls, to_tree, from_tree)
    return cls


def _of_dataclass(cls: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    names = [field.name for field in fields(cls)]

    def to_tree(value: Any) -> Any:
        if others := sorted(getattr(value, "__dict__", {}).keys() - {*names}):
            raise ValueError(f"it has attributes besides its fields: {others}")
        return {name: getattr(value, name) for name in names}

    def from_tree(tree: Any) -> Any:
        _check_fields(_name_of(cls), list(tree), names)
        value = object.__new__(cls)
        for name in names:  # also of a frozen one
            object.__setattr__(value, name, tree[name])
        return value

    return to_tree, from_tree


def _check_fields(name: str, then: list[str], now: list[str]) -> None:
    if {*then} != {*now}:
        raise CheckpointError(
            f"{name!r} had the fields {then} when it was saved, and has {now}: put "
            "them back, or register it with functions that know both"
        )


def from_registered(value: Any) -> list[Any] | None:
    """The name and the tree of an object of a registered type; None: it isn't."""
    for name, (cls, to_tree, _) in _registered.items():
        if type(value) is cls:
            return [name, to_tree(value)]
    return None


def _to_registered(tree: list[Any]) -> Any:
    if tree[0] not in _registered:
        raise CheckpointError(
            f"the checkpoint holds an object that is registered as {tree[0]!r}; import "
            "the module that calls `register_type` for it"
        )
    return _registered[tree[0]].from_tree(tree[1])


def _name_of(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _class_of(name: str, base: type) -> Any:
    """The class of a name, if it is imported; it is not imported for this."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        # Not by `getattr`: some modules import others when they are asked.
        is_there = isinstance(found, ModuleType | type)
        found = vars(found).get(part) if is_there else None
    if not isinstance(found, type) or not issubclass(found, base):
        raise CheckpointError(
            f"the checkpoint holds a value of {name!r}, which is not there: import the "
            "module that defines it"
        )
    return found


def _from_named(value: Any, base: type) -> list[Any]:
    name = _name_of(type(value))
    try:
        is_there = _class_of(name, base) is type(value)
    except CheckpointError:
        is_there = False
    if not is_there:
        raise ValueError(f"{name} can't be found by its name")
    if base is tuple:
        return [name, dict(zip(value._fields, value, strict=True))]
    is_member = value.name in type(value).__members__
    return [name, value.name if is_member else value.value]


def _to_enum(tree: list[Any]) -> Any:
    cls = _class_of(tree[0], enum.Enum)
    if type(tree[1]) is int and issubclass(cls, enum.Flag):  # several members
        return cls(tree[1])
    return cls.__members__[tree[1]]


def _to_named(tree: list[Any]) -> Any:
    cls = _class_of(tree[0], tuple)
    if type(tree[1]) is list:  # as older checkpoints have it, without the names
        if len(tree[1]) != len(cls._fields):
            raise CheckpointError(f"{tree[0]!r} had {len(tree[1])} fields when saved")
        return tuple.__new__(cls, tree[1])
    _check_fields(tree[0], list(tree[1]), list(cls._fields))
    return tuple.__new__(cls, [tree[1][name] for name in cls._fields])


def _from_time(value: Any) -> list[Any]:
    if value.tzinfo is not None and type(value.tzinfo) is not timezone:
        raise ValueError(f"its time zone is a {type(value.tzinfo).__qualname__}")
    return [value.isoformat(), value.fold]


def _to_time(kind: Any, tree: list[Any]) -> Any:
    return kind.fromisoformat(tree[0]).replace(fold=tree[1])


def _from_default(value: defaultdict[Any, Any]) -> list[Any]:
    name = getattr(value.default_factory, "__name__", None)
    if _FACTORIES.get(str(name)) is not value.default_factory:
        raise ValueError(f"its default is made by {value.default_factory!r}")
    return [name, dict(value)]


def _to_default(tree: list[Any]) -> Any:
    return defaultdict(None if tree[0] is None else _FACTORIES[tree[0]], tree[1])


def _to_viewed(tree: list[Any]) -> Tensor:
    dtype, shape, data = tree
    found: Tensor = data.view(_DTYPES[dtype]).reshape(shape)
    return found


def _to_array(tree: list[Any]) -> Any:
    dtype = np.dtype(tree[0])
    if dtype.kind not in _ARRAYS:
        raise ValueError(f"numpy values of dtype {dtype} have no stored form")
    return tree[2].numpy().view(dtype).reshape(tree[1])


def _from_array(value: Any) -> list[Any]:
    if value.dtype.kind not in _ARRAYS or not value.dtype.itemsize:
        raise ValueError(f"it has the dtype {value.dtype}")
    data = np.array(value, order="C").reshape(-1).view(np.uint8)
    return [value.dtype.str, list(value.shape), torch.from_numpy(data)]


def _of_list(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`make` for a list only: a range, of a few bytes, would fill the memory."""

    def back(tree: Any) -> Any:
        if type(tree) is not list:
            raise TypeError(f"it has a {type(tree).__name__}, not a list")
        return make(tree)

    return back


def _to_deque(tree: list[Any]) -> Any:
    return deque(_of_list(list)(tree[1]), tree[0])


#: By type: its tag, what turns a value into a tree, and what turns that back.
CODES: dict[Any, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    # The ints, floats and dicts here are those that JSON cannot hold.
    int: ("int", hex, lambda v: int(v, 16)),
    float: ("float", struct.Struct("<d").pack, lambda v: struct.unpack("<d", v)[0]),
    complex: ("complex", lambda v: [v.real, v.imag], lambda v: complex(*v)),
    bytes: ("bytes", lambda v: base64.b64encode(v).decode(), base64.b64decode),
    tuple: ("tuple", list, _of_list(tuple)),
    dict: ("dict", list, dict),
    OrderedDict: ("OrderedDict", list, OrderedDict),
    set: ("set", list, _of_list(set)),
    frozenset: ("frozenset", list, _of_list(frozenset)),
    Counter: ("Counter", list, lambda v: Counter(dict(v))),
    defaultdict: ("defaultdict", _from_default, _to_default),
    deque: ("deque", lambda v: [v.maxlen, list(v)], _to_deque),
    range: ("range", lambda v: [v.start, v.stop, v.step], lambda v: range(*v)),
    PurePath: (
        "path",
        lambda v: [type(v).__name__, str(v)],
        lambda v: _PATHS.get(v[0], Path)(v[1]),
    ),
    datetime: ("datetime", _from_time, lambda v: _to_time(datetime, v)),
    date: ("date", date.isoformat, date.fromisoformat),
    time: ("time", _from_time, lambda v: _to_time(time, v)),
    timedelta: (
        "timedelta",
        lambda v: [v.days, v.seconds, v.microseconds],
        lambda v: timedelta(*v),
    ),
    enum.Enum: ("enum", lambda v: _from_named(v, enum.Enum), _to_enum),
    # Of all named tuples.
    NamedTuple: ("namedtuple", lambda v: _from_named(v, tuple), _to_named),
    torch.dtype: ("dtype", str, lambda v: _DTYPES[v]),
    torch.device: ("device", str, torch.device),
    torch.Size: ("size", list, _of_list(torch.Size)),
    np.ndarray: ("array", _from_array, _to_array),
    np.generic: ("number", _from_array, lambda v: _to_array(v)[()]),
}
#: By tag: what turns a tree into a value.
BACK = {
    **{tag: back for tag, _, back in CODES.values()},
    "viewed": _to_viewed,
    "type": _to_registered,
}
#: The same, for those who do not have the program's classes: names in their places.
BACK_WITHOUT_CLASSES = {
    **BACK,
    "enum": lambda v: f"{v[0]}.{v[1]}",
    "namedtuple": lambda v: (v[0], *(v[1].values() if type(v[1]) is dict else v[1])),
    "type": tuple,
}
MAPPINGS = (dict, OrderedDict, Counter)


def kind_of(value: Any) -> Any:
    """What of `CODES` a value falls under: its type, or what that is one of."""
    if isinstance(value, np.generic) and not isinstance(value, np.void):
        return np.generic
    if isinstance(value, enum.Enum):
        return enum.Enum
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return NamedTuple
    if isinstance(value, PurePath) and type(value) in (*_PATHS.values(), type(Path())):
        return PurePath
    return type(value)
