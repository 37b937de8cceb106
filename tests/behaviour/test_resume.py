"""A run stopped anywhere and started again ends with the same bits."""

import functools

import pytest
import torch
from support import (
    Case,
    RandomData,
    RandomModel,
    RecordingCallback,
    StopAt,
    digest,
    every_batch,
    train,
)

import helios

EPOCHS = {"total_steps": 4, "valid_frequency": 1, "chkpt_frequency": 2}
STEPS = {
    "train_unit": "iteration",
    "total_steps": 17,
    "valid_frequency": 4,
    "chkpt_frequency": 3,
    "print_frequency": 2,
}


def check(root, stops, *, model=RandomModel, data=None, **options):
    make_data = functools.partial(RandomData, **(data or {}))
    Case(model, make_data, **options).check(root, stops)


@pytest.mark.parametrize("accumulation_steps", [1, 2, 3])
def test_stop_at_any_batch_of_a_run_in_epochs(tmp_path, accumulation_steps):
    check(tmp_path, every_batch(20), accumulation_steps=accumulation_steps, **EPOCHS)


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_stop_at_any_batch_of_a_run_in_steps(tmp_path, accumulation_steps):
    check(tmp_path, every_batch(17), accumulation_steps=accumulation_steps, **STEPS)


def test_stop_at_every_batch_one_after_the_other(tmp_path):
    check(tmp_path, [[StopAt(batch=batch) for batch in range(20)]], **EPOCHS)


def test_stop_during_any_validation(tmp_path):
    stops = [
        [StopAt(validation=cycle, valid_step=step)]
        for cycle in range(4)
        for step in range(2)
    ]
    check(tmp_path, stops, **EPOCHS)


def test_stop_during_two_validations_then_inside_the_next_epoch(tmp_path):
    chain = [StopAt(validation=1), StopAt(validation=2, valid_step=1), StopAt(batch=17)]
    check(tmp_path, [chain], accumulation_steps=2, **EPOCHS)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_resumes_exactly(tmp_path, precision):
    stops = [[StopAt(batch=batch)] for batch in (0, 3, 7)]
    check(tmp_path, stops, mixed_precision=precision, accumulation_steps=2, **EPOCHS)


class Phased(RandomModel):
    """Goes on to the next phase after every epoch."""

    def should_advance_dataset_phase(self):
        return self.trainer.datamodule.train_dataset.inputs.shape[0] < 28


def test_switch_between_phases_resumes_exactly(tmp_path):
    check(tmp_path, every_batch(22), model=Phased, data={"phases": 3}, **EPOCHS)


@pytest.mark.parametrize(
    "workers",
    [
        {"num_workers": 2},
        {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 4},
    ],
)
def test_workers_resume_exactly(tmp_path, workers):
    check(tmp_path, [[StopAt(batch=3), StopAt(batch=9)]], data=workers, **EPOCHS)


def test_number_of_workers_changes_nothing(tmp_path):
    alone = Case(**EPOCHS).uninterrupted(tmp_path / "0")
    four = functools.partial(RandomData, num_workers=4, persistent_workers=True)
    assert Case(data=four, **EPOCHS).uninterrupted(tmp_path / "4") == alone


def test_workers_may_change_at_a_resume(tmp_path):
    whole = Case(**EPOCHS).uninterrupted(tmp_path / "whole")
    first = RandomModel()
    stop = StopAt(batch=7)
    recorder = RecordingCallback()
    trainer = helios.Trainer(
        callbacks=[recorder, stop],
        chkpt_root=tmp_path / "parts",
        use_cpu=True,
        **EPOCHS,
    )
    assert not trainer.fit(first, RandomData(num_workers=2))
    second = RandomModel()
    assert trainer.fit(second, RandomData())
    assert digest(second.state_dict()) == whole.weights
    assert first.ids + second.ids == whole.ids
    assert recorder.logged == whole.logged


class Crash(helios.Callback):
    """Fails after so many batches."""

    def __init__(self, batch):
        self.batch = batch

    def on_training_batch_end(self, session):
        if session.state.global_iteration == self.batch:
            raise RuntimeError("crash")


@pytest.mark.parametrize("options", [EPOCHS, STEPS], ids=["epochs", "steps"])
def test_crash_after_any_batch_resumes_from_the_last_checkpoint(tmp_path, options):
    case = Case(**options)
    whole = case.uninterrupted(tmp_path / "whole")
    for batch in range(1, 18, 2):
        root = tmp_path / f"crash_{batch}"
        with pytest.raises(RuntimeError, match="crash"):
            case.run(root, Crash(batch))
        is_finished, model, _ = case.run(root, Crash(None))
        assert is_finished
        assert digest(model.state_dict()) == whole.weights, batch
        assert [value.hex() for value in model.history] == whole.history


class Meddler(RandomModel):
    """Draws and changes weights in hooks that a resume runs again."""

    def on_training_start(self):
        with torch.no_grad():
            self.temperature.add_(torch.rand(()))

    def on_training_epoch_start(self, current_epoch):
        with torch.no_grad():
            self.heads["a"].bias.add_(torch.rand(1))
        self.history.append(float(current_epoch))


def test_hooks_that_change_state_resume_exactly(tmp_path):
    check(tmp_path, every_batch(12), model=Meddler, **{**EPOCHS, "total_steps": 3})


def test_finished_run_started_again_changes_nothing(tmp_path):
    whole = Case(**EPOCHS).uninterrupted(tmp_path)
    is_finished, model, recorder = Case(**EPOCHS).run(tmp_path)
    assert is_finished
    assert digest(model.state_dict()) == whole.weights
    assert model.ids == recorder.logged == []


def test_finished_run_can_be_made_longer(tmp_path):
    longer = Case(**{**EPOCHS, "total_steps": 6})
    whole = longer.uninterrupted(tmp_path / "whole")
    Case(**EPOCHS).run(tmp_path / "parts")
    _, model, _ = longer.run(tmp_path / "parts")
    assert digest(model.state_dict()) == whole.weights


def test_run_that_ended_for_want_of_improvement_stays_ended(tmp_path):
    class Worse(RandomModel):
        def have_metrics_improved(self):
            super().have_metrics_improved()
            return False

    options = {**EPOCHS, "total_steps": float("inf"), "early_stop_cycles": 2}
    model = Worse()
    is_finished, _ = train(model, RandomData(), tmp_path, **options)
    again = Worse()
    assert is_finished
    assert len(model.ids) == 10
    assert train(again, RandomData(), tmp_path, **options)[0]
    assert digest(again.state_dict()) == digest(model.state_dict())
