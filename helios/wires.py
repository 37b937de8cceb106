"""Wires: TCP connections from rank to rank, for messages of a byte that cannot wait.

A collective of gloo hands each message to a thread of its own and back, which takes
seven times as long as the kernel does for the message.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import distributed

_SETUP_S = 10.0
_BYTES = [bytes([value]) for value in range(256)]


class Wires:
    """To the rank at each of ``distances``, and from the one as far behind; or none.

    Every rank must make one. ``gather`` gives all ranks' values of a picklable one,
    in rank order. ``is_complete`` says whether this rank has its connections: other
    ranks may not have theirs, as where hosts have their ports closed to each other.
    """

    def __init__(
        self,
        distances: Iterable[int],
        gather: Callable[[Any], list[Any]],
        timeout_s: float,
    ) -> None:
        self._rank, self._ranks = distributed.get_rank(), distributed.get_world_size()
        self._to: dict[int, socket.socket] = {}
        self._from: dict[int, socket.socket] = {}
        weakref.finalize(self, _close, self._to, self._from)
        _all.add(self)
        token = secrets.token_bytes(16)  # of this rank, for who may connect to it
        door = _door()
        address = None if door is None else door.getsockname()[:2]
        doors = gather((address, token))
        self.is_complete = False
        # No rank may take so long that the others' next collective is over time.
        self._until_s = time.monotonic() + min(_SETUP_S, timeout_s / 2)
        if door is not None:
            with door, contextlib.suppress(OSError):
                for distance in distances:
                    other = (self._rank + distance) % self._ranks
                    self._connect(distance, *doors[other])
                while len(self._from) < len(self._to):
                    self._accept(door, token)
                self.is_complete = True
        for connection in (*self._to.values(), *self._from.values()):
            connection.settimeout(timeout_s)

    def _left_s(self) -> float:
        """What is left of the time to set up; raises where nothing is."""
        left_s = self._until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return left_s

    def exchange(self, value: int, distance: int) -> int:
        """Send a byte that far, and get one from as far; that rank must call as well.

        Raises a RuntimeError, as collectives do, where the other rank has ended or the
        time is over.
        """
        try:
            self._to[distance].sendall(_BYTES[value])
            got = self._from[distance].recv(1)
        except OSError as error:
            raise RuntimeError(self._tell(distance, f"is lost: {error}")) from error
        if not got:
            raise RuntimeError(self._tell(distance, "has closed its connection"))
        return got[0]

    def _tell(self, distance: int, what: str) -> str:
        other = (self._rank - distance) % self._ranks
        return f"rank {other}, from which rank {self._rank} waits for a message, {what}"

    def _connect(self, distance: int, address: Any, token: bytes) -> None:
        if address is None:
            raise OSError("That rank can't listen.")
        connection = socket.create_connection(address, self._left_s())
        self._to[distance] = connection
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(token + distance.to_bytes(4, "big"))

    def _accept(self, door: socket.socket, token: bytes) -> None:
        door.settimeout(self._left_s())
        connection, _ = door.accept()
        with contextlib.ExitStack() as stack:
            stack.enter_context(connection)
            connection.settimeout(self._left_s())
            hello = connection.recv(len(token) + 4, socket.MSG_WAITALL)
            if secrets.compare_digest(hello[: len(token)], token):  # else a stranger
                self._from[int.from_bytes(hello[len(token) :], "big")] = connection
                stack.pop_all()


_all: weakref.WeakSet[Wires] = weakref.WeakSet()


def _door() -> socket.socket | None:
    """Listen at this host's address on the way to where the ranks have met."""
    meeting = os.environ.get("MASTER_ADDR", "localhost")
    kind = socket.SOCK_DGRAM
    with contextlib.suppress(OSError):
        family, *_, address = socket.getaddrinfo(meeting, 1, type=kind)[0]
        with socket.socket(family, kind) as way:
            way.connect(address)  # sends nothing
            own = way.getsockname()[0]
        return socket.create_server((own, 0), family=family)
    return None


def _close(*connections: dict[int, socket.socket]) -> None:
    for each in connections:
        while each:
            each.popitem()[1].close()


def _close_in_child() -> None:
    """Close a forked child's copies: a dead rank's would look alive by them."""
    for wires in _all:
        _close(wires._to, wires._from)


os.register_at_fork(after_in_child=_close_in_child)
