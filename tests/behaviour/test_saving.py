"""When checkpoints are made, and which of them stay."""

import collections
import errno
import os
import shutil
import signal
import threading

import pytest
import torch
from support import IdModel, IndexData, train

import helios
from helios.checkpoint import (
    CheckpointStore,
    find_damage,
    find_last_checkpoint,
    read_checkpoint,
)
from helios.errors import CheckpointError, ResumeError

IN_STEPS = {"train_unit": "iteration", "total_steps": 8}


class Clock:
    """A clock that goes on by some seconds with each batch."""

    def __init__(self, step_s):
        self.now_s, self.step_s = 0.0, step_s

    def __call__(self):
        return self.now_s


class Clocked(helios.Callback):
    """Gives a run its clock."""

    def __init__(self, step_s):
        self.clock = Clock(step_s)

    def on_training_start(self, session):
        session.saver._clock = self.clock
        session.saver.answered()
        session.saver._looked_s = 0.0

    def on_training_batch_end(self, session):
        self.clock.now_s += self.clock.step_s


def steps(root):
    """The steps of the checkpoints that are there, in order."""
    records = CheckpointStore(root / "ids").records().values()
    return sorted(r["progress"]["current_iteration"] for r in records)


def test_interval_in_seconds_saves_at_the_first_step_after_it(tmp_path):
    train(
        IdModel(), IndexData(), tmp_path, Clocked(2.0), **IN_STEPS, chkpt_interval_s=5
    )
    assert steps(tmp_path) == [3, 6, 8]


def test_interval_begins_anew_with_each_checkpoint(tmp_path):
    options = {**IN_STEPS, "chkpt_frequency": 4, "chkpt_interval_s": 6}
    train(IdModel(), IndexData(), tmp_path, Clocked(2.0), **options)
    assert steps(tmp_path) == [3, 4, 7, 8]


def test_interval_waits_for_the_end_of_an_accumulation_window(tmp_path):
    options = {**IN_STEPS, "total_steps": 3, "accumulation_steps": 3}
    data = IndexData(9, batch_size=1)
    train(IdModel(), data, tmp_path, Clocked(1.0), **options, chkpt_interval_s=1)
    records = CheckpointStore(tmp_path / "ids").records().values()
    # And at the end of the run, which is that of an epoch.
    assert sorted(r["progress"]["global_iteration"] for r in records) == [3, 6, 9, 9]


def test_model_that_declines_is_asked_once_an_interval(tmp_path):
    class Declining(IdModel):
        asked = ()

        def should_save_checkpoint(self):
            self.asked += (self.trainer._session.state.current_iteration,)
            return False

    model = Declining()
    train(model, IndexData(), tmp_path, Clocked(2.0), **IN_STEPS, chkpt_interval_s=5)
    assert model.asked == (3, 6)
    assert steps(tmp_path) == [8]


class At(helios.Callback):
    """Does something after a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_training_batch_end(self, session):
        if session.state.current_iteration == self.step:
            self.act(session)


def test_file_named_save_asks_for_a_checkpoint_and_is_removed(tmp_path):
    trigger = tmp_path / "ids" / "save"

    def drop(session):
        trigger.parent.mkdir()
        trigger.touch()

    train(IdModel(), IndexData(), tmp_path, At(2, drop), Clocked(0.4), **IN_STEPS)
    # It is looked for once a second.
    assert steps(tmp_path) == [3, 8]
    assert not trigger.exists()


def test_signal_asks_for_a_checkpoint_and_the_run_goes_on(tmp_path):
    def send(session):
        os.kill(os.getpid(), signal.SIGUSR2)

    finished, _ = train(IdModel(), IndexData(), tmp_path, At(2, send), **IN_STEPS)
    assert finished
    assert steps(tmp_path) == [2, 8]


def test_callback_can_ask_for_a_checkpoint(tmp_path):
    ask = At(5, lambda session: session.request_save())
    train(IdModel(), IndexData(), tmp_path, ask, **IN_STEPS)
    assert steps(tmp_path) == [5, 8]


def test_request_without_a_folder_is_of_no_effect():
    ask = At(5, lambda session: session.request_save())
    assert train(IdModel(), IndexData(), None, ask, **IN_STEPS)[0]


def test_multiples_of_keep_every_stay(tmp_path):
    options = {**IN_STEPS, "chkpt_frequency": 1, "keep_last": 2, "keep_every": 3}
    train(IdModel(), IndexData(), tmp_path, **options)
    assert steps(tmp_path) == [3, 6, 7, 8]


def test_keep_every_in_epochs_counts_whole_epochs(tmp_path):
    data = IndexData(6, batch_size=2)
    options = {"total_steps": 5, "chkpt_frequency": 1, "keep_last": 1, "keep_every": 2}
    ask = At(7, lambda session: session.request_save())  # in the third epoch
    train(IdModel(), data, tmp_path, ask, **options)
    assert steps(tmp_path) == [6, 12, 15]


class Scored(IdModel):
    """Logs a score in each validation."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def on_validation_end(self, validation_cycle):
        self.log("accuracy", self.scores[validation_cycle])
        super().on_validation_end(validation_cycle)


