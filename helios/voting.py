"""Votes: what ranks agree on at each batch, on the CPU, beside the device's work."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

_TAG = 0x48  # of other messages, that a program may send


class Votes:
    """Questions of which each rank has an answer; every rank must make one.

    Messages of one byte. They go over gloo: through the device they would wait for its
    work, and training for them. From rank to rank, twice as far each time, as in the
    dissemination barrier of Hensgen, Finkel and Manber (1988): gloo's own reductions
    are made for large tensors, and take half as long again.
    """

    def __init__(self) -> None:
        is_there = distributed.get_backend() == "gloo"
        world = distributed.group.WORLD
        self._group: Any = world if is_there else distributed.new_group(backend="gloo")
        self._rank, self._ranks = distributed.get_rank(), distributed.get_world_size()
        self._sent, self._got = torch.zeros(
            2, 1, dtype=torch.uint8, device="cpu"
        ).unbind()

    def any_of(self, flags: tuple[bool, ...]) -> list[bool]:
        """Whether any rank says yes, to up to 8 questions; every rank must call."""
        bits = sum(1 << number for number, flag in enumerate(flags) if flag)
        group, rank, ranks, distance = self._group, self._rank, self._ranks, 1
        while distance < ranks:
            self._sent.fill_(bits)
            sending = group.send([self._sent], (rank + distance) % ranks, _TAG)
            group.recv([self._got], (rank - distance) % ranks, _TAG).wait()
            bits |= int(self._got)
            sending.wait()
            distance *= 2
        return [bool(bits >> number & 1) for number in range(len(flags))]
