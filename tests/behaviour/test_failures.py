"""Exceptions anywhere: told with rank, step and samples; everything is closed."""

import os
import re
import subprocess
import sys

import pytest
import torch
from accelerate.tracking import GeneralTracker, on_main_process
from support import IdModel, IndexData, IndexDataset, train
from torch.utils.data import default_collate

import helios
from helios.checkpoint import CheckpointStore
from helios.loggers.tensorboard import get_tensorboard_writer
from helios.loggers.text import get_root_logger

TIMEOUT_S = 60
OPTIONS = {"total_steps": 2, "valid_frequency": 1, "chkpt_frequency": 1}


class Broken(Exception):
    """What the tests raise."""


def fail(*args, **kwargs):
    raise Broken("on purpose")


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


class FailingItem(IndexDataset):
    def __getitem__(self, index):
        return fail() if index == 3 else index


def failing_collate(items):
    return fail() if 3 in items else default_collate(items)


class Data(IndexData):
    """Two batches an epoch."""

    def __init__(self, dataset=IndexDataset, **params):
        super().__init__(4, valid=2, batch_size=2, **params)
        self.dataset = dataset

    def setup(self):
        super().setup()
        self._train_phases.clear()
        self._add_train_phase(self.dataset(4), self.params)


class Tracker(GeneralTracker):
    """A logger of somebody else's."""

    name, requires_logging_directory = "somebody", False

    def __init__(self):
        super().__init__()
        self.events = []

    tracker = None

    @on_main_process
    def store_init_configuration(self, values):
        pass

    @on_main_process
    def log(self, values, step=None):
        self.events.append("log")

    @on_main_process
    def finish(self):
        self.events.append("finish")


class FailingTracker(Tracker):
    log = fail


class FailingEnd(Tracker):
    def finish(self):
        super().finish()
        fail()


BEFORE = "before training"
START = r"after step 0 \(epoch 0\)"
STEP = r"in step 1 \(epoch 0, batch 0\), samples \[0, 1\]"
FIRST = r"after step 1 \(epoch 0\); its last batch was 0, samples \[0, 1\]"
EPOCH = r"after step 2 \(epoch 1\)"
VALID = r"in an evaluation after step 2 \(epoch 1\): in its batch 0, samples \[0, 1\]"
END = r"after step 4 \(epoch 2\)"

OF_MODEL = {
    "setup": BEFORE,
    "append_to_banner": BEFORE,
    "on_training_start": START,
    "on_training_epoch_start": START,
    "on_training_batch_start": STEP,
    "batch_to_device": STEP,
    "train_step": STEP,
    "on_training_batch_end": FIRST,
    "should_training_stop": FIRST,
    "on_training_epoch_end": EPOCH,
    "should_advance_dataset_phase": EPOCH,
    "on_validation_start": EPOCH,
    "on_validation_batch_start": VALID,
    "valid_step": VALID,
    "on_validation_batch_end": VALID,
    "on_validation_end": EPOCH,
    "have_metrics_improved": EPOCH,
    "should_save_checkpoint": EPOCH,
    "append_metadata_to_chkpt_name": EPOCH,
    "user_state_dict": START,
    "on_training_end": END,
}
OF_CALLBACK = {
    "state_dict": START,
    "on_training_start": START,
    "on_training_epoch_start": START,
    "on_training_batch_end": FIRST,
    "on_training_epoch_end": EPOCH,
    "on_validation_start": EPOCH,
    "on_validation_batch_end": VALID,
    "on_validation_end": EPOCH,
    "on_log": r"after step 2 \(epoch 0|1\)",
    "on_checkpoint_saved": "after step",  # by the writer's thread, at any time
    "on_training_end": END,
}
OF_DATA = {
    "prepare_data": BEFORE,
    "setup": BEFORE,
    "train_dataloader": BEFORE,
    "valid_dataloader": START,
    "state_dict": START,
    "teardown": END,
}
LOADING = r"after step 1 \(epoch 0\); its last batch was 0, samples \[0, 1\]"
WORKER = {"num_workers": 1}


def failing(base, hook, action=fail):
    return type("Failing", (base,), {hook: action})


def table():
    """Each place that a test has: what to train, and where it is to be said to fail."""
    for hook, where in OF_MODEL.items():
        yield f"model: {hook}", failing(IdModel, hook)(), Data(), [], {}, where
    for hook, where in OF_CALLBACK.items():
        callback = failing(helios.Callback, hook)()
        yield f"callback: {hook}", IdModel(), Data(), [callback], {}, where
    for hook, where in OF_DATA.items():
        yield f"data: {hook}", IdModel(), failing(Data, hook)(), [], {}, where
    for number, params in enumerate(({}, WORKER)):
        place = ("main process", "worker")[number]
        data = Data(FailingItem, **params)
        yield f"data set, {place}", IdModel(), data, [], {}, LOADING
        data = Data(collate_fn=failing_collate, **params)
        yield f"collate function, {place}", IdModel(), data, [], {}, LOADING
    for kind, where in ((FailingTracker, r"after step 2"), (FailingEnd, END)):
        trackers = {"log_with": [kind()]}
        yield f"logger: {kind.__name__}", IdModel(), Data(), [], trackers, where


