"""What a run tells: file, console, TensorBoard, callbacks."""

import logging
import os
import re
import warnings

import pytest
import torch
from support import (
    IdModel,
    IndexData,
    RandomData,
    RandomModel,
    RecordingCallback,
    StopAt,
    TraceCallback,
    TraceModel,
    train,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import helios
from helios.loggers.tensorboard import get_tensorboard_writer
from helios.loggers.text import get_root_logger

OPTIONS = {
    "total_steps": 3,
    "valid_frequency": 1,
    "chkpt_frequency": 1,
    "print_frequency": 1,
}


class Crash(helios.Callback):
    """Fails after so many batches."""

    def __init__(self, batch=None):
        self.batch = batch

    def on_training_batch_end(self, session):
        if session.state.global_iteration == self.batch:
            raise RuntimeError("crash")


# What `log` does where.


class Speaking(IdModel):
    """Logs everywhere."""

    def on_training_start(self):
        self.log("start", 1)

    def on_training_epoch_start(self, current_epoch):
        self.log("epoch start", current_epoch)

    def train_step(self, batch, state):
        super().train_step(batch, state)
        self.log("sample", batch.item())
        if batch.item() == 0:
            self.log("first", torch.tensor([0.5]))

    def on_training_epoch_end(self, current_epoch):
        self.log("epoch end", current_epoch)

    def on_validation_start(self, validation_cycle):
        super().on_validation_start(validation_cycle)
        self.log("validation start", validation_cycle)

    def valid_step(self, batch, step):
        self.log_dict({"sum": batch.sum(), "step": step})

    def on_validation_end(self, validation_cycle):
        super().on_validation_end(validation_cycle)
        self.log("validation end", validation_cycle)

    def test_step(self, batch, step):
        self.log("test", batch.float().mean())

    def on_training_end(self):
        self.log("end", 2)


def spoken(tmp_path, **options):
    data = IndexData(3, valid=4)
    _, recorder = train(Speaking(), data, tmp_path, total_steps=1, **options)
    lines = [
        (step, name, float.fromhex(value)) for step, name, value in recorder.logged
    ]
    return [line for line in lines if line[1] != "loss"]


def test_training_steps_log_their_latest_values_at_the_end_of_the_epoch(tmp_path):
    assert spoken(tmp_path, valid_frequency=1) == [
        (0, "start", 1.0),
        (0, "epoch start", 0.0),
        (3, "sample", 2.0),
        (3, "first", 0.5),
        (3, "epoch end", 0.0),
        (3, "validation start", 0.0),
        (3, "sum", 3.0),
        (3, "step", 0.5),
        (3, "validation end", 0.0),
        (3, "end", 2.0),
    ]


def test_training_steps_log_their_latest_values_at_log_points(tmp_path):
    assert spoken(tmp_path, print_frequency=2) == [
        (0, "start", 1.0),
        (0, "epoch start", 0.0),
        (2, "sample", 1.0),
        (2, "first", 0.5),
        (3, "epoch end", 0.0),
        (3, "end", 2.0),
    ]


def test_test_logs_means():
    recorder = RecordingCallback()
    trainer = helios.Trainer(use_cpu=True, callbacks=[recorder])
    trainer.test(Speaking(), IndexData(valid=4))
    assert recorder.logged == [(0, "test", (1.5).hex())]


class Reducing(IdModel):
    """Logs each batch's first id in all ways, and a tensor beside a number."""

    def valid_step(self, batch, step):
        for how in (None, "mean", "sum", "max", "min"):
            self.log(f"{how}", batch[0].item(), reduce=how)
        self.log("tensors", batch[1], reduce="max")


def test_validation_reduces_over_its_batches_as_is_asked(tmp_path):
    # Batches begin with 0, 2, and 4.
    data = IndexData(2, valid=6)
    options = {"total_steps": 1, "valid_frequency": 1}
    _, recorder = train(Reducing(), data, tmp_path, **options)
    found = {name: float.fromhex(v) for _, name, v in recorder.logged if name != "loss"}
    assert found == {
        **{"None": 2.0, "mean": 2.0, "sum": 6.0, "max": 4.0, "min": 0.0},
        "tensors": 5.0,
    }


def test_unknown_reduction_is_refused(tmp_path):
    class Wrong(IdModel):
        def train_step(self, batch, state):
            self.log("loss", 1.0, reduce="median")

    with pytest.raises(ValueError, match=r"`reduce` must be one of .* got 'median'"):
        train(Wrong(), IndexData(2), tmp_path, total_steps=1)


def test_log_outside_of_a_run_is_refused():
    with pytest.raises((AssertionError, helios.HeliosError), match="in no run"):
        IdModel().log("loss", 1.0)


def test_callbacks_may_log(tmp_path):
    class Halves(helios.Callback):
        def on_training_epoch_end(self, session):
            session.log({"half": 0.5})

    _, recorder = train(IdModel(), IndexData(2), tmp_path, Halves(), total_steps=1)
    assert (2, "half", (0.5).hex()) in recorder.logged


def test_value_that_is_no_number_is_named(tmp_path):
    class Wrong(IdModel):
        def train_step(self, batch, state):
            super().train_step(batch, state)
            self.log("pair", torch.ones(2))

    with pytest.raises((TypeError, ValueError, RuntimeError), match="pair"):
        train(Wrong(), IndexData(2), tmp_path, total_steps=1)


# The file and the console.


def lines_of(file):
    """The messages, without times."""
    return [re.sub(r"^\S+ \S+ ", "", line) for line in file.read_text().splitlines()]


def test_log_file_is_continued_by_a_resumed_run(tmp_path):
    options = {**OPTIONS, "enable_file_logging": True, "run_name": "mine"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(IdModel(), IndexData(), whole, StopAt(), log_root=whole, **options)
    for stop in (StopAt(5), StopAt(20), StopAt()):
        train(IdModel(), IndexData(), parts, stop, log_root=parts, **options)
    one = [line for line in lines_of(whole / "mine.log") if "loss" in line]
    three = [line for line in lines_of(parts / "mine.log") if "loss" in line]
    assert len(one) == 36
    assert three == one
    text = (parts / "mine.log").read_text()
    assert text.count("resumed from ids_epoch_") == 2
    assert text.count("the test: stopped") == 2
    assert text.count("finished") == 1


def test_older_paths_of_logs_are_kept(tmp_path):
    train(
        IdModel(),
        IndexData(1),
        None,
        total_steps=1,
        enable_file_logging=True,
        enable_tensorboard=True,
        log_path=tmp_path / "text",
        run_path=str(tmp_path / "events"),
        run_name="old",
    )
    assert "finished" in (tmp_path / "text" / "old.log").read_text()
    assert list((tmp_path / "events").rglob("events.out.tfevents.*"))


def test_console_shows_what_is_logged(tmp_path, capsys):
    train(IdModel(), IndexData(2), tmp_path, total_steps=1, print_banner=True)
    shown = capsys.readouterr().err
    assert helios.__version__ in shown
    assert re.search(r"\bepoch 0  step 2\b.*loss", shown) or "loss" in shown
    assert "finished" in shown


def test_model_adds_to_the_banner(tmp_path, capsys):
    class Bannered(IdModel):
        def append_to_banner(self, banner):
            return f"{banner}\nwith a line of mine"

    train(Bannered(), IndexData(1), tmp_path, total_steps=1, print_banner=True)
    assert "with a line of mine" in capsys.readouterr().err
    train(Bannered(), IndexData(1), tmp_path, total_steps=1)
    assert "with a line of mine" not in capsys.readouterr().err


def test_users_may_write_to_the_root_logger(tmp_path):
    class Writing(IdModel):
        def on_training_start(self):
            get_root_logger().info("from the %s", "model")

    options = {"enable_file_logging": True, "log_root": tmp_path}
    train(Writing(), IndexData(1), None, total_steps=1, **options)
    assert "INFO from the model" in lines_of(tmp_path / "run.log")


@pytest.mark.parametrize("is_captured", [True, False])
def test_warnings_are_logged_where_asked(tmp_path, is_captured):
    class Warning(IdModel):
        def on_training_start(self):
            warnings.warn("a warning of mine", UserWarning, stacklevel=1)

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        show = warnings.showwarning
        train(
            Warning(),
            IndexData(1),
            None,
            total_steps=1,
            capture_warnings=is_captured,
            enable_file_logging=True,
            log_root=tmp_path,
        )
        assert warnings.showwarning is show
    logged = (tmp_path / "run.log").read_text()
    assert ("a warning of mine" in logged) == is_captured
    assert [str(w.message) for w in shown] == ["a warning of mine"] * (not is_captured)


def test_loggers_are_put_back_as_they_were(tmp_path):
    logger = get_root_logger()
    before = logger.level, logger.propagate, list(logger.handlers)
    handlers = list(logging.getLogger().handlers)
    train(IdModel(), IndexData(1), tmp_path, total_steps=1)
    assert (logger.level, logger.propagate, logger.handlers) == before
    assert logging.getLogger().handlers == handlers


# TensorBoard.


def scalars(folder):
    """By name: steps and values, as TensorBoard shows them."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: [(e.step, e.value) for e in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def board(root, *callbacks, **options):
    options = {**OPTIONS, "enable_tensorboard": True, "run_name": "mine", **options}
    try:
        train(
            RandomModel(),
            RandomData(),
            root / "c",
            *callbacks,
            log_root=root,
            **options,
        )
    finally:
        # TensorBoard reads files in the order of their names, which begin with the
        # second of their making: one each, where all of this takes less.
        files = sorted(root.rglob("events.out.tfevents.*"), key=os.path.getmtime)
        for second, file in enumerate(files):
            file.rename(file.with_name(f"events.out.tfevents.{second:010d}.host"))


def events_of(root):
    (file, *_) = root.rglob("events.out.tfevents.*")
    return scalars(file.parent)


def test_board_of_a_stopped_run_is_that_of_an_uninterrupted_one(tmp_path):
    board(tmp_path / "whole", StopAt())
    for stop in (StopAt(3), StopAt(validation=1), StopAt()):
        board(tmp_path / "parts", stop)
    whole = events_of(tmp_path / "whole")
    assert [step for step, _ in whole["loss"]] == list(range(1, 16))
    assert [step for step, _ in whole["score"]] == [5, 10, 15]
    assert events_of(tmp_path / "parts") == whole


@pytest.mark.parametrize("batch", [2, 7, 9])
def test_board_of_a_crashed_run_is_that_of_an_uninterrupted_one(tmp_path, batch):
    board(tmp_path / "whole", Crash())
    # What it logs after its last checkpoint is logged again, and must not show twice.
    with pytest.raises(RuntimeError, match="crash"):
        board(tmp_path / "parts", Crash(batch))
    board(tmp_path / "parts", Crash())
    assert events_of(tmp_path / "parts") == events_of(tmp_path / "whole")


def test_board_of_a_run_that_crashed_twice_is_that_of_an_uninterrupted_one(tmp_path):
    board(tmp_path / "whole", Crash())
    for batch in (4, 9, 13):
        with pytest.raises(RuntimeError, match="crash"):
            board(tmp_path / "parts", Crash(batch))
    board(tmp_path / "parts", Crash())
    assert events_of(tmp_path / "parts") == events_of(tmp_path / "whole")


def test_finished_run_started_again_adds_nothing_to_its_board(tmp_path):
    board(tmp_path, StopAt())
    before = events_of(tmp_path)
    board(tmp_path, StopAt())
    assert events_of(tmp_path) == before


def test_writer_is_that_of_the_run_in_progress_and_else_does_nothing(tmp_path):
    class Writing(IdModel):
        def train_step(self, batch, state):
            super().train_step(batch, state)
            get_tensorboard_writer().add_scalar("mine", 3.0, state.current_iteration)

    options = {"total_steps": 1, "log_root": tmp_path}
    train(Writing(), IndexData(2), None, **options)
    assert not list(tmp_path.rglob("events.*"))
    train(Writing(), IndexData(2), None, enable_tensorboard=True, **options)
    assert events_of(tmp_path)["mine"] == [(0, 3.0), (1, 3.0)]
    assert get_tensorboard_writer().add_scalar("mine", 3.0, 1) is None
    assert get_tensorboard_writer().add_anything(1, named=2) is None


def test_callbacks_hear_what_is_logged(tmp_path):
    model = TraceModel()
    callback = TraceCallback(model.trace)
    train(model, IndexData(2), tmp_path, callback, total_steps=1, print_frequency=1)
    assert model.trace.count("callback on_log loss") == 2


def test_error_of_a_teardown_is_logged(tmp_path, capsys):
    class Data(IndexData):
        def teardown(self):
            raise KeyError("not to be torn down")

    with pytest.raises(KeyError, match="torn down"):
        train(IdModel(), Data(2), None, total_steps=1)
    assert "KeyError: 'not to be torn down'" in capsys.readouterr().err
