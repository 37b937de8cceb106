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
# A host that is gone is missed after five minutes by who only waits for it. TCP's own
# limit, a quarter of an hour, is for who sends.
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 30, "TCP_KEEPCNT": 8}
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
        time is over, and from then on: a byte that is late would be another's answer.
        """
        other = self._rank + distance
        try:
            self._to[distance].sendall(_BYTES[value])
            other = self._rank - distance
            got = self._from[distance].recv(1)
            if not got:
                raise ConnectionError("it has closed its connection")
        except BaseException as error:
            _close(self._to, self._from)
            if not isinstance(error, OSError | KeyError):
                raise
            why = "an earlier one failed" if isinstance(error, KeyError) else error
            raise RuntimeError(
                f"rank {self._rank} cannot exchange messages with rank "
                f"{other % self._ranks}: {why}"
            ) from error
        return got[0]

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
            hello = b""
            while len(hello) < len(token) + 4:
                connection.settimeout(self._left_s())
                if not (part := connection.recv(len(token) + 4 - len(hello))):
                    return
                hello += part
            if secrets.compare_digest(hello[: len(token)], token):  # else a stranger
                self._from[int.from_bytes(hello[len(token) :], "big")] = connection
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for name, number in _KEEPALIVE.items():
                    if hasattr(socket, name):  # not everywhere
                        option = getattr(socket, name)
                        connection.setsockopt(socket.IPPROTO_TCP, option, number)
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
