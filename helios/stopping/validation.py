"""Validations that are interrupted: when ranks vote on it, and what is saved then."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from helios.engine import inner_optimizer
from helios.sharding import is_sharded
from helios.state import Boundary

if TYPE_CHECKING:
    from helios.session import Session

_OWED = "validation"  # what is saved of reading says where one was interrupted
_VOTE_S = 0.1
_MOST_BATCHES = 16


class Votes:
    """Has the ranks vote on a stop within an evaluation: all after the same batches.

    That is as often as a stop may wait, about, and not with each batch: ``agree_each``
    is that of the engine, which may cost as much as a small batch.
    """

    def __init__(
        self,
        agree_each: Callable[..., list[bool]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._agree_each, self._clock = agree_each, clock
        self._every = self._left = 1
        self._voted_s = clock()

    def ask(self, wants_stop: bool) -> bool:
        """Whether any rank wants to stop, if it is time to vote; every rank must call.

        Call it once a batch.
        """
        self._left -= 1
        if self._left:
            return False
        is_seldom = self._clock() - self._voted_s >= _VOTE_S
        stops, is_seldom = self._agree_each(wants_stop, is_seldom)
        more = self._every // 2 if is_seldom else self._every * 2
        self._every = self._left = min(max(more, 1), _MOST_BATCHES)
        self._voted_s = self._clock()
        return stops


class Frozen:
    """The state before a validation, to be saved if that is interrupted.

    What is large is not copied: the parameters, and what the optimizers have of them.
    A validation leaves them alone, as a rule; :meth:`is_true` tells. Every rank must
    make one.
    """

    def __init__(self, session: Session) -> None:
        found = session._model._holdings()
        self._weights = [_local(p.detach()) for p in found.all_parameters()]
        states = [inner_optimizer(o).state.values() for o in found.optimizers.values()]
        kept = [
            value for of_one in states for values in of_one for value in values.values()
        ]
        live = {t.data_ptr() for t in self._weights}
        live |= {_local(t).data_ptr() for t in kept if isinstance(t, torch.Tensor)}
        #: What the session's `_encode` gives.
        self.encoded = session._encode()
        for file in self.encoded[0].files.values():
            for name, tensor in file.items():
                if tensor.data_ptr() not in live:
                    file[name] = tensor.clone()
        self._norms = self._norms_now()

    def is_true(self) -> bool:
        """Whether the weights are those of then: one may validate moving averages."""
        pairs = zip(self._norms, self._norms_now(), strict=True)
        return all(torch.equal(_bits(one), _bits(other)) for one, other in pairs)

    def _norms_now(self) -> list[torch.Tensor]:
        """The norm of each, on its device; nothing waits for it."""
        wide = {2: torch.float32}  # by the size of a number
        return [
            torch.linalg.vector_norm(t, dtype=wide.get(t.dtype.itemsize))
            for t in self._weights
            if t.dtype.is_floating_point and t.dtype.itemsize > 1
        ]


def begin(session: Session, boundary: Boundary) -> None:
    """Make ready for a validation that may be interrupted; every rank must call."""
    if session.saver is not None:
        session.reading[_OWED] = boundary.value
        session.frozen = Frozen(session)


def end(session: Session) -> None:
    """Note that it was not interrupted."""
    session.frozen = None
    session.reading.pop(_OWED, None)


def is_owed(session: Session) -> bool:
    """Whether the run that is resumed was interrupted in a validation."""
    return _OWED in session.reading


def owed(session: Session, boundary: Boundary) -> Boundary:
    """That at which a validation was interrupted, once, in the place of the start."""
    if boundary is Boundary.START and is_owed(session):
        return Boundary(session.reading.pop(_OWED))
    return boundary


def is_interrupted(session: Session, votes: Votes) -> bool:
    """Whether to end an evaluation after this batch; every rank must call."""
    stops = session.stop_reason is not None
    if session.engine.world_size > 1:
        stops = votes.ask(stops)
    if not stops:
        return False
    frozen = session.frozen
    return not session.engine.agree(frozen is not None and not frozen.is_true())


def _bits(norm: torch.Tensor) -> torch.Tensor:
    """Its bits: of those a NaN is the same as before."""
    return norm.reshape(1).view(torch.uint8)


def _local(tensor: Any) -> Any:
    """This rank's part of a sharded tensor; any other one as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor
