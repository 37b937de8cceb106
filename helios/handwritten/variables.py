"""Variables of a loop by hand, which go on at a resume."""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

from helios.checkpoint import Encoder
from helios.errors import ResumeError, UnstorableError

# Whether the variables of a function are copied when they are asked for: see PEP 667.
_COPIES = sys.version_info < (3, 13)


class Variables:
    """Reads variables where the loop has them, and sets them there again.

    They are those of the function with the loop over epochs, and of the one with the
    loop over batches, where that is another. A resume sets them when the loop has come
    to where it was saved, so that whatever has run before does no harm.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        #: By function what this rank has saved, or has found in its checkpoint.
        self.own: dict[str, dict[str, Any]] = {}
        self._of_main: dict[str, dict[str, Any]] = {}
        self._frames: dict[str, FrameType] = {}

    @contextlib.contextmanager
    def inside(self, which: str, frame: FrameType) -> Iterator[None]:
        """While the loop over epochs, or over batches, of a frame runs."""
        if frame in self._frames.values() or not self.names:
            yield
            return
        self._frames[which] = frame
        try:
            yield
        finally:
            del self._frames[which]

    def check(self) -> None:
        """Raise, before the first batch, on what is no variable, or has no form.

        Raises:
            ValueError: none of the functions has a variable of the name.
            TypeError: what it holds can't be saved.
        """
        known = {n for frame in self._frames.values() for n in _names_of(frame)}
        if missing := [name for name in self.names if name not in known]:
            codes = [frame.f_code for frame in self._frames.values()]
            raise ValueError(
                f"`carry` names {missing[0]!r}, which is no variable of "
                f"{' or '.join(map(_place_of, codes))}; what is an attribute, or "
                "elsewhere, goes into `session.notes`, or its object to the Session"
            )
        try:
            Encoder().encode(self.read(), file="variables")
        except UnstorableError as error:
            raise TypeError(
                f"`carry` names what can't be saved: {error}; an object of your own is "
                "passed to the Session, as `early=early`"
            ) from error

    def read(self) -> dict[str, dict[str, Any]]:
        """What they are now, by function; those that are not set yet are left out."""
        self.own.clear()
        for which, frame in self._frames.items():
            with _locals_of(frame) as held:
                self.own[which] = {n: held[n] for n in self.names if n in held}
        return self.own

    def load_of_main(self, found: dict[str, dict[str, Any]]) -> None:
        """Take what the main rank has saved, for a rank that there was not."""
        self._of_main = found

    def put_back(self) -> None:
        """Set them as they were saved, in the functions that are running."""
        for which, saved in (self.own or self._of_main).items():
            if (frame := self._frames.get(which)) is not None:
                with _locals_of(frame) as held:
                    kept = {n: saved[n] for n in self.names if n in saved}
                    _assign(frame, {n: into(held.get(n), v) for n, v in kept.items()})


def into(kept: Any, value: Any) -> Any:
    """A saved value, in the list or dict that other variables may share."""
    if type(kept) is type(value) is list:
        kept[:] = value
    elif type(kept) is type(value) is dict:
        kept.clear()
        kept.update(value)
    else:
        return value
    return kept


@contextlib.contextmanager
def _locals_of(frame: FrameType) -> Iterator[Any]:
    """The variables of a frame, by name.

    Of a function, Python before 3.13 makes a copy, and keeps it: it is emptied, as it
    would keep alive all that the function holds. It is made anew each time.
    """
    held = frame.f_locals
    try:
        yield held
    finally:
        if _is_copied(frame):
            held.clear()


def _is_copied(frame: FrameType) -> bool:
    return bool(frame.f_code.co_flags & inspect.CO_OPTIMIZED) and _COPIES


def _assign(frame: FrameType, values: dict[str, Any]) -> None:
    """Set variables of a function that is running.

    Raises:
        ResumeError: this Python does not let itself be told.
    """
    held = frame.f_locals
    held.update(values)
    if _is_copied(frame):  # what debuggers do: into the function from the copy
        ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))
    with _locals_of(frame) as now:
        if missed := [name for name in values if now.get(name) is not values[name]]:
            raise ResumeError(
                f"`carry`: this Python, {sys.implementation.name} {sys.version}, does "
                f"not let {missed[0]!r} be set; use `session.notes`"
            )


def _names_of(frame: FrameType) -> set[str]:
    """The variables that it can have."""
    code = frame.f_code
    if code.co_flags & inspect.CO_OPTIMIZED:
        return {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
    return {*frame.f_locals, *code.co_names}


def _place_of(code: CodeType) -> str:
    return f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})"
