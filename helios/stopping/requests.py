"""Requests to stop: signals, a file, a time limit, the program; and their deadlines."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pathlib
import selectors
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any, ClassVar, NoReturn

from helios.engine import Engine
from helios.lastwords import last_words
from helios.loggers.text import get_root_logger
from helios.stopping.clocks import Alarms, Interrupts
from helios.stopping.ranks import mark_stopped, starter_folder
from helios.stopping.slurm import requeue
from helios.stopping.status import (
    EXIT_INTERRUPTED,
    exit_status,
    freeze_imports,
    keep_status,
)

#: A file of this name in the folder of the checkpoints asks for a stop.
STOP_FILE = "stop"
_LOOK_EVERY_S = 1.0
_POLITE = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_HANDLED = (*_POLITE, signal.SIGUSR2)
_UNWIND_S = 2.0  # after a second one, for what Python has to close
_FORK_S = 0.05  # after a signal that came while a setup forked, until the next try
_MEET_S = 2.0  # after a stop, for ranks that wait for each other at the start


class Interrupted(KeyboardInterrupt):
    """Ends a user's `prepare_data` or `setup` where it is, as Ctrl-C would."""


class Stopped(Exception):  # no error: it is caught where the run was started
    """All ranks leave the setup."""


class Stops:
    """What asks one call of fit, validate or test to stop, and when it has to be over.

    ``reason`` says why it is to stop. Signals are heard by the main thread and by a
    thread of their own: the main one may be in a call that does not return.
    """

    _listening: ClassVar[Stops | None] = None
    #: Asked for by a signal, when the run that heard it was done: the next one stops.
    _late: ClassVar[tuple[str, bool] | None] = None

    def __init__(
        self, *, max_time_s: float | None = None, grace_s: float | None = None
    ) -> None:
        self.reason: str | None = None
        self._is_own = False  # the reason is the run's own, and may be withdrawn
        self.wants_requeue = False
        #: What SIGUSR2 does: once there is a session, a checkpoint.
        self.request_save: Callable[[], None] = lambda: None
        self._grace_s, self._max_time_s = grace_s, max_time_s
        self._alarms = Alarms()
        self._alarms.arm("limit", max_time_s)
        self._is_main_rank = self._has_joined = False
        #: A signal was heard; the run has done as it asks; the run has failed.
        self._heard_signal = self._has_answered = self._has_failed = False
        self._file: pathlib.Path | None = None
        self._hears = self._is_interruptible = self._was_interrupted = False
        self._ended = threading.Event()
        self._write: socket.socket | None = None
        self._heard_here, self._heard_there = Interrupts(), Interrupts()
        self._before: dict[signal.Signals, Any] = {}
        self._before_fd = -1

    def request(self, reason: str, *, is_own: bool = False) -> None:
        """Ask for a stop; any thread. The first reason counts, but for a run's own."""
        if self.reason is not None and (is_own or not self._is_own):
            return
        self.reason, self._is_own = reason, is_own
        if is_own:
            return
        self._alarms.arm("grace", self._grace_s)
        if not self._has_joined:
            self._alarms.arm("meeting", _MEET_S)
        self._wake()
        if threading.current_thread() is not threading.main_thread():
            self._interrupt_setup()

    def withdraw(self, reason: str) -> None:
        """Forget a reason of the run's own, or that one: it was done in another way."""
        if self._is_own or self.reason == reason:
            self.reason, self._is_own = None, False
            self._alarms.disarm("grace")

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hear signals, and keep the deadlines.

        Signals are heard in the main thread only: others cannot set handlers. Begin
        before the ranks meet: one that has met the others does not die of a signal.
        """
        read, self._write = socket.socketpair()
        for end in (read, self._write):
            end.setblocking(False)
        watch = threading.Thread(target=self._watch, args=(read,), daemon=True)
        watch.name = "stops"
        self._hears = threading.current_thread() is threading.main_thread()
        if self._hears:
            self._set_handlers()
        late, Stops._late = Stops._late, None
        if late is not None:
            self._heard_signal = True
            reason, self.wants_requeue = late
            self.request(reason)
        watch.start()
        try:
            yield
        finally:
            if self._hears:
                self._put_handlers_back()
            if self._is_unanswered() and self.reason is not None:
                Stops._late = self.reason, self.wants_requeue
            self._ended.set()
            self._wake()
            watch.join()
            if self._file is not None:  # it was meant for this run
                with contextlib.suppress(OSError):
                    self._file.unlink()
            self._write.close()
            read.close()

    @contextlib.contextmanager
    def joined(self, engine: Engine, folder: pathlib.Path | None) -> Iterator[None]:
        """Both :meth:`listening` and :meth:`join`, where the ranks have met before."""
        with self.listening():
            self.join(engine, folder)
            yield

    def join(self, engine: Engine, folder: pathlib.Path | None) -> None:
        """Go on with the other ranks; the main one looks for ``stop`` in the folder."""
        self._is_main_rank, self._has_joined = engine.is_main, True
        self._alarms.disarm("meeting")
        if folder is not None and engine.is_main:
            self._file = folder / STOP_FILE
            # Not waited for: it may wait for a disk.
            look = threading.Thread(target=self._look, args=(self._file,), daemon=True)
            look.start()

    def setup(self, engine: Engine, part: Callable[[], object]) -> None:
        """Call a user's part of the setup, which a stop ends; every rank must call.

        Raises:
            Stopped: afterwards, on all ranks, where a stop is asked for on any.
        """
        try:
            try:
                self._is_interruptible = self._hears
                if self.reason is None:
                    part()
            finally:
                self._is_interruptible = False
        except BaseException as error:  # the user's code may have made another of ours
            if not self._was_interrupted or type(error) is KeyboardInterrupt:
                raise
        if self.reason is not None:  # the others may be in a collective of the part's
            self._alarms.arm("setup", _MEET_S)
            self._wake()
        stops = engine.agree(self.reason is not None)
        self._alarms.disarm("setup")
        if stops:
            self.request("another rank asks to stop")
            raise Stopped

    def fail(self) -> None:
        """Have what has started this rank not be told of signals: it has failed."""
        self._has_failed = True

    def tell_late(self) -> None:
        """Tell what has started this rank of a signal that has come too late.

        It has got that, too, and cannot know how its ranks have ended.
        """
        if self._is_unanswered() and not self._has_failed:
            mark_stopped()

    def _is_unanswered(self) -> bool:
        return self._heard_signal and not self._has_answered

    def leave(self, engine: Engine) -> None:
        """Do what a run does last that was stopped; every rank must call."""
        self._has_answered = True
        keep_status()
        if engine.agree(self.wants_requeue) and engine.is_main:
            self.wants_requeue = False  # so that the grace limit does not, once more
            requeue()

    def _note(self, number: int) -> None:
        if number in _POLITE:
            self._heard_signal = True
            self.wants_requeue = self.wants_requeue or number == signal.SIGUSR1
            self.request(f"received {signal.Signals(number).name}")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Hear a signal, in the main thread."""
        if self._heard_here.is_second(number):
            self._has_answered = True
            raise KeyboardInterrupt
        if number == signal.SIGUSR2:  # here alone: each asks for one
            self.request_save()
            return
        self._note(number)
        if _is_forking() and self._is_interruptible:
            self._alarms.arm("interrupt", _FORK_S)  # a hook's exceptions are lost
            self._wake()
        elif self._is_interruptible:
            self._is_interruptible = False  # once is enough
            self._was_interrupted = True
            raise Interrupted

    def _interrupt_setup(self) -> None:
        """Have the main thread leave a part of the setup, if it is in one."""
        main = threading.main_thread().ident
        if self._is_interruptible and main is not None:
            signal.pthread_kill(main, signal.SIGTERM)  # where it sleeps, too

    def _watch(self, read: socket.socket) -> None:
        """Hear signals, in a thread, and do what is due."""
        told = None
        with selectors.DefaultSelector() as selector:
            selector.register(read, selectors.EVENT_READ)
            while not self._ended.is_set():
                numbers = b""
                if selector.select(self._alarms.left_s()):
                    numbers = read.recv(64)
                for number in numbers:
                    self._note(number)
                    if self._heard_there.is_second(number):
                        self._alarms.arm("unwinding", _UNWIND_S)
                for name in self._alarms.due():
                    self._do(name)
                if self.reason != told:
                    told = self.reason
                    if told is not None:
                        words = "%s: the run is to stop", told
                        last_words(partial(get_root_logger().info, *words))

    def _do(self, name: str) -> None:
        if name == "limit":
            self.request(f"`max_time_s` is over, {self._max_time_s:g} s")
        elif name == "grace":
            words = "NO END WITHIN `stop_grace_s`, %g S: the last checkpoint stands"
            last_words(partial(get_root_logger().critical, words, self._grace_s))
            if self.wants_requeue and self._is_main_rank:
                last_words(requeue)
            _end_rank()
        elif name == "interrupt":
            self._interrupt_setup()
        elif name == "setup":
            _end_rank()
        elif name == "meeting":
            if not self._has_joined:  # which may have been while it was armed
                _end_rank()
        else:
            words = "interrupted twice: ended at once"
            last_words(partial(get_root_logger().critical, words))
            _end(EXIT_INTERRUPTED)

    def _look(self, file: pathlib.Path) -> None:
        while not self._ended.wait(_LOOK_EVERY_S):
            try:
                file.stat()
            except OSError:  # it is not there, or not to be seen now
                continue
            self.request(f"there is a file {file}")
            try:
                file.unlink()  # it is not meant for the run that goes on
            except OSError as error:
                get_root_logger().error("delete it, to go on: %s", error)
            return

    def _wake(self) -> None:
        if self._write is not None:
            with contextlib.suppress(OSError):  # full: it is awake; closed: it is over
                self._write.send(b"\0")

    def _set_handlers(self) -> None:
        Stops._listening = self
        assert self._write is not None
        file = self._write.fileno()
        self._before_fd = signal.set_wakeup_fd(file, warn_on_full_buffer=False)
        self._before = {n: signal.signal(n, self._handle) for n in _HANDLED}

    def _put_handlers_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._before_fd)
        Stops._listening = None


# A forked child has its parent's handlers, and writes what it gets where the parent
# listens, before any hook is called: signals wait until it has put them back.
_forking = threading.local()


def _is_forking() -> bool:
    return hasattr(_forking, "mask")


def _hold_signals() -> None:
    if Stops._listening is not None:
        _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)


def _let_signals_come() -> None:
    if _is_forking():
        signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)
        del _forking.mask


def _be_deaf() -> None:
    """Put the signals' handlers back in a forked child: its parent hears them."""
    if Stops._listening is not None:
        Stops._listening._put_handlers_back()
    _let_signals_come()


os.register_at_fork(
    before=_hold_signals, after_in_parent=_let_signals_come, after_in_child=_be_deaf
)
freeze_imports()  # when torch and Accelerate have been imported, above


def _end_rank() -> NoReturn:
    """End this rank at once, as one that was stopped, and the others with it."""
    status = exit_status()
    if starter_folder() is not None:  # which waits for all, and takes a 0 for an end
        os.kill(os.getppid(), signal.SIGTERM)
    _end(status)


def _end(status: int) -> NoReturn:
    """End this process at once, and the workers of its loaders."""
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(status)
