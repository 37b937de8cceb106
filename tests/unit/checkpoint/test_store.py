import contextlib
import errno
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, load_model
from support.disk import Disk

from helios.bars import reading
from helios.checkpoint import (
    BackgroundWriter,
    Checkpoint,
    CheckpointStore,
    Encoder,
    find_damage,
    find_last_checkpoint,
    read_checkpoint,
    register_type,
)
from helios.checkpoint import records as records_module
from helios.checkpoint import store as store_module
from helios.checkpoint import tensors as tensors_module
from helios.checkpoint.records import FORMAT
from helios.differences import differences
from helios.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    UnstorableError,
)

FILES = ["model.safetensors", "training.safetensors", "helios.json"]


def weights(step: int) -> dict[str, Any]:
    return {"w": torch.arange(300.0) + step, "b": torch.full((5,), step)}


def save(store: CheckpointStore, name: str, step: int, /, **trees: Any) -> Path:
    """A checkpoint of these trees, each with a file of its name."""
    encoder = Encoder()
    plain = {file: encoder.encode(tree, file=file) for file, tree in trees.items()}
    folder = store.begin(name)
    files = dict[str, Any]()
    for file, tensors in encoder.files.items():
        files |= store.write_group(folder, file, tensors, encoder.aliases[file])
    record = {"trees": plain, "files": files, "progress": {"step": step}}
    return store.commit(folder, name, record)


def write(store: CheckpointStore, name: str, step: int) -> Path:
    training = [step, torch.ones(40) * step]
    return save(store, name, step, model=weights(step), training=training)


def prune(store: CheckpointStore, keep_last: int) -> None:
    for path in store.list()[keep_last:]:
        store.remove(path)


def step_of(path: Path | None) -> int:
    """Reads the checkpoint, checks all of it, and returns its step."""
    assert path is not None
    checkpoint = read_checkpoint(path)
    step = checkpoint.record["progress"]["step"]
    assert checkpoint.tree("training")[0] == step
    for name, tensor in checkpoint.tree("model").items():
        assert tensor.equal(weights(step)[name])
    assert isinstance(step, int)
    return step


def found(root: Path) -> int:
    reports: list[str] = []
    step = step_of(CheckpointStore(root).find_last(reports.append))
    assert reports == []
    return step


def unexpected(reason: str) -> None:
    raise AssertionError(reason)


# What is written.


def test_saved_trees_are_loaded_again(tmp_path: Path) -> None:
    tree = {"a": (1, torch.ones(2)), 3: [float("inf")], "e": torch.empty(0, 2)}
    tied = {"b": tree["a"][1], "array": np.arange(3.0)}  # type: ignore[index]
    path = save(CheckpointStore(tmp_path / "new"), "one", 1, x=tree, y=tied)
    checkpoint = read_checkpoint(str(path))
    got, other = checkpoint.tree("x"), checkpoint.tree("y")
    assert got["a"][1].equal(torch.ones(2))
    assert got["a"][1] is other["b"]
    assert got[3] == [float("inf")]
    assert got["e"].shape == (0, 2)
    got["a"][1].zero_()
    other["array"][:] = 0  # both may be written to


def test_what_json_would_misread_comes_back_from_the_disk(tmp_path: Path) -> None:
    pair = "\ud83d" + "\ude00"  # two characters, which JSON takes for one
    tree = {pair: pair, "\udcff": "\ud83d", "\U0001f600\0\n": ["$"], "n": 9**9999}
    path = save(CheckpointStore(tmp_path), "one", 1, x=tree)
    assert read_checkpoint(path).tree("x") == tree


def test_tensors_of_every_dtype_come_back_from_the_disk(tmp_path: Path) -> None:
    data = torch.arange(32, dtype=torch.uint8) % 2
    every = {str(v): v for v in vars(torch).values() if isinstance(v, torch.dtype)}
    tree, encoder = {}, Encoder()
    for name, dtype in every.items():
        with contextlib.suppress(UnstorableError, RuntimeError):
            encoder.encode(data.view(dtype), file="x")
            tree[name] = data.clone().view(dtype)
    path = save(CheckpointStore(tmp_path), "one", 1, x=tree)
    assert tree.keys() == every.keys()
    for name, tensor in read_checkpoint(path).tree("x").items():
        assert tensor.dtype is every[name]
        assert tensor.view(torch.uint8).equal(data)


def test_safetensors_reads_tensors_that_are_views(tmp_path: Path) -> None:
    data = torch.arange(24.0).reshape(4, 6)
    tree = {"t": data[::2].t(), "row": data[1], "none": data[:0], "one": data[0, 0]}
    tree |= {"wide": torch.ones(1).expand(3), "int8": torch.ones(3, dtype=torch.int8)}
    encoder = Encoder()
    encoder.encode(tree, file="f")
    store = CheckpointStore(tmp_path)
    folder = store.begin("x")
    store.write_group(folder, "f", BackgroundWriter().snapshot(encoder.files)["f"])
    store.write_group(folder, "empty", {})
    got = load_file(folder / "f.safetensors")
    assert got.keys() == tree.keys()
    assert all(got[name].equal(tensor) for name, tensor in tree.items())
    assert load_file(folder / "empty.safetensors") == {}