TABLE = {name: rest for name, *rest in table()}


@pytest.mark.parametrize("place", TABLE)
def test_exception_anywhere_is_told_and_everything_is_closed(tmp_path, capsys, place):
    model, data, callbacks, options, where = TABLE[place]
    logs = {"enable_file_logging": True, "enable_tensorboard": True}
    logs |= {"print_banner": True}
    tracker = (options.get("log_with") or [Tracker()])[0]
    writers, handlers = [], []

    class Witness(helios.Callback):
        def on_training_start(self, session):
            writers.append(get_tensorboard_writer())
            handlers.extend(get_root_logger().handlers)

    with pytest.raises(Broken, match="on purpose"):
        train(
            *(model, data, tmp_path, Witness(), *callbacks),
            **{**OPTIONS, **logs, "log_root": tmp_path, "log_with": [tracker]},
        )
    for text in (capsys.readouterr().err, (tmp_path / "run.log").read_text()):
        assert re.search(f"rank 0 failed {where}", text), text
        # That of a worker is a part of the main process's.
        count = 2 if "worker" in place else 1
        assert text.count("Traceback (most recent call last)") == count
        assert "in fail" in text
        assert "Broken: on purpose" in text
        if "data set" in place:
            assert "Helios: in sample 3 (epoch 0, batch 1)" in text
        if "collate" in place:
            assert "Helios: in collating samples [2, 3]" in text
    for writer in writers:
        assert writer.all_writers is None
    for handler in handlers:
        assert getattr(handler, "stream", None) is None
    if writers:
        assert tracker.events[-1] == "finish"
    assert get_root_logger().handlers == []


INTERRUPTED = {"model: train_step": STEP, "callback: on_training_epoch_end": EPOCH}
INTERRUPTED |= {"model: setup": BEFORE, "model: valid_step": VALID}


@pytest.mark.parametrize("place", INTERRUPTED)
def test_interrupt_is_told_as_an_exception_is(tmp_path, capsys, place):
    owner, hook = place.split(": ")
    base = IdModel if owner == "model" else helios.Callback
    made = failing(base, hook, interrupt)()
    model, callbacks = (made, []) if owner == "model" else (IdModel(), [made])
    with pytest.raises(KeyboardInterrupt):
        train(
            *(model, Data(), tmp_path, *callbacks),
            **{**OPTIONS, "enable_file_logging": True, "log_root": tmp_path},
        )
    for text in (capsys.readouterr().err, (tmp_path / "run.log").read_text()):
        assert re.search(f"rank 0 failed {INTERRUPTED[place]}", text), text
        assert "KeyboardInterrupt" in text
    assert get_root_logger().handlers == []


class ExitingItem(IndexDataset):
    def __getitem__(self, index):
        return sys.exit() if index == 3 else index


def leave(*args, **kwargs):
    sys.exit(0)


EXITS = {
    "model: setup": (failing(IdModel, "setup", leave), Data, BEFORE),
    "model: train_step": (failing(IdModel, "train_step", leave), Data, STEP),
    "model: valid_step": (failing(IdModel, "valid_step", leave), Data, VALID),
    "data: teardown": (IdModel, failing(Data, "teardown", leave), END),
    "data set": (IdModel, lambda: Data(ExitingItem), LOADING),
}


@pytest.mark.parametrize("place", EXITS)
def test_exit_within_a_run_does_not_pass_for_its_end(tmp_path, capsys, place):
    model, data, where = EXITS[place]
    with pytest.raises(SystemExit) as caught:
        train(model(), data(), tmp_path, **OPTIONS)
    assert caught.value.code == 1
    said = capsys.readouterr().err
    assert re.search(f"rank 0 failed {where}", said), said
    assert "the run is not finished, so the exit status is 1, not 0" in said


@pytest.mark.parametrize(
    ("code", "silent"), [(3, []), ("in words", []), (0, [SystemExit])]
)
def test_exit_with_a_status_of_its_own_or_that_is_wanted_is_left_alone(
    tmp_path, code, silent
):
    model = failing(IdModel, "train_step", lambda *_: sys.exit(code))()
    with pytest.raises(SystemExit) as caught:
        train(model, Data(), tmp_path, **OPTIONS, train_exceptions=silent)
    assert caught.value.code == code


