"""Losses and gradients that are NaN or infinite: found, told, and dealt with."""

import itertools
import math
import os
import signal
import threading
import time

import pytest
import torch
from accelerate.tracking import GeneralTracker, on_main_process
from support import (
    Case,
    IdModel,
    IndexData,
    Outcome,
    RandomData,
    RandomModel,
    StopAt,
    digest,
    train,
)
from torch import nn

import helios
from helios.checkpoint import CheckpointStore, read_checkpoint
from helios.errors import BadNumbersError
from helios.health.watch import _WARN_EVERY, Health
from helios.interchange import take_over
from helios.loggers.tensorboard import get_tensorboard_writer

IN_STEPS = {"train_unit": "iteration", "total_steps": 8}


class Spoiled(IdModel):
    """Has bad numbers in some batches, counted from 0: in the loss, or elsewhere."""

    def __init__(self, *batches, kind="loss", value=math.nan, leaves_out=False):
        super().__init__()
        self.spoiled, self.kind, self.value = batches, kind, value
        self.leaves_out = leaves_out

    def train_step(self, batch, state):
        is_spoiled = state.global_iteration in self.spoiled
        if is_spoiled and self.leaves_out:
            return
        self.batches.append(batch.tolist())
        loss = 0.001 * self.net(batch.float()[:, None]).square().mean()
        kind = self.kind if is_spoiled else None
        if kind == "loss":
            loss = loss * self.value
        if kind == "gradient":
            handle = self.net.weight.register_hook(lambda g: g * self.value)
        self.backward(loss)
        if kind == "gradient":
            handle.remove()
        self._loss_items["mine"] = loss * self.value if kind == "item" else loss
        self.optimizer.step()
        self.optimizer.zero_grad()


WORDS = {
    "loss": "loss is {}, a gradient is not finite, mine is {}",
    "gradient": "a gradient is not finite",
    "item": "mine is {}",
}


@pytest.mark.parametrize("value", [math.nan, -math.inf], ids=str)
@pytest.mark.parametrize("kind", WORDS)
def test_bad_numbers_are_told_with_rank_step_and_samples(tmp_path, capsys, kind, value):
    model = Spoiled(4, kind=kind, value=value)
    assert train(model, IndexData(8, batch_size=1), None, **IN_STEPS)[0]
    said = capsys.readouterr().err
    what = WORDS[kind].format(value, value)
    at = "at step 5 (epoch 0, batch 4), samples [4]"
    assert f"NUMBERS HAVE GONE BAD: rank 0: {what}, {at}" in said
    assert ("in 3 more batches, to step 8" in said) == (kind != "item")
    assert len(model.batches) == 8


@pytest.mark.parametrize("policy", ["warn", "stop", "skip", "rollback", None])
def test_good_numbers_are_left_alone_by_every_policy(tmp_path, capsys, policy):
    plain, watched = IdModel(), IdModel()
    data = {"batch_size": 2, "shuffle": True}
    train(plain, IndexData(12, **data), None, total_steps=3, bad_numbers=None)
    train(watched, IndexData(12, **data), tmp_path, total_steps=3, bad_numbers=policy)
    assert "BAD" not in capsys.readouterr().err
    assert watched.batches == plain.batches
    assert digest(watched.state_dict()) == digest(plain.state_dict())


def test_without_a_policy_nothing_is_looked_at(tmp_path, capsys):
    steps = []

    class Look(helios.Callback):
        def on_training_batch_end(self, session):
            steps.append(session._model.engine.backward is torch.Tensor.backward)

    model = Spoiled(1)
    train(model, IndexData(4), None, Look(), total_steps=1, bad_numbers=None)
    assert steps == [True] * 4
    assert not model.optimizer._optimizer_step_pre_hooks
    assert "BAD" not in capsys.readouterr().err


