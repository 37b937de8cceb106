import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model

from helios.checkpoint import (
    Checkpoint,
    CheckpointStore,
    Encoder,
    find_last_checkpoint,
    load,
    read_checkpoint,
    save,
)
from helios.checkpoint import reader as reader_module
from helios.checkpoint import store as store_module
from helios.checkpoint.tensorfile import CODES, pack, unpack
from helios.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    UnstorableError,
)

FILES = ["model.safetensors", "training.safetensors", "helios.json"]


def weights(step: int) -> dict[str, Any]:
    return {"w": torch.arange(300.0) + step, "b": torch.full((5,), step)}


def write(store: CheckpointStore, name: str, step: int) -> Path:
    encoder = Encoder()
    trees = {
        "model": encoder.encode(weights(step), file="model"),
        "training": encoder.encode([step, torch.ones(40) * step], file="training"),
    }
    folder = store.begin(name)
    files = {
        file: store.write_file(folder, file, tensors, encoder.aliases[file])
        for file, tensors in encoder.files.items()
    }
    record = {"trees": trees, "files": files, "progress": {"step": step}}
    return store.commit(folder, name, record)


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


def test_a_saved_tree_is_loaded_again(tmp_path: Path) -> None:
    tree = {"a": (1, torch.ones(2)), 3: [float("inf")]}
    got = load(save(tmp_path / "new" / "one", tree))
    assert got["a"][1].equal(torch.ones(2))
    assert got[3] == [float("inf")]


def test_an_unstorable_tree_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UnstorableError):
        save(tmp_path / "one", print)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_safetensors_reads_every_dtype_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    data = (torch.arange(6 * 4 * dtype.itemsize) % 2).to(torch.uint8).view(dtype)
    tensors = {"m": data.reshape(6, 4)[::2].t(), "s": data[1], "e": data[:0]}
    tensors |= {"odd": torch.ones(3, dtype=torch.int8), "z": torch.zeros(1).double()}
    store = CheckpointStore(tmp_path)
    folder = store.begin("x")
    store.write_file(folder, "f", tensors, {"key": "value"})
    got = load_file(folder / "f.safetensors")
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
        bits = [
            t.contiguous().reshape(-1).view(torch.uint8) for t in (got[name], tensor)
        ]
        assert bits[0].equal(bits[1])


def test_safetensors_reads_files_without_tensors(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    folder = store.begin("x")
    store.write_file(folder, "f", {})
    assert load_file(folder / "f.safetensors") == {}


def test_untied_weights_are_loaded_without_helios(tmp_path: Path) -> None:
    net, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    path = save(tmp_path / "c", net.state_dict())
    other.load_state_dict(load_file(path / "tensors.safetensors"))
    assert other.weight.equal(net.weight)


def test_tied_weights_are_stored_once_and_loaded_by_safetensors(tmp_path: Path) -> None:
    def tied() -> torch.nn.Module:
        layers = [torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)]
        layers[1].weight = layers[0].weight
        return torch.nn.Sequential(*layers)

    net, other = tied(), tied()
    path = save(tmp_path / "c", net.state_dict())
    file = path / "tensors.safetensors"
    assert sorted(load_file(file)) == ["0.bias", "0.weight", "1.bias"]
    missing, unexpected = load_model(other, file)
    assert not missing
    assert not unexpected
    assert other.state_dict()["1.weight"].equal(net.state_dict()["0.weight"])
    state = load(path)
    assert state["0.weight"] is state["1.weight"]
    header = file.read_bytes()[8:]
    assert header.startswith(b'{"__metadata__":{"1.weight":"0.weight"}')


def test_loaded_tensors_outlive_the_file(tmp_path: Path) -> None:
    path = write(CheckpointStore(tmp_path), "a", 1)
    checkpoint = read_checkpoint(path)
    for file in FILES[:2]:  # what a mapped file would show
        data = (path / file).read_bytes()
        (path / file).write_bytes(bytes(len(data)))
    shutil.rmtree(path)
    assert checkpoint.tree("model")["w"].equal(weights(1)["w"])


def test_only_the_files_asked_for_are_read(tmp_path: Path) -> None:
    path = write(CheckpointStore(tmp_path), "a", 1)
    (path / "training.safetensors").unlink()
    checkpoint = read_checkpoint(path, files=["model"])
    assert checkpoint.tree("model")["w"].equal(weights(1)["w"])
    with pytest.raises(CheckpointCorruptError, match="'training' is not loaded"):
        checkpoint.tree("training")
    with pytest.raises(CheckpointError, match="no 'rank_9'"):
        checkpoint.tree("rank_9")
    with pytest.raises(CheckpointError, match=r"no file 'rank_9.safetensors'"):
        read_checkpoint(path, files=["rank_9"])