class ScoredData(IndexData):
    """With something to validate on."""

    def setup(self):
        super().setup()
        self._add_valid_dataset([0, 1])


def scored(root, scores, best, **options):
    options = {**IN_STEPS, "chkpt_frequency": 1, "valid_frequency": 1, **options}
    model = Scored(scores)
    return train(model, ScoredData(), root, keep_last=1, keep_best=best, **options)


@pytest.mark.parametrize(
    ("mode", "count", "kept"),
    [("max", 1, [3, 8]), ("max", 3, [1, 3, 5, 8]), ("min", 2, [4, 7, 8])],
)
def test_best_checkpoints_stay(tmp_path, mode, count, kept):
    scores = [0.5, 0.2, 0.9, 0.1, 0.7, float("nan"), 0.1, 0.4]
    scored(tmp_path, scores, helios.KeepBest("accuracy", mode, count))
    assert steps(tmp_path) == kept
    records = CheckpointStore(tmp_path / "ids").records().values()
    marked = [r["progress"]["current_iteration"] for r in records if r["is_best"]]
    assert marked == {"max": [3], "min": [7]}[mode]
    for path in CheckpointStore(tmp_path / "ids").list():
        assert find_damage(path) == {}


def test_best_one_stays_over_a_resume(tmp_path):
    best = helios.KeepBest("accuracy")
    scores = [0.1, 0.8, 0.3, 0.2, 0.1, 0.5, 0.1, 0.1]
    stop = At(4, lambda session: session.request_stop("the test"))
    options = {**IN_STEPS, "chkpt_frequency": 1, "valid_frequency": 1, "keep_last": 1}
    train(Scored(scores), ScoredData(), tmp_path, stop, keep_best=best, **options)
    assert steps(tmp_path) == [2, 4]
    train(
        Scored(scores), ScoredData(), tmp_path, At(0, None), keep_best=best, **options
    )
    assert steps(tmp_path) == [2, 8]


def test_replaced_checkpoint_does_not_count(tmp_path):
    best = helios.KeepBest("accuracy")
    scored(tmp_path, [0.5, 0.9], best, total_steps=2)
    scored(tmp_path, [0.5, 0.4], best, total_steps=2, resume="never")
    records = CheckpointStore(tmp_path / "ids").records().values()
    marks = {r["progress"]["current_iteration"]: r["is_best"] for r in records}
    assert marks == {1: True, 2: False}


@pytest.mark.parametrize("operation", ["amend", "remove"])
def test_older_ones_that_resist_do_not_make_the_new_one_a_failure(
    tmp_path, monkeypatch, capsys, operation
):
    def resist(self, path, **values):
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    monkeypatch.setattr(CheckpointStore, operation, resist)
    best = helios.KeepBest("accuracy")
    recorder = scored(tmp_path, [0.1, 0.5, 0.9], best, total_steps=3)[1]
    said = capsys.readouterr().err
    assert "OLDER CHECKPOINTS COULD NOT BE MARKED OR DELETED" in said
    assert "resource busy" in said
    assert "COULD NOT BE WRITTEN" not in said
    assert steps(tmp_path) == [1, 2, 3]
    assert len(recorder.saved) == 3


def test_record_without_progress_is_named_and_hinders_no_other_run(tmp_path):
    options = {**IN_STEPS, "keep_last": 1, "keep_every": 2}
    train(IdModel(), IndexData(), tmp_path, **options)
    store = CheckpointStore(tmp_path / "ids")
    (path,) = store.list()
    store.amend(path, progress={})
    with pytest.raises(CheckpointError, match=r"is without .*current_iteration"):
        train(IdModel(), IndexData(), tmp_path, **options)
    os.rename(path, path.with_name("another"))
    options["chkpt_frequency"] = 1
    finished, recorder = train(
        IdModel(), IndexData(), tmp_path, resume="never", **options
    )
    assert finished
    assert len(recorder.saved) == 8


