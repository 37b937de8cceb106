"""The end of a process: its status, which a scheduler goes by, and its length."""

from __future__ import annotations

import atexit
import contextlib
import gc
import inspect
import io
import os
import signal
import types
from typing import Any

from helios.stopping.ranks import mark_stopped, starter_folder

#: A run that was stopped, and goes on when it is started again: EX_TEMPFAIL of
#: sysexits.h. 0: it has come to its end. Any other one: it has failed.
EXIT_STOPPED = 75
#: A second SIGINT has ended it, as a shell would say.
EXIT_INTERRUPTED = 130

#: What finalizers of these packages do, the end of a process does as well.
_HARMLESS = {"_io", "helios", "joblib", "numpy", "socket", "subprocess"}
_HARMLESS |= {"torch", "tqdm"}

_is_to_end_soon = False


def exit_status() -> int:
    """The status with which a process ends whose run was stopped.

    A launcher takes a rank's for a failure, and may start it anew. A starter of our own
    is told in another way, and ends with `EXIT_STOPPED` itself.
    """
    if starter_folder() is not None:
        mark_stopped()
        return 0
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    return EXIT_STOPPED if restarts == "0" else 0


def keep_status() -> None:
    """Have no SIGTERM or SIGUSR1 change the status with which this process ends.

    For one whose run is stopped and saved: who asks a second time is to get the same.
    """
    atexit.unregister(_ignore_polite)
    atexit.register(_ignore_polite)  # the last one: it is the first to be called


def _ignore_polite() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def end_soon() -> None:
    """Have this process, once it ends, not look for garbage: for one that only waits.

    All that torch consists of makes that a second, of what a scheduler grants. What has
    a finalizer of its own is looked for.
    """
    global _is_to_end_soon
    _is_to_end_soon = True


def freeze_imports() -> None:
    """In a rank that Helios has started, have garbage not looked for in what is there.

    That is torch, mostly: at the end of a process Python looks through it four times.
    What a program makes later is not concerned.
    """
    if starter_folder() is not None:
        gc.collect()  # what is garbage by now would stay
        gc.freeze()


@atexit.register  # as Helios is imported: after what the program registers
def _end() -> None:
    if _is_to_end_soon:
        _freeze()


def _freeze() -> None:
    objects = gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if _has_finalizer(kind)}
    found = [each for each in objects if type(each) in kinds]
    if any(_owner(each) not in _HARMLESS for each in found):
        return
    for each in found:
        # Files that nobody has closed, and only garbage holds, come to it here.
        if isinstance(each, io.IOBase):
            with contextlib.suppress(OSError, ValueError):
                each.flush()
    gc.freeze()


def _has_finalizer(kind: type) -> bool:
    return any("__del__" in vars(base) for base in kind.__mro__)


def _owner(each: Any) -> str:
    """The package whose code the finalizer of an object runs."""
    name = type(each).__module__
    if isinstance(each, types.GeneratorType):
        frame = each.gi_frame
        if frame is None or inspect.getgeneratorstate(each) == inspect.GEN_CREATED:
            return "helios"  # there is nothing to be left
        name = frame.f_globals.get("__name__", "")
    return str(name).partition(".")[0]
