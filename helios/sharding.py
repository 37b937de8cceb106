"""Sharded tensors: this rank's piece of one, and one made of the pieces of any ranks.

They are cut in one dimension. ``torch.distributed.tensor`` is imported where there is a
DTensor: it takes a third of a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

#: Where pieces lie: the mesh of ranks, and how a tensor is spread over each of its
#: dimensions. None: in one piece, on this rank.
Layout: TypeAlias = tuple[Any, Sequence[Any]] | None
#: Where it begins in the dimension that is cut, and its numbers.
Piece: TypeAlias = Sequence[Any]


def is_sharded(value: object) -> bool:
    """Whether it is a DTensor."""
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def layout_of(tensors: Iterable[Tensor]) -> Layout:
    """How the first sharded one of them lies."""
    for tensor in tensors:
        if is_sharded(tensor):
            mesh, placements = _parts(tensor)
            return mesh, placements
    return None


def shard_dim(tensor: Tensor) -> int:
    """The dimension that it is cut in.

    Raises:
        ValueError: it lies in another way.
    """
    _, placements = _parts(tensor)
    kinds = [type(placement).__name__ for placement in placements]
    dims = [p.dim for p, kind in zip(placements, kinds, strict=True) if kind == "Shard"]
    if len(dims) != 1 or set(kinds) - {"Shard", "Replicate"}:
        raise ValueError(f"it lies as {placements}, not cut in one dimension")
    return int(dims[0])


def piece_of(tensor: Tensor) -> Piece | None:
    """This rank's piece of a sharded one; None: it is empty, or another rank's too."""
    mesh, placements = _parts(tensor)
    places = mesh.get_coordinate()
    for placement, place in zip(placements, places, strict=True):
        if placement.is_replicate() and place:
            return None
    live: Any = tensor
    local = live.to_local()
    return [_start(live, shard_dim(tensor)), local] if local.numel() else None


def join(
    pieces: Sequence[Piece],
    shape: Sequence[int],
    dim: int,
    dtype: torch.dtype,
    layout: Layout,
) -> Tensor:
    """Make a tensor of its pieces: whole, or this rank's part of it in that layout.

    Raises:
        ValueError: the pieces are not those of such a tensor.
    """
    # Before there is memory for it: a hostile file may claim any shape.
    end, pieces = 0, sorted(pieces, key=lambda piece: piece[0])
    for start, tensor in pieces:
        box = [*tensor.shape]
        fits = box[:dim] == [*shape[:dim]] and box[dim + 1 :] == [*shape[dim + 1 :]]
        if start != end or not fits or tensor.dtype != dtype:
            raise ValueError(f"a piece of {box} at {start} is none of {[*shape]}")
        end += box[dim]
    if end != shape[dim] and 0 not in shape:
        raise ValueError(f"the pieces of {[*shape]} end at {end}")
    if layout is None:
        whole = local = torch.empty([*shape], dtype=dtype)
        begin = 0
    else:
        whole, local, begin = _empty(shape, dim, dtype, *layout)
    for start, tensor in pieces:
        low = max(start, begin)
        count = min(start + tensor.shape[dim], begin + local.shape[dim]) - low
        if count > 0:
            here = local.narrow(dim, low - begin, count)
            here.copy_(tensor.narrow(dim, low - start, count))
    return whole


def like(live: Any, value: Any) -> Any:
    """Cut a whole tensor as a live one is cut; all else is given back as it is.

    Every rank must call.
    """
    is_whole = is_sharded(live) and isinstance(value, Tensor) and not is_sharded(value)
    if not is_whole or value.shape != live.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = _parts(live)
    return distribute_tensor(value.to(live.device), mesh, placements)


def all_like(live: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """:func:`like` for the values of a dict."""
    return {name: like(live.get(name), value) for name, value in values.items()}


def _parts(tensor: Any) -> tuple[Any, Sequence[Any]]:
    return tensor.device_mesh, tensor.placements


def _start(tensor: Any, dim: int) -> int:
    """Where this rank's part of a sharded one begins."""
    (chunk,) = tensor.__create_chunk_list__()
    return int(chunk.offsets[dim])


def _empty(
    shape: Sequence[int], dim: int, dtype: torch.dtype, mesh: Any, placements: Any
) -> tuple[Tensor, Tensor, int]:
    """A sharded tensor, this rank's part of it, and where that begins."""
    from torch.distributed.tensor import Shard, empty

    cut = [p if p.is_replicate() else Shard(dim) for p in placements]
    made: Any = empty(*shape, dtype=dtype, device_mesh=mesh, placements=cut)
    return made, made.to_local(), _start(made, dim)