@pytest.mark.parametrize("place", ["teardown", "on_exception", "tracker", "saved"])
def test_failure_of_the_end_itself_hides_neither_the_first_one_nor_the_others(
    tmp_path, capsys, place
):
    class Other(Exception):
        pass

    def fail_too(*args, **kwargs):
        raise Other(place)

    data, tracker, callbacks = Data(), Tracker(), [helios.Callback()]
    if place == "teardown":
        data.teardown = fail_too
    if place == "tracker":
        tracker.finish = fail_too
    if place == "on_exception":
        callbacks = [failing(helios.Callback, place, fail_too)() for _ in range(2)]
    if place == "saved":
        callbacks = [failing(helios.Callback, "on_checkpoint_saved", fail_too)()]
    writers = []

    class Model(IdModel):
        def train_step(self, batch, state):
            super().train_step(batch, state)
            if place == "saved" and not state.current_iteration:
                self._session.request_save()
            if state.current_iteration == 1:
                writers.append(get_tensorboard_writer())
                fail()

    with pytest.raises(Broken, match="on purpose"):
        train(
            *(Model(), data, tmp_path, *callbacks),
            **{**OPTIONS, "enable_tensorboard": True, "log_root": tmp_path},
            log_with=[tracker],
        )
    said = capsys.readouterr().err
    assert said.count("Broken: on purpose") == 1
    assert said.count(f"Other: {place}") == (2 if place == "on_exception" else 1)
    assert "while it ended" in said
    assert writers[0].all_writers is None
    assert place == "tracker" or tracker.events[-1] == "finish"
    assert get_root_logger().handlers == []


def test_failure_of_the_writers_thread_that_is_not_the_disks_ends_the_run(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(CheckpointStore, "write_group", fail)
    with pytest.raises(Broken, match="on purpose"):
        train(IdModel(), Data(), tmp_path, **OPTIONS)
    said = capsys.readouterr().err
    assert said.count("Traceback (most recent call last)") == 1
    assert re.search(r"rank 0 failed after step [234] ", said)
    assert "in fail" in said


SCRIPT = """
import ctypes, sys
import helios
from support import IdModel, IndexData

class Model(IdModel):
    def train_step(self, batch, state):
        if sys.argv[1] == "native":
            ctypes.string_at(0)
        if sys.argv[1] == "exit":
            sys.exit()
        raise {"error": ValueError, "interrupt": KeyboardInterrupt}[sys.argv[1]]("here")

helios.Trainer(
    total_steps=1, use_cpu=True, log_root=sys.argv[2], enable_file_logging=True
).fit(Model(), IndexData())
"""


def run_script(folder, *args, script=SCRIPT):
    (folder / "script.py").write_text(script)
    return subprocess.run(
        [sys.executable, folder / "script.py", *args],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.mark.parametrize(
    ("kind", "code"), [("error", 1), ("interrupt", 130), ("exit", 1)]
)
def test_failed_run_ends_with_an_exit_status_that_says_so(tmp_path, kind, code):
    done = run_script(tmp_path, kind, tmp_path)
    assert done.returncode in (code, -2), done.stderr
    assert "rank 0 failed in step 1 (epoch 0, batch 0), samples [0]" in done.stderr


def test_crash_in_native_code_shows_the_stacks(tmp_path):
    done = run_script(tmp_path, "native", tmp_path)
    assert done.returncode == -11
    assert "Fatal Python error: Segmentation fault" in done.stderr
    assert "in train_step" in done.stderr


def test_handler_of_native_crashes_is_put_back():
    code = """
import faulthandler, sys
import helios
from support import IdModel, IndexData
seen = []
class Model(IdModel):
    def train_step(self, batch, state):
        super().train_step(batch, state)
        seen.append(faulthandler.is_enabled())
for is_enabled in (False, True):
    faulthandler.enable() if is_enabled else faulthandler.disable()
    helios.Trainer(total_steps=1, use_cpu=True).fit(Model(), IndexData(1))
    seen.append(faulthandler.is_enabled())
assert seen == [True, False, True, True], seen
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def run_out_of_memory(*args, **kwargs):
    torch.empty(2**50)  # really


def run_out_of_a_devices(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB")


@pytest.mark.parametrize("action", [run_out_of_memory, run_out_of_a_devices])
def test_error_of_memory_is_told_with_the_shapes_of_the_batch(tmp_path, capsys, action):
    class Pairs(IndexDataset):
        def __getitem__(self, index):
            return {"image": torch.zeros(3, 8), "label": index}

    model = failing(IdModel, "train_step", action)()
    with pytest.raises(RuntimeError, match="memory") as caught:
        train(model, Data(Pairs), tmp_path, **OPTIONS)
    (note,) = caught.value.__notes__
    assert "the batch has the shapes {'image': (2, 3, 8), 'label': (2,)}" in note
    assert "a smaller `batch_size`, with as many more `accumulation_steps`" in note
    assert note in capsys.readouterr().err


def test_other_errors_get_no_advice_on_memory(tmp_path):
    with pytest.raises(Broken) as caught:
        train(failing(IdModel, "train_step")(), Data(), tmp_path, **OPTIONS)
    assert not hasattr(caught.value, "__notes__")