def test_bad_numbers_are_told_before_the_run_ends_and_soon(tmp_path, capsys):
    said = {}

    class Listen(helios.Callback):
        def on_training_batch_end(self, session):
            said[session.state.global_iteration] = capsys.readouterr().err

    train(Spoiled(2), IndexData(100), None, Listen(), total_steps=1)
    told = [batch for batch, text in said.items() if "GONE BAD" in text]
    assert told[0] == _WARN_EVERY
    assert "step 3 " in said[told[0]]


@pytest.mark.parametrize(
    ("policy", "later"),  # the others have dealt with it by then
    [("warn", 0), ("stop", 0), ("skip", 0), ("rollback", 0), ("warn", 1)],
)
def test_bad_numbers_are_told_before_the_failure_that_comes_of_them(
    tmp_path, capsys, policy, later
):
    class Failing(Spoiled):
        def backward(self, loss):
            super().backward(loss)
            assert self._session.state.global_iteration != 2 + later

    options = {"total_steps": 1, "bad_numbers": policy, "chkpt_frequency": 1}
    with pytest.raises(AssertionError):
        train(Failing(2), IndexData(8), tmp_path, **options)
    told, _, after = capsys.readouterr().err.partition("rank 0 failed in step")
    bad = "NUMBERS HAVE GONE BAD: rank 0: loss is nan"
    assert bad in told
    assert "at step 3 (epoch 0, batch 2), samples [2]" in told
    assert "GONE BAD" not in after


class Busy:
    """Stands for a device whose copy to the host is not done."""

    def __init__(self):
        self.is_over = threading.Event()

    def query(self):
        return False

    def synchronize(self):
        self.is_over.wait(60)


def test_who_interrupts_a_run_waits_for_its_device_no_longer_than_there_is(
    tmp_path, capsys
):
    busy = Busy()

    class Interrupt(helios.Callback):
        def on_training_batch_end(self, session):
            health = session.tell_unread.__self__
            health._copies.append(([], torch.zeros(0), busy))
            self.began_s = time.monotonic()
            raise KeyboardInterrupt

        def on_exception(self, session, error):
            self.took_s = time.monotonic() - self.began_s

    interrupt = Interrupt()
    with pytest.raises(KeyboardInterrupt):
        train(IdModel(), IndexData(8), None, interrupt, total_steps=1)
    busy.is_over.set()
    assert "rank 0 failed" in capsys.readouterr().err
    assert interrupt.took_s < 1.5  # two seconds after the signal all is ended


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_stop_ends_the_run_before_anything_more_is_saved(tmp_path, kind, window):
    options = {"chkpt_frequency": 1, "accumulation_steps": window, "total_steps": 8}
    options |= {"train_unit": "iteration", "bad_numbers": "stop"}
    at = rf"at step {5 // window + 1} \(epoch 0, batch 5\), samples \[5\]"
    for _ in range(2):  # the same command comes to the same
        with pytest.raises(BadNumbersError, match=at):
            train(Spoiled(5, kind=kind), IndexData(20), tmp_path, **options)
    path = CheckpointStore(tmp_path / "ids").list()[0]
    assert read_checkpoint(path).record["progress"]["global_iteration"] in (4, 5)
    weights = read_checkpoint(path).tree("model")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_stop_in_the_last_step_is_no_finished_run(tmp_path):
    with pytest.raises(BadNumbersError, match="at step 4 "):
        train(Spoiled(3), IndexData(4), tmp_path, total_steps=1, bad_numbers="stop")
    assert not list(tmp_path.glob("ids/*"))


