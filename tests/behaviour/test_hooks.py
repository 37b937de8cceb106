"""The order of everything in a run, and what each hook is given."""

import pytest
import torch
from support import IdModel, IndexData, StopAt, TraceCallback, TraceModel, train

import helios


def trace(root, *callbacks, **options):
    """Whether the run finished, and all hooks: the model's and a callback's."""
    model = TraceModel()
    hooks = [TraceCallback(model.trace), *callbacks]
    data = IndexData(4, valid=2, batch_size=2)
    # Not in the background, where a save is finished at any time.
    is_finished, _ = train(model, data, root, *hooks, async_save=False, **options)
    return is_finished, model.trace


def test_run_in_epochs_calls_its_hooks_in_this_order(tmp_path):
    options = {"total_steps": 2, "valid_frequency": 1, "chkpt_frequency": 2}
    assert trace(tmp_path, **options) == (
        True,
        [
            "setup False",
            "on_training_start",
            "callback on_training_start",
            "on_training_epoch_start 0",
            "callback on_training_epoch_start 0",
            "on_training_batch_start",
            "train_step",
            "on_training_batch_end False",
            "callback on_training_batch_end 1",
            "should_training_stop",
            "on_training_batch_start",
            "train_step",
            "on_training_batch_end False",
            "callback on_training_batch_end 2",
            "should_training_stop",
            "callback on_log loss",
            "on_training_epoch_end 0",
            "callback on_training_epoch_end 1",
            "should_advance_dataset_phase",
            "on_validation_start 0",
            "callback on_validation_start 0",
            "on_validation_batch_start 0",
            "valid_step 0",
            "on_validation_batch_end 0",
            "callback on_validation_batch_end 0",
            "on_validation_end 0",
            "callback on_validation_end 1",
            "have_metrics_improved",
            "should_training_stop",
            "on_training_epoch_start 1",
            "callback on_training_epoch_start 1",
            "on_training_batch_start",
            "train_step",
            "on_training_batch_end False",
            "callback on_training_batch_end 3",
            "should_training_stop",
            "on_training_batch_start",
            "train_step",
            "on_training_batch_end False",
            "callback on_training_batch_end 4",
            "should_training_stop",
            "callback on_log loss",
            "on_training_epoch_end 1",
            "callback on_training_epoch_end 2",
            "should_advance_dataset_phase",
            "on_validation_start 1",
            "callback on_validation_start 1",
            "on_validation_batch_start 0",
            "valid_step 0",
            "on_validation_batch_end 0",
            "callback on_validation_batch_end 0",
            "on_validation_end 1",
            "callback on_validation_end 2",
            "have_metrics_improved",
            "should_save_checkpoint",
            "callback on_checkpoint_saved trace_epoch_2_iter_4",
            "should_training_stop",
            "on_training_end",
            "callback on_training_end",
        ],
    )


def test_run_in_steps_of_two_batches_calls_its_hooks_in_this_order(tmp_path):
    options = {
        "train_unit": "iteration",
        "total_steps": 2,
        "valid_frequency": 1,
        "chkpt_frequency": 2,
        "print_frequency": 2,
        "accumulation_steps": 2,
    }
    assert trace(tmp_path, **options) == (
        True,
        [
            "setup False",
            "on_training_start",
            "callback on_training_start",
            "on_training_epoch_start 0",
            "callback on_training_epoch_start 0",
            "on_training_batch_start",
            "train_step",
            "on_training_batch_end False",
            "callback on_training_batch_end 1",
            "should_training_stop",
            "on_training_batch_start",
            "train_step",
            "on_training_batch_end False",
            "callback on_training_batch_end 2",
            "on_validation_start 0",
            "callback on_validation_start 0",
            "on_validation_batch_start 0",
            "valid_step 0",
            "on_validation_batch_end 0",
            "callback on_validation_batch_end 0",
            "on_validation_end 0",
            "callback on_validation_end 1",
            "have_metrics_improved",
            "should_training_stop",
            "on_training_epoch_end 0",
            "callback on_training_epoch_end 1",
            "should_advance_dataset_phase",
            "should_training_stop",
            "on_training_epoch_start 1",
            "callback on_training_epoch_start 1",
            "on_training_batch_start",
            "train_step",
            "on_training_batch_end False",
            "callback on_training_batch_end 3",
            "should_training_stop",
            "on_training_batch_start",
            "train_step",
            "on_training_batch_end True",
            "callback on_training_batch_end 4",
            "callback on_log loss",
            "on_validation_start 1",
            "callback on_validation_start 1",
            "on_validation_batch_start 0",
            "valid_step 0",
            "on_validation_batch_end 0",
            "callback on_validation_batch_end 0",
            "on_validation_end 1",
            "callback on_validation_end 2",
            "have_metrics_improved",
            "should_save_checkpoint",
            "callback on_checkpoint_saved trace_epoch_1_iter_2",
            "should_training_stop",
            "on_training_epoch_end 1",
            "callback on_training_epoch_end 2",
            "should_advance_dataset_phase",
            "should_training_stop",
            "callback on_checkpoint_saved trace_epoch_2_iter_2",
            "on_training_end",
            "callback on_training_end",
        ],
    )


