"""Checkpoints of others, taken over.

They are read with `weights_only`, which runs no code. What they cannot say is listed in
the record.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from helios.checkpoint import CheckpointStore, Encoder
from helios.checkpoint.records import DAMAGE
from helios.errors import CheckpointError, CheckpointNotFoundError
from helios.state import TrainingState, check_name

KINDS = ("networks", "optimizers", "schedulers", "others")
# By kind: what Accelerate calls the files of its objects, the first of them.
FILES = {
    "networks": "model.safetensors",
    "optimizers": "optimizer.bin",
    "schedulers": "scheduler.bin",
    "others": "custom_checkpoint_0.pkl",
}
_PICKLED = {"networks": "pytorch_model.bin"}  # by `safe_serialization=False`
_MAX_RANKS = 1 << 16
_LAYOUT = "the layout of these files is not documented: look at the first results"


@dataclasses.dataclass
class Found:
    """What there is in somebody's checkpoint, as a run of Helios has it."""

    source: str
    model: dict[str, Any]
    progress: TrainingState
    scaler: dict[str, Any] | None = None
    rng: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    unknown: list[str] = dataclasses.field(default_factory=list)

    def write(self, root: Path, save_name: str) -> Path:
        """Make a checkpoint that a run of `save_name` goes on from; return its folder.

        Raises:
            FileExistsError: there is one of that name.
            UnstorableError: it holds something that has no stored form.
        """
        check_name("save_name", save_name)
        store, encoder = CheckpointStore(root / save_name), Encoder()
        epoch, step = self.progress.global_epoch, self.progress.current_iteration
        name = f"{save_name}_epoch_{epoch}_iter_{step}"
        if (store.root / name).exists():
            raise FileExistsError(f"{store.root / name} exists")
        networks = named(self.model.get("networks", {}))
        whole = next(iter(networks.values())) if len(networks) == 1 else networks
        trees = {"model": encoder.encode(whole, file="model")}
        parts: dict[str, Any] = {"model": self.model}
        if self.scaler is not None:
            parts["scaler"] = {"scaler": self.scaler}
        trees["training"] = encoder.encode(parts, file="training")
        for rank in range(max(self.rng, default=0) + 1):
            group, states = f"rank_{rank}", self.rng.get(rank)
            own = {"rng": states, "books": {}, "reading": {}, "gradients": None}
            trees[group] = encoder.encode(own, file=group)
        folder = store.begin(name)
        files = {
            file: entry
            for group, tensors in encoder.files.items()
            for file, entry in store.write_group(
                folder, group, tensors, encoder.aliases[group]
            ).items()
        }
        record = {
            "progress": self.progress.dict(),
            "identity": {},
            "imported": {"from": self.source, "unknown": self.unknown},
            "trees": trees,
            "files": files,
        }
        return store.commit(folder, name, record)


def take_over(
    source: Path, progress: Mapping[str, int], names: Mapping[str, Sequence[str]]
) -> Found:
    """Take over a folder of :func:`from_accelerate`, or a file of :func:`from_pth`.

    Raises:
        CheckpointError: it cannot be used.
    """
    read = from_accelerate if source.is_dir() else from_pth
    try:
        found = read(source, progress, names)
    except DAMAGE as error:
        raise CheckpointError(
            f"{source} does not hold what it should: {error!r}"
        ) from error
    for name, value in found.progress.dict().items():
        is_count = type(getattr(TrainingState(), name)) is int
        if is_count and (type(value) is not int or value < 0):
            raise CheckpointError(f"{source}: `{name}` is {value!r}, not an int >= 0")
    if (last := max(found.rng, default=0)) >= _MAX_RANKS:
        raise CheckpointError(f"{source} has random states of a rank {last}")
    return found