def test_metric_that_is_not_logged_is_named_once(tmp_path, capsys):
    scored(tmp_path, [0.1, 0.5, 0.9], helios.KeepBest("acuracy"), total_steps=3)
    said = capsys.readouterr().err
    assert said.count("goes by 'acuracy', which was not logged at this step, but") == 1
    assert "at this step, but ['accuracy']: " in said
    scored(tmp_path, [0.1, 0.5, 0.9], helios.KeepBest("accuracy"), total_steps=3)
    assert "keep_best" not in capsys.readouterr().err


def test_value_of_another_step_does_not_count(tmp_path):
    scores = [0.9, 0.1]
    scored(tmp_path, scores, helios.KeepBest("accuracy"), valid_frequency=4)
    # Of 5 to 7 nothing was logged.
    assert steps(tmp_path) == [4, 8]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"chkpt_interval_s": 0}, ValueError, "`chkpt_interval_s` must be > 0"),
        ({"chkpt_interval_s": "1"}, ValueError, "`chkpt_interval_s` must be > 0"),
        ({"keep_every": 0, "keep_last": 1}, ValueError, "`keep_every` must be an int"),
        ({"keep_every": 2}, ValueError, "`keep_every` needs `keep_last`"),
        ({"keep_best": "loss", "keep_last": 1}, TypeError, "must be a helios.KeepBest"),
        ({"max_shard_bytes": 0}, ValueError, "`max_shard_bytes` must be an int >= 1"),
    ],
)
def test_wrong_options_are_refused_when_the_trainer_is_made(options, error, message):
    with pytest.raises(error, match=message):
        helios.Trainer(**options)


def test_wrong_best_is_refused():
    with pytest.raises(ValueError, match='`mode` must be "max" or "min"'):
        helios.KeepBest("loss", "lowest")
    with pytest.raises(ValueError, match="`count` must be an int >= 1"):
        helios.KeepBest("loss", "min", 0)


def test_shards_of_a_run_resume_exactly(tmp_path):
    options = {**IN_STEPS, "max_shard_bytes": 4}
    whole = IdModel()
    train(whole, IndexData(), tmp_path / "whole", **options)
    stop = At(3, lambda session: session.request_stop("the test"))
    train(IdModel(), IndexData(), tmp_path / "parts", stop, **options)
    folder = find_last_checkpoint(tmp_path / "parts")
    assert (folder / "model-00002-of-00002.safetensors").exists()
    model = IdModel()
    train(model, IndexData(), tmp_path / "parts", At(0, None), **options)
    assert model.net.weight.equal(whole.net.weight)


Usage = collections.namedtuple("Usage", "free")


def test_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch, capsys):
    real, free = shutil.disk_usage, [100]
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: Usage(free[0]) if free else real(path)
    )

    def make_room(session):
        session.saver._background.wait()  # it has found none
        free.clear()

    more_room = At(4, make_room)
    finished, _ = train(
        IdModel(), IndexData(), tmp_path, more_room, **IN_STEPS, chkpt_frequency=1
    )
    assert finished
    assert steps(tmp_path) == [4, 5, 6, 7, 8]
    said = capsys.readouterr().err
    assert said.count("A CHECKPOINT COULD NOT BE WRITTEN") == 3
    assert "bytes are needed" in said
    assert "100 are free" in said


@pytest.mark.parametrize("is_async", [False, True])
def test_last_save_is_tried_again_where_it_fails(tmp_path, monkeypatch, is_async):
    real, begun = CheckpointStore.begin, []

    def begin(self, name, size_bytes):
        begun.append(name)
        if len(begun) == 4:
            raise OSError(28, "No space left on device")
        return real(self, name, size_bytes)

    monkeypatch.setattr(CheckpointStore, "begin", begin)
    options = {**IN_STEPS, "total_steps": 4, "async_save": is_async}
    finished, _ = train(IdModel(), IndexData(), tmp_path, **options, chkpt_frequency=1)
    assert finished
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert len(begun) == 5
    # A thread that looks for a `stop` file may still be about: it ends by itself.
    assert "checkpoint writer" not in {each.name for each in threading.enumerate()}


def test_disk_that_was_full_keeps_no_part_of_a_checkpoint(tmp_path, monkeypatch):
    real, left = CheckpointStore.write_group, []

    def write_group(self, folder, group, *rest):
        if len(left) == 0 and group != "model":
            left.append(folder)
            raise OSError(28, "No space left on device")
        return real(self, folder, group, *rest)

    class Look(helios.Callback):
        def on_training_batch_end(self, session):
            session.saver._background.wait()
            left.extend([folder.exists() for folder in left[:1]])

    monkeypatch.setattr(CheckpointStore, "write_group", write_group)
    train(IdModel(), IndexData(), tmp_path, Look(), **IN_STEPS, chkpt_frequency=3)
    assert left[1] is False


