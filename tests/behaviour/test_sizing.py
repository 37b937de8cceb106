"""A batch size that is found before the run, by trying."""

import gc
import json
import os
import signal
import time
import weakref

import pytest
import torch
from support import IdModel, IndexData, IndexDataset, StopAt, digest, run_ranks, train

import helios
from helios.checkpoint import CheckpointStore
from helios.engine import Engine
from helios.errors import LaunchError, ModelError
from helios.loop import Run

OPTIONS = {"total_steps": 2, "batch_size": "auto"}


class Large(IdModel):
    """Has no room for more than so many samples at once."""

    def __init__(self, room):
        super().__init__()
        self.room = room

    def setup(self, for_inference=False):
        super().setup(for_inference)
        del self.batches[:]  # those of trials

    def train_step(self, batch, state):
        if len(batch) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB")
        super().train_step(batch, state)


def sizes(model):
    return {len(batch) for batch in model.batches}


@pytest.mark.parametrize(
    ("room", "size", "steps"), [(100, 12, 1), (12, 12, 1), (7, 6, 2), (1, 1, 12)]
)
def test_largest_part_of_the_batch_that_fits_is_taken(
    tmp_path, capsys, room, size, steps
):
    model = Large(room)
    assert train(model, IndexData(24, batch_size=12), tmp_path, **OPTIONS)[0]
    assert sizes(model) == {size}
    assert model.engine.accumulation_steps == steps
    said = capsys.readouterr().err
    assert f"batches of {size} fit, with `accumulation_steps` of {steps}" in said
    assert ("batches of 12 do not fit into memory" in said) == (size < 12)
    assert "Traceback" not in said
    assert said.count("finished after") == 1
    record = next(iter(CheckpointStore(tmp_path / "ids").records().values()))
    assert record["progress"]["current_iteration"] == 4


def test_global_batch_and_its_samples_stay(tmp_path):
    cut, whole, data = Large(3), Large(100), {"batch_size": 6, "shuffle": True}
    train(cut, IndexData(24, **data), tmp_path, **OPTIONS, accumulation_steps=2)
    train(whole, IndexData(24, **data), None, total_steps=2, accumulation_steps=2)
    assert cut.engine.accumulation_steps == 4
    pairs = zip(cut.batches[::2], cut.batches[1::2], strict=True)
    assert [one + two for one, two in pairs] == whole.batches


def test_run_is_as_if_the_size_had_been_given(tmp_path):
    found, given = Large(4), Large(4)
    train(found, IndexData(24, batch_size=8, shuffle=True), tmp_path, **OPTIONS)
    data = IndexData(24, batch_size=4, shuffle=True)
    train(given, data, None, total_steps=2, accumulation_steps=2)
    assert found.batches == given.batches
    assert digest(found.state_dict()) == digest(given.state_dict())


def test_run_that_goes_on_keeps_its_size_without_trying(tmp_path, capsys):
    data = {"batch_size": 8, "shuffle": True}
    whole = Large(4)
    train(whole, IndexData(24, **data), tmp_path / "whole", StopAt(), **OPTIONS)
    first, second = Large(4), Large(100)
    train(first, IndexData(24, **data), tmp_path / "parts", StopAt(batch=3), **OPTIONS)
    capsys.readouterr()
    train(second, IndexData(24, **data), tmp_path / "parts", StopAt(), **OPTIONS)
    assert "fit" not in capsys.readouterr().err
    assert first.batches + second.batches == whole.batches
    assert digest(second.state_dict()) == digest(whole.state_dict())
    path = CheckpointStore(tmp_path / "parts" / "ids").list()[0]
    third = Large(100)
    assert train(
        third, IndexData(24, **data), None, **{**OPTIONS, "total_steps": 3}, resume=path
    )[0]
    assert sizes(third) == {4}


def test_hooks_that_need_what_a_step_leaves_are_no_hindrance(tmp_path):
    class Reading(Large):
        def on_training_batch_end(self, state, should_log=False):
            super().on_training_batch_end(state, should_log)
            assert self._loss_items["loss"] is not None

    model = Reading(3)
    assert train(model, IndexData(24, batch_size=12), tmp_path, **OPTIONS)[0]
    assert sizes(model) == {3}


