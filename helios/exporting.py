"""Weights and states for others: as safetensors, or as Accelerate's `load_state` reads.

Accelerate's folder has torch's own files beside the safetensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helios.checkpoint import Checkpoint, CheckpointStore
from helios.checkpoint.tensors import FORMS, write_tensors
from helios.errors import CheckpointError
from helios.interchange import FILES, KINDS, named, numbered_file

_METADATA = {"format": "pt"}  # which some readers insist on


def weights(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], list[str]]:
    """The networks' tensors by dotted name, and the names of what is no tensor.

    Raises:
        CheckpointError: there are none.
    """
    if "model" not in checkpoint.record["trees"]:
        raise CheckpointError(f"{checkpoint.path} has no weights")
    tree = checkpoint.tree("model", has_classes=False)
    tensors, others = dict[str, Tensor](), list[str]()
    for name, value in _leaves(tree, ""):
        if isinstance(value, Tensor):
            tensors[name] = value
        else:
            others.append(name)
    return tensors, others


def save_weights(
    tensors: Mapping[str, Tensor], path: Path, shard_bytes: int | None = None
) -> None:
    """Write one safetensors file, or a folder of shards with an index.

    A tied tensor is in it under each of its names.

    Raises:
        CheckpointError: safetensors has no form for a tensor's dtype.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in FORMS:
            raise CheckpointError(f"{name} has dtype {tensor.dtype}: no form for it")
    if shard_bytes is None:
        with open(path, "xb") as out:
            write_tensors(out, tensors, _METADATA)
        return
    path.mkdir()
    store = CheckpointStore(path, max_shard_bytes=shard_bytes)
    store.write_group(path, "model", tensors, metadata=_METADATA)


def to_accelerate(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Write what `Accelerator.load_state` reads; return what is not in there.

    The objects are numbered as they stand in the model, so they must be prepared in
    that order.
    """
    training = checkpoint.tree("training", has_classes=False)
    model, left_out = training["model"], list[str]()
    for kind in KINDS[:3]:
        for number, (name, state) in enumerate(named(model.get(kind, {})).items()):
            path = folder / numbered_file(FILES[kind], number)
            if kind != "networks":
                torch.save(state, path)
                continue
            found = dict(_leaves(state, ""))
            tensors = {k: v for k, v in found.items() if isinstance(v, Tensor)}
            save_weights(tensors, path)
            left_out += [f"{name}.{k}" for k in found if k not in tensors]
    if training.get("scaler"):
        torch.save(training["scaler"]["scaler"], folder / "scaler.pt")
    steps = checkpoint.record["progress"]["global_iteration"]
    for group in checkpoint.record["trees"]:
        if group.startswith("rank_"):
            states = checkpoint.tree(group, has_classes=False)["rng"]
            if states is None:  # of an import
                left_out.append(f"the random numbers of {group}")
                continue
            path = folder / f"random_states_{group.removeprefix('rank_')}.pkl"
            torch.save({"step": steps, **_rng_for(states)}, path)
    others = {k: v for k, v in model.items() if k not in KINDS[:3]}
    left_out += [f"{k} {sorted(v)}" for k, v in others.items() if type(v) is dict and v]
    left_out.append("the position in the data: skip the batches of the epoch yourself")
    return left_out


def _rng_for(states: Mapping[str, Any]) -> dict[str, Any]:
    """The other way."""
    version, words, gauss = states["python"]
    numpy = states["numpy"]
    key, position = numpy["state"]["key"], numpy["state"]["pos"]
    found = {
        "random_state": (version, tuple(words.tolist()), gauss),
        "numpy_random_seed": (
            numpy["bit_generator"],
            key,
            position,
            numpy["has_gauss"],
            numpy["gauss"],
        ),
        "torch_manual_seed": states["torch"],
    }
    if "cuda" in states:
        found["torch_cuda_manual_seed"] = [states["cuda"]]
    return found


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree
