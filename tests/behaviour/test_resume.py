"""A run stopped anywhere and started again ends with the same bits."""

import pytest
from support import RandomData, RandomModel, RecordingCallback, StopAt, digest, train

import helios
from helios.checkpoint import find_last_checkpoint, read_checkpoint

EPOCHS = {"total_steps": 4, "valid_frequency": 1, "chkpt_frequency": 2}
STEPS = {
    "train_unit": "iteration",
    "total_steps": 17,
    "valid_frequency": 4,
    "chkpt_frequency": 3,
    "print_frequency": 2,
}


class Outcome:
    """All that two runs are compared by."""

    def __init__(self, model, root, recorder):
        self.weights = digest(model.state_dict())
        self.history = [value.hex() for value in model.history]
        self.ids = list(model.ids)
        self.logged = list(recorder.logged)
        checkpoint = read_checkpoint(find_last_checkpoint(root))
        self.state = digest(checkpoint.tree("training"))
        self.rng = digest(checkpoint.tree("rank_0"))
        progress = checkpoint.record["progress"]
        self.progress = {k: progress[k] for k in progress if "time" not in k}

    def __eq__(self, other):
        return vars(self) == vars(other)


def run(root, *callbacks, data=None, **options):
    model = RandomModel()
    is_finished, recorder = train(
        model, RandomData(**(data or {})), root, *callbacks, **options
    )
    return is_finished, model, recorder


def uninterrupted(root, **options):
    is_finished, model, recorder = run(root, **options)
    assert is_finished
    return Outcome(model, root, recorder)


def interrupted(root, *stops, data=None, **options):
    """Run once for each stop, then to the end; ids and logs of all runs joined."""
    ids, logged = [], []
    for stop in stops:
        is_finished, model, recorder = run(root, stop, data=data, **options)
        assert not is_finished
        ids += model.ids
        logged += recorder.logged
    is_finished, model, recorder = run(root, StopAt(), data=data, **options)
    assert is_finished
    model.ids[:0] = ids
    recorder.logged[:0] = logged
    return Outcome(model, root, recorder)


def check(tmp_path, stops, **options):
    # The same callbacks as in the interrupted runs, which a resume asks for.
    is_finished, model, recorder = run(tmp_path / "whole", StopAt(), **options)
    assert is_finished
    whole = Outcome(model, tmp_path / "whole", recorder)
    for number, chain in enumerate(stops):
        parts = interrupted(tmp_path / f"parts_{number}", *chain, **options)
        for name, value in vars(whole).items():
            assert getattr(parts, name) == value, (name, [vars(s) for s in chain])


def every_batch(count):
    return [[StopAt(batch=batch)] for batch in range(count)]


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


def test_switch_between_phases_resumes_exactly(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "RandomModel", Phased)
    check(tmp_path, every_batch(22), data={"phases": 3}, **EPOCHS)


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
    alone = uninterrupted(tmp_path / "0", **EPOCHS)
    four = {"num_workers": 4, "persistent_workers": True}
    assert uninterrupted(tmp_path / "4", data=four, **EPOCHS) == alone


def test_workers_may_change_at_a_resume(tmp_path):
    whole = uninterrupted(tmp_path / "whole", **EPOCHS)
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
    whole = uninterrupted(tmp_path / "whole", **options)
    for batch in range(1, 18, 2):
        root = tmp_path / f"crash_{batch}"
        with pytest.raises(RuntimeError, match="crash"):
            run(root, Crash(batch), **options)
        is_finished, model, _ = run(root, Crash(None), **options)
        assert is_finished
        assert digest(model.state_dict()) == whole.weights, batch
        assert [value.hex() for value in model.history] == whole.history


class Meddler(RandomModel):
    """Draws and changes weights in hooks that a resume runs again."""

    def on_training_start(self):
        import torch

        with torch.no_grad():
            self.temperature.add_(torch.rand(()))

    def on_training_epoch_start(self, current_epoch):
        import torch

        with torch.no_grad():
            self.heads["a"].bias.add_(torch.rand(1))
        self.history.append(float(current_epoch))


def test_hooks_that_change_state_resume_exactly(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "RandomModel", Meddler)
    check(tmp_path, every_batch(12), **{**EPOCHS, "total_steps": 3})


def test_finished_run_started_again_changes_nothing(tmp_path):
    whole = uninterrupted(tmp_path, **EPOCHS)
    is_finished, model, recorder = run(tmp_path, **EPOCHS)
    assert is_finished
    assert digest(model.state_dict()) == whole.weights
    assert model.ids == recorder.logged == []


def test_finished_run_can_be_made_longer(tmp_path):
    whole = uninterrupted(tmp_path / "whole", **{**EPOCHS, "total_steps": 6})
    run(tmp_path / "parts", **EPOCHS)
    _, model, _ = run(tmp_path / "parts", **{**EPOCHS, "total_steps": 6})
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
