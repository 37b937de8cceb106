"""Variables of a loop by hand, which go on at a resume."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator, MutableMapping, MutableSet
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helios.checkpoint import Encoder
from helios.errors import ResumeError, UnstorableError
from helios.loggers.text import get_root_logger

# Whether the variables of a function are copied when they are asked for: see PEP 667.
_COPIES = sys.version_info < (3, 13)
# Whose frames may stand between a loop and what it reads.
_BARS = re.compile(r"[/\\]site-packages[/\\](tqdm|rich|accelerate|torch)[/\\]")
_OWN = os.path.dirname(os.path.dirname(__file__)) + os.sep
# What others may hold, too, and see change.
_SHARED = (Tensor, np.ndarray, list, collections.deque, MutableMapping, MutableSet)
# Who has such a copy, if nobody but its function and the one that asks here.
_HOLDERS = 3


class Variables:
    """Reads variables where the loop has them, and sets them there again.

    They are those of the function with the loop over epochs, and of the one with the
    loop over batches, where that is another. A resume sets them twice: before the loop
    enters the epoch, for what reads them on the way to its batches, and where the loop
    has come to where it was saved, for what has changed them on that way.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        #: By function what this rank is to save, or has found in its checkpoint: the
        #: values, and the names of those that still were what they began as.
        self.own: dict[str, dict[str, Any]] = {}
        self._of_main: dict[str, dict[str, Any]] = {}
        self._frames: dict[str, FrameType] = {}
        # What they were where a loop began: that of the frame, and that over batches.
        self._first: dict[str, dict[str, Any]] = {}
        self._begun: dict[str, dict[str, Any]] = {}
        self._is_checked = False

    @contextlib.contextmanager
    def inside(self, which: str, frame: FrameType | None) -> Iterator[None]:
        """While the loop over epochs, or over batches, of a frame runs."""
        if frame is not None and frame not in self._frames.values():
            self._frames[which], self._first[which] = frame, _read(frame, self.names)
        del frame  # nothing is to be kept alive that nobody reads
        if which == "batches":
            self._begun = {w: _read(f, self.names) for w, f in self._frames.items()}
        try:
            yield
        finally:
            self.leave(which)

    def leave(self, *which: str) -> None:
        """Let go of frames: what they hold is not kept alive any more."""
        for one in which:
            self._frames.pop(one, None)
            self._first.pop(one, None)
            self._begun = {}

    def caller(self) -> FrameType | None:
        """The frame that calls a session's method, if variables of it are carried."""
        return sys._getframe(2) if self.names else None

    def reader(self) -> FrameType | None:
        """The frame of the user's that a session's generator yields to, likewise.

        None, if it is that of the epochs, or has none of the variables. Between the two
        there may be others, such as that of a bar, or of a generator that passes on.
        """
        frame = sys._getframe(1).f_back if self.names else None
        while frame is not None and frame not in self._frames.values():
            path = frame.f_code.co_filename
            is_between = bool(frame.f_code.co_flags & inspect.CO_GENERATOR)
            is_between |= path.startswith(_OWN) or _BARS.search(path) is not None
            if not is_between and not _names_of(frame).isdisjoint(self.names):
                return frame
            frame = frame.f_back
        return None

    def check(self, parameters: Iterable[Tensor]) -> None:
        """Raise, before the first batch, on what is no variable, or has no form.

        Warn of the latter with the first batch of a later epoch.

        Raises:
            ValueError: none of the functions has a variable of the name.
            TypeError: what it holds can't be saved, or set again.
        """
        known = {n for frame in self._frames.values() for n in _names_of(frame)}
        if missing := [name for name in self.names if name not in known]:
            codes = [frame.f_code for frame in self._frames.values()]
            raise ValueError(
                f"`carry` names {missing[0]!r}, which is no variable of "
                f"{' or '.join(map(_place_of, codes))}; what is an attribute, or "
                "elsewhere, goes into `session.notes`, or its object to the Session"
            )
        is_first, self._is_checked = not self._is_checked, True
        trained = {_address(one) for one in parameters}
        for name, value in self._items():
            if (why := _fault_of(value, trained)) is None:
                continue
            if not is_first:
                get_root_logger().warning("`carry` names %r, which %s", name, why)
            else:
                raise TypeError(
                    f"`carry` names {name!r}, which {why}; an object of your own is "
                    f"passed to the Session instead, as `{name}={name}`"
                )

    def _items(self) -> Iterator[tuple[str, Any]]:
        for frame in self._frames.values():
            yield from _read(frame, self.names).items()

    def read(self) -> dict[str, dict[str, Any]]:
        """What they are now, by function; those that are not set yet are left out."""
        self.own.clear()
        for which, frame in self._frames.items():
            values, self.own[which] = _read(frame, self.names), {}
            shared = {n: v for n, v in values.items() if isinstance(v, _SHARED)}
            for name, then in (("same", self._first), ("here", self._begun)):
                old = then.get(which, {})
                same = [n for n, value in shared.items() if value is old.get(n)]
                self.own[which][name] = same
            self.own[which] |= {"values": values, "names": [*self.names]}
        return self.own

    def load_of_main(self, found: dict[str, dict[str, Any]]) -> None:
        """Take what the main rank has saved, for a rank that there was not."""
        self._of_main = found

    def put_back(self, *, is_there: bool) -> None:
        """Set them as they were saved, in the functions that are running.

        `is_there`: the loop has come to where it was saved, and nothing more is to do.
        """
        found = self.own or self._of_main
        kind = "here" if self._begun else "same"
        for which, saved in found.items():
            if (frame := self._frames.get(which)) is not None:
                now, same = _read(frame, self.names), set(saved[kind])
                _assign(
                    frame,
                    {
                        n: into(now.get(n), v) if n in same else v
                        for n, v in saved["values"].items()
                        if n in self.names
                    },
                )
        if is_there:
            self._tell(found)
            self.own.clear()
            self._of_main = {}

    def _tell(self, found: dict[str, dict[str, Any]]) -> None:
        """Warn of names that are others than those that were saved."""
        saved = {name for each in found.values() for name in each["names"]}
        asked, logger = set(self.names), get_root_logger()
        for name in sorted(asked - saved):
            logger.warning("`carry`: %r was not saved, and begins anew", name)
        for name in sorted(saved - asked):
            logger.warning("`carry`: %r was saved, and is not named any more", name)