def from_accelerate(
    folder: Path, progress: Mapping[str, int], names: Mapping[str, Sequence[str]]
) -> Found:
    """Take over what `Accelerator.save_state` wrote.

    `names` has the model's attributes for each of `KINDS`, in the order in which they
    were prepared; without, those of a run are taken in the order in which they stand.
    `progress` has what the user knows of the `TrainingState`.

    Raises:
        CheckpointNotFoundError: it is no such folder.
        CheckpointError: a file cannot be read without running code.
    """
    if (folder / "helios.json").exists():
        raise CheckpointError(f"{folder} is a checkpoint of Helios already")
    model: dict[str, Any] = {}
    for kind, first in FILES.items():
        paths = _files(folder, first) or _files(folder, _PICKLED.get(kind, first))
        states = [_read(path) for path in paths]
        model[kind] = states
        if kind in names:
            if len(names[kind]) != len(states):
                raise CheckpointError(
                    f"{len(names[kind])} names are given for the {kind} {names[kind]}, "
                    f"and {folder} has {len(states)}"
                )
            model[kind] = dict(zip(names[kind], states, strict=True))
    if not model["networks"]:
        raise CheckpointNotFoundError(f"{folder} has no weights of `save_state`")
    scaler = folder / "scaler.pt"
    found = Found("Accelerate", model, TrainingState())
    if scaler.exists():
        found.scaler = _read(scaler)
    counts = [0]
    for path in sorted(folder.glob("random_states_*.pkl")):
        states = _read(path)
        counts.append(int(states.get("step", 0)))
        found.rng[int(path.stem.rpartition("_")[2])] = _rng_of(states)
    optimizers = model["optimizers"]
    if isinstance(optimizers, dict):
        optimizers = list(optimizers.values())
    known = {"current_iteration": _updates(optimizers)}
    known["global_iteration"] = max(counts) or known["current_iteration"]
    _say(found, known, progress)
    found.unknown.append(
        "the order of the samples: a Session keeps it where nothing is shuffled, or a "
        "seedable sampler does it; elsewhere it is that of Helios from here on"
    )
    if not found.rng:
        found.unknown.append("random numbers: there is no random_states_<rank>.pkl")
    found.unknown += [
        f"{kind}: there are none in the folder" for kind in KINDS[:3] if not model[kind]
    ]
    found.unknown += [
        f"{path.name} is not taken over: it holds a pickled object"
        for path in sorted([*folder.glob("sampler*.bin"), *folder.glob("dl_state*")])
    ]
    return found


def from_pth(
    path: Path, progress: Mapping[str, int], names: Mapping[str, Sequence[str]]
) -> Found:
    """Take over a `.pth` file of an older Helios, or any of that kind.

    What it has under "model", else all of it, is what `Model.state_dict` gave: states
    by the attributes' names. A model that overrides `load_state_dict` gets it as it is.

    Raises:
        CheckpointError: it cannot be read without running code, or has no weights.
    """
    tree = _read(path)
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} holds a {type(tree).__name__}, not a dict")
    states = tree["model"] if isinstance(tree.get("model"), Mapping) else tree
    if _is_of_tensors(states):  # of one network, without a name
        states = {names["networks"][0] if "networks" in names else "net": states}
    model: dict[str, Any] = {kind: {} for kind in KINDS[:3]}
    for name, state in states.items():
        if (kind := _kind_of(state)) is not None:
            model[kind][name] = state
    if not model["networks"]:
        raise CheckpointError(f"{path} has no weights under {sorted(map(str, states))}")
    # A kind of which there is nothing is left as it is.
    model = {kind: found for kind, found in model.items() if found}
    found = Found("a .pth file", {**states, **model}, TrainingState())
    optimizers = list(model.get("optimizers", {}).values())
    known = {"current_iteration": _updates(optimizers)}
    fields = {field.name for field in dataclasses.fields(TrainingState)}
    for candidate in (tree, *tree.values()):
        if isinstance(candidate, Mapping) and {"global_epoch"} <= {*candidate}:
            known |= {k: v for k, v in candidate.items() if k in fields}
    _say(found, known, progress)
    others = sorted(str(key) for key in tree if tree[key] is not states)
    if states is not tree and others:
        found.unknown.append(f"not taken over: {', '.join(others)}; {_LAYOUT}")
    found.unknown.append("random numbers, and the order of the samples")
    return found


