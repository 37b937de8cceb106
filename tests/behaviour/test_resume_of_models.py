"""Models of many kinds, stopped after any batch, go on to the same bits."""

import gc
import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from support import IdModel, IndexData, RandomData, StopAt, digest, train
from torch import nn

import helios
from helios.errors import ModelError

OPTIONS = {"total_steps": 3, "chkpt_frequency": 1, "print_frequency": 1}


class Base(helios.Model):
    """A network with dropout, trained by what a subclass says."""

    clears_early = False

    def __init__(self):
        super().__init__("model")

    def setup(self, for_inference=False):
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1)
        )
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.05)

    def train_step(self, batch, state):
        _, inputs, targets = batch
        loss = (self.net(inputs)[:, 0].float() - targets).square().mean()
        self.backward(loss)
        self.optimizer.step()
        if not self.clears_early:
            self.optimizer.zero_grad()
        self.log("loss", loss)


class Unfreezing(Base):
    """Begins to train its first layer in the second epoch."""

    def setup(self, for_inference=False):
        super().setup()
        self.net[0].requires_grad_(False)

    def on_training_epoch_start(self, current_epoch):
        if current_epoch == 1:
            self.net[0].requires_grad_(True)


class Adversarial(Base):
    """Turns the gradients of its second network off and on within a step."""

    def setup(self, for_inference=False):
        super().setup()
        self.critic = nn.Linear(1, 1)
        self.second = torch.optim.SGD(self.critic.parameters(), lr=0.1)

    def train_step(self, batch, state):
        self.critic.requires_grad_(False)
        super().train_step(batch, state)
        self.critic.requires_grad_(True)
        loss = self.critic(self.net(batch[1]).detach()).square().mean()
        self.backward(loss)
        self.second.step()
        self.second.zero_grad()
        self.critic.requires_grad_(False)


class Sum(torch.optim.Optimizer):
    """Keeps the sum of its parameters' updates in double precision, and counts."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state["exact"] = parameter.double()
                state["count"] = torch.zeros((), dtype=torch.int64)
            state["exact"] -= 0.01 * parameter.grad.double() / 3
            state["count"] += 1
            parameter.copy_(state["exact"])


class DoublePrecision(Base):
    """Its optimizer's state has other dtypes than its parameters."""

    def setup(self, for_inference=False):
        super().setup()
        self.optimizer = Sum(self.net.parameters())


class EarlyClearing(Base):
    """Clears its gradients in the hook before the step."""

    clears_early = True

    def on_training_batch_start(self, state):
        super().on_training_batch_start(state)
        self.optimizer.zero_grad()


class Overflowing(Base):
    """A scheduler of epochs, and a loss that overflows half precision at their ends."""

    def setup(self, for_inference=False):
        super().setup()
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.5)

    def train_step(self, batch, state):
        if state.dataset_iter == 4:
            batch = [batch[0], batch[1] * 1e6, batch[2]]
        super().train_step(batch, state)

    def on_training_epoch_end(self, current_epoch):
        self.scheduler.step()


class Drawing(Base):
    """Adds noise from generators of its own, of every kind."""

    def setup(self, for_inference=False):
        super().setup()
        self.torch = torch.Generator().manual_seed(1)
        self.others = [np.random.default_rng(2), random.Random(3)]
        self.older = {"numpy": np.random.RandomState(4)}

    def train_step(self, batch, state):
        numpy, python = self.others
        noise = torch.randn((), generator=self.torch) + numpy.normal()
        noise += python.gauss(0, 1) + self.older["numpy"].normal()
        super().train_step([batch[0], batch[1] + noise.float(), batch[2]], state)


class LaidOut(Base):
    """Has weights in another order, and an optimizer that walks through memory."""

    def setup(self, for_inference=False):
        layers = [nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 7, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(7, 5, 2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(5, 1)]
        self.net = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.05, fused=True)


KINDS = [
    (Drawing, {}),
    (LaidOut, {}),
    (Unfreezing, {}),
    (Unfreezing, {"accumulation_steps": 2}),
    (Adversarial, {"accumulation_steps": 2}),
    (DoublePrecision, {}),
    (EarlyClearing, {"accumulation_steps": 3}),
    (Overflowing, {"mixed_precision": "fp16"}),
]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_stop_after_any_batch_changes_no_bit(tmp_path, kind, options):
    options = {**OPTIONS, **options}
    whole = kind()
    _, recorder = train(whole, RandomData(), tmp_path / "whole", **options)
    for batch in range(15):
        root, first, second = tmp_path / str(batch), kind(), kind()
        is_finished, before = train(first, RandomData(), root, StopAt(batch), **options)
        assert not is_finished
        _, after = train(second, RandomData(), root, **options)
        assert digest(second.state_dict()) == digest(whole.state_dict()), batch
        assert before.logged + after.logged == recorder.logged, batch