def names_in(carry: Any) -> tuple[str, ...]:
    """The names that `carry` has; a TypeError, if it is neither one nor some."""
    names = [carry] if isinstance(carry, str) else carry
    is_some = isinstance(names, list | tuple | set | frozenset)
    if not is_some or not all(isinstance(name, str) for name in names):
        raise TypeError(f"`carry` must be names of variables, got {carry!r}")
    return tuple(names)


def into(kept: Any, value: Any) -> Any:
    """A saved value, in the container, array or tensor that others may hold, too."""
    if type(kept) is not type(value):
        return value
    if isinstance(value, Tensor):
        can_be_written = not (kept.is_inference() or kept.requires_grad)
        is_alike = _is_alike(kept, value) and kept.device == value.device
        if not can_be_written or not is_alike or 0 in kept.stride():
            return value
        with torch.no_grad():
            kept.copy_(value)
    elif isinstance(value, np.ndarray):
        if not _is_alike(kept, value) or not kept.flags.writeable:
            return value
        kept[...] = value
    elif isinstance(value, list):
        kept[:] = value
    elif isinstance(value, collections.deque):
        if kept.maxlen != value.maxlen:
            return value
        kept.clear()
        kept.extend(value)
    elif isinstance(value, MutableMapping):
        kept.clear()
        for key, one in value.items():  # a Counter's `|` would drop some
            kept[key] = one
    elif isinstance(value, MutableSet):
        kept.clear()
        kept |= value
    else:
        return value
    return kept


def _is_alike(one: Any, other: Any) -> bool:
    return bool(one.shape == other.shape and one.dtype == other.dtype)


def _address(tensor: Tensor) -> int:
    """Of its memory; 0 where it has none that is plain, as a piece of a sharded one."""
    is_plain = type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta
    is_plain = is_plain and tensor.layout is torch.strided
    return tensor.untyped_storage().data_ptr() if is_plain else 0


def _fault_of(value: Any, trained: set[int]) -> str | None:
    """Why a value can't be carried, if it can't."""
    encoder = Encoder()
    try:
        encoder.encode(value, file="value")
    except UnstorableError:
        return f"holds what can't be saved: {value!r:.60}"
    if encoder.pieces:
        return "is shared out over the ranks"
    for tensor in encoder.files["value"].values():
        if _address(tensor) and _address(tensor) in trained:
            return "is a part of a network, which is saved anyway: clone it"
    return "asks for gradients, which would be lost" if _asks(value) else None


def _asks(value: Any) -> bool:
    """Whether there is a leaf in it that asks for gradients."""
    if isinstance(value, Tensor):
        return value.requires_grad and value.is_leaf
    if isinstance(value, dict):
        value = [*value.values()]
    return isinstance(value, list | tuple) and any(map(_asks, value))


def _read(frame: FrameType, names: tuple[str, ...]) -> dict[str, Any]:
    """The variables of a frame that are set.

    Of a function, Python before 3.13 makes a copy of all, and keeps it. It is emptied,
    as it would keep alive what the function lets go, if nobody has it by `locals()`.
    """
    held = frame.f_locals
    found = {name: held[name] for name in names if name in held}
    if _is_copied(frame) and sys.getrefcount(held) <= _HOLDERS:
        held.clear()
    return found


def _is_copied(frame: FrameType) -> bool:
    return bool(frame.f_code.co_flags & inspect.CO_OPTIMIZED) and _COPIES


def _assign(frame: FrameType, values: dict[str, Any]) -> None:
    """Set variables of a function that is running.

    Raises:
        ResumeError: this Python does not let itself be told.
    """
    frame.f_locals.update(values)
    if _is_copied(frame):  # what debuggers do: into the function from the copy
        ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))
    now = _read(frame, tuple(values))
    if missed := [name for name in values if now.get(name) is not values[name]]:
        raise ResumeError(
            f"`carry`: this Python, {sys.implementation.name} {sys.version}, does not "
            f"let {missed[0]!r} be set; use `session.notes`"
        )


def _names_of(frame: FrameType) -> set[str]:
    """The variables that it can have."""
    code = frame.f_code
    if code.co_flags & inspect.CO_OPTIMIZED:
        return {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
    return {*frame.f_locals, *code.co_names}


def _place_of(code: CodeType) -> str:
    return f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})"
