"""Gathering of in-memory data: a batch at once, to the bits of one by one."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import StackDataset, Subset, TensorDataset, default_collate

Gather = Callable[[NDArray[np.int64]], Any]

# Features of the package `datasets` whose rows are numbers, text or arrays, and
# undergo no decoding.
_LISTS = {"List", "LargeList", "Sequence"}
_LEAVES = {"Value", "ClassLabel", "Array2D", "Array3D", "Array4D", "Array5D"}
# What its formats make of numbers in batches; of a row's scalars, "numpy" keeps the
# type, but loaders ask for batches.
_DTYPES = {"b": torch.bool, "i": torch.int64, "u": torch.int64, "f": torch.float32}


def gatherer(dataset: Any) -> Gather | None:
    """Return what fetches and collates a batch of in-memory samples at once, or None.

    It takes int64 indices of shape (batch,) and returns what `default_collate` makes of
    those samples, in memory of its own; IndexError where one is out of range. It can
    be pickled with the data set. None: the data set is of no known kind, by exact type,
    or one whose batches would differ in any bit, type or stride; go sample by sample.

    The `indices` of a `Subset` are read once, here: assign new ones, rather than
    change them in place. Other changes of the data set are followed.
    """
    try:
        with warnings.catch_warnings():
            # Nothing is written to an array: whether torch could is no matter.
            warnings.filterwarnings("ignore", message="The given NumPy array is not wr")
            if (gather := _gather_of(dataset)) is None:
                return None
            index = np.zeros(2, np.int64)
            is_same = _is_same(gather(index), _one_by_one(dataset, index))
    except Exception:  # It fails sample by sample, too, and is better reported there.
        return None
    return _Gatherer(dataset, gather) if is_same else None


class _Gatherer:
    """A function that is made anew where it is unpickled: no data are sent twice."""

    def __init__(self, dataset: Any, gather: Gather) -> None:
        self._dataset = dataset
        self._gather = gather

    def __call__(self, indices: NDArray[np.int64]) -> Any:
        return self._gather(indices)

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any]]:
        return gatherer, (self._dataset,)


def _gather_of(dataset: Any) -> Gather | None:
    kind = type(dataset)
    if (kind.__module__, kind.__name__) == ("datasets.arrow_dataset", "Dataset"):
        return _of_arrow(dataset)
    make = _MAKERS.get(kind)
    return None if make is None else make(dataset)


def _one_by_one(dataset: Any, indices: NDArray[np.int64]) -> Any:
    """What a loader makes of samples: it takes `__getitems__` where there is one."""
    if callable(getattr(dataset, "__getitems__", None)):
        return default_collate(dataset.__getitems__(indices.tolist()))
    return default_collate([dataset[i] for i in indices.tolist()])


def _is_same(one: Any, other: Any) -> bool:
    """Whether two batches agree in all that can be seen of them."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(_is_same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, torch.Tensor):
        return _traits(one) == _traits(other) and torch.equal(_bits(one), _bits(other))
    return bool(one == other)


def _traits(tensor: torch.Tensor) -> tuple[Any, ...]:
    flags = tensor.requires_grad, tensor.is_conj(), tensor.is_neg()
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride(), flags


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


def _is_plain(tensor: Any) -> bool:
    """Whether the rows are those of an ordinary tensor, through which no gradient goes.

    A gradient would be summed up in another order.
    """
    is_tensor = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    if not is_tensor or tensor.layout is not torch.strided or tensor.is_nested:
        return False
    return not (tensor.requires_grad or tensor.is_quantized or tensor.ndim == 0)


def _as_index(indices: NDArray[np.int64], count: int) -> torch.Tensor:
    """Return the indices as a tensor; IndexError if one isn't below the count."""
    # Some devices end the process for it, and index_select has other errors, too.
    if (last := indices.max()) >= count:
        raise IndexError(f"index {last} is out of range for {count} samples")
    # torch warns of arrays that are not writable, and takes no negative strides.
    return torch.from_numpy(indices if indices.flags.carray else indices.copy())


def _of_tensor(tensor: torch.Tensor) -> Gather | None:
    if not _is_plain(tensor):
        return None

    def gather(indices: NDArray[np.int64]) -> torch.Tensor:
        index = _as_index(indices, len(tensor))
        return tensor.index_select(0, index.to(tensor.device))

    return gather


def _of_array(array: NDArray[Any]) -> Gather | None:
    if array.dtype.kind not in "biufc":
        return None
    plain = np.asarray(array)  # of a memmap, too
    if plain.ndim == 1:  # torch selects no unsigned scalars
        return lambda indices: torch.as_tensor(plain[indices])
    if (rows := _of_tensor(torch.from_numpy(plain))) is None:
        return None
    # as_tensor: to torch's default device, where default_collate puts arrays.
    return lambda indices: torch.as_tensor(rows(indices))