def test_run_stopped_inside_an_epoch_goes_on_inside_it(tmp_path):
    is_finished, hooks = trace(tmp_path, StopAt(batch=1), total_steps=1)
    assert not is_finished
    assert hooks[-3:] == [
        "callback on_training_batch_end 1",
        "should_training_stop",
        "callback on_checkpoint_saved trace_epoch_0_iter_1",
    ]
    assert trace(tmp_path, StopAt(), total_steps=1) == (
        True,
        [
            "setup False",
            "on_training_start",
            "callback on_training_start",
            "on_training_epoch_start 0",
            "callback on_training_epoch_start 0",
            "should_training_stop",
            "on_training_batch_start",
            "train_step",
            "on_training_batch_end False",
            "callback on_training_batch_end 2",
            "should_training_stop",
            "callback on_log loss",
            "on_training_epoch_end 0",
            "callback on_training_epoch_end 1",
            "should_advance_dataset_phase",
            "should_training_stop",
            "callback on_checkpoint_saved trace_epoch_1_iter_2",
            "on_training_end",
            "callback on_training_end",
        ],
    )


def test_run_stopped_after_the_last_batch_of_an_epoch_still_ends_that_epoch(tmp_path):
    assert not trace(tmp_path, StopAt(batch=2), total_steps=1)[0]
    assert trace(tmp_path, StopAt(), total_steps=1) == (
        True,
        [
            "setup False",
            "on_training_start",
            "callback on_training_start",
            "on_training_epoch_start 0",
            "callback on_training_epoch_start 0",
            "should_training_stop",
            "callback on_log loss",
            "on_training_epoch_end 0",
            "callback on_training_epoch_end 1",
            "should_advance_dataset_phase",
            "should_training_stop",
            "callback on_checkpoint_saved trace_epoch_1_iter_2",
            "on_training_end",
            "callback on_training_end",
        ],
    )


class StopAtEpochEnd(helios.Callback):
    """Asks to stop at the end of the first epoch."""

    def on_training_epoch_end(self, session):
        if session.state.global_epoch == 1:
            session.request_stop("the test")


def test_run_stopped_at_an_epochs_end_begins_with_the_next_epoch(tmp_path):
    is_finished, hooks = trace(tmp_path, StopAtEpochEnd(), total_steps=2)
    assert not is_finished
    assert hooks[-2:] == [
        "should_training_stop",
        "callback on_checkpoint_saved trace_epoch_1_iter_2",
    ]
    is_finished, hooks = trace(tmp_path, StopAtEpochEnd(), total_steps=2)
    assert is_finished
    assert hooks[:9] == [
        "setup False",
        "on_training_start",
        "callback on_training_start",
        "should_training_stop",
        "on_training_epoch_start 1",
        "callback on_training_epoch_start 1",
        "on_training_batch_start",
        "train_step",
        "on_training_batch_end False",
    ]


def test_validation_that_a_stop_interrupts_is_run_again_from_its_start(tmp_path):
    options = {"total_steps": 2, "valid_frequency": 1}
    is_finished, hooks = trace(tmp_path, StopAt(validation=0), **options)
    assert not is_finished
    assert hooks[-4:] == [
        "on_validation_batch_end 0",
        "callback on_validation_batch_end 0",
        "should_training_stop",
        "callback on_checkpoint_saved trace_epoch_1_iter_2",
    ]
    is_finished, hooks = trace(tmp_path, StopAt(), **options)
    assert is_finished
    assert hooks[:7] == [
        "setup False",
        "on_training_start",
        "callback on_training_start",
        "on_validation_start 0",
        "callback on_validation_start 0",
        "on_validation_batch_start 0",
        "valid_step 0",
    ]


def make_trainer(model, root=None):
    return helios.Trainer(
        total_steps=1,
        use_cpu=True,
        chkpt_root=root,
        callbacks=[TraceCallback(model.trace)],
    )


TEST_HOOKS = [
    "on_testing_start",
    "on_testing_batch_start 0",
    "test_step 0",
    "on_testing_batch_end 0",
    "on_testing_batch_start 1",
    "test_step 1",
    "on_testing_batch_end 1",
    "on_testing_end",
]


def test_test_without_a_checkpoint_calls_load_for_testing():
    model = TraceModel()
    assert make_trainer(model).test(model, IndexData())
    assert model.trace == ["setup True", "load_for_testing", *TEST_HOOKS]


def test_test_takes_the_last_checkpoint(tmp_path):
    trained = TraceModel()
    make_trainer(trained, tmp_path).fit(trained, IndexData())
    model = TraceModel()
    assert make_trainer(model, tmp_path).test(model, IndexData())
    assert model.trace == ["setup True", *TEST_HOOKS]
    assert torch.equal(model.net.weight, trained.net.weight)


