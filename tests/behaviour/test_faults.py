"""Exceptions, signals, kills and full disks."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import time

import pytest
from support import (
    IdModel,
    IndexData,
    IndexDataset,
    RandomData,
    RandomModel,
    StopAt,
    TraceCallback,
    digest,
    train,
)
from support.children import TIMEOUT_S, child, receive, wait_until

import helios
from helios.checkpoint import read_checkpoint
from helios.errors import CheckpointError

OPTIONS = {"total_steps": 3, "valid_frequency": 1, "chkpt_frequency": 1}


# Exceptions.


class Broken(Exception):
    """What the tests raise."""


def fail(*args, **kwargs):
    raise Broken("on purpose")


class FailingItem(IndexDataset):
    __getitem__ = fail


class FailingData(IndexData):
    def setup(self):
        self._add_train_phase(FailingItem(3))


def failing(hook):
    return type("Failing", (IdModel,), {hook: fail})()


def test_exceptions_that_are_named_pass_unlogged(tmp_path, capsys):
    with pytest.raises(Broken, match="on purpose"):
        train(
            failing("train_step"),
            IndexData(),
            tmp_path,
            **OPTIONS,
            train_exceptions=[OSError, Broken],
            test_exceptions=[OSError],
        )
    assert "Traceback" not in capsys.readouterr().err
    trainer = helios.Trainer(use_cpu=True, test_exceptions=[Broken])
    with pytest.raises(Broken, match="on purpose"):
        trainer.test(failing("test_step"), IndexData())
    assert "Traceback" not in capsys.readouterr().err


def test_failing_sample_is_named(tmp_path):
    with pytest.raises(Broken) as caught:
        train(IdModel(), FailingData(), tmp_path, **OPTIONS)
    assert caught.value.__notes__ == ["Helios: in sample 0 (epoch 0, batch 0)"]


def test_trainer_can_be_used_again_after_a_failure(tmp_path):
    trainer = helios.Trainer(use_cpu=True, total_steps=1)
    with pytest.raises(Broken):
        trainer.fit(failing("train_step"), IndexData())
    assert trainer.fit(IdModel(), IndexData())


@pytest.mark.parametrize("is_failing", [True, False])
def test_loader_workers_end_with_the_run(tmp_path, is_failing):
    model = failing("valid_step") if is_failing else IdModel()
    data = IndexData(num_workers=1, persistent_workers=True)
    before = multiprocessing.active_children()
    with pytest.raises(Broken) if is_failing else contextlib.nullcontext():
        train(model, data, tmp_path, **OPTIONS)
    assert set(multiprocessing.active_children()) <= set(before)


# Signals and kills.


class Tell(helios.Callback):
    """Tells the parent when a batch is done, and goes on when it says so."""

    def __init__(self, pipe, batch):
        self.pipe, self.batch = pipe, batch

    def on_training_batch_end(self, session):
        if session.state.global_iteration == self.batch:
            self.pipe.send(self.batch)
            self.pipe.recv()


def fit(pipe, root, workers, batch):
    model, data = RandomModel(), RandomData(**workers)
    is_finished, _ = train(model, data, root, Tell(pipe, batch), **OPTIONS)
    pipe.send((is_finished, model.ids, digest(model.state_dict())))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The samples and the final state of a run without interruption."""
    model = RandomModel()
    train(model, RandomData(), tmp_path_factory.mktemp("whole"), **OPTIONS)
    return model.ids, digest(model.state_dict())


def resume(root):
    model = RandomModel()
    with child(fit, root, {}, None) as (_, pipe):
        is_finished, ids, state = receive(pipe)
    assert is_finished, model
    return ids, state


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signal_to_all_processes_of_a_run_saves_it_and_ends_it(tmp_path, whole, name):
    workers = {"num_workers": 2, "persistent_workers": True}
    with child(fit, tmp_path, workers, 7) as (process, pipe):
        assert receive(pipe) == 7
        number = getattr(signal, name)
        if name == "SIGUSR1":  # which goes to the main process: workers know it not
            os.kill(process.pid, number)
        else:
            os.killpg(process.pid, number)
        pipe.send("go on")
        is_finished, first, _ = receive(pipe)
        process.join(TIMEOUT_S)
        assert process.exitcode == 0
    assert not is_finished
    assert len(first) == 7
    second, state = resume(tmp_path)
    assert (first + second, state) == whole


class Patient(helios.Callback):
    """Waits for a first signal to be heard, then for a second."""

    def __init__(self, pipe):
        self.pipe = pipe

    def on_training_batch_end(self, session):
        if session.state.global_iteration == 7:
            self.pipe.send("ready")
            wait_until(lambda: session.stop_reason is not None)
            self.pipe.send(session.stop_reason)
            self.pipe.recv()


def wait_for_two(pipe, root):
    try:
        train(RandomModel(), RandomData(), root, Patient(pipe), **OPTIONS)
    except KeyboardInterrupt:
        pipe.send("interrupted")