def test_compiled_network_is_saved_under_its_own_names(tmp_path):
    class Compiled(Base):
        def setup(self, for_inference=False):
            super().setup()
            self.net = torch.compile(self.net, backend="eager")

    model = Compiled()
    train(model, RandomData(), tmp_path, total_steps=1)
    assert list(model.trained_state_dict()["net"]) == list(names_of_the_network())


@pytest.fixture
def reset():
    """Lets tests make an Accelerator of their own, of which there is one a process."""
    reset = partial(AcceleratorState._reset_state, reset_partial_state=True)
    yield reset
    reset()


@pytest.mark.parametrize("stop", [1, 5])
def test_network_that_accelerate_compiles_is_saved_and_resumed(tmp_path, stop, reset):
    def fit(root, **ways):
        # As `helios launch --dynamo_backend eager` does.
        reset()
        own = Accelerator(cpu=True, dynamo_backend="eager")
        model = Base()
        options = {"use_cpu": None, "total_steps": 2, "print_frequency": 1}
        stop_at = StopAt(**ways)
        train(model, RandomData(), root, stop_at, accelerator=own, **options)
        return model

    whole = fit(tmp_path / "whole")
    assert hasattr(whole.net, "_orig_mod")  # it is compiled
    assert list(whole.trained_state_dict()["net"]) == list(names_of_the_network())
    fit(tmp_path / "parts", batch=stop)
    resumed = fit(tmp_path / "parts")
    assert digest(resumed.state_dict()) == digest(whole.state_dict())


def names_of_the_network():
    model = Base()
    model.setup()
    return model.net.state_dict()


def test_network_that_would_not_be_saved_is_refused(tmp_path):
    class Hidden(Base):
        def setup(self, for_inference=False):
            super().setup()
            self.parts = SimpleNamespace(extra=nn.Linear(1, 1))
            self.optimizer.add_param_group({"params": self.parts.extra.parameters()})

    with pytest.raises(ModelError, match="would not be saved"):
        train(Hidden(), RandomData(), tmp_path, total_steps=1)


class Broken(helios.Callback):
    """Fails when a checkpoint is on the disk."""

    def on_checkpoint_saved(self, session, path):
        raise KeyError("the user's")


def test_error_of_a_checkpoint_hook_is_raised_as_it_is(tmp_path, capsys):
    with pytest.raises(KeyError, match="the user's"):
        train(Base(), RandomData(), tmp_path, Broken(), **OPTIONS)
    assert "COULD NOT BE WRITTEN" not in capsys.readouterr().err


class Extra(nn.Linear):
    """Keeps the tensor that it gets."""

    extra = torch.ones(3)

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def test_nothing_of_a_resumed_run_lies_in_the_files_of_its_checkpoint(tmp_path):
    class Keeping(IdModel):
        best = None

        def setup(self, for_inference=False):
            self.net = Extra(1, 1)
            self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01)

        def user_state_dict(self):
            # Tensors of the networks: they have their place among the weights.
            return {"best": dict(self.net.named_parameters())}

        def load_user_state_dict(self, state, for_inference):
            self.best = state["best"]

    options = {"train_unit": "iteration", "total_steps": 6}
    train(Keeping(), IndexData(), tmp_path, StopAt(batch=3), **options)
    model = Keeping()

    class Looking(helios.Callback):
        def on_training_end(self, session):
            gc.collect()
            maps = Path("/proc/self/maps").read_text().splitlines()
            self.mapped = [line for line in maps if str(tmp_path) in line]

    looking = Looking()
    train(model, IndexData(), tmp_path, looking, **options)
    assert model.best["weight"].shape == (1, 1)
    assert model.net.extra.equal(torch.ones(3))
    assert looking.mapped == []


def test_second_fit_begins_with_empty_running_losses(tmp_path):
    class Running(Base):
        def train_step(self, batch, state):
            super().train_step(batch, state)
            self._loss_items["ones"] = 1.0

    model = Running()
    for _ in range(2):
        train(model, RandomData(), None, total_steps=1)
        assert model._running_losses == {"ones": 5.0}
