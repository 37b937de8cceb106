"""Differences of two values, deeply and bit by bit."""

import contextlib
import dataclasses
import enum
import types
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch

PLAIN = (type(None), bool, int, float, complex, str, bytes)
CONTAINERS = (Mapping, list, tuple, deque)
_LEAVES = (type, types.ModuleType, types.FunctionType, enum.Enum)


def differences(
    first: Any, second: Any, path: str, above: frozenset[int] = frozenset()
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the paths at which two values differ, and what is there in each.

    Of an array only the first place. NaN is the same as a NaN of the same bits.
    """
    here = path, first, second
    if type(first) is not type(second):
        yield here
    elif isinstance(first, torch.Tensor | np.ndarray):
        kinds = [f"{v.dtype}, shape {tuple(v.shape)}" for v in (first, second)]
        if kinds[0] != kinds[1]:
            yield path, kinds[0], kinds[1]
            return
        one, two = array_of(first), array_of(second)
        if one.dtype == object:
            found = differences(one.tolist(), two.tolist(), path, above)
            yield from islice(found, 1)
        elif one.size and (differs := (_bytes(one) != _bytes(two)).any(axis=1)).any():
            at = np.unravel_index(int(differs.argmax()), one.shape)
            where = path + "".join(f"[{index}]" for index in at)
            yield where, one[at].item(), two[at].item()
    elif (members := members_of(first)) is not None:
        if id(first) in above:
            return
        above |= {id(first)}
        others = members_of(second) or {}
        for key in {**members, **others}:
            pair = members.get(key, "nothing"), others.get(key, "nothing")
            yield from differences(*pair, path + key, above)
    elif not _is_same(first, second):
        yield here


def members_of(value: Any, most: int | None = None) -> dict[str, Any] | None:
    """What a value consists of, by what follows in its path; None of a plain one."""
    if isinstance(value, Mapping):
        return {f"[{key!r}]": member for key, member in islice(value.items(), most)}
    if isinstance(value, CONTAINERS):
        return {f"[{i}]": member for i, member in enumerate(islice(value, most))}
    kind: Any = type(value)
    if isinstance(value, _LEAVES):
        return None
    if kind.__eq__ is object.__eq__ or dataclasses.is_dataclass(value):
        names = [*getattr(value, "__dict__", ()), *getattr(value, "__slots__", ())]
        return {f".{name}": getattr(value, name, None) for name in names}
    return None


def array_of(value: Any) -> Any:
    """An array, or one of the tensor's values, short floats as longer ones."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.dtype == torch.complex32:
        value = value.to(torch.complex64)
    is_short = value.is_floating_point() and value.itemsize < 4
    return (value.float() if is_short else value).to_dense().numpy(force=True)


def _bytes(array: Any) -> Any:
    """The bytes of an array's values, shape (values, bytes of one)."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint8).reshape(flat.size, -1)


def _is_same(first: Any, second: Any) -> bool:
    if not isinstance(first, (*PLAIN, np.generic)):
        with contextlib.suppress(Exception):  # a table, say, has no truth
            return bool(first == second)
    return repr(first) == repr(second)