def test_second_interrupt_ends_a_run_at_once(tmp_path):
    with child(wait_for_two, tmp_path) as (process, pipe):
        assert receive(pipe) == "ready"
        os.kill(process.pid, signal.SIGINT)
        assert "SIGINT" in receive(pipe)
        until = time.monotonic() + TIMEOUT_S
        while not pipe.poll(0.05):  # those of one moment are one
            assert time.monotonic() < until
            os.kill(process.pid, signal.SIGINT)
        assert pipe.recv() == "interrupted"
    assert [p.name for p in tmp_path.glob("*/random*")] == ["random_epoch_1_iter_5"]


def test_handlers_of_signals_are_put_back(tmp_path):
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    train(IdModel(), IndexData(), tmp_path, total_steps=1)
    assert [signal.getsignal(number) for number in numbers] == before


def end():
    os.kill(os.getpid(), signal.SIGKILL)


class KilledWhere(RandomModel):
    """Ends at a place of its own, as if by SIGKILL."""

    place = None

    def append_metadata_to_chkpt_name(self, name):
        if self.place == "while saving" and len(self.ids) == 10:
            end()
        return super().append_metadata_to_chkpt_name(name)

    def train_step(self, batch, state):
        super().train_step(batch, state)
        if self.place == "inside a step" and len(self.ids) == 8:
            end()

    def have_metrics_improved(self):
        if self.place == "after a validation" and len(self.ids) == 10:
            end()
        return super().have_metrics_improved()


class KilledHere(helios.Callback):
    """Ends where a callback can."""

    def __init__(self, place):
        self.place, self.saves = place, 0

    def on_validation_batch_end(self, session, step):
        if self.place == "inside a validation" and session.state.global_epoch == 2:
            end()

    def on_checkpoint_saved(self, session, path):
        self.saves += 1
        if self.place == "behind a save" and self.saves == 2:
            end()

    def on_training_epoch_end(self, session):
        if self.place == "at an epoch's end" and session.state.global_epoch == 2:
            end()

    def on_training_end(self, session):
        if self.place == "at the end":
            end()


def run_to_be_killed(pipe, root, place):
    model = KilledWhere()
    model.place = place
    train(model, RandomData(), root, KilledHere(place), **OPTIONS)
    pipe.send("it was not killed")


PLACES = [
    "inside a step",
    "at an epoch's end",
    "inside a validation",
    "after a validation",
    "while saving",
    "behind a save",
    "at the end",
]


@pytest.mark.parametrize("place", PLACES)
def test_killed_run_started_again_ends_with_the_same_bits(tmp_path, whole, place):
    with child(run_to_be_killed, tmp_path, place) as (process, pipe):
        process.join(TIMEOUT_S)
        assert process.exitcode == -signal.SIGKILL
        with pytest.raises(EOFError):
            pipe.recv()
    model = RandomModel()
    assert train(model, RandomData(), tmp_path, KilledHere(None), **OPTIONS)[0]
    ids, state = whole
    assert digest(model.state_dict()) == state
    assert model.ids == ids[len(ids) - len(model.ids) :]


def progress_of_all(root):
    """The steps of each checkpoint, the newest last; all must be whole."""
    records = [read_checkpoint(path).record for path in root.glob("[!.]*")]
    return sorted(record["progress"]["current_iteration"] for record in records)


def train_for_ever(pipe, root):
    options = {"total_steps": float("inf"), "train_unit": "iteration"}
    pipe.send("ready")
    train(RandomModel(), RandomData(), root, **options, chkpt_frequency=1)


def test_run_killed_while_it_writes_keeps_a_whole_checkpoint(tmp_path):
    root = tmp_path / "random"
    for _ in range(4):
        with child(train_for_ever, tmp_path) as (process, pipe):
            receive(pipe)
            wait_until(lambda: root.is_dir() and len(list(root.glob("random_*"))) > 2)
            wait_until(lambda: list(root.glob(".helios-*")) or not process.is_alive())
            os.kill(process.pid, signal.SIGKILL)
            process.join(TIMEOUT_S)
            assert process.exitcode == -signal.SIGKILL
        assert len(progress_of_all(root)) >= 3


def test_run_killed_while_it_writes_ends_with_the_same_bits(tmp_path):
    options = {"train_unit": "iteration", "chkpt_frequency": 1}
    with child(train_for_ever, tmp_path / "parts") as (process, pipe):
        receive(pipe)
        wait_until(lambda: len(list(tmp_path.glob("parts/random/random_*"))) > 3)
        os.kill(process.pid, signal.SIGKILL)
        process.join(TIMEOUT_S)
    steps = progress_of_all(tmp_path / "parts" / "random")[-1] + 11
    parts, whole = RandomModel(), RandomModel()
    train(parts, RandomData(), tmp_path / "parts", total_steps=steps, **options)
    train(whole, RandomData(), tmp_path / "whole", total_steps=steps, **options)
    assert len(parts.ids) == 11
    assert digest(parts.state_dict()) == digest(whole.state_dict())