def test_files_can_be_read_by_whom_the_folder_can(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = write(CheckpointStore(tmp_path), "a", 1)
    finally:
        os.umask(before)
    assert {(path / file).stat().st_mode & 0o777 for file in FILES} == {0o640}


def test_untied_weights_are_loaded_without_helios(tmp_path: Path) -> None:
    net, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    path = save(CheckpointStore(tmp_path), "c", 1, model=net.state_dict())
    other.load_state_dict(load_file(path / "model.safetensors"))
    assert other.weight.equal(net.weight)


def test_tied_weights_are_stored_once_and_loaded_by_safetensors(tmp_path: Path) -> None:
    def tied() -> torch.nn.Module:
        layers = [torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)]
        layers[1].weight = layers[0].weight
        return torch.nn.Sequential(*layers)

    net, other = tied(), tied()
    path = save(CheckpointStore(tmp_path), "c", 1, model=net.state_dict())
    file = path / "model.safetensors"
    assert sorted(load_file(file)) == ["0.bias", "0.weight", "1.bias"]
    missing, unexpected = load_model(other, file)
    assert not missing
    assert not unexpected
    assert other.state_dict()["1.weight"].equal(net.state_dict()["0.weight"])
    state = read_checkpoint(path).tree("model")
    assert state["0.weight"] is state["1.weight"]
    assert b'"__metadata__":{"1.weight":"0.weight"}' in file.read_bytes()


def test_loaded_tensors_outlive_the_folder(tmp_path: Path) -> None:
    path = write(CheckpointStore(tmp_path), "a", 1)
    checkpoint = read_checkpoint(path)
    shutil.rmtree(path)
    assert checkpoint.tree("model")["w"].equal(weights(1)["w"])


def test_writing_to_loaded_tensors_leaves_the_checkpoint_as_it_is(
    tmp_path: Path,
) -> None:
    path = write(CheckpointStore(tmp_path), "a", 1)
    checkpoint = read_checkpoint(path)
    own = checkpoint.tree("training", own=True)[1]
    checkpoint.tree("training")[1].zero_()
    checkpoint.tree("model")["w"].zero_()
    assert own.eq(1).all()
    assert step_of(path) == 1


def test_own_tensors_that_were_one_stay_one(tmp_path: Path) -> None:
    shared = torch.ones(3)
    path = save(CheckpointStore(tmp_path), "a", 1, x={"a": shared, "b": [shared]})
    checkpoint = read_checkpoint(path)
    tree = checkpoint.tree("x", own=True)
    assert tree["a"] is tree["b"][0]
    assert tree["a"] is not checkpoint.tree("x")["a"]