@pytest.mark.parametrize("every", [None, 1, 2])
@pytest.mark.parametrize("saves", [True, False], ids=["saves", "keeps nothing"])
def test_stop_tells_of_a_checkpoint_only_where_there_is_one(tmp_path, saves, every):
    options = {**IN_STEPS, "chkpt_frequency": every, "bad_numbers": "stop"}
    with pytest.raises(BadNumbersError) as caught:
        train(Spoiled(2), IndexData(8), tmp_path if saves else None, **options)
    is_there = saves and every is not None
    said = str(caught.value)
    assert ("The last checkpoint is from before that." in said) == is_there
    assert ("There is no checkpoint from before that." in said) == (not is_there)
    assert said.endswith('"skip"` or "rollback"' if is_there else '"skip"`')


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("policy", ["skip", "rollback"])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_step_of_bad_numbers_is_left_out(tmp_path, capsys, policy, window, kind):
    options = {"accumulation_steps": window, "chkpt_frequency": 1, **IN_STEPS}
    ends = [n for n in (5, 11, 12) if kind == "loss" or n % window == window - 1]
    model = Spoiled(*ends, kind=kind)
    assert train(
        model, IndexData(30), tmp_path / policy, bad_numbers=policy, **options
    )[0]
    windows = [n // window * window + i for n in ends for i in range(window)]
    without = Spoiled(*windows, leaves_out=True)
    train(without, IndexData(30), None, bad_numbers=None, **options)
    assert digest(model.net.state_dict()) == digest(without.net.state_dict())
    said = capsys.readouterr().err
    for n in (n for n in ends if n < 8 * window):
        step, samples = n // window + 1, f"(epoch 0, batch {n}), samples [{n}]"
        if policy == "skip":
            assert f"STEP {step} IS SKIPPED" in said
            assert f"skipped on rank 0: step {step} {samples}" in said
        else:
            assert f"at step {step} {samples}; the run goes back to" in said
            assert f"left out: step {step} {samples}" in said


def test_skipped_steps_are_counted(tmp_path, capsys):
    counts = []

    class Count(helios.Callback):
        def on_training_batch_end(self, session):
            counts.append(session.reading.get("skipped_steps", 0))

    train(Spoiled(1, 4), IndexData(6), None, Count(), total_steps=1, bad_numbers="skip")
    assert counts == [0, 1, 1, 1, 2, 2]
    assert "STEP 5 IS SKIPPED, 2 so far" in capsys.readouterr().err


class SpoiledRandom(RandomModel):
    """Random in every way, with batch normalization that bad inputs would spoil."""

    batches = (0, 7, 11)

    def train_step(self, batch, state):
        ids, inputs, targets = batch
        if state.global_iteration in self.batches:
            inputs = inputs * math.nan
        super().train_step((ids, inputs, targets), state)


class SpoiledLoss(RandomModel):
    """Has bad losses, and good gradients: nothing of it is left in the window."""

    def backward(self, loss):
        is_bad = self._session.state.global_iteration in SpoiledRandom.batches
        super().backward(loss + math.inf if is_bad else loss)


@pytest.mark.parametrize(
    ("model", "window"),
    [(SpoiledRandom, 1), (SpoiledRandom, 2), (SpoiledRandom, 3), (SpoiledLoss, 3)],
)
def test_run_with_skipped_steps_resumes_anywhere(tmp_path, model, window):
    options = {"total_steps": 3, "valid_frequency": 1, "accumulation_steps": window}
    Case(model, bad_numbers="skip", **options).check(tmp_path)


def test_skipped_step_leaves_no_trace_in_the_network_and_its_optimizers(tmp_path):
    seen = []

    class Look(helios.Callback):
        def on_training_batch_end(self, session):
            model = session._model
            parts = model.net, model.heads["a"], *model.optimizers
            seen.append(digest([part.state_dict() for part in parts]))

    class One(SpoiledRandom):
        batches = (3,)

        def train_step(self, batch, state):
            super().train_step(batch, state)
            for group in (g for o in self.optimizers for g in o.param_groups):
                group["lr"] = 0.01  # which the schedulers change

    train(One(), RandomData(), None, Look(), total_steps=1, bad_numbers="skip")
    changes = [a != b for a, b in itertools.pairwise(seen)]
    assert changes == [True, True, False, True]


class Later(SpoiledRandom):
    batches = (7, 11)


@pytest.mark.parametrize("window", [1, 2])
def test_run_that_went_back_ends_the_same_wherever_it_is_stopped(tmp_path, window):
    options = {"total_steps": 3, "valid_frequency": 1, "accumulation_steps": window}
    options |= {"chkpt_frequency": 1, "bad_numbers": "rollback"}

    def run(root, *callbacks):
        model = Later()
        finished, recorder = train(model, RandomData(), root, *callbacks, **options)
        return finished, Outcome(model, root, recorder)

    _, whole = run(tmp_path / "whole", StopAt())
    for batch in range(5, 15):  # from the first checkpoint on
        root = tmp_path / str(batch)
        assert not run(root, StopAt(batch=batch))[0]
        finished, parts = run(root, StopAt())
        assert finished
        for name in ("weights", "state", "rank", "progress", "history"):
            assert getattr(parts, name) == getattr(whole, name), (name, batch)


class StopAfterReturn(helios.Callback):
    """Asks to stop before the batch that is left out."""

    def on_training_batch_end(self, session):
        has_returned = session.reading.get("left_out_steps") == [5]
        if has_returned and session.state.global_iteration == 5:
            session.request_stop("the test")


def test_later_resume_leaves_out_what_was_left_out_whatever_the_policy(tmp_path):
    options = {**IN_STEPS, "chkpt_frequency": 4}
    finished, _ = train(
        *(Spoiled(5), IndexData(20), tmp_path, StopAfterReturn()),
        **options,
        bad_numbers="rollback",
    )
    assert not finished
    model = Spoiled(5)
    assert train(model, IndexData(20), tmp_path, bad_numbers=None, **options)[0]
    assert model.batches == [[6], [7]]
    assert model.net.weight.isfinite().all()


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path):
    for root in (None, tmp_path):
        with pytest.raises(BadNumbersError, match="no checkpoint from before that"):
            train(Spoiled(2), IndexData(4), root, total_steps=1, bad_numbers="rollback")


