"""The numbers that are watched, where they come from, and what is said of them."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch

from helios.data.batches import listed
from helios.sharding import is_sharded

_SHOWN = 64  # samples that a message names

#: What it is, and a number or a tensor.
Value: TypeAlias = tuple[str, Any]


class Where(NamedTuple):
    """A batch of this rank, and the step that it is a part of."""

    batch: int  # batches of the run before it
    step: int
    epoch: int
    number: int  # within the epoch
    samples: Any  # their indices, where they have any

    def __str__(self) -> str:
        at = f"step {self.step} (epoch {self.epoch}, batch {self.number})"
        return f"{at}, {samples_of(self.samples)}"


Watched: TypeAlias = tuple[Where, list[Value]]


class Found(NamedTuple):
    """Bad numbers of a batch, in words."""

    where: Where
    what: str


def samples_of(indices: Any) -> str:
    """The samples of a batch, in words."""
    if indices is None:
        return "of a stream, whose samples have no numbers"
    found = listed(indices)
    if len(found) > _SHOWN:
        return f"samples {found[:_SHOWN]} and {len(found) - _SHOWN} more"
    return f"samples {found}"


def dense(grad: Any) -> Any:
    """The numbers of a gradient that are on this rank."""
    local = grad.to_local() if is_sharded(grad) else grad
    return local.coalesce().values() if local.is_sparse else local


def together(values: list[Value]) -> torch.Tensor:
    """All of them in one tensor, where they are."""
    flat = [value for _, value in values]
    try:
        return torch.stack(flat)
    except (RuntimeError, TypeError):  # plain numbers, or of several shapes or devices
        tensors = [torch.as_tensor(v) for v in flat]
        device = next((t.device for t in tensors if t.device.type != "cpu"), None)
        sums = [t.to(device or "cpu", torch.float64).sum() for t in tensors]
        return torch.stack(sums) if sums else torch.zeros(0)
