"""Trees that are saved without a run: whole, verified, and in place of older ones."""

import math
import os

import pytest
import torch

from helios.checkpoint import CheckpointStore, load, save, store
from helios.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    UnstorableError,
)


def tree(value=1):
    shared = torch.arange(4.0) * value
    return {
        "weights": {"a": shared, "tied": shared},
        7: [math.inf, None, ("x", b"y")],
        "optimizer": {"state": {0: {"step": torch.tensor(value)}}},
    }


def same(one, other):
    assert one.keys() == other.keys()
    assert torch.equal(one["weights"]["a"], other["weights"]["a"])
    assert one["weights"]["tied"] is one["weights"]["a"]
    assert one[7] == other[7]
    assert one["optimizer"]["state"][0] == other["optimizer"]["state"][0]
    return True


def test_tree_comes_back_as_it_was_and_replaces_an_older_one(tmp_path):
    for value in (1, 2):
        save(tmp_path / "folder" / "tree", tree(value))
        assert same(load(str(tmp_path / "folder" / "tree")), tree(value))
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["tree"]


@pytest.mark.parametrize("operation", ["rename", "fsync", "open"])
def test_save_that_is_cut_off_anywhere_leaves_the_older_tree(
    tmp_path, monkeypatch, operation
):
    class CutOff(BaseException):
        pass

    path = tmp_path / "tree"
    real, calls, most = getattr(store.os, operation), 0, None

    def failing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == most:
            raise CutOff
        return real(*args, **kwargs)

    monkeypatch.setattr(store.os, operation, failing)
    save(path, tree(1))
    save(path, tree(1))
    count = calls // 2 + 1
    assert count > 1
    for most in range(1, count + 1):
        calls = 0
        try:
            save(path, tree(2))
        except CutOff:
            found = load(path)["weights"]["a"]
            assert torch.equal(found, tree(1)["weights"]["a"]) or torch.equal(
                found, tree(2)["weights"]["a"]
            )
        most = None
        save(path, tree(1))
        assert same(load(path), tree(1))
        assert not {"tree.replaced", ".tree.partial"} & set(os.listdir(tmp_path))


def test_store_of_a_run_in_the_same_folder_is_left_in_peace(tmp_path):
    begun = CheckpointStore(tmp_path).begin("run_epoch_1")
    save(tmp_path / "tree", tree())
    assert begun.is_dir()


def test_what_cannot_be_stored_or_loaded_is_an_error_that_says_so(tmp_path):
    path = tmp_path / "tree"
    with pytest.raises(UnstorableError, match=r"hooks\[0\]"):
        save(path, {"hooks": [print]})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointNotFoundError, match="is not the folder"):
        load(path)
    save(path, tree())
    file = path / "tree.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointCorruptError, match=r"tree\.safetensors"):
        load(path)
    own = tmp_path / "own"
    own.mkdir()
    (own / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not the folder of a checkpoint"):
        save(own, tree())
    assert (own / "notes.txt").read_text() == "mine"