@pytest.mark.parametrize("is_async", [False, True])
def test_failure_of_the_writer_is_told_at_the_next_step(
    tmp_path, monkeypatch, capsys, is_async
):
    said = {}

    def fail(self, *args):
        raise OSError(5, "Input/output error")

    def listen(session):
        said[session.state.current_iteration] = capsys.readouterr().err

    def wait(session):
        session.saver._background.wait()

    options = {**IN_STEPS, "chkpt_frequency": 3, "async_save": is_async}
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "write_group", fail)
        with pytest.raises(helios.HeliosError, match="could not be written"):
            train(
                IdModel(),
                IndexData(),
                tmp_path,
                *(At(step, wait) for step in (4, 7)),
                *(At(step, listen) for step in range(1, 9)),
                **options,
            )
    told = [step for step, text in said.items() if "Input/output error" in text]
    # A writer that has failed by the end of the step is heard of at once.
    assert told == [4, 7] or (is_async and told in ([5, 8], [4, 8], [5, 7]))


def test_error_of_a_hook_that_a_checkpoint_calls_ends_the_run_at_the_next_step(
    tmp_path,
):
    class Failing(helios.Callback):
        def on_checkpoint_saved(self, session, path):
            raise KeyError("mine")

    model = IdModel()
    options = {**IN_STEPS, "chkpt_frequency": 3, "async_save": False}
    with pytest.raises(KeyError, match="mine"):
        train(model, IndexData(), tmp_path, Failing(), **options)
    assert len(model.batches) == 3
    assert read_checkpoint(find_last_checkpoint(tmp_path))


class OtherModel(IdModel):
    def setup(self, for_inference=False):
        super().setup()
        self.more = torch.nn.Linear(1, 1)


def test_refused_resume_deletes_nothing(tmp_path):
    options = {**IN_STEPS, "total_steps": 3, "chkpt_frequency": 1}
    train(IdModel(), IndexData(), tmp_path, **options)
    with pytest.raises(ResumeError):
        train(OtherModel(), IndexData(), tmp_path, **options, keep_last=1)
    assert steps(tmp_path) == [1, 2, 3]


def test_damaged_ones_that_were_passed_over_do_not_count(tmp_path):
    options = {**IN_STEPS, "chkpt_frequency": 1}
    train(IdModel(), IndexData(), tmp_path, **{**options, "total_steps": 5})
    store = CheckpointStore(tmp_path / "ids")
    for path in store.list()[:2]:
        damaged = path / "model.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-1])

    class Look(helios.Callback):
        def on_training_batch_end(self, session):
            session.saver.finish()
            kept.append(steps(tmp_path))

    kept = []
    train(IdModel(), IndexData(), tmp_path, Look(), **options, keep_last=2)
    # Of the steps 4 and 5 there are new ones as soon as they are done again.
    assert kept[:4] == [[2, 3, 4, 5], [3, 4, 5], [4, 5], [5, 6]]
    assert steps(tmp_path) == [7, 8]
    assert [find_damage(path) for path in store.list()] == [{}, {}]


def test_fresh_start_counts_and_deletes_no_checkpoint_of_another_run(tmp_path):
    options = {**IN_STEPS, "keep_last": 1}
    train(IdModel(), IndexData(), tmp_path, **IN_STEPS, chkpt_frequency=2)
    for total, resume in ((3, "never"), (7, "auto"), (9, "auto")):
        options |= {"total_steps": total, "resume": resume}
        train(IdModel(), IndexData(), tmp_path, **options)
        assert steps(tmp_path) == sorted([2, 4, 6, 8, total])


def test_resume_deletes_what_a_dead_run_left_and_spares_what_it_goes_on_from(tmp_path):
    options = {**IN_STEPS, "total_steps": 3, "chkpt_frequency": 1}
    train(IdModel(), IndexData(), tmp_path, **options)
    store = CheckpointStore(tmp_path / "ids")
    damaged = store.list()[0] / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (tmp_path / "ids" / ".helios-0123").mkdir()

    def look(session):
        assert steps(tmp_path) == [2, 3]
        assert not list((tmp_path / "ids").glob(".helios-*"))

    train(IdModel(), IndexData(), tmp_path, At(3, look), **options, keep_last=1)
    assert steps(tmp_path) == [3]
    assert find_damage(store.list()[0]) == {}