# The disk.


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    command = [mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("file systems can't be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


class Filler(helios.Callback):
    """Fills the disk after the first epoch, and empties it after the third."""

    def __init__(self, folder):
        self.file = folder / "filler"

    def on_training_epoch_start(self, session):
        wait_until(lambda: not session.saver._background.is_busy)
        if session.state.global_epoch == 1:
            with (
                contextlib.suppress(OSError),
                open(self.file, "wb", buffering=0) as out,
            ):
                while out.write(bytes(256)):
                    pass
        if session.state.global_epoch == 3:
            self.file.unlink()


@pytest.mark.parametrize("async_save", [True, False])
def test_full_disk_lets_the_training_go_on(small_disk, tmp_path, capsys, async_save):
    options = {"total_steps": 5, "chkpt_frequency": 1, "async_save": async_save}
    filled, free = IdModel(), IdModel()
    _, recorder = train(filled, IndexData(3), small_disk, Filler(small_disk), **options)
    train(free, IndexData(3), tmp_path / "free", **options)
    assert digest(filled.state_dict()) == digest(free.state_dict())
    written = ["ids_epoch_1_iter_3", "ids_epoch_4_iter_12", "ids_epoch_5_iter_15"]
    assert recorder.saved == written
    shown = capsys.readouterr().err
    assert shown.count("No space left on device") == 2
    assert "CHECKPOINT COULD NOT BE WRITTEN" in shown.upper()
    assert sorted(path.name for path in small_disk.glob("ids/[!.]*")) == written
    assert progress_of_all(small_disk / "ids") == [3, 12, 15]


class Talkative(IdModel):
    """Logs more than fits into what is left of a page of the disk."""

    def train_step(self, batch, state):
        super().train_step(batch, state)
        self.log_dict({f"value {i}": i for i in range(200)})


# TensorBoard's own thread ends by the error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_full_disk_of_logs_takes_no_checkpoint_along(small_disk, tmp_path, capsys):
    options = {"log_root": small_disk, "enable_tensorboard": True, "total_steps": 5}
    options |= {"chkpt_frequency": 1, "print_frequency": 1}
    root, filler = tmp_path / "checkpoints", Filler(small_disk)
    _, recorder = train(Talkative(), IndexData(3), root, filler, **options)
    assert len(recorder.saved) == 5
    shown = capsys.readouterr().err
    assert "TensorBoard's log ends here" in shown
    assert "COULD NOT BE WRITTEN" not in shown


def test_run_stopped_on_a_full_disk_goes_on_from_the_last_checkpoint(
    small_disk, tmp_path
):
    class Fill(Filler):
        def on_training_batch_end(self, session):
            if session.state.global_iteration == 5:
                raise Broken

    options = {"total_steps": 4, "chkpt_frequency": 1}
    with pytest.raises(Broken):
        train(IdModel(), IndexData(3), small_disk, Fill(small_disk), **options)
    (small_disk / "filler").unlink()
    model, free = IdModel(), IdModel()
    train(
        model,
        IndexData(3),
        small_disk,
        Fill(tmp_path / "nowhere"),
        **{**options, "total_steps": 1},
    )
    assert model.batches == []
    train(model, IndexData(3), small_disk, StopAt(), **options)
    train(free, IndexData(3), tmp_path / "free", **options)
    assert digest(model.state_dict()) == digest(free.state_dict())


def test_folder_that_vanishes_is_made_again(tmp_path):
    class Vanish(helios.Callback):
        def on_training_epoch_start(self, session):
            if session.state.global_epoch == 2:
                shutil.rmtree(tmp_path / "ids")

    options = {"total_steps": 4, "chkpt_frequency": 1, "async_save": False}
    _, recorder = train(IdModel(), IndexData(3), tmp_path, Vanish(), **options)
    assert len(recorder.saved) == 4
    names = sorted(p.name for p in tmp_path.glob("ids/*"))
    assert names == ["ids_epoch_3_iter_9", "ids_epoch_4_iter_12"]


def test_failing_run_calls_on_exception_once(tmp_path):
    trace = []
    with pytest.raises(Broken):
        train(
            failing("train_step"),
            IndexData(),
            tmp_path,
            TraceCallback(trace),
            **OPTIONS,
        )
    assert trace[-1] == "callback on_exception Broken"
    assert sum("on_exception" in line for line in trace) == 1


@pytest.mark.parametrize("is_stopped", [True, False])
def test_last_checkpoint_that_cannot_be_written_is_an_error(tmp_path, is_stopped):
    class Block(helios.Callback):
        def on_training_batch_end(self, session):
            if session.state.global_iteration == 2:
                shutil.rmtree(tmp_path / "ids", ignore_errors=True)
                (tmp_path / "ids").write_text("a file in the way")
                if is_stopped:
                    session.request_stop("the test")

    model = IdModel()
    with pytest.raises(CheckpointError, match="could not be written"):
        train(model, IndexData(3), tmp_path, Block(), total_steps=1)
    assert len(model.batches) == (2 if is_stopped else 3)