def _of_tensor_dataset(dataset: TensorDataset) -> Gather | None:
    tensors = dataset.tensors
    if not all(map(_is_plain, tensors)):
        return None

    def gather(indices: NDArray[np.int64]) -> Any:
        if dataset.tensors is not tensors:
            return _one_by_one(dataset, indices)
        index = _as_index(indices, len(tensors[0]))
        return [t.index_select(0, index.to(t.device)) for t in tensors]

    return gather


def _of_stack(dataset: StackDataset[Any]) -> Gather | None:
    parts = dataset.datasets
    names = list(parts) if isinstance(parts, dict) else None
    rows = list(map(_gather_of, parts.values() if isinstance(parts, dict) else parts))
    gathers = [gather for gather in rows if gather is not None]
    if len(gathers) < len(rows):
        return None

    def gather(indices: NDArray[np.int64]) -> Any:
        if dataset.datasets is not parts:
            return _one_by_one(dataset, indices)
        batch = [gather(indices) for gather in gathers]
        return batch if names is None else dict(zip(names, batch, strict=True))

    return gather


def _of_subset(dataset: Subset[Any]) -> Gather | None:
    inner, given = dataset.dataset, dataset.indices
    rows = _gather_of(inner)
    places = None if rows is None else _places(given, len(inner))  # type: ignore[arg-type]  # it has a length, being known
    if rows is None or places is None:
        return None

    def gather(indices: NDArray[np.int64]) -> Any:
        if dataset.dataset is not inner or dataset.indices is not given:
            return _one_by_one(dataset, indices)
        return rows(places[indices])

    return gather


def _places(given: Any, count: int) -> NDArray[np.int64] | None:
    """Return a subset's indices, as 0 to the count; None if they are anything else."""
    if type(given) not in (list, tuple, range, np.ndarray, torch.Tensor):
        return None
    if isinstance(given, list | tuple) and bool in set(map(type, given)):
        return None  # a mask of one sample
    places = given.numpy(force=True) if isinstance(given, torch.Tensor) else given
    places = np.array(places)
    if places.ndim != 1 or places.dtype.kind != "i":
        return None
    places = np.where(places < 0, places + count, places).astype(np.int64)
    return places if np.all((places >= 0) & (places < count)) else None


def _of_arrow(dataset: Any) -> Gather | None:
    """Gather the rows of a `datasets.Dataset` from its Arrow table, where they fit."""
    form = dataset.format
    kind, names = form["type"], form["columns"]
    if kind not in ("torch", "numpy"):
        return None
    if not all(_is_undecoded(dataset.features[name]) for name in names):
        return None
    tables = dataset.with_format("arrow", columns=names)

    def columns(indices: NDArray[np.int64]) -> dict[str, Any] | None:
        table, batch = tables[indices.tolist()], {}
        for name in table.column_names:
            batch[name] = _collated(table.column(name).combine_chunks(), kind)
            if batch[name] is None:
                return None
        return batch

    def gather(indices: NDArray[np.int64]) -> Any:
        batch = columns(indices) if dataset.format == form else None
        return _one_by_one(dataset, indices) if batch is None else batch

    # Where the first sample does not fit, others may not either.
    return None if columns(np.zeros(1, np.int64)) is None else gather


def _is_undecoded(feature: Any) -> bool:
    name = type(feature).__name__
    return name in _LEAVES or (name in _LISTS and _is_undecoded(feature.feature))


def _collated(column: Any, kind: str) -> torch.Tensor | list[str] | None:
    """Return an Arrow array as the collated rows of a format; None if it may differ.

    None values, lists of several lengths or of none, and 64 bits without a sign are
    formatted by rules of their own.
    """
    array, shape = getattr(column, "storage", column), [len(column)]
    while array.null_count == 0 and "list" in str(array.type).partition("<")[0]:
        lengths = np.unique(array.value_lengths())
        if len(lengths) != 1:
            return None
        shape.append(int(lengths[0]))
        array = array.flatten()
    if array.null_count or len(array) == 0:
        return None
    if str(array.type) in ("string", "large_string") and len(shape) == 1:
        text = np.asarray(array.to_pylist())  # as is done with rows: drops final zeros
        return text.tolist() if kind == "torch" else list(text)
    values = array.to_numpy(zero_copy_only=False)
    if values.dtype.kind not in _DTYPES or values.dtype == np.uint64:
        return None
    return torch.tensor(values.reshape(shape), dtype=_DTYPES[values.dtype.kind])


_MAKERS: dict[type, Callable[[Any], Gather | None]] = {
    torch.Tensor: _of_tensor,
    torch.nn.Parameter: _of_tensor,
    np.ndarray: _of_array,
    np.memmap: _of_array,
    TensorDataset: _of_tensor_dataset,
    StackDataset: _of_stack,
    Subset: _of_subset,
}
