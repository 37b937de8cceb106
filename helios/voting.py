"""Votes: what ranks agree on at each batch, on the CPU, beside the device's work."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, ClassVar

import torch
from torch import distributed
from torch.distributed.constants import default_pg_nccl_timeout, default_pg_timeout

from helios.wires import Wires

_TAG = 0x48  # of other messages, that a program may send


class Votes:
    """Questions of which each rank has an answer; every rank must make one.

    Messages of one byte. They go beside the device: through it they would wait for its
    work, and training for them. From rank to rank, twice as far each time, as in the
    dissemination barrier of Hensgen, Finkel and Manber (1988). They take wires, and
    where some rank has not got them, gloo's messages. Their time limit is that of the
    process group's collectives on ``device``, but for NCCL's default, which is short.
    """

    _can_wire: ClassVar[bool] = True  # as far as all ranks know

    def __init__(self, device: torch.device) -> None:
        self._group: Any = distributed.group.WORLD
        self.timeout = timeout = _timeout_of(self._group, device)
        if distributed.get_backend() != "gloo":
            if timeout == default_pg_nccl_timeout:
                timeout = default_pg_timeout
            self._group = distributed.new_group(backend="gloo", timeout=timeout)
        self._rank, self._ranks = distributed.get_rank(), distributed.get_world_size()
        self._sent, self._got = torch.zeros(
            2, 1, dtype=torch.uint8, device="cpu"
        ).unbind()
        distances = range((self._ranks - 1).bit_length())
        self._distances = [1 << number for number in distances]
        self._exchange = self._exchange_by_gloo
        if Votes._can_wire:
            wires = Wires(self._distances, self._gather, timeout.total_seconds())
            Votes._can_wire = not self.any_of((not wires.is_complete,))[0]
        self.is_wired = Votes._can_wire
        if self.is_wired:
            self._exchange = wires.exchange

    def any_of(self, flags: tuple[bool, ...]) -> list[bool]:
        """Whether any rank says yes, to up to 8 questions; every rank must call."""
        bits = sum(1 << number for number, flag in enumerate(flags) if flag)
        for distance in self._distances:
            bits |= self._exchange(bits, distance)
        return [bool(bits >> number & 1) for number in range(len(flags))]

    def _exchange_by_gloo(self, value: int, distance: int) -> int:
        group, rank, ranks = self._group, self._rank, self._ranks
        self._sent.fill_(value)
        sending = group.send([self._sent], (rank + distance) % ranks, _TAG)
        group.recv([self._got], (rank - distance) % ranks, _TAG).wait()
        got = int(self._got)
        sending.wait()
        return got

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self._ranks
        distributed.all_gather_object(values, value, group=self._group)
        return values


def _timeout_of(group: Any, device: torch.device) -> timedelta:
    """How long its collectives on such a device may take."""
    options = group._get_backend(device).options
    return getattr(options, "_timeout", default_pg_timeout)
