import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from helios.checkpoint import BackgroundWriter, find_damage
from helios.errors import CheckpointError


def test_a_snapshot_does_not_follow_the_live_tensor() -> None:
    writer = BackgroundWriter()
    live = torch.arange(6.0).reshape(2, 3)
    copy = writer.snapshot({"f": {"a": live.t(), "s": live[0, 1]}})["f"]
    live.zero_()
    assert copy["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert copy["s"].item() == 1


def test_a_prepared_snapshot_is_copied_to_memory_that_is_there() -> None:
    writer = BackgroundWriter()
    live = {"a": torch.ones(3, 2), "b": torch.arange(4)}
    writer.prepare({"f": live})
    writer.wait()
    places = {t.data_ptr() for t in writer._buffers.values()}
    live["b"] = torch.arange(5)  # which has grown since
    copies = writer.snapshot({"f": live})["f"]
    assert all(copies[name].equal(live[name]) for name in live)
    assert copies["a"].data_ptr() in places
    assert copies["b"].data_ptr() not in places


def test_overlapping_tensors_become_copies_of_their_own() -> None:
    row = torch.arange(3.0)
    live = {"a": row.expand(2, 3), "b": row, "c": row[1:], "d": row.unfold(0, 2, 1)}
    copies = BackgroundWriter().snapshot({"f": live})["f"]
    assert len({copy.untyped_storage().data_ptr() for copy in copies.values()}) == 4
    assert all(copies[name].equal(live[name]) for name in live)


def test_a_snapshot_taken_in_inference_mode_can_be_taken_again_outside() -> None:
    writer = BackgroundWriter()
    with torch.inference_mode():
        writer.snapshot({"f": {"a": torch.ones(2)}})
    live = torch.nn.Parameter(torch.zeros(2))
    copy = writer.snapshot({"f": {"a": live}})["f"]["a"]
    assert copy.tolist() == [0, 0]
    assert not copy.requires_grad


def test_jobs_run_one_after_the_other() -> None:
    writer, seen = BackgroundWriter(), list[str]()
    gate = threading.Event()

    def first() -> None:
        gate.wait()
        seen.append("first")

    writer.submit(first)
    threading.Timer(0.05, gate.set).start()
    writer.submit(lambda: seen.append("second"))
    writer.wait()
    assert seen == ["first", "second"]


def test_a_failed_job_surfaces_once_with_its_cause() -> None:
    writer = BackgroundWriter()
    cause = OSError(28, "no space left")

    def fail() -> None:
        raise cause

    writer.submit(fail)
    writer.submit(lambda: None)
    writer.submit(lambda: [][0])  # of two errors, the first is told
    writer.wait()
    with pytest.raises(CheckpointError, match="no space left") as caught:
        writer.check()
    assert caught.value.__cause__ is cause
    writer.check()


def test_there_is_a_thread_only_while_a_job_runs() -> None:
    def writers() -> int:
        names = [each.name for each in threading.enumerate()]
        return names.count("checkpoint writer")

    writer, inside = BackgroundWriter(), list[int]()
    assert writers() == 0
    writer.submit(lambda: inside.append(writers()))
    writer.wait()
    assert inside == [1]
    assert writers() == 0


@pytest.mark.parametrize("sizes", [(1 << 22,) * 3, (1 << 24, 1), (1, 1 << 24, 3)])
def test_a_large_snapshot_is_whole(sizes: tuple[int, ...]) -> None:
    live = {f"{i}": torch.arange(n) % 251 + i for i, n in enumerate(sizes)}
    copies = BackgroundWriter().snapshot({"f": live})["f"]
    assert all(copies[name].equal(tensor) for name, tensor in live.items())
    assert list(copies) == list(live)


def test_an_error_of_the_thread_that_helps_to_copy_is_raised() -> None:
    live = {"a": torch.ones(1 << 22), "b": torch.ones(1 << 22)}
    writer = BackgroundWriter()
    writer.snapshot({"f": live})
    # It cannot be written to: its numbers are one.
    writer._buffers["f", "b"] = torch.ones(1).expand(1 << 22)
    with pytest.raises(RuntimeError):
        writer.snapshot({"f": live})


def test_a_job_that_waits_for_itself_is_an_error() -> None:
    writer = BackgroundWriter()
    writer.submit(writer.wait)
    writer.wait()
    with pytest.raises(CheckpointError, match="cannot join current thread"):
        writer.check()


LATE = """
import threading
from helios.checkpoint import BackgroundWriter

def late():
    threading.main_thread().join()
    writer = BackgroundWriter()
    for number in range(2):
        writer.submit(lambda: print("job", number))
    writer.wait()
    writer.check()

threading.Thread(target=late).start()
"""


def test_jobs_are_done_where_the_main_thread_has_ended() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LATE],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["job", "0", "job", "1"]


EXIT = """
import sys, time, torch
from helios.checkpoint import BackgroundWriter, CheckpointStore

def job():
    time.sleep(0.5)  # the main thread has ended
    store = CheckpointStore(sys.argv[1])
    part = store.begin("last")
    files = store.write_group(part, "model", {"w": torch.ones(1 << 20)})
    record = {"progress": {}, "trees": {}, "files": files}
    store.commit(part, "last", record)

BackgroundWriter().submit(job)
if sys.argv[2] == "raise":
    raise ValueError("the training failed")
"""


@pytest.mark.parametrize("how", ["return", "raise"])
def test_the_interpreter_does_not_end_in_the_middle_of_a_job(
    tmp_path: Path, how: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXIT, str(tmp_path), how],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == (how == "raise"), done.stderr
    assert find_damage(tmp_path / "last") == {}


@pytest.mark.gpu
def test_a_snapshot_from_cuda_is_complete_when_it_returns() -> None:
    writer = BackgroundWriter()
    live = torch.ones(1 << 24, device="cuda")
    copy = writer.snapshot({"f": {"a": live}})["f"]["a"]
    live.zero_()
    assert bool((copy == 1).all())
