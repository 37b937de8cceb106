"""The plain variables of the functions with a loop by hand, while it runs."""

from __future__ import annotations

import dis
import functools
import os
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

import torch

from helios.differences import CONTAINERS, PLAIN

_SHOWN = 60  # characters of a value
_MOST_FRAMES, _MOST_MEMBERS = 5, 1000
# Others may do more than to list what they hold, a lazy mapping for one.
_LISTED = (dict, list, tuple, deque, OrderedDict, defaultdict, Counter)
_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_MODULE = "<module>"
_STORES = ("STORE_FAST", "STORE_NAME", "STORE_DEREF", "STORE_GLOBAL")


def plain(value: Any) -> str | None:
    """A plain value in words, or a container of these; None of any other."""
    is_plain = isinstance(value, PLAIN)
    if isinstance(value, CONTAINERS):
        members = value.values() if hasattr(value, "values") else value
        is_plain = all(isinstance(member, PLAIN) for member in members)
    if not is_plain:
        return None
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def variables() -> tuple[dict[str, dict[str, str]], dict[str, list[str]]]:
    """The plain variables by function, from the inside; and the functions with a loop.

    The latter are the ones whose variables can be carried, but for those that a `for`
    sets anew, which are named.
    """
    found: dict[str, dict[str, str]] = {}
    codes: list[CodeType] = []
    for frame in _frames():
        codes.append(frame.f_code)
        # Of a function, Python before 3.13 gives a dict that `locals()` shares: it is
        # read, and nothing else.
        held = [(k, v) for k, v in [*frame.f_locals.items()] if _is_of_user(k)]
        texts = {k: text for k, v in held if (text := _text(v)) is not None}
        found.setdefault(_name(frame.f_code), texts)
    outer = [code for code in codes if "epochs" in code.co_names]
    loops = {_name(code): _counted(code) for code in (*codes[:1], *outer[:1])}
    return found, loops


def _frames() -> Iterator[FrameType]:
    """The frames of the user's files, from the inside up to the module."""
    frame: FrameType | None = sys._getframe(1)
    count = 0
    while frame is not None and count < _MOST_FRAMES:
        file = os.path.abspath(frame.f_code.co_filename)
        if not file.startswith(_OWN) and not any(part in file for part in _INSTALLED):
            count += 1
            yield frame
            if frame.f_code.co_name == _MODULE:
                return
        frame = frame.f_back


@functools.cache
def _counted(code: CodeType) -> list[str]:
    """The variables that a `for` sets in each turn."""
    names: list[str] = []
    is_target = False
    for instruction in dis.get_instructions(code):
        name, value = instruction.opname, instruction.argval
        if name in ("FOR_ITER", "UNPACK_SEQUENCE", "EXTENDED_ARG"):
            is_target |= name == "FOR_ITER"
        elif is_target and name.startswith(_STORES):
            # Python 3.13 has some that do two things.
            stored = (value,) if isinstance(value, str) else value
            names += stored[: name.count("STORE_")]
            is_target = "LOAD_" not in name
        else:
            is_target = False
    return names


def _name(code: CodeType) -> str:
    return "the module" if code.co_name == _MODULE else f"{code.co_name}()"


def _is_of_user(name: str) -> bool:
    return name.isidentifier() and not name.startswith("_")


def _text(value: Any) -> str | None:
    if type(value) is torch.Tensor:
        # One with a graph is what the step has come to, such as its loss.
        is_number = value.dim() == 0 and value.device.type == "cpu"
        return repr(value.item()) if is_number and not value.requires_grad else None
    if isinstance(value, CONTAINERS):
        if type(value) not in _LISTED:
            return None
        if len(value) > _MOST_MEMBERS:  # it is read after each batch
            return f"{len(value)} members"
    return plain(value)
