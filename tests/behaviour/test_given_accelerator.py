"""A run on an accelerator that the user has made: what that was built with counts."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker
from accelerate.utils import (
    AutocastKwargs,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    ProjectConfiguration,
)
from support import ByHand, IdModel, IndexData, RandomData, RandomModel, train

from helios.errors import LaunchError


@pytest.fixture
def make(accelerator):
    """Makes the accelerator of a test; the fixture that it asks for cleans up."""

    def made(**options):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return Accelerator(cpu=True, **options)

    return made


def run(accelerator, model=None, data=None, **options):
    model = IdModel() if model is None else model
    options = {"total_steps": 2, **options}
    data = IndexData(12, batch_size=2) if data is None else data
    assert train(model, data, None, accelerator=accelerator, **options)[0]
    return model


class Kept(GeneralTracker):
    name, requires_logging_directory = "kept", False

    def __init__(self):
        super().__init__()
        self.started, self.logged, self.is_finished = [], [], False

    @property
    def tracker(self):
        return self

    def start(self):
        self.started.append(True)

    def store_init_configuration(self, values):
        self.started.append(values)

    def log(self, values, step=None, **kwargs):
        self.logged.append((step, sorted(values)))

    def finish(self):
        self.is_finished = True


def test_trackers_are_started_and_get_what_is_logged(make):
    tracker = Kept()
    run(make(log_with=tracker))
    assert tracker.started == [True]
    assert tracker.logged == [(6, ["loss"]), (12, ["loss"])]
    assert tracker.is_finished


def test_trackers_that_the_user_has_started_are_not_started_again(make):
    tracker = Kept()
    accelerator = make(log_with=tracker)
    accelerator.init_trackers("mine", config={"lr": 0.1})
    run(accelerator)
    assert tracker.started == [True, {"lr": 0.1}]
    assert len(tracker.logged) == 2


def test_project_folder_is_that_of_the_trackers(make, tmp_path):
    project = ProjectConfiguration(str(tmp_path / "p"), str(tmp_path / "logs"))
    run(make(log_with="tensorboard", project_config=project), run_name="mine")
    assert list((tmp_path / "logs" / "mine").glob("events.*"))


def test_settings_of_the_scaler_count_on_the_cpu_too(make):
    scaler = GradScalerKwargs(init_scale=8.0, growth_interval=4)
    accelerator = make(mixed_precision="fp16", kwargs_handlers=[scaler])
    run(accelerator, total_steps=1)
    assert accelerator.scaler.get_scale() == 16.0  # after six steps


def test_settings_of_autocast_count(make):
    class Seen(RandomModel):
        def setup(self, for_inference=False):
            super().setup()
            self.net[0].register_forward_hook(
                lambda *args: dtypes.append(args[2].dtype)
            )

    for is_on, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        dtypes, handler = [], AutocastKwargs(enabled=is_on)
        accelerator = make(mixed_precision="bf16", kwargs_handlers=[handler])
        run(accelerator, Seen(), data=RandomData(), total_steps=1)
        assert set(dtypes) == {dtype}


def test_windows_of_the_accumulation_plugin_count(make):
    class Steps(IdModel):
        def on_training_batch_end(self, state, should_log=False):
            steps.append(state.current_iteration)

    steps = []
    plugin = GradientAccumulationPlugin(num_steps=4)
    run(make(gradient_accumulation_plugin=plugin), Steps(), total_steps=1)
    assert steps == [0, 0, 0, 1, 1, 2]


def test_windows_over_the_end_of_an_epoch_are_refused(make, tmp_path):
    plugin = GradientAccumulationPlugin(num_steps=4, sync_with_dataloader=False)
    with pytest.raises(LaunchError, match="windows end with an epoch here"):
        run(make(gradient_accumulation_plugin=plugin))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    # Of its own one it knows that it ends them.
    assert ByHand(tmp_path / "run", window=4).run()
