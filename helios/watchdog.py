"""The watchdog: ends a run in which nothing goes on, and says where each rank is."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from helios.lastwords import last_words
from helios.workers import awaited

if TYPE_CHECKING:
    from helios.session import Session

#: The exit status of a rank that its watchdog has ended.
EXIT_STATUS = 1
_LOOKS = 20  # in the time after which a run counts as hung
_ANSWER_S = 5.0  # for all ranks to say where they are
_EARLY = 0.8  # of a collective's time, after which the ranks say it anyway
_numbers = itertools.count()  # of watchdogs, the same on all ranks
_HERE = os.path.dirname(os.path.abspath(__file__))
# Where a rank is that waits for others: a vote, a collective, a backward with one.
_WAITING: tuple[str, ...] = (
    os.path.join(_HERE, "voting.py"),
    os.path.join("torch", "distributed", ""),
    os.path.join("torch", "autograd", "graph.py"),
    os.path.join("torch", "nn", "parallel", ""),
)
# What is not the user's code.
_LIBRARIES = (
    *{sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")},
    _HERE,
)


@contextlib.contextmanager
def watched(session: Session, timeout_s: float | None) -> Iterator[None]:
    """End the process where no batch ends for so many seconds; None: never.

    It writes the stacks of all threads to the log, says which ranks are behind, and
    ends at once: the last checkpoint stands. Each rank has such a watchdog; the one
    that hangs has one too, as long as it lets other threads run. With None, several
    ranks write as much, once, before the time of a collective is over. Every rank must
    call.
    """
    ends, votes = timeout_s is not None, session.engine.votes
    if timeout_s is None:
        if votes is None:
            yield
            return
        timeout_s = _EARLY * votes.timeout.total_seconds()
    ended, number = threading.Event(), next(_numbers)
    main = threading.get_ident()

    def watch() -> None:
        seen, since_s = _progress(session), time.monotonic()
        while not ended.wait(min(timeout_s / _LOOKS, 1.0)):
            now = _progress(session)
            if now != seen:
                seen, since_s = now, time.monotonic()
            elif time.monotonic() - since_s >= timeout_s:
                report = partial(_report, session, main, timeout_s, number)
                last_words(report, 2 * _ANSWER_S + 2)
                if not ends:
                    return
                for worker in multiprocessing.active_children():
                    worker.kill()  # it may be the one that hangs, and would stay
                os._exit(EXIT_STATUS)

    thread = threading.Thread(target=watch, daemon=True, name="watchdog")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _progress(session: Session) -> tuple[int, ...]:
    state = session.state
    return state.global_iteration, state.validation_cycles, session.beats


def _report(session: Session, main: int, timeout_s: float, number: int) -> None:
    rank, frames = session.engine.rank, sys._current_frames()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = [
        f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame))
        for ident, frame in frames.items()
        if names.get(ident) not in ("watchdog", "last words")
    ]
    where = _where(session, frames.get(main))
    session.logger.critical(
        "rank %d: NO BATCH HAS ENDED FOR %g S; it is %s\n%s",
        *(rank, timeout_s, where["text"], "\n".join(stacks)),
    )
    if session.engine.world_size > 1:
        # On a thread of its own: the store, too, may not answer.
        arguments = session, where, number
        told = threading.Thread(target=_compare, args=arguments, daemon=True)
        told.start()
        told.join(2 * _ANSWER_S)


def _where(session: Session, frame: FrameType | None) -> dict[str, Any]:
    """Where a rank's main thread is: in the user's code, if that is in it."""
    stack = [] if frame is None else traceback.extract_stack(frame)
    files = [os.path.abspath(line.filename) for line in stack]
    own = [n for n, file in enumerate(files) if not file.startswith(_LIBRARIES)]
    place = "nowhere"
    if stack:
        line = stack[own[-1] if own else -1]
        place = f"in {line.name}, {line.filename}:{line.lineno}"
    state = session.state
    at = f"epoch {state.global_epoch}, step {state.current_iteration}"
    wait = f"; it waits for {what}" if (what := awaited()) else ""
    return {
        "text": f"{place}, {at}, batch {state.global_iteration}{wait}",
        "progress": _progress(session),
        "waits": any(part in file for file in files for part in _WAITING),
    }


def _compare(session: Session, where: dict[str, Any], number: int) -> None:
    """Exchange with the other ranks where each is; the main rank writes it down."""
    engine = session.engine
    base = torch.distributed.distributed_c10d._get_default_store()
    store = torch._C._distributed_c10d.PrefixStore(f"helios-watchdog-{number}", base)
    progress = " ".join(map(str, where["progress"]))
    store.set(f"{engine.rank}", f"{int(where['waits'])} {progress} {where['text']}")
    if not engine.is_main:
        # The main rank has to have read it before the store ends with a process.
        with contextlib.suppress(RuntimeError):
            store.wait(["read"], timedelta(seconds=_ANSWER_S))
        return
    found: dict[int, tuple[tuple[int, ...], bool, str]] = {}
    until_s = time.monotonic() + _ANSWER_S
    while len(found) < engine.world_size and time.monotonic() < until_s:
        for rank in {*range(engine.world_size)} - {*found}:
            if store.check([f"{rank}"]):
                waits, *counts, text = store.get(f"{rank}").decode().split(" ", 4)
                progress_of = tuple(map(int, counts))
                found[rank] = (progress_of, waits == "1", text)
        time.sleep(0.05)
    lines = [
        f"rank {r}: {found[r][2] if r in found else 'no answer'}"
        for r in range(engine.world_size)
    ]
    silent = {*range(engine.world_size)} - {*found}
    least = min((progress for progress, _, _ in found.values()))
    behind = sorted(silent) or [
        rank
        for rank, (progress_of, waits, _) in sorted(found.items())
        if progress_of == least and not waits
    ]
    said = f"behind: rank {', '.join(map(str, behind))}" if behind else "all wait"
    session.logger.critical("where each rank is:\n%s\n%s", "\n".join(lines), said)
    store.set("read", "1")
