"""Votes: what ranks agree on at each batch, on the CPU, beside the device's work."""

from __future__ import annotations

import torch
from torch import distributed


class Votes:
    """Questions of which each rank has an answer; every rank must make one.

    Messages of one byte. They go over gloo: through the device they would wait for its
    work, and training for them.
    """

    def __init__(self) -> None:
        is_there = distributed.get_backend() == "gloo"
        self._group = None if is_there else distributed.new_group(backend="gloo")
        # In one byte: of more than one element, gloo makes two messages.
        self._ballot = torch.zeros(1, dtype=torch.uint8)

    def any_of(self, flags: tuple[bool, ...]) -> list[bool]:
        """Whether any rank says yes, to up to 8 questions; every rank must call."""
        bits = sum(1 << number for number, flag in enumerate(flags) if flag)
        self._ballot.fill_(bits)
        distributed.all_reduce(self._ballot, distributed.ReduceOp.BOR, self._group)
        bits = int(self._ballot)
        return [bool(bits >> number & 1) for number in range(len(flags))]