def test_network_that_trials_would_have_trained_is_refused(tmp_path):
    class Made(IdModel):
        def __init__(self):
            super().__init__()
            self.made = torch.nn.Linear(1, 1)

        def setup(self, for_inference=False):
            self.net = self.made
            self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01)

    with pytest.raises(ModelError, match="make it in `setup`"):
        train(Made(), IndexData(8, batch_size=4), tmp_path, **OPTIONS)
    assert train(Made(), IndexData(8, batch_size=4), tmp_path, total_steps=1)[0]


def test_stop_that_is_asked_for_in_a_trial_is_not_lost(tmp_path, capsys):
    class Stopping(Large):
        def train_step(self, batch, state):
            super().train_step(batch, state)
            os.kill(os.getpid(), signal.SIGTERM)

    model = Stopping(100)
    assert not train(model, IndexData(24, batch_size=4), tmp_path, **OPTIONS)[0]
    assert len(model.batches) == 1
    assert "SIGTERM: stopped before training, to start again" in capsys.readouterr().err


def test_program_that_asks_for_a_stop_in_a_trial_is_heard(tmp_path, capsys):
    class Stopping(Large):
        def train_step(self, batch, state):
            trainer.request_stop("by the program")
            super().train_step(batch, state)

    trainer = helios.Trainer(use_cpu=True, print_banner=False, **OPTIONS)
    assert not trainer.fit(Stopping(100), IndexData(24, batch_size=4))
    assert "by the program: stopped before training" in capsys.readouterr().err


class StoppedData(IndexData):
    """Asks for a stop in a part of its setup."""

    def __init__(self, place):
        super().__init__(24, batch_size=4)
        self.place = place

    def prepare_data(self):
        if self.place == "prepare_data":
            os.kill(os.getpid(), signal.SIGTERM)

    def setup(self):
        super().setup()
        if self.place == "setup":
            self.trainer.request_stop("by the program")


@pytest.mark.parametrize("place", ["prepare_data", "setup"])
def test_stop_in_the_setup_of_a_trial_is_not_lost(tmp_path, capsys, place):
    model = Large(100)
    assert not train(model, StoppedData(place), tmp_path, **OPTIONS)[0]
    assert "stopped before training, to start again" in capsys.readouterr().err
    assert not hasattr(model, "net")


def test_data_that_cannot_be_read_are_an_error_of_the_run(tmp_path, monkeypatch):
    make_run = Run.__init__

    def with_copies_ahead(run, *args, **options):
        make_run(run, *args, **options)
        run._reads_ahead = True  # as on a GPU

    class Broken(IndexDataset):
        def __getitem__(self, index):
            if index >= 4:
                raise ValueError("sample is broken")
            return super().__getitem__(index)

    class BrokenData(IndexData):
        def setup(self):
            self._add_train_phase(Broken(24), {"batch_size": 4})

    monkeypatch.setattr(Run, "__init__", with_copies_ahead)
    with pytest.raises(ValueError, match="sample is broken"):
        train(Large(100), BrokenData(), tmp_path, **OPTIONS)


def test_nothing_of_a_trial_is_in_memory_when_the_next_one_is_placed(
    tmp_path, monkeypatch
):
    prepare, made, alive = Engine.prepare, [], []

    def counting(engine, networks, *others):
        gc.collect()
        alive.append(sum(each() is not None for each in made))
        made.extend(map(weakref.ref, networks))
        return prepare(engine, networks, *others)

    monkeypatch.setattr(Engine, "prepare", counting)
    assert train(Large(3), IndexData(24, batch_size=12), tmp_path, **OPTIONS)[0]
    assert alive == [0] * 5  # trials of 12, 6, 4, 3, and the run


def test_limit_of_time_is_for_trials_and_run_together(tmp_path, capsys):
    class Slow(Large):
        def train_step(self, batch, state):
            time.sleep(0.5)
            super().train_step(batch, state)

    model = Slow(4)  # trials of 12, 6 and 4 samples take 0.5, 0.5 and 1 s
    data = IndexData(24, batch_size=12)
    assert not train(model, data, tmp_path, **OPTIONS, max_time_s=1.3)[0]
    said = capsys.readouterr().err
    assert "`max_time_s` is over, 1.3 s: stopped before training" in said


def test_network_that_is_too_large_for_any_batch_is_told(tmp_path):
    with pytest.raises(LaunchError, match="no part of the batch of 4 fits"):
        train(Large(0), IndexData(8, batch_size=4), tmp_path, **OPTIONS)