@pytest.fixture
def others(tmp_path):
    """Another run's checkpoints in the folder, newest first; a step has two batches."""
    options = {**IN_STEPS, "accumulation_steps": 2, "chkpt_frequency": 1}
    train(IdModel(), IndexData(20), tmp_path, **options)
    return CheckpointStore(tmp_path / "ids").list()


def test_way_back_leads_to_what_was_taken_up_from_another_folder(
    tmp_path, others, capsys
):
    model = go_back(tmp_path / "new", 9, resume=others[-2])
    assert f"goes back to {others[-2].name}," in capsys.readouterr().err
    assert [batch for [batch] in model.batches[:8]] == [4, 5, 6, 7, 8, 9, 4, 5]


@pytest.mark.parametrize("is_elsewhere", [True, False])
def test_what_was_imported_is_no_way_back(tmp_path, is_elsewhere):
    torch.save({"net": nn.Linear(1, 1).state_dict()}, tmp_path / "old.pth")
    found = take_over(tmp_path / "old.pth", {}, {})
    imported = found.write(tmp_path / "imported", "ids")
    resume = {"resume": imported} if is_elsewhere else {}
    root = tmp_path / ("new" if is_elsewhere else "imported")
    with pytest.raises(BadNumbersError, match="no checkpoint from before that"):
        go_back(root, 5, **resume)


def test_way_back_leads_past_what_is_damaged_to_what_was_taken_up(
    tmp_path, others, capsys
):
    class Damage(helios.Callback):
        def on_training_batch_end(self, session):
            if session.state.global_iteration == 9:
                (saved,) = CheckpointStore(tmp_path / "new" / "ids").list()
                for file in saved.rglob("*.safetensors"):
                    file.write_bytes(b"")

    options = {"resume": others[-2], "chkpt_frequency": 4, "async_save": False}
    go_back(tmp_path / "new", 9, Damage(), **options)
    assert f"goes back to {others[-2].name}," in capsys.readouterr().err