def test_test_after_fit_uses_the_model_as_it_is():
    model = TraceModel()
    trainer = make_trainer(model)
    trainer.fit(model, IndexData())
    net = model.net
    del model.trace[:]
    assert trainer.test(model, IndexData())
    assert model.trace == TEST_HOOKS
    assert model.net is net


def test_validate_calls_the_hooks_of_a_validation():
    model = TraceModel()
    assert make_trainer(model).validate(model, IndexData())
    assert model.trace == [
        "setup True",
        "load_for_testing",
        "on_validation_start 0",
        "callback on_validation_start 0",
        "on_validation_batch_start 0",
        "valid_step 0",
        "on_validation_batch_end 0",
        "callback on_validation_batch_end 0",
        "on_validation_batch_start 1",
        "valid_step 1",
        "on_validation_batch_end 1",
        "callback on_validation_batch_end 1",
        "on_validation_end 0",
        "callback on_validation_end 1",
    ]


def test_test_that_is_asked_to_stop_says_so():
    class Stopped(IdModel):
        def test_step(self, batch, step):
            super().test_step(batch, step)
            self.trainer.request_stop()

    model = Stopped()
    assert not helios.Trainer(use_cpu=True).test(model, IndexData())
    assert model.validated == [[0, 1]]


def test_callbacks_are_called_in_the_order_of_their_list(tmp_path):
    model = TraceModel()
    callbacks = [TraceCallback(model.trace, mark) for mark in ("first", "second")]
    train(model, IndexData(2), tmp_path, *callbacks, total_steps=1)
    of_callbacks = [line.split(" ", 1) for line in model.trace if "second" in line]
    for _, rest in of_callbacks:
        at = model.trace.index(f"first {rest}")
        assert model.trace[at + 1] == f"second {rest}"
    assert len(of_callbacks) == 8


class Witness(IdModel):
    """Writes down the counters that its hooks see."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_training_batch_start(self, state):
        super().on_training_batch_start(state)
        self.seen.append(("start", *counters(state)))

    def train_step(self, batch, state):
        super().train_step(batch, state)
        self.seen.append(("step", *counters(state)))

    def on_training_batch_end(self, state, should_log=False):
        super().on_training_batch_end(state, should_log)
        self.seen.append(("end", *counters(state), should_log))

    def batch_to_device(self, batch, phase):
        self.seen.append((phase.value, batch.tolist()))
        return batch


def counters(state):
    return (
        state.current_iteration,
        state.global_iteration,
        state.global_epoch,
        state.dataset_iter,
    )


def test_counters_count_what_is_finished(tmp_path):
    model = Witness()
    data = IndexData(3, valid=1)
    options = {"accumulation_steps": 2, "print_frequency": 2, "valid_frequency": 1}
    train(model, data, tmp_path, total_steps=1, **options)
    assert model.seen == [
        ("start", 0, 0, 0, 0),
        ("train", [0]),
        ("step", 0, 0, 0, 0),
        ("end", 0, 1, 0, 1, False),
        ("start", 0, 1, 0, 1),
        ("train", [1]),
        ("step", 0, 1, 0, 1),
        ("end", 1, 2, 0, 2, False),
        ("start", 1, 2, 0, 2),
        ("train", [2]),
        ("step", 1, 2, 0, 2),
        ("end", 2, 3, 0, 3, True),
        ("valid", [0]),
    ]


def test_modes_and_gradients_are_those_of_the_phase(tmp_path):
    seen = []

    class Modes(IdModel):
        def train_step(self, batch, state):
            super().train_step(batch, state)
            seen.append(("train", self.net.training, torch.is_grad_enabled()))

        def valid_step(self, batch, step):
            seen.append(("valid", self.net.training, torch.is_grad_enabled()))

        def on_validation_end(self, validation_cycle):
            super().on_validation_end(validation_cycle)
            seen.append(("end", self.net.training, torch.is_grad_enabled()))

    data = IndexData(1, valid=1)
    train(Modes(), data, tmp_path, total_steps=2, valid_frequency=1)
    epoch = [("train", True, True), ("valid", False, False), ("end", False, True)]
    assert seen == epoch * 2


def test_failing_run_tells_its_callbacks_and_the_datamodule(tmp_path):
    torn_down = []

    class Failing(TraceModel):
        def train_step(self, batch, state):
            raise OSError("broken")

    class Data(IndexData):
        def teardown(self):
            torn_down.append(True)

    model = Failing()
    callback = TraceCallback(model.trace)
    with pytest.raises(OSError, match="broken"):
        train(model, Data(), tmp_path, callback, total_steps=1)
    assert model.trace[-2:] == [
        "on_training_batch_start",
        "callback on_exception OSError",
    ]
    assert torn_down == [True]