def test_other_failures_are_those_of_the_run(tmp_path, capsys):
    class Failing(IdModel):
        def train_step(self, batch, state):
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        train(Failing(), IndexData(8, batch_size=4), tmp_path, **OPTIONS)
    said = capsys.readouterr().err
    assert said.count("ValueError: mine") == 1
    assert "rank 0 failed in step 1" in said


@pytest.mark.parametrize("value", ["automatic", 8, True])
def test_other_sizes_are_the_datas_to_say(value):
    with pytest.raises(ValueError, match="`batch_size` must be one of"):
        helios.Trainer(batch_size=value)


SCRIPT = """
import json
import os
import pathlib
import sys
import torch
import helios
from helios.errors import LaunchError
from support import IdModel, IndexData, digest

torch.set_num_threads(1)
rank, rooms = int(os.environ["RANK"]), json.loads(sys.argv[1])

class Large(IdModel):
    def setup(self, for_inference=False):
        super().setup(for_inference)
        self.net.register_buffer("shared", torch.zeros(1))  # with each forward
        self.batches.clear()  # those of trials
    def train_step(self, batch, state):
        if rooms[rank] == "raise":
            raise ValueError("my step is wrong")
        if rooms[rank] != "none" and len(batch) > rooms[rank]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB")
        super().train_step(batch, state)
    def on_training_batch_end(self, state, should_log=False):
        assert self._loss_items  # which only a step leaves
        super().on_training_batch_end(state, should_log)
    def batch_to_device(self, batch, phase):
        if rank == 1 and rooms[rank] == "none":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB")
        return super().batch_to_device(batch, phase)

model = Large()
if "none" not in rooms:
    model.train_step = model.train_step  # as of a step that was compiled
trainer = helios.Trainer(
    use_cpu=True, total_steps=2, batch_size=sys.argv[2] or None, chkpt_root="runs",
    accumulation_steps=int(sys.argv[4]), log_root=".", enable_file_logging=True,
)
try:
    trainer.fit(model, IndexData(32, batch_size=int(sys.argv[3]), shuffle=True))
    assert ("train_step" in vars(model)) == ("none" not in rooms)
    report = [digest(model.net.state_dict()), model.batches]
except LaunchError as error:
    if "outside" in str(error):
        raise
    report = str(error)
except (ValueError, RuntimeError) as error:
    report = str(error)
    if "raise" not in rooms:
        raise
pathlib.Path(f"report_{rank}.json").write_text(json.dumps(report))
if "raise" not in rooms:
    torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def on_ranks(folder, rooms, batch_size, size, steps=1):
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT)
    run_ranks(
        script, len(rooms), json.dumps(rooms), batch_size, size, steps, cwd=folder
    )
    paths = [folder / f"report_{rank}.json" for rank in range(len(rooms))]
    return [json.loads(path.read_text()) for path in paths]


def test_size_that_fits_each_of_several_ranks_is_taken(tmp_path):
    first, second = on_ranks(tmp_path / "found", [100, 5], "auto", 8)
    assert {len(batch) for batch in [*first[1], *second[1]]} == {4}
    assert first[0] == second[0]
    given = on_ranks(tmp_path / "given", [100, 100], "", 4, 2)
    assert [first, second] == given


def test_ranks_that_have_no_room_for_any_batch_are_told(tmp_path):
    told = on_ranks(tmp_path / "none", [100, 0], "auto", 4)
    assert told[0] == told[1]
    assert "no part of the batch of 4 fits" in told[0]


def test_memory_that_is_too_small_outside_of_a_step_ends_the_ranks(tmp_path):
    with pytest.raises(
        AssertionError, match="out of memory outside of its `train_step`"
    ):
        on_ranks(tmp_path / "elsewhere", [100, "none"], "auto", 4)


def test_what_a_rank_raises_in_a_trial_is_in_its_log(tmp_path):
    told = on_ranks(tmp_path / "raised", [100, "raise"], "auto", 4)
    assert told[1] == "my step is wrong"
    log = next((tmp_path / "raised").glob("*.rank_1.log")).read_text()
    assert "rank 1 failed in step 1 (epoch 0, batch 0), samples [" in log
    assert "ValueError: my step is wrong" in log