def test_the_record_says_what_was_saved(tmp_path: Path) -> None:
    path = write(CheckpointStore(tmp_path), "a", 7)
    record = json.loads((path / "helios.json").read_text())["record"]
    assert record["format"] == 1
    assert record["progress"] == {"step": 7}
    assert record["world_size"] == 1
    assert abs(datetime.now(UTC) - datetime.fromisoformat(record["created"])) < (
        timedelta(minutes=1)
    )
    assert {
        name: (entry["size_bytes"], entry["checksum"])
        for name, entry in record["files"].items()
    } == {
        file: (len(data), f"crc32:{zlib.crc32(data):08x}")
        for file in FILES[:2]
        if (data := (path / file).read_bytes())
    }


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
    infos = CheckpointStore(tmp_path).list()
    assert [info.path.name for info in infos] == ["y", "a", "z"]
    assert [info.record["progress"]["step"] for info in infos] == [2, 1, 0]
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
    assert [info.path for info in store.list()] == [path]
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
    reports: list[str] = []
    assert find_last_checkpoint(tmp_path, reports.append) == tmp_path / "here"
    assert len(reports) == 1


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
    assert "c4/helios.json is missing" in reports[0]
    assert "c3/helios.json is not a record" in reports[1]
    assert "c2/model.safetensors has " in reports[2]
    problems = {info.path.name: info.problem for info in store.list()}
    assert [name for name, problem in problems.items() if problem] == ["c4", "c3"]


def test_prune_keeps_the_newest_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in range(5):
        write(store, f"c{step}", step)
    assert [path.name for path in store.prune(2)] == ["c2", "c1", "c0"]
    assert sorted(os.listdir(tmp_path)) == ["c3", "c4"]
    assert store.prune(1) == [tmp_path / "c3"]
    assert store.prune(1) == []
    assert found(tmp_path) == 4
    with pytest.raises(ValueError, match="`keep_last` must be >= 1, got 0"):
        store.prune(0)


def test_prune_counts_whole_ones_only(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in range(4):
        write(store, f"c{step}", step)
    (tmp_path / "c3" / "model.safetensors").unlink()
    (tmp_path / "c2" / "helios.json").write_text("")
    os.utime(tmp_path / "c2", (0, 0))  # unreadable: taken for the oldest, left alone
    assert store.prune(1) == [tmp_path / "c0"]
    assert sorted(os.listdir(tmp_path)) == ["c1", "c2", "c3"]


def test_a_checkpoint_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, "a", 1)
    write(store, "a", 2)
    assert os.listdir(tmp_path) == ["a"]
    assert found(tmp_path) == 2


# Writers that died.


def test_only_the_litter_of_dead_writers_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here, unique = socket.gethostname(), "0" * 32
    names = {
        f".helios-{dead.pid}-{unique}-{here}": False,
        f".helios-{os.getpid()}-{unique}-{here}": False,
        f".helios-{os.getppid()}-{unique}-{here}": True,
        f".helios-1-{unique}-elsewhere": True,
        f".helios-2-{unique}-elsewhere": False,
        ".helios-mine": True,
        ".git": True,
    }
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    old = tmp_path / f".helios-2-{unique}-elsewhere"
    for path in (*old.iterdir(), old):
        os.utime(path, (time.time() - 4000,) * 2)
    folder = CheckpointStore(tmp_path).begin("a")
    assert {name: (tmp_path / name).exists() for name in names} == names
    assert folder.exists()


class Crash(BaseException):
    """The process ends here: nothing may catch it."""


class Disk:
    """Stands for `open`, `os` and `shutil`: fails at one of their operations."""

    def __init__(self, fail_at: int, error: BaseException) -> None:
        self.fail_at, self.error, self.log = fail_at, error, list[str]()

    def did(self, what: str) -> None:
        self.log.append(what)
        if len(self.log) == self.fail_at:
            raise self.error

    def __getattr__(self, name: str) -> Any:
        real = getattr(shutil if name == "rmtree" else os, name)
        if name not in ("mkdir", "makedirs", "rename", "fsync", "open", "rmtree"):
            return real

        def operation(*args: Any, **kwargs: Any) -> Any:
            if name == "rmtree" and len(self.log) + 1 == self.fail_at:
                next(Path(args[0]).iterdir()).unlink()  # half of it is done
            self.did(name)
            return real(*args, **kwargs)

        return operation

    def open_file(self, path: Path, mode: str) -> Any:
        self.did(f"create {Path(path).name}")
        return DiskFile(self, open(path, mode), Path(path).name)