class Halved:
    """What is computed with when it is loaded."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


@pytest.mark.parametrize("size", [4, 300])
def test_own_tensors_are_laid_out_as_they_were(tmp_path: Path, size: int) -> None:
    image = torch.rand(2, 3, size, size)
    last = image.to(memory_format=torch.channels_last)
    tree = {"last": last, "again": last, "t": image[0, 0].T, "cut": image[:, :, ::2]}
    checkpoint = read_checkpoint(save(CheckpointStore(tmp_path), "a", 1, x=tree))
    own = checkpoint.tree("x", own=True)
    assert own["last"] is own["again"]
    assert [own[name].stride() for name in tree] == [
        *(last.stride(), last.stride(), image[0, 0].T.stride()),
        torch.empty(2, 3, size // 2, size).stride(),
    ]
    for tree_of in (own, checkpoint.tree("x")):
        assert list(differences(tree, tree_of, "x")) == []


def test_own_tensors_large_and_small_are_copied_as_they_are(tmp_path: Path) -> None:
    tree = {n: torch.arange(float(n)) for n in (1, 1 << 18, 1 << 20)}
    tree |= {"number": np.float32(0.1), "text": np.str_("a" * (1 << 19))}
    tree["halved"] = Halved(torch.arange(float(1 << 21)))
    register_type(Halved, lambda v: v.value * 2, lambda v: Halved(v / 2))
    checkpoint = read_checkpoint(save(CheckpointStore(tmp_path), "a", 1, x=tree))
    with torch.inference_mode():
        own = checkpoint.tree("x", own=True)
    # A function of the user's looks at what it gets.
    own["halved"], tree["halved"] = own["halved"].value, tree["halved"].value
    assert list(differences(tree, own, "x")) == []
    tensors = [value for value in own.values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 4
    assert not any(tensor.is_inference() for tensor in tensors)
    mapped = {t.data_ptr() for t in checkpoint.tensors["x"].values()}
    assert not mapped & {own[n].data_ptr() for n in (1, 1 << 18, 1 << 20)}


def below(*place: str) -> Callable[[tuple[str | int, ...]], bool]:
    return lambda path: path[: len(place)] == place


def test_tensors_that_are_copied_anyway_stay_in_the_file(tmp_path: Path) -> None:
    tree = {"model": {"net": {"w": torch.ones(3)}, "user": torch.ones(4)}}
    checkpoint = read_checkpoint(save(CheckpointStore(tmp_path), "a", 1, x=tree))
    got = checkpoint.tree("x", own=True, copied=below("model", "net"))["model"]
    mapped = {t.data_ptr() for t in checkpoint.tensors["x"].values()}
    assert got["net"]["w"].data_ptr() in mapped
    assert got["user"].data_ptr() not in mapped


@pytest.mark.parametrize("own", [True, False])
def test_what_was_on_a_device_goes_to_the_one_there_is(own: bool) -> None:
    names = {"a": "one", "b": "one", "net": "one", "c": "two"}
    tree = {key: {"$": "tensor", "v": ["x", n, "cuda"]} for key, n in names.items()}
    tree["c"]["v"] = ["x", "two"]
    tensors = {"x": {"one": torch.ones(3), "two": torch.ones(2)}}
    checkpoint = Checkpoint(Path(), {"trees": {"x": tree}}, tensors)
    there = torch.device("meta")
    got = checkpoint.tree("x", own=own, device=there, copied=below("net"))
    assert got["a"].device == there
    assert got["a"] is got["b"]
    assert got["c"].device.type == got["net"].device.type == "cpu"
    for device in (None, torch.device("cpu")):
        got = checkpoint.tree("x", own=own, device=device)
        assert got["a"].equal(torch.ones(3))
        assert got["a"] is got["b"]


def test_a_group_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = write(CheckpointStore(tmp_path), "a", 1)
    with pytest.raises(CheckpointError, match="no 'rank_9'"):
        read_checkpoint(path).tree("rank_9")


def test_the_record_says_what_was_saved(tmp_path: Path) -> None:
    path = write(CheckpointStore(tmp_path), "a", 7)
    record = json.loads((path / "helios.json").read_text())["record"]
    assert record["format"] == FORMAT
    assert record["progress"] == {"step": 7}
    assert abs(datetime.now(UTC) - datetime.fromisoformat(record["created"])) < (
        timedelta(minutes=1)
    )
    assert {
        file: {"group": file.partition(".")[0], **entry_of((path / file).read_bytes())}
        for file in FILES[:2]
    } == record["files"]


# Finding, order, retention.


def test_the_order_is_that_of_saving_whatever_names_and_clock_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime):
        now_is = datetime(2031, 1, 1, tzinfo=UTC)

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls.now_is

    monkeypatch.setattr(store_module, "datetime", Clock)
    for step, name in enumerate("zay"):
        write(CheckpointStore(tmp_path), name, step)  # a process of its own each
        Clock.now_is -= timedelta(days=400)
    paths = CheckpointStore(tmp_path).list()
    assert [path.name for path in paths] == ["y", "a", "z"]
    assert found(tmp_path) == 2


def test_folders_that_are_no_checkpoints_are_not_listed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "root")
    assert store.list() == []
    assert store.find_last(unexpected) is None
    path = write(store, "a", 1)
    (tmp_path / "root" / "logs").mkdir()
    (tmp_path / "root" / "file").touch()
    shutil.copytree(path, tmp_path / "root" / ".hidden")
    (tmp_path / "root" / "latest").symlink_to(path)
    assert store.list() == [path]
    with pytest.raises(CheckpointNotFoundError):
        read_checkpoint(tmp_path / "root" / "logs")
    with pytest.raises(CheckpointNotFoundError):
        read_checkpoint(tmp_path / "absent")


def test_the_last_is_found_below_the_root_too(tmp_path: Path) -> None:
    assert find_last_checkpoint(tmp_path) is None
    write(CheckpointStore(tmp_path / "b"), "x", 1)
    write(CheckpointStore(tmp_path), "here", 2)
    last = write(CheckpointStore(tmp_path / "a"), "x", 3)
    assert find_last_checkpoint(tmp_path) == last
    (last / "model.safetensors").unlink()
    assert find_last_checkpoint(tmp_path) == tmp_path / "here"


def test_damaged_newer_checkpoints_are_passed_over_with_the_reason(
    tmp_path: Path,
) -> None:
    store = CheckpointStore(tmp_path)
    for step in range(5):
        write(store, f"c{step}", step)
    (tmp_path / "c4" / "helios.json").unlink()
    (tmp_path / "c3" / "helios.json").write_text("{}")
    with open(tmp_path / "c2" / "model.safetensors", "ab") as file:
        file.write(b"x")
    reports: list[str] = []
    assert step_of(store.find_last(reports.append)) == 1
    assert len(reports) == 3
    assert "c3/helios.json: it is truncated or altered" in reports[0]
    assert "c4/helios.json: [Errno 2] No such file" in reports[1]
    assert "c2/model.safetensors: it is truncated or altered" in reports[2]
    assert [path.name for path in store.list()] == ["c2", "c1", "c0"]


def test_prune_keeps_the_newest_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in range(5):
        write(store, f"c{step}", step)
    prune(store, 2)
    assert sorted(os.listdir(tmp_path)) == ["c3", "c4"]
    for _ in range(2):
        prune(store, 1)
        assert os.listdir(tmp_path) == ["c4"]
    assert found(tmp_path) == 4


def test_prune_leaves_alone_what_it_cannot_read(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in range(4):
        write(store, f"c{step}", step)
    (tmp_path / "c0" / "helios.json").write_text("")
    (tmp_path / "logs").mkdir()
    prune(store, 1)
    assert sorted(os.listdir(tmp_path)) == ["c0", "c3", "logs"]


def test_a_link_to_the_newest_one_is_not_counted_and_not_followed(
    tmp_path: Path,
) -> None:
    store = CheckpointStore(tmp_path)
    write(store, "a", 1)
    (tmp_path / "latest").symlink_to(write(store, "b", 2))
    prune(store, 1)
    assert sorted(os.listdir(tmp_path)) == ["b", "latest"]
    assert found(tmp_path) == step_of(tmp_path / "latest") == 2


def test_a_checkpoint_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, "a", 1)
    write(store, "a", 2)
    assert os.listdir(tmp_path) == ["a"]
    assert found(tmp_path) == 2


# Writers that died.


def test_the_litter_of_dead_writers_is_removed_and_nothing_else(tmp_path: Path) -> None:
    names = [".helios-0123", "a.replaced", "gone.replaced", ".git", "a"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    folder = CheckpointStore(tmp_path).begin("b")
    kept = {"gone.replaced", ".git", "a"}
    assert set(os.listdir(tmp_path)) == {*kept, folder.name}


class Crash(BaseException):
    """The process ends here: nothing may catch it."""


def with_disk(
    monkeypatch: pytest.MonkeyPatch, disk: Disk, run: Callable[[], Any]
) -> bool:
    """Whether `run` came to its end."""
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "os", disk)
        patch.setattr(store_module, "shutil", disk)
        patch.setattr(store_module, "open", disk.open_file, raising=False)
        try:
            run()
        except (Crash, OSError):
            return False
    return True


def test_a_save_syncs_every_file_before_the_record_and_the_record_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(0, Crash())
    store = CheckpointStore(tmp_path / "new")
    assert with_disk(monkeypatch, disk, lambda: write(store, "a", 1))
    assert disk.log == [
        *("makedirs", "mkdir"),
        "create model.safetensors",
        *["write model.safetensors"] * 3,  # the header, and two tensors
        *("fsync", "create training.safetensors"),
        *["write training.safetensors"] * 2,
        "fsync",
        *("create helios.json", "write helios.json", "fsync", "open", "fsync"),
        *("rename", "open", "fsync"),
    ]
    replacing = Disk(0, Crash())
    assert with_disk(monkeypatch, replacing, lambda: write(store, "a", 2))
    removal = ["rename", "rmtree"]
    assert replacing.log[-6:] == ["rename", "rename", "open", "fsync", *removal]


@pytest.mark.parametrize(
    "error", [Crash(), OSError(errno.ENOSPC, "disk full")], ids=repr
)
@pytest.mark.parametrize("name", ["new", "same"])
def test_a_crash_at_any_operation_of_a_save_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, name: str
) -> None:
    fail_at, has_ended = 0, False
    outcomes = set()
    while not has_ended:
        fail_at += 1
        root = tmp_path / str(fail_at)
        write(CheckpointStore(root), "same", 1)
        disk = Disk(fail_at, error)
        store = CheckpointStore(root)

        def run(store: CheckpointStore = store) -> None:
            write(store, name, 2)
            prune(store, 1)

        has_ended = with_disk(monkeypatch, disk, run)
        step = found(root)
        assert step == 2 if has_ended else step in (1, 2)
        outcomes.add(step)
        # After a crash another process goes on, after an error the same one does.
        write(store if isinstance(error, OSError) else CheckpointStore(root), name, 3)
        assert found(root) == 3
        assert {path.name for path in root.iterdir()} <= {"same", "new"}
    assert outcomes == {1, 2}
    assert fail_at > 18


def test_a_crash_at_any_operation_of_a_change_of_the_record_leaves_one_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at, has_ended = 0, False
    store = CheckpointStore(tmp_path)
    path = write(store, "a", 1)
    created = store.records()[path]["created"]
    outcomes = []
    while not has_ended:
        fail_at += 1
        disk = Disk(fail_at, Crash())
        has_ended = with_disk(monkeypatch, disk, lambda: store.amend(path, mark=True))
        assert find_damage(path) == {}
        record = store.records()[path]
        assert (record["created"], found(tmp_path)) == (created, 1)
        outcomes.append(record.get("mark", False))
        if not has_ended:
            store.amend(path, mark=False)
    assert outcomes == [False] * 4 + [True] * 3


def test_two_crashes_in_a_row_while_replacing_leave_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash_at(root: Path, step: int, fail_at: int) -> bool:
        disk = Disk(fail_at, Crash())
        store = CheckpointStore(root)
        return not with_disk(monkeypatch, disk, lambda: write(store, "a", step))

    first, total = 13, 0  # from before the record's folder is synced
    while True:
        for second in range(1, 99):
            root = tmp_path / f"{first}-{second}"
            write(CheckpointStore(root), "a", 1)
            if not crash_at(root, 2, first):
                assert total > 100
                return
            has_crashed = crash_at(root, 3, second)
            step = step_of(CheckpointStore(root).find_last())
            assert step in (1, 2, 3) if has_crashed else step == 3
            write(CheckpointStore(root), "a", 4)
            assert found(root) == 4
            assert os.listdir(root) == ["a"]
            total += 1
            if not has_crashed:
                break
        first += 1


SAVE_FOREVER = """
import os, signal, sys, time, random
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from test_store import CheckpointStore, found, write

