"""Disks that are full, read-only, slow or gone: what a run makes of them.

Real file systems of 256 KiB, where they can be mounted.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import threading

import pytest
from accelerate.tracking import GeneralTracker, on_main_process
from support import IdModel, IndexData, digest, train

import helios
from helios.checkpoint import CheckpointStore, find_damage
from helios.loggers.text import get_root_logger

TIMEOUT_S = 60


def run(*command):
    return subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False)


@pytest.fixture
def disk(tmp_path):
    """The folder of a small file system."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system")
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if run(*command).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    run("umount", "-l", str(folder))


class At(helios.Callback):
    """Does something at the starts of epochs, when no checkpoint is being written."""

    def __init__(self, **actions):
        self.actions = {int(name[1:]): action for name, action in actions.items()}

    def on_training_epoch_start(self, session):
        if session.saver is not None:
            session.saver._background.wait()
        if action := self.actions.get(session.state.global_epoch):
            action()


def remount(folder, how):
    assert run("mount", "-o", f"remount,{how}", str(folder)).returncode == 0


def fill(folder):
    with contextlib.suppress(OSError), open(folder / "filler", "wb", 0) as out:
        while out.write(bytes(256)):
            pass


def unmount(folder):
    assert run("umount", "-l", str(folder)).returncode == 0


def weights():
    model = IdModel()
    train(model, IndexData(3), None, total_steps=5)
    return digest(model.state_dict())


def epochs(root):
    """The epochs of the checkpoints, each of which is whole."""
    records = CheckpointStore(root / "ids").records()
    assert all(find_damage(path) == {} for path in records)
    return sorted(record["progress"]["global_epoch"] for record in records.values())


@pytest.mark.parametrize("async_save", [True, False])
def test_disk_that_becomes_read_only_lets_the_training_go_on(disk, capsys, async_save):
    model = IdModel()
    act = At(_1=lambda: remount(disk, "ro"), _3=lambda: remount(disk, "rw"))
    options = {"total_steps": 5, "chkpt_frequency": 1, "async_save": async_save}
    assert train(model, IndexData(3), disk, act, **options)[0]
    assert digest(model.state_dict()) == weights()
    assert epochs(disk) == [1, 4, 5]
    said = capsys.readouterr().err
    assert said.count("A CHECKPOINT COULD NOT BE WRITTEN") == 2
    assert "Read-only file system" in said
    assert not list(disk.glob("ids/.*"))


# TensorBoard's own thread ends by the error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_disk_that_is_gone_lets_the_training_go_on_in_the_folder_that_is_left(
    disk, capsys
):
    model, options = IdModel(), {"total_steps": 5, "chkpt_frequency": 1}
    logs = {"log_root": disk, "enable_file_logging": True, "enable_tensorboard": True}
    act = At(_2=lambda: unmount(disk))
    assert train(model, IndexData(3), disk, act, **options, **logs)[0]
    assert digest(model.state_dict()) == weights()
    assert epochs(disk) == [3, 4, 5]
    capsys.readouterr()
    again = IdModel()
    assert train(again, IndexData(3), disk, At(), **options)[0]
    assert again.batches == []


class Talkative(IdModel):
    """Logs more than a page of the disk at each batch."""

    def train_step(self, batch, state):
        super().train_step(batch, state)
        get_root_logger().info("at batch %d: %s", state.global_iteration, "-" * 5000)


def test_full_disk_takes_lines_of_the_log_file_and_nothing_else(disk, tmp_path, capsys):
    model = Talkative()
    act = At(_1=lambda: fill(disk), _3=(disk / "filler").unlink)
    logs = {"log_root": disk, "enable_file_logging": True, "total_steps": 5}
    assert train(model, IndexData(3), tmp_path / "runs", act, **logs)[0]
    assert digest(model.state_dict()) == weights()
    said, written = capsys.readouterr().err, (disk / "run.log").read_text()
    assert said.count("THE LOG FILE CANNOT BE WRITTEN, lines are missing") == 1
    assert "No space left on device" in said
    assert "Traceback" not in said
    assert said.count("at batch ") == 15
    for batch in (0, 1, 2, 10, 14):
        assert f"at batch {batch}: " in written
    assert "at batch 7: " not in written
    assert "finished after 5 epochs" in written


def test_log_file_on_a_disk_that_stays_full_is_closed_without_a_word(disk, tmp_path):
    logs = {"log_root": disk, "enable_file_logging": True, "total_steps": 5}
    act = At(_1=lambda: fill(disk))
    assert train(Talkative(), IndexData(3), tmp_path / "runs", act, **logs)[0]


def test_read_only_folder_of_logs_is_told_and_the_run_goes_on(disk, tmp_path, capsys):
    remount(disk, "ro")
    model, logs = IdModel(), {"enable_file_logging": True, "enable_tensorboard": True}
    options = {"total_steps": 5, "log_root": disk / "logs", **logs}
    assert train(model, IndexData(3), tmp_path / "runs", **options)[0]
    assert digest(model.state_dict()) == weights()
    said = capsys.readouterr().err
    assert "THERE IS NO LOG FILE, as it cannot be written" in said
    assert "THERE IS NO LOG FOR TENSORBOARD" in said
    assert epochs(tmp_path / "runs") == [5]


def test_read_only_folder_of_checkpoints_is_refused_before_anything_is_made(disk):
    remount(disk, "ro")
    model = IdModel()
    with pytest.raises(helios.HeliosError, match="`chkpt_root` cannot be written to"):
        train(model, IndexData(3), disk, total_steps=5)
    assert not hasattr(model, "net")


def test_slow_disk_holds_the_training_up_at_the_next_checkpoint_only(
    tmp_path, monkeypatch
):
    real, go_on, seen = CheckpointStore.write_group, threading.Event(), []

    def wait(self, *args, **kwargs):
        assert go_on.wait(TIMEOUT_S)
        return real(self, *args, **kwargs)

    class Watch(helios.Callback):
        def on_training_batch_end(self, session):
            step = session.state.current_iteration
            seen.append((step, session.saver._background.is_busy))
            if step == 5:
                go_on.set()

    monkeypatch.setattr(CheckpointStore, "write_group", wait)
    options = {"train_unit": "iteration", "total_steps": 6, "chkpt_frequency": 3}
    model = IdModel()
    assert train(model, IndexData(20), tmp_path, Watch(), **options)[0]
    assert [busy for step, busy in seen if step in (4, 5)] == [True, True]
    records = CheckpointStore(tmp_path / "ids").records().values()
    steps = sorted(r["progress"]["current_iteration"] for r in records)
    assert steps == [3, 6]


class Lost(GeneralTracker):
    """A logger whose server is gone."""

    name, requires_logging_directory, tracker = "lost", False, None

    @on_main_process
    def store_init_configuration(self, values):
        pass

    def fail(self, *args, **kwargs):
        raise ConnectionError("the server is gone")

    log = finish = fail


def test_tracker_that_cannot_write_does_not_stop_a_run(tmp_path, capsys):
    assert train(IdModel(), IndexData(3), None, total_steps=2, log_with=[Lost()])[0]
    said = capsys.readouterr().err
    assert said.count("A TRACKER COULD NOT WRITE: the server is gone") == 3


CONSOLE = """
import helios
from support import IdModel, IndexData

trainer = helios.Trainer(use_cpu=True, total_steps=2, print_frequency=1)
assert trainer.fit(IdModel(), IndexData())
print("trained")
"""


def test_console_that_is_a_full_disk_does_not_stop_a_run():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", CONSOLE],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=full,
            timeout=TIMEOUT_S,
            check=False,
        )
    assert done.stdout == b"trained\n"
