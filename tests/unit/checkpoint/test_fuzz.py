"""The reader against checkpoints altered at random, and made to pass the checks."""

import copy
import json
import os
import random
import shutil
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helios.checkpoint import CheckpointStore, Encoder, find_damage, read_checkpoint
from helios.errors import CheckpointError

#: More than this for one checkpoint of a few kB would be an attack that succeeds.
MOST_S = 2.0
VALUES = [
    None,
    True,
    -1,
    0,
    2**70,
    1e308,
    "",
    "..",
    "/etc/passwd",
    "\x00",
    [],
    {},
    [[]],
]


def make(root: Path) -> Path:
    """A checkpoint with something of everything."""
    encoder = Encoder()
    shared = torch.arange(6.0).reshape(2, 3)
    model = {
        "a.weight": shared,
        "a.tied": shared,
        "b": torch.ones(3).to(torch.bfloat16),
    }
    training = {
        "state": {0: {"step": 3, "avg": torch.zeros(3)}, (1, "x"): [1.5, float("nan")]},
        "numpy": np.arange(4, dtype=np.uint32),
        "odd": [b"bytes", 2**80, 1j, {1, 2}, torch.float16, torch.Size([2])],
        "complex": torch.ones(2, dtype=torch.complex64),
    }
    trees = {
        "model": encoder.encode(model, file="model"),
        "training": encoder.encode(training, file="training"),
        "shared": {"$": "sharded", "v": ["model.w", [3, 2], 0, "torch.float32"]},
    }
    for rank in range(2):  # as if they had shared it out
        pieces = {"model.w": [2 * rank, torch.ones(2 - rank, 2)], "none": None}
        own = encoder.encode({"shards": pieces}, file=f"rank_{rank}")
        trees[f"rank_{rank}"] = own
    store = CheckpointStore(root)
    folder, files = store.begin("a"), dict[str, Any]()
    for group, tensors in encoder.files.items():
        files |= store.write_group(folder, group, tensors, encoder.aliases[group])
    progress = {"current_iteration": 3}
    return store.commit(
        folder, "a", {"progress": progress, "trees": trees, "files": files}
    )


def replaced(value: Any, draw: random.Random) -> Any:
    """A tree of JSON with one node changed."""
    value = copy.deepcopy(value)
    node, above = value, None
    while isinstance(node, dict | list) and node and draw.random() < 0.8:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        above = node, draw.choice(keys)
        node = node[above[1]]
    if above is None:
        return draw.choice(VALUES)
    parent, key = above
    action = draw.randrange(4)
    if action == 0:
        parent[key] = draw.choice(VALUES)
    elif action == 1:
        del parent[key]
    elif action == 2:
        parent[key] = copy.deepcopy(value)  # one inside of itself
    elif isinstance(node, int | float):
        parent[key] = node + draw.choice([-1, 1, 2**31, 2**63])
    else:
        parent[key] = [parent[key]] * draw.randrange(3)
    return value


def sealed(record: Any) -> bytes:
    body = json.dumps(record).encode()
    return b'{"checksum": "crc32:%08x", "record": %s}\n' % (zlib.crc32(body), body)


def alter(path: Path, draw: random.Random) -> None:
    """Change one file, or what the record says of it, so that checksums are right."""
    record = json.loads((path / "helios.json").read_bytes())["record"]
    if draw.random() < 0.5:
        for _ in range(draw.randrange(1, 4)):
            record = replaced(record, draw)
        (path / "helios.json").write_bytes(sealed(record))
        return
    file = draw.choice(sorted(path.glob("*.safetensors")))
    data = bytearray(file.read_bytes())
    for _ in range(draw.randrange(1, 5)):
        at = draw.randrange(min(len(data), 400)) if data else 0  # mostly the header
        if draw.random() < 0.7:
            data[at : at + 1] = bytes([draw.randrange(256)])
        else:
            del data[at : at + draw.randrange(9)]
    file.write_bytes(data)
    if draw.random() < 0.9:
        entry = record["files"][file.name]
        entry["size_bytes"] = len(data)
        entry["crc32"] = [f"{zlib.crc32(data):08x}"]
        (path / "helios.json").write_bytes(sealed(record))


def read(path: Path) -> bool:
    """Whether it can be read at all; any error but a CheckpointError passes through."""
    try:
        find_damage(path)
        checkpoint = read_checkpoint(path)
        for group in checkpoint.record["trees"]:
            for own in (False, True):
                checkpoint.tree(group, own=own)
    except CheckpointError:
        return False
    return True


# The time can be set, for a longer search: HELIOS_FUZZ_S=600.
@pytest.mark.parametrize(
    "seconds",
    [
        3.0,
        pytest.param(
            float(os.environ.get("HELIOS_FUZZ_S", "60")), marks=pytest.mark.slow
        ),
    ],
)
@pytest.mark.timeout(7200)
def test_altered_checkpoints_are_read_or_corrupt_and_nothing_else(
    tmp_path: Path, seconds: float
) -> None:
    whole, altered = make(tmp_path / "whole"), tmp_path / "altered"
    assert read(whole)
    end, count, readable = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        count += 1
        shutil.copytree(whole, altered)
        alter(altered, random.Random(count))
        began = time.monotonic()
        readable += read(altered)
        assert time.monotonic() - began < MOST_S, f"seed {count}"
        shutil.rmtree(altered)
    print(f"{count} altered checkpoints, {readable} of them readable")
    assert 0 < readable < count