def _say(found: Found, known: dict[str, Any], given: Mapping[str, int]) -> None:
    """Fill in how far the training is, and say what is not known of that."""
    known |= given
    for name, value in known.items():
        setattr(found.progress, name, value)
    if found.progress.dataset_iter:
        found.progress.epoch_stage = "open"
    for name, words in (
        ("global_epoch", "the epoch"),
        ("dataset_iter", "the batches that are done of the epoch"),
        ("current_iteration", "the steps"),
    ):
        if name not in given:
            value = getattr(found.progress, name)
            source = "as the files say" if known.get(name) else "nobody says"
            found.unknown.append(f"{words}: {source}, taken as {value}")


def _files(folder: Path, first: str) -> list[Path]:
    """The files of one kind of objects, in their order."""
    found = list[Path]()
    while (path := folder / numbered_file(first, len(found))).exists():
        found.append(path)
    return found


def numbered_file(first: str, number: int) -> str:
    """What Accelerate calls the file of its n-th object of a kind."""
    if "_0." in first:
        return first.replace("_0.", f"_{number}.")
    return first if number == 0 else first.replace(".", f"_{number}.")


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        with _numpy_is_safe():
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind, for a file of any contents
        wanted = re.search(r"GLOBAL (\S+)", text := str(error))
        advice = r"\n|Re-running|\(1\)"  # on how to run the code all the same
        why = f"it needs {wanted[1]}" if wanted else re.split(advice, text)[0].strip()
        raise CheckpointError(
            f"{path} cannot be read without running code of its own: {why}"
        ) from error


def _numpy_is_safe() -> AbstractContextManager[None]:
    """Let arrays of numpy's numbers be read, which random states are."""
    multiarray = np._core.multiarray  # type: ignore[attr-defined]  # not in its stubs
    old = f"numpy.core.multiarray.{multiarray._reconstruct.__name__}"
    return torch.serialization.safe_globals(
        [
            multiarray._reconstruct,
            (multiarray._reconstruct, old),
            np.ndarray,
            np.dtype,
            type(np.dtype(np.uint32)),
        ]
    )


def _rng_of(states: Mapping[str, Any]) -> dict[str, Any]:
    """Accelerate's random states, as `helios.rng.capture_rng` has them."""
    version, words, gauss = states["random_state"]
    kind, keys, position, has_gauss, cached = states["numpy_random_seed"]
    numpy = {"bit_generator": str(kind), "has_gauss": has_gauss, "gauss": cached}
    numpy["state"] = {"key": np.asarray(keys), "pos": position}
    python = (version, np.array(words, dtype=np.uint32), gauss)
    found = {"python": python, "numpy": numpy, "torch": states["torch_manual_seed"]}
    devices = states.get("torch_cuda_manual_seed")
    return {**found, "cuda": devices[0]} if devices else found


def _updates(optimizers: Sequence[Any]) -> int:
    """How many steps the optimizers have made, as far as they count them."""
    found = [
        int(entry["step"])
        for optimizer in optimizers
        for entry in optimizer.get("state", {}).values()
        if "step" in entry
    ]
    return max(found, default=0)


def _kind_of(state: Any) -> str | None:
    """What a state is of, by what is in it; None: of something else."""
    if not isinstance(state, Mapping):
        return None
    if {"state", "param_groups"} <= {*state}:
        return "optimizers"
    if "last_epoch" in state or "_last_lr" in state:
        return "schedulers"
    return "networks" if _is_of_tensors(state) else None


def _is_of_tensors(state: Mapping[Any, Any]) -> bool:
    return bool(state) and all(isinstance(v, Tensor) for v in state.values())


def named(states: Any) -> dict[str, Any]:
    """By name; by number, where there are no names."""
    pairs = states.items() if isinstance(states, Mapping) else enumerate(states)
    return {str(name): state for name, state in pairs}