class DiskFile:
    def __init__(self, disk: Disk, file: Any, name: str) -> None:
        self.disk, self.file, self.name = disk, file, name

    def __enter__(self) -> "DiskFile":
        return self

    def __exit__(self, *args: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: Any) -> None:
        try:
            self.disk.did(f"write {self.name}")
        except BaseException:
            self.file.write(data[: len(data) // 2])
            raise
        self.file.write(data)


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
    tensors = ["create {}", "write {}", "write {}", "write {}", "fsync"]
    assert disk.log == [
        *("makedirs", "open", "fsync", "mkdir"),
        *(line.format("model.safetensors") for line in tensors),
        *("create training.safetensors", *["write training.safetensors"] * 2, "fsync"),
        *("create helios.json", "write helios.json", "fsync", "open", "fsync"),
        *("rename", "open", "fsync"),
    ]
    replacing = Disk(0, Crash())
    assert with_disk(monkeypatch, replacing, lambda: write(store, "a", 2))
    assert replacing.log[-6:] == [*("rename", "rename", "open", "fsync"), *REMOVAL]


REMOVAL = ("rename", "rmtree")


@pytest.mark.parametrize(
    "error", [Crash(), OSError(errno.ENOSPC, "disk full")], ids=repr
)
@pytest.mark.parametrize("name", ["new", "same"])
def test_a_crash_at_any_operation_of_a_save_leaves_a_whole_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    name: str,
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
            store.prune(1)

        has_ended = with_disk(monkeypatch, disk, run)
        step = found(root)
        assert step == 2 if has_ended else step in (1, 2)
        outcomes.add(step)
        # After a crash another process goes on, after an error the same one does.
        write(store if isinstance(error, OSError) else CheckpointStore(root), name, 3)
        assert found(root) == 3
        assert {path.name for path in root.iterdir()} <= {"same", "new"}
    assert outcomes == {1, 2}
    assert fail_at > 20


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
for _ in range(25):
    receive, send = os.pipe()
    pid = os.fork()
    if not pid:
        store = CheckpointStore(root)
        while True:
            last += 1
            write(store, f"c{last % 3}", last)
            os.write(send, last.to_bytes(4, "little"))
            store.prune(2)
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
print("killed", 25)
"""


def test_a_writer_killed_at_any_moment_leaves_what_it_acknowledged(
    tmp_path: Path,
) -> None:
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", SAVE_FOREVER, str(tmp_path), str(here)],
        cwd=here.parents[2],
        env={**os.environ, "PYTHONPATH": str(here.parents[2])},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "killed 25\n"


# Damage.


def assert_noticed(path: Path, *named: str) -> None:
    with pytest.raises(CheckpointCorruptError) as caught:
        read_checkpoint(path)
    problems = CheckpointStore(path.parent).verify(path)
    assert len(problems) == 1
    for text in named:
        assert text in str(caught.value)
        assert text in problems[0]


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
    assert_noticed(path, file, "is missing")


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


def test_without_verification_sizes_and_headers_are_still_checked(
    tmp_path: Path,
) -> None:
    path = write(CheckpointStore(tmp_path), "a", 1)
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    read_checkpoint(path, verify=False)
    for part in range(1, 8):
        file.write_bytes(data[:part])
        with pytest.raises(CheckpointCorruptError, match="model"):
            read_checkpoint(path, verify=False)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b"\xff",
        b'{"a":1}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":["1"],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b'{"a":{"dtype":"I8","shape":[2],"data_offsets":[0,2]}}',
        b'{"a":{"dtype":"F32","shape":[4611686018427387904,0],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[99999999999],"data_offsets":[0,399999999996]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"[" * 100_000,
    ],
)
def test_crafted_headers_are_refused(tmp_path: Path, header: bytes) -> None:
    data = len(header).to_bytes(8, "little") + header + b"abcd"
    path = crafted(tmp_path, {"x.safetensors": data})
    with pytest.raises(CheckpointCorruptError, match=r"x\.safetensors"):
        read_checkpoint(path)


def test_a_header_that_claims_more_than_the_file_allocates_nothing(
    tmp_path: Path,
) -> None:
    for claim in (5, 2**32, 2**63, 2**64 - 1):
        data = claim.to_bytes(8, "little") + b"{}"
        path = crafted(tmp_path / str(claim), {"x.safetensors": data})
        with pytest.raises(CheckpointCorruptError, match=f"claims {claim} bytes"):
            read_checkpoint(path)


def crafted(root: Path, files: dict[str, bytes], /, **changes: Any) -> Path:
    """A checkpoint with right checksums, whatever its files hold."""
    path = root / "crafted"
    path.mkdir(parents=True)
    entries = {
        name: {"size_bytes": len(data), "checksum": f"crc32:{zlib.crc32(data):08x}"}
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


def test_a_crafted_record_that_is_right_is_read(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(crafted(tmp_path, {"x.safetensors": EMPTY}))
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.tensors == {"x": {}}


@pytest.mark.parametrize(
    "name",
    [
        "../a.safetensors",
        "/a.safetensors",
        "..",
        ".a.safetensors",
        "",
        "a/b.safetensors",
        "a\\b.safetensors",
        "a\0.safetensors",
        "a.pkl",
        "helios.json",
    ],
)
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(EMPTY)
    entry = {"size_bytes": len(EMPTY), "checksum": f"crc32:{zlib.crc32(EMPTY):08x}"}
    path = crafted(tmp_path, {}, files={name: entry})
    with pytest.raises(CheckpointCorruptError, match=r"helios\.json"):
        read_checkpoint(path)
    store = CheckpointStore(tmp_path / "store")
    if name.endswith("safetensors") or not name.strip("."):
        with pytest.raises(ValueError, match="no plain name"):
            store.begin(name)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": []},
        {"files": {"a.safetensors": {}}},
        {"files": {"a.safetensors": {"size_bytes": True, "checksum": ""}}},
        {"files": {"a.safetensors": {"size_bytes": "1", "checksum": ""}}},
        {"trees": []},
        {"progress": None},
        {"created": 5},
        {"created": "yesterday"},
        {"created": "2026-01-01"},
    ],
)
def test_crafted_records_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = crafted(tmp_path, {}, **changes)
    with pytest.raises(CheckpointCorruptError, match=r"helios\.json"):
        read_checkpoint(path)
    assert CheckpointStore(tmp_path).list()[0].problem


@pytest.mark.parametrize("file", ["x.safetensors", "helios.json"])
def test_links_pipes_and_folders_in_place_of_files_are_refused(
    tmp_path: Path, file: str
) -> None:
    path = crafted(tmp_path, {"x.safetensors": EMPTY})
    os.rename(path / file, tmp_path / "outside")
    (path / file).symlink_to(tmp_path / "outside")
    assert_noticed(path, file)
    (path / file).unlink()
    os.mkfifo(path / file)
    assert_noticed(path, file, "not a regular file")
    (path / file).unlink()
    (path / file).mkdir()
    assert_noticed(path, file, "not a regular file")


def test_bombs_in_the_record_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = '{"a":' * 200_000 + "1" + "}" * 200_000
    path = tmp_path / "bomb"
    path.mkdir()
    head = f'{{"checksum": "crc32:{zlib.crc32(bomb.encode()):08x}", "record": '
    (path / "helios.json").write_text(f"{head}{bomb}}}\n")
    with pytest.raises(CheckpointCorruptError, match="RecursionError"):
        read_checkpoint(path)
    monkeypatch.setattr(reader_module, "_MAX_RECORD_BYTES", 1000)
    with pytest.raises(CheckpointCorruptError, match="too large"):
        read_checkpoint(path)


def test_a_later_format_is_refused_and_passed_over(tmp_path: Path) -> None:
    write(CheckpointStore(tmp_path), "a", 1)
    path = crafted(tmp_path, {}, format=2)
    with pytest.raises(CheckpointError, match="is of format 2"):
        read_checkpoint(path)
    os.utime(path)
    reports: list[str] = []
    assert step_of(CheckpointStore(tmp_path).find_last(reports.append)) == 1
    assert "format 2" in reports[0]


def test_a_tree_that_is_malformed_names_its_group(tmp_path: Path) -> None:
    path = crafted(tmp_path, {}, trees={"model": {"$": "tensor", "v": ["x", "y"]}})
    with pytest.raises(CheckpointCorruptError, match=r"crafted, 'model': .*'y'"):
        read_checkpoint(path).tree("model")


def test_commit_refuses_a_folder_that_lost_a_file(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    folder = store.begin("a")
    entry = store.write_file(folder, "model", weights(1))
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="not what was written"):
        store.commit(folder, "a", {"trees": {}, "files": {"model": entry}})
    assert store.list() == []


def test_unpack_reads_what_pack_made() -> None:
    data = b"".join(pack({"a": torch.arange(3), "b": torch.ones(())}, {}))
    position = 0

    def fill(view: memoryview) -> None:
        nonlocal position
        view[:] = data[position : position + len(view)]
        position += len(view)

    got = unpack(fill, len(data))
    assert got["a"].equal(torch.arange(3))
    assert got["b"].equal(torch.ones(()))