def go_back(root, bad, *callbacks, **options):
    model = Spoiled(bad)
    options |= {**IN_STEPS, "accumulation_steps": 2, "bad_numbers": "rollback"}
    train(model, IndexData(20), root, *callbacks, **options)
    return model


def test_another_runs_checkpoints_are_no_way_back(tmp_path, others):
    with pytest.raises(BadNumbersError, match="no checkpoint from before that"):
        go_back(tmp_path, 9, resume="never")


def test_another_runs_checkpoints_are_none_after_a_resume_either(tmp_path, others):
    options = {**IN_STEPS, "accumulation_steps": 2, "resume": "never"}
    assert not train(IdModel(), IndexData(20), tmp_path, StopAt(batch=5), **options)[0]
    with pytest.raises(BadNumbersError, match="no checkpoint from before that"):
        go_back(tmp_path, 5)  # whose step began before the stop


def test_way_back_leads_to_what_was_taken_up_and_not_to_what_is_newer(
    tmp_path, others, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model = go_back(tmp_path, 9, resume=f"ids/{others[-2].name}")
    assert f"goes back to {others[-2].name}," in capsys.readouterr().err
    assert [batch for [batch] in model.batches[:8]] == [4, 5, 6, 7, 8, 9, 4, 5]


def test_way_back_of_a_fresh_start_is_its_own(tmp_path, others):
    found = [
        go_back(root, 9, chkpt_frequency=3, resume="never").net.state_dict()
        for root in (tmp_path, tmp_path / "clean")
    ]
    assert digest(found[0]) == digest(found[1])


def test_going_back_that_does_not_help_ends(tmp_path):
    model = Spoiled(*range(3, 100))
    options = {"train_unit": "iteration", "total_steps": 60, "chkpt_frequency": 3}
    with pytest.raises(BadNumbersError, match=r"step 14 .* leaving out does not help"):
        train(model, IndexData(100), tmp_path, bad_numbers="rollback", **options)


def test_stop_that_is_asked_for_is_not_lost_on_the_way_back(tmp_path):
    class Both(Spoiled):
        def train_step(self, batch, state):
            super().train_step(batch, state)
            if state.global_iteration == 5 and len(self.batches) == 6:
                self.trainer.request_stop("the test")

    model, options = Both(5), {"chkpt_frequency": 1, **IN_STEPS}
    finished, _ = train(
        model, IndexData(20), tmp_path, bad_numbers="rollback", **options
    )
    assert not finished
    assert len(model.batches) == 6


class Terminated(helios.Callback):
    """Gets a signal when bad numbers are found, and the run has not gone back yet."""

    def __init__(self):
        self.reasons = []

    def on_training_batch_end(self, session):
        if session.stop_reason is not None and not self.reasons:
            self.reasons.append(session.stop_reason)
            os.kill(os.getpid(), signal.SIGTERM)


def test_signal_that_comes_before_the_way_back_is_not_lost(tmp_path):
    model, signals = Spoiled(5), Terminated()
    options = {"chkpt_frequency": 1, **IN_STEPS, "stop_grace_s": 60}
    finished, _ = train(
        model, IndexData(20), tmp_path, signals, bad_numbers="rollback", **options
    )
    assert "numbers have gone bad" in signals.reasons[0]
    assert not finished


def test_validation_of_a_step_that_is_left_out_leaves_nothing(tmp_path):
    class SpoiledOnce(RandomModel):
        def backward(self, loss):
            is_bad = self._session.state.global_iteration == 5
            super().backward(loss + math.inf if is_bad else loss)

    options = {"train_unit": "iteration", "total_steps": 12, "chkpt_frequency": 4}
    options |= {"valid_frequency": 6, "bad_numbers": "rollback"}
    stale, outcomes = [], []

    class Look(helios.Callback):
        def on_training_batch_end(self, session):
            stale.append(session.frozen)

    for stop in (None, 8):
        root = tmp_path / f"{stop}"
        for at in [None] if stop is None else [stop, None]:
            model = SpoiledOnce()
            callbacks = Look(), StopAt(batch=at)
            finished, _ = train(model, RandomData(), root, *callbacks, **options)
        assert finished
        outcomes.append(digest(model.state_dict()))
    assert {*stale} == {None}
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("policy", ["warn", "stop", "skip"])
def test_infinite_gradients_of_fp16_are_the_scalers_business(tmp_path, capsys, policy):
    class Large(IdModel):
        def train_step(self, batch, state):
            loss = self.net(batch.float()[:, None]).square().mean() * 1e4
            self.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()

    options = {"mixed_precision": "fp16", "total_steps": 1}
    models = [Large(), Large()]
    for model, bad in zip(models, (policy, None), strict=True):
        assert train(model, IndexData(8), None, bad_numbers=bad, **options)[0]
    assert "BAD" not in capsys.readouterr().err
    assert models[0].engine.scaler.get_scale() < 65536
    assert digest(models[0].state_dict()) == digest(models[1].state_dict())


def test_bad_loss_is_skipped_under_a_scaler_and_leaves_its_scale(tmp_path, capsys):
    class Clipped(IdModel):
        def train_step(self, batch, state):
            loss = self.net(batch.float()[:, None]).square().mean()
            self.backward(loss * (math.nan if state.global_iteration == 2 else 0.01))
            self.clip_gradients(self.net.parameters(), self.optimizer, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    model = Clipped()
    options = {"mixed_precision": "fp16", "total_steps": 1, "bad_numbers": "skip"}
    assert train(model, IndexData(4), None, **options)[0]
    assert model.net.weight.isfinite().all()
    assert model.engine.scaler.get_scale() == 65536
    assert "STEP 3 IS SKIPPED" in capsys.readouterr().err


class Strange(IdModel):
    """Gradients that torch's quick look refuses."""

    def setup(self, for_inference=False):
        self.net = nn.ModuleDict(
            {
                "sparse": nn.Embedding(4, 2, sparse=True),
                "wide": nn.Linear(2, 1, dtype=torch.float64),
            }
        )
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01)

    def train_step(self, batch, state):
        rows = self.net["sparse"](batch % 4)
        if state.global_iteration == 2:
            rows.register_hook(lambda gradient: gradient * math.inf)
        self.backward(self.net["wide"](rows.double()).square().mean())
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_sparse_gradients_and_those_of_two_types_are_looked_at(tmp_path, capsys):
    model = Strange()
    assert train(model, IndexData(4), None, total_steps=1, bad_numbers="skip")[0]
    said = capsys.readouterr().err
    assert "STEP 3 IS SKIPPED, 1 so far: rank 0: a gradient is not finite" in said
    assert model.net["sparse"].weight.isfinite().all()


def test_plain_numbers_among_the_losses_are_looked_at(capsys):
    class Plain(IdModel):
        def train_step(self, batch, state):
            super().train_step(batch, state)
            bad = math.inf if state.global_iteration == 2 else 1
            self._loss_items |= {"plain": bad, "pair": torch.ones(2)}

    train(Plain(), IndexData(4), None, total_steps=1)
    said = capsys.readouterr().err
    assert "rank 0: plain is inf, at step 3 (epoch 0, batch 2), samples [2]" in said
    assert said.count("BAD") == 1


def test_large_batch_is_not_listed_as_a_whole(capsys):
    data = IndexData(200, batch_size=100)
    train(Spoiled(1), data, None, total_steps=1)
    said = capsys.readouterr().err
    assert "samples [100, 101, " in said
    assert "163] and 36 more" in said


@pytest.mark.parametrize("value", ["ignore", True, 1])
def test_unknown_policy_is_refused(value):
    with pytest.raises(ValueError, match="`bad_numbers` must be one of"):
        helios.Trainer(bad_numbers=value)


def test_look_at_gradients_changes_no_bit_of_them():
    parameter = nn.Parameter(torch.tensor([1e-42, -0.0, 3e38, 1.1]))
    parameter.grad = torch.tensor([1e-42, -0.0, 3e38, 1.1])
    health = Health.__new__(Health)
    health._flags, health._values, health._takes = [], [], True
    health._look_at_gradients(torch.optim.SGD([parameter]))
    assert health._values[0][1].item() == 0
    assert parameter.grad.view(torch.int32).equal(parameter.data.view(torch.int32))


class Tracker(GeneralTracker):
    """A logger that keeps what it is told."""

    name, requires_logging_directory, tracker = "kept", False, None

    def __init__(self):
        super().__init__()
        self.steps = []

    @on_main_process
    def store_init_configuration(self, values):
        pass

    @on_main_process
    def log(self, values, step=None):
        self.steps.append(step)

    def finish(self):
        self.steps.append("end")


def test_trackers_and_tensorboard_go_on_over_the_way_back(tmp_path):
    tracker, writers = Tracker(), []

    class Logging(Spoiled):
        def train_step(self, batch, state):
            super().train_step(batch, state)
            self.log("step", state.current_iteration)
            writer = get_tensorboard_writer()
            writers.extend([writer] if writer not in writers else [])

    options = {**IN_STEPS, "chkpt_frequency": 4, "print_frequency": 1}
    options |= {"log_root": tmp_path, "enable_tensorboard": True}
    model = Logging(5)
    train(
        *(model, IndexData(20), tmp_path),
        **{**options, "log_with": [tracker], "bad_numbers": "rollback"},
    )
    assert tracker.steps == [1, 2, 3, 4, 5, 6, 5, 7, 8, "end"]
    assert [writer.all_writers for writer in writers] == [None, None]


class Growing(torch.utils.data.IterableDataset):
    """A stream that goes on where it is, as long as the same object is asked."""

    def __init__(self, length=12):
        self.position, self.length = 0, length

    def __iter__(self):
        while self.position < self.length:
            self.position += 1
            yield self.position - 1
        self.position = 0


class GrowingWithState(Growing):
    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class GrowingData(helios.DataModule):
    def __init__(self, kind, length=12):
        super().__init__()
        self.kind, self.length = kind, length

    def setup(self):
        self._add_train_phase(self.kind(self.length), {"batch_size": 2})


@pytest.mark.parametrize("kind", [Growing, GrowingWithState])
def test_stream_is_entered_where_the_checkpoint_is_on_the_way_back(tmp_path, kind):
    options = {"total_steps": 10, "train_unit": "iteration", "chkpt_frequency": 3}
    model, without = Spoiled(5, 8), Spoiled(5, 8, leaves_out=True)
    train(model, GrowingData(kind), tmp_path, bad_numbers="rollback", **options)
    train(without, GrowingData(kind), None, bad_numbers=None, **options)
    assert digest(model.net.state_dict()) == digest(without.net.state_dict())


@pytest.mark.parametrize("bad", [6, 7])
@pytest.mark.parametrize("data", [IndexData, GrowingData], ids=["items", "stream"])
def test_short_last_step_of_an_epoch_is_left_out_by_itself(tmp_path, bad, data):
    """Of 8 batches in steps of 3, the last has two: none of the next epoch."""

    def run(model, policy):
        numbers = {"total_steps": 3, "chkpt_frequency": 1, "accumulation_steps": 3}
        made = IndexData(8) if data is IndexData else GrowingData(GrowingWithState, 16)
        train(model, made, tmp_path / str(policy), bad_numbers=policy, **numbers)
        return digest(model.net.state_dict())

    # The epoch before has left a checkpoint to go back to.
    bad += 8
    left_out = run(Spoiled(14, 15, leaves_out=True), None)
    assert run(Spoiled(bad), "skip") == left_out
    assert run(Spoiled(bad), "rollback") == left_out