root, last = Path(sys.argv[1]), 0
random.seed(0)
write(CheckpointStore(root), "c0", 0)
for _ in range(int(sys.argv[3])):
    receive, send = os.pipe()
    pid = os.fork()
    if not pid:
        store = CheckpointStore(root)
        while True:
            last += 1
            write(store, f"c{last % 3}", last)
            os.write(send, last.to_bytes(4, "little"))
            prune(store, 2)
    os.close(send)
    last = int.from_bytes(os.read(receive, 4), "little")
    time.sleep(random.random() * 0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with os.fdopen(receive, "rb") as pipe:
        acknowledged = pipe.read()
    if acknowledged:
        last = int.from_bytes(acknowledged[-4:], "little")
    assert found(root) in (last, last + 1), (found(root), last)
    last = found(root)
write(CheckpointStore(root), "c0", last + 1)
assert not [path for path in root.iterdir() if path.name.startswith(".")]
print("killed", sys.argv[3])
"""


@pytest.mark.parametrize("count", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_a_writer_killed_at_any_moment_leaves_what_it_acknowledged(
    tmp_path: Path, count: int
) -> None:
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", SAVE_FOREVER, str(tmp_path), str(here), str(count)],
        cwd=here.parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"killed {count}\n"


# Shards.


def test_shards_are_those_of_the_hub(tmp_path: Path) -> None:
    tree = {f"layer.{n}": torch.full((10,), float(n)) for n in range(5)}
    tree["wide"] = torch.arange(90.0)
    tree["tied"] = tree["layer.4"]
    path = save(CheckpointStore(tmp_path, max_shard_bytes=100), "a", 1, model=tree)
    files = [f"model-{n:05}-of-00004.safetensors" for n in range(1, 5)]
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert sorted(os.listdir(path)) == [
        *("helios.json", *files, "model.safetensors.index.json")
    ]
    assert index["metadata"] == {"total_size": 5 * 40 + 360}
    loaded = {}
    for file in files:
        part = load_file(path / file)
        assert [index["weight_map"][name] for name in part] == [file] * len(part)
        loaded |= part
    assert [len(load_file(path / file)) for file in files] == [2, 2, 1, 1]
    assert loaded.keys() == tree.keys() - {"tied"}
    got = read_checkpoint(path).tree("model")
    assert all(got[name].equal(tensor) for name, tensor in tree.items())
    assert got["tied"] is got["layer.4"]


def test_damage_of_any_shard_is_found_and_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, max_shard_bytes=100)
    path = write(store, "a", 1)
    assert find_damage(path) == {}
    names = sorted(set(os.listdir(path)) - {"helios.json"})
    assert len(names) == 4
    whole = {name: (path / name).read_bytes() for name in names}
    damaged = {name: data[:-1] + bytes([data[-1] ^ 1]) for name, data in whole.items()}
    for name in names:
        (path / name).write_bytes(damaged[name])
        assert_noticed(path, name, "it is altered, between the bytes 0 and")
        (path / name).write_bytes(whole[name])
    for name in names[1:]:
        (path / name).write_bytes(damaged[name])
    assert find_damage(path).keys() == {*names[1:]}


def test_a_file_of_many_chunks_is_verified_chunk_by_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors_module, "CHUNK_BYTES", 128)
    path = write(CheckpointStore(tmp_path), "a", 1)
    record = json.loads((path / "helios.json").read_text())["record"]
    entry = record["files"]["model.safetensors"]
    data = (path / "model.safetensors").read_bytes()
    chunks = [data[start : start + 128] for start in range(0, len(data), 128)]
    assert entry["crc32"] == [f"{zlib.crc32(chunk):08x}" for chunk in chunks]
    assert step_of(path) == 1
    for number in range(len(chunks)):
        altered = bytearray(data)
        altered[128 * number] ^= 1
        (path / "model.safetensors").write_bytes(altered)
        where = f"between the bytes {128 * number} and {128 * number + 128}"
        assert_noticed(path, "model.safetensors", where)


def test_a_record_too_large_to_be_read_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    write(store, "a", 1)
    for limit, tree in (
        ("MAX_RECORD_BYTES", list(range(10_000))),
        ("_MAX_OBJECTS", []),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(records_module, limit, 10_000)
            with pytest.raises(CheckpointError, match="keep long lists of numbers as"):
                save(store, "b", 2, x=tree or [[] for _ in range(10_000)])
    assert found(tmp_path) == 1


# Damage.


def assert_noticed(path: Path, *named: str) -> None:
    with pytest.raises(CheckpointCorruptError) as caught:
        read_checkpoint(path)
    for text in named:
        assert text in str(caught.value)


def test_every_flipped_byte_of_the_record_is_noticed(tmp_path: Path) -> None:
    path = write(CheckpointStore(tmp_path), "a", 1)
    data = (path / "helios.json").read_bytes()
    for index in range(len(data)):
        for mask in (1, 0x20, 0x80):
            altered = bytearray(data)
            altered[index] ^= mask
            (path / "helios.json").write_bytes(altered)
            with pytest.raises(CheckpointCorruptError, match=r"helios\.json"):
                read_checkpoint(path)
    (path / "helios.json").write_bytes(data)
    assert step_of(path) == 1


@pytest.mark.parametrize("file", FILES)
def test_truncated_extended_and_missing_files_are_named(
    tmp_path: Path, file: str
) -> None:
    path = write(CheckpointStore(tmp_path), "a", 1)
    data = (path / file).read_bytes()
    for part in range(20):
        (path / file).write_bytes(data[: part * len(data) // 20])
        assert_noticed(path, file)
    (path / file).write_bytes(data[:-1])
    assert_noticed(path, file)
    (path / file).write_bytes(data + b"\n")
    assert_noticed(path, file)
    (path / file).unlink()
    assert_noticed(path, file, "No such file")


@pytest.mark.parametrize("file", FILES[:2])
def test_flipped_bits_of_tensors_and_headers_are_named(
    tmp_path: Path, file: str
) -> None:
    path = write(CheckpointStore(tmp_path), "a", 1)
    data = (path / file).read_bytes()
    for index in [*range(0, 200, 3), *range(200, len(data), 37), len(data) - 1]:
        altered = bytearray(data)
        altered[index] ^= 1 << index % 8
        (path / file).write_bytes(altered)
        assert_noticed(path, file)


def entry_of(data: bytes) -> dict[str, Any]:
    """What a record says of a small file."""
    sums = [f"{zlib.crc32(data):08x}"] if data else []
    return {"size_bytes": len(data), "crc32": sums}


def crafted(root: Path, files: dict[str, bytes], /, **changes: Any) -> Path:
    """A checkpoint with right checksums, whatever its files hold."""
    path = root / "crafted"
    path.mkdir(parents=True, exist_ok=True)
    entries = {
        name: {"group": name.partition(".")[0], **entry_of(data)}
        for name, data in files.items()
    }
    for name, data in files.items():
        (path / Path(name).name).write_bytes(data)
    record = {"format": 1, "created": datetime.now(UTC).isoformat(), "progress": {}}
    record |= {"trees": {}, "files": entries, **changes}
    body = json.dumps(record)
    head = f'{{"checksum": "crc32:{zlib.crc32(body.encode()):08x}", "record": '
    (path / "helios.json").write_text(f"{head}{body}}}\n")
    return path


EMPTY = b"\x08\0\0\0\0\0\0\0{}      "


@pytest.mark.parametrize(
    "changes",
    [
        {"identity": []},
        {"identity": None},
        {"metrics": None},
        {"metrics": "text"},
        {"metrics": {"loss": "text"}},
        {"metrics": {"loss": []}},
        {"metrics": {"loss": 10**400}},
        {"files": {"model.safetensors": 5}},
        {"files": {"model.safetensors": {"group": "model", "crc32": []}}},
        {"files": {"a.safetensors": {"size_bytes": 8, "crc32": [], "group": []}}},
        {"passed_over": 5},
        {"passed_over": ["a", 5]},
        {"imported": 5},
        {"imported": {"from": "Accelerate", "unknown": 5}},
        {"progress": {"current_iteration": "3"}},
        {"progress": {"global_epoch": None}},
        {"progress": {"epoch_stage": 1}},
        {"created": "9999-12-31T23:59:59.999999"},
    ],
)
def test_values_that_no_run_writes_are_refused_and_passed_over(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = crafted(tmp_path, {}, **changes)
    with pytest.raises(CheckpointCorruptError):
        read_checkpoint(path)
    store = CheckpointStore(tmp_path)
    assert write(store, "new", 1) == store.find_last()
    assert store.list() == [tmp_path / "new"]


def test_what_is_optional_in_a_record_may_be_missing(tmp_path: Path) -> None:
    record = read_checkpoint(crafted(tmp_path, {})).record
    assert record["identity"] == record["metrics"] == {}


def test_a_time_without_zone_is_taken_for_utc(tmp_path: Path) -> None:
    path = crafted(tmp_path, {}, created="2199-01-01")
    new = write(CheckpointStore(tmp_path), "new", 1)
    assert CheckpointStore(tmp_path).list() == [new, path]


def test_a_crafted_record_that_is_right_is_read(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(crafted(tmp_path, {"x.safetensors": EMPTY}))
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.tensors == {"x": {}}


NAMES = ["../a", "/a", "..", ".", "", "a/b", "a\0", "./a"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_files_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(EMPTY)
    (tmp_path / "crafted" / "a").mkdir(parents=True)
    (tmp_path / "crafted" / "a" / "b.safetensors").write_bytes(EMPTY)
    entry = {"group": "a", **entry_of(EMPTY)}
    for suffix in ("", ".safetensors"):
        path = crafted(tmp_path, {}, files={f"{name}{suffix}": entry})
        with pytest.raises(CheckpointCorruptError):
            read_checkpoint(path)


@pytest.mark.parametrize("name", [*NAMES, ".hidden", "a.replaced", "a/"])
def test_names_that_are_not_of_a_folder_here_are_refused(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(ValueError, match=r"^`name` must be"):
        CheckpointStore(tmp_path / "store").begin(name)
    assert not (tmp_path / "store").exists()


DTYPES = ["F4", "F99"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_that_safetensors_cannot_give_are_corrupt(
    tmp_path: Path, dtype: str
) -> None:
    header = f'{{"a":{{"dtype":"{dtype}","shape":[4],"data_offsets":[0,4]}}}}'.encode()
    data = len(header).to_bytes(8, "little") + header + b"abcd"
    for content in (data, b"", b"abc"):
        path = crafted(tmp_path, {"x.safetensors": content})
        assert_noticed(path, "x.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {"files": []},
        {"files": {"a.safetensors": {}}},
        {"files": {"a.safetensors": {"size_bytes": True, "crc32": []}}},
        {"files": {"a.safetensors": {"size_bytes": "1", "crc32": [""]}}},
        {"trees": []},
        {"progress": None},
        {"created": 5},
        {"created": "yesterday"},
        {"created": None},
        {"files": {"a.safetensors": 1}},
    ],
)
def test_crafted_records_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    write(CheckpointStore(tmp_path), "a", 1)
    path = crafted(tmp_path, {}, **changes)
    with pytest.raises(CheckpointCorruptError, match=r"crafted/(helios\.json|a\.safe)"):
        read_checkpoint(path)
    reports: list[str] = []
    assert step_of(CheckpointStore(tmp_path).find_last(reports.append)) == 1
    assert len(reports) == 1
    write(CheckpointStore(tmp_path), "b", 2)


@pytest.mark.parametrize("what", ["open", "safe_open"])
def test_a_disk_that_cannot_be_read_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    store = CheckpointStore(tmp_path)
    write(store, "a", 1)
    bad = write(store, "b", 2)
    real = getattr(tensors_module, what, open)

    def failing(path: Path, *args: Any, **options: Any) -> Any:
        if bad in Path(path).parents:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *args, **options)

    monkeypatch.setattr(tensors_module, what, failing, raising=False)
    reports: list[str] = []
    assert step_of(store.find_last(reports.append)) == 1
    assert "model.safetensors: [Errno 5] Input/output error" in reports[0]


def test_a_link_to_nothing_is_passed_over_with_a_bar_too(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, "a", 1)
    file = write(store, "b", 2) / "model.safetensors"
    file.unlink()
    file.symlink_to(tmp_path / "gone")
    reports: list[str] = []
    assert step_of(store.find_last(reports.append, reading)) == 1
    assert "it is no plain file" in reports[0]


@pytest.mark.parametrize("file", ["x.safetensors", "helios.json"])
def test_a_link_in_place_of_a_file_is_noticed(tmp_path: Path, file: str) -> None:
    path = crafted(tmp_path, {"x.safetensors": EMPTY})
    (path / file).rename(tmp_path / file)
    (path / file).symlink_to(tmp_path / file)
    assert_noticed(path, file, "it is no plain file")
    (path / file).unlink()
    os.mkfifo(path / file)  # to open it would wait for ever
    assert_noticed(path, file, "it is no plain file")


def test_a_header_that_claims_to_be_huge_is_corrupt(tmp_path: Path) -> None:
    for size in (2**63, 2**40, 101 * 2**20):
        data = size.to_bytes(8, "little") + b"{}"
        assert_noticed(crafted(tmp_path, {"x.safetensors": data}), "x.safetensors")


@pytest.mark.parametrize("file", ["x.safetensors", "helios.json"])
def test_a_folder_in_place_of_a_file_is_noticed(tmp_path: Path, file: str) -> None:
    path = crafted(tmp_path, {"x.safetensors": EMPTY})
    (path / file).unlink()
    (path / file).mkdir()
    assert_noticed(path, file, "it is no plain file")


class Evil:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("file", ["x.safetensors", "helios.json", "model.bin"])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_pickle_in_any_place_is_not_read(
    tmp_path: Path, file: str, form: str
) -> None:
    evil = Evil(tmp_path / "made")
    content = io.BytesIO()
    torch.save(evil, content) if form == "torch" else pickle.dump(evil, content)
    if file == "helios.json":
        path = crafted(tmp_path, {"x.safetensors": EMPTY})
        (path / file).write_bytes(content.getvalue())
        assert_noticed(path, file)
    elif file == "model.bin":  # beside the others, and with a checksum that is right
        path = crafted(tmp_path, {"x.safetensors": EMPTY, file: content.getvalue()})
        assert read_checkpoint(path).tensors == {"x": {}}
    else:
        assert_noticed(crafted(tmp_path, {file: content.getvalue()}), file)
    assert not (tmp_path / "made").exists()


def test_a_record_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = write(CheckpointStore(tmp_path), "a", 1)
    with open(path / "helios.json", "r+b") as out:  # it takes no room on the disk
        out.truncate((1 << 26) + 101)
    assert_noticed(path, "helios.json", "too large")


def test_the_first_damage_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.mkdir()
    with open(path / "x.safetensors", "wb") as out:  # 128 GiB, which take no room
        out.truncate(1 << 37)
    for count, why in ((2048, "altered, between"), (0, "0 checksums are not")):
        entry = {"group": "x", "size_bytes": 1 << 37, "crc32": ["0" * 8] * count}
        record = {"progress": {}, "trees": {}, "files": {"x.safetensors": entry}}
        record |= {"format": FORMAT, "created": datetime.now(UTC)}
        (path / "helios.json").unlink(missing_ok=True)
        store_module._write_record(path / "helios.json", record)
        began = time.monotonic()
        with pytest.raises(CheckpointCorruptError, match=why):
            read_checkpoint(path)
        assert time.monotonic() - began < 5


def shared_out(root: Path, **changes: Any) -> Path:
    """A checkpoint of a tensor of two ranks, which stands in two places of a tree."""
    encoder = Encoder()
    node = {"$": "sharded", "v": ["x", [3], 0, "torch.float32"]}
    trees: dict[str, Any] = {"model": [node, node]}
    for rank in range(2):
        own = {"shards": {"x": [2 * rank, torch.full((2 - rank,), rank)]}}
        own["shards"]["x"][1] = own["shards"]["x"][1].float()
        trees[f"rank_{rank}"] = encoder.encode(own, file=f"rank_{rank}")
    store = CheckpointStore(root)
    folder, files = store.begin("a"), dict[str, Any]()
    for group, tensors in encoder.files.items():
        files |= store.write_group(folder, group, tensors)
    record = {"trees": {**trees, **changes}, "files": files, "progress": {}}
    return store.commit(folder, "a", record)


def test_a_tensor_of_several_ranks_is_joined_once(tmp_path: Path) -> None:
    one, other = read_checkpoint(shared_out(tmp_path)).tree("model")
    assert one.tolist() == [0, 0, 1]
    assert one is other  # a hostile tree may name it a million times


def test_a_piece_that_stands_for_many_takes_no_memory(tmp_path: Path) -> None:
    encoder, store = Encoder(), CheckpointStore(tmp_path)
    piece, names = [0, torch.zeros(1000)], [f"x{i}" for i in range(50)]
    own = {"shards": dict.fromkeys(names, piece)}
    trees: dict[str, Any] = {"rank_0": encoder.encode(own, file="rank_0")}
    trees["model"] = [
        {"$": "sharded", "v": [name, [1000], 0, "torch.float32"]} for name in names
    ]
    folder = store.begin("a")
    files = store.write_group(folder, "rank_0", encoder.files["rank_0"])
    path = store.commit(folder, "a", {"trees": trees, "files": files, "progress": {}})
    with pytest.raises(CheckpointCorruptError, match="pieces that are in no file"):
        read_checkpoint(path).tree("model")


@pytest.mark.parametrize("shards", [[1], "x", 3, {"x": 5}, {"x": [0]}, {"x": [0, "y"]}])
def test_pieces_that_are_none_are_corrupt(tmp_path: Path, shards: Any) -> None:
    path = shared_out(tmp_path, rank_1={"shards": shards})
    with pytest.raises(CheckpointCorruptError):
        read_checkpoint(path).tree("model")


def test_a_record_nested_without_end_is_corrupt(tmp_path: Path) -> None:
    bomb = '{"a":' * 200_000 + "1" + "}" * 200_000
    path = tmp_path / "bomb"
    path.mkdir()
    head = f'{{"checksum": "crc32:{zlib.crc32(bomb.encode()):08x}", "record": '
    (path / "helios.json").write_text(f"{head}{bomb}}}\n")
    assert_noticed(path, "helios.json", "recursion")


def test_a_record_that_would_take_all_memory_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    path.mkdir()
    body = b'{"trees": [%s[]]}' % (b"[]," * 20_000_000)  # 2 GB once it is read
    head = b'{"checksum": "crc32:%08x", "record": ' % zlib.crc32(body)
    (path / "helios.json").write_bytes(head + body + b"}\n")
    tracemalloc.start()
    began = time.monotonic()
    assert_noticed(path, "helios.json", "20000003 dicts and lists; it may have")
    assert time.monotonic() - began < 10
    assert tracemalloc.get_traced_memory()[1] < 5 * len(body)
    tracemalloc.stop()


def test_a_later_format_is_refused_and_passed_over(tmp_path: Path) -> None:
    write(CheckpointStore(tmp_path), "a", 1)
    path = crafted(tmp_path, {}, format=FORMAT + 1)
    with pytest.raises(CheckpointError, match=f"has format {FORMAT + 1}, and {FORMAT}"):
        read_checkpoint(path)
    reports: list[str] = []
    assert step_of(CheckpointStore(tmp_path).find_last(reports.append)) == 1
    assert f"format {FORMAT + 1}" in reports[0]


def test_a_tree_that_names_an_absent_tensor_is_corrupt(tmp_path: Path) -> None:
    path = crafted(tmp_path, {}, trees={"model": {"$": "tensor", "v": ["x", "y"]}})
    with pytest.raises(CheckpointCorruptError, match="is malformed: KeyError"):
        read_checkpoint(path).tree("model")
