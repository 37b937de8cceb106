"""Checkpoints of every format that was ever written are read.

`python tests/unit/checkpoint/test_format.py` writes the fixture of the present format;
those that are there must never be written again.
"""

import collections
import pathlib
import sys
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import pytest
import torch

from helios.checkpoint import CheckpointStore, Encoder, find_damage, read_checkpoint
from helios.checkpoint.records import FORMAT
from helios.differences import differences
from helios.state import TrainingUnit

FIXTURES = pathlib.Path(__file__).parents[2] / "fixtures"


def model() -> dict[str, Any]:
    return {"0.weight": torch.arange(6.0).reshape(2, 3), "0.bias": torch.ones(2)}


def training() -> dict[str, Any]:
    """A value of each tag that needs nothing of the reader's own."""
    shared = torch.arange(4, dtype=torch.int16)
    return {
        "plain": [None, True, 1, -2.5, "text", {"key": []}],
        "tied": [shared, shared, shared[:2]],
        "dtypes": [torch.ones(2, dtype=torch.bfloat16), torch.ones((), dtype=bool)],
        "viewed": torch.tensor([[1 + 2j]], dtype=torch.complex128),
        "numbers": [2**70, -(2**63), float("nan"), float("-inf"), 1 - 2j],
        "bytes": b"\x00\xff",
        "sequences": [(1, (2,)), {1, 2}, frozenset([3]), torch.Size([4, 5])],
        "dicts": [
            {1: "a", (2, 3): "b", "$": 4},
            collections.OrderedDict(a=1),
            collections.Counter("aab"),
            collections.defaultdict(list, {5: [6]}),
        ],
        "deques": [collections.deque([1, 2], 3), range(1, 9, 3)],
        "paths": [pathlib.PurePosixPath("/a/b"), pathlib.PureWindowsPath("c:\\d")],
        "times": [
            datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC),
            datetime(2026, 1, 2, fold=1).time(),
            date(2026, 1, 2),
            timedelta(days=-1, microseconds=5),
        ],
        "enum": TrainingUnit.EPOCH,
        "torch": [torch.float16, torch.device("cuda:1")],
        "numpy": [np.arange(3, dtype=">i4"), np.float32(0.1), np.array(["ab", "c"])],
    }


PIECES = {"training.newest": [torch.arange(6.0)[:4].reshape(2, 2), torch.ones(1, 2)]}


def laid_out() -> dict[str, Any]:
    """What has its layout since format 2."""
    image = torch.arange(24.0).reshape(1, 2, 3, 4)
    return {"last": image.to(memory_format=torch.channels_last)}


@pytest.mark.parametrize("number", range(1, FORMAT + 1))
def test_fixture_of_each_format_is_read(number: int) -> None:
    folder = FIXTURES / f"format_{number}"
    assert find_damage(folder) == {}
    checkpoint = read_checkpoint(folder)
    assert checkpoint.record["format"] == number
    assert checkpoint.record["progress"] == {"current_iteration": 7}
    assert list(differences(model(), checkpoint.tree("model"), "model")) == []
    found = checkpoint.tree("training")
    assert list(differences(training(), found, "training")) == []
    assert found["tied"][0] is found["tied"][1]
    if number >= 3:
        assert checkpoint.tree("newest").equal(torch.cat(PIECES["training.newest"]))
    if number >= 2:
        newer = checkpoint.tree("newer", own=True)
        assert newer.pop("marked").equal(found["tied"][0])
        assert list(differences(laid_out(), newer, "newer")) == []
        assert newer["last"].stride() == laid_out()["last"].stride()


def write(root: pathlib.Path) -> None:
    encoder, store = Encoder(), CheckpointStore(root, max_shard_bytes=64)
    trees = {
        "model": encoder.encode(model(), file="model"),
        "training": encoder.encode(training(), file="training"),
    }
    trees["newer"] = newer = encoder.encode(laid_out(), file="training")
    # As if it had been on a GPU, which not every machine has.
    file, name = trees["training"]["tied"][0]["v"]
    newer["marked"] = {"$": "tensor", "v": [file, name, "cuda"]}
    # As if two ranks had shared it out.
    payload = ["training.newest", [3, 2], 0, "torch.float32"]
    trees["newest"] = {"$": "sharded", "v": payload}
    for rank in range(2):
        own = {name: [2 * rank, found[rank]] for name, found in PIECES.items()}
        file = f"rank_{rank}"
        trees[file] = encoder.encode({"shards": own}, file=file)
    folder, files = store.begin(f"format_{FORMAT}"), dict[str, Any]()
    for group, tensors in encoder.files.items():
        files |= store.write_group(folder, group, tensors, encoder.aliases[group])
    record = {"progress": {"current_iteration": 7}, "trees": trees, "files": files}
    store.commit(folder, f"format_{FORMAT}", record)


def test_present_format_is_written_as_in_its_fixture(tmp_path: pathlib.Path) -> None:
    write(tmp_path)
    ours, theirs = tmp_path / f"format_{FORMAT}", FIXTURES / f"format_{FORMAT}"
    assert {p.name for p in ours.iterdir()} == {p.name for p in theirs.iterdir()}
    for path in ours.glob("*.safetensors"):
        assert path.read_bytes() == (theirs / path.name).read_bytes()
    records = [read_checkpoint(path).record for path in (ours, theirs)]
    for record in records:
        del record["created"]
    assert records[0] == records[1]


if __name__ == "__main__":
    sys.exit(write(FIXTURES))
