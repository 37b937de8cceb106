"""What a run computes: the same bits as a loop written by hand."""

import json
import math
from itertools import chain

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from support import (
    IdModel,
    IndexData,
    IndexDataset,
    RandomData,
    RandomModel,
    RecordingCallback,
    StopAt,
    digest,
    train,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import helios
from helios import rng
from helios.checkpoint import find_last_checkpoint, read_checkpoint

SAMPLES = 14
EPOCHS = 3


@pytest.fixture
def own_accelerator():
    """What makes an Accelerator; its process-wide state is taken away at the end."""

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield Accelerator
    reset()


# The schedule.


def test_run_in_epochs_trains_on_every_sample_of_each(tmp_path):
    model = IdModel()
    train(model, IndexData(5, batch_size=2), tmp_path, total_steps=2)
    assert model.batches == [[0, 1], [2, 3], [4]] * 2


def test_run_in_steps_ends_inside_an_epoch(tmp_path):
    model = IdModel()
    data = IndexData(5, batch_size=2)
    assert train(model, data, tmp_path, train_unit="iteration", total_steps=4)[0]
    assert model.batches == [[0, 1], [2, 3], [4], [0, 1]]


@pytest.mark.parametrize("unit", ["epoch", "iteration"])
def test_endless_run_ends_when_the_model_says_so(tmp_path, unit):
    class Sated(IdModel):
        def should_training_stop(self):
            return len(self.batches) == 7

    model = Sated()
    options = {"train_unit": unit, "total_steps": math.inf}
    assert train(model, IndexData(5), tmp_path, **options)[0] is False
    assert len(model.batches) == 7
    assert [p.name for p in tmp_path.glob("*/*")] == ["ids_epoch_1_iter_7"]


@pytest.mark.parametrize(
    ("unit", "frequency", "saved"),
    [
        ("epoch", 2, ["epoch_2_iter_6", "epoch_4_iter_12", "epoch_5_iter_15"]),
        ("epoch", None, ["epoch_5_iter_15"]),
        ("iteration", 2, ["epoch_0_iter_2", "epoch_1_iter_4", "epoch_1_iter_5"]),
        ("iteration", 5, ["epoch_1_iter_5"]),
    ],
)
def test_checkpoints_are_saved_when_they_are_due(tmp_path, unit, frequency, saved):
    options = {"train_unit": unit, "total_steps": 5, "chkpt_frequency": frequency}
    _, recorder = train(IdModel(), IndexData(3), tmp_path, **options)
    assert recorder.saved == [f"ids_{name}" for name in saved]


def test_only_the_last_checkpoints_are_kept(tmp_path):
    options = {"total_steps": 5, "chkpt_frequency": 1, "keep_last": 2}
    train(IdModel(), IndexData(1), tmp_path, **options)
    kept = sorted(p.name for p in tmp_path.glob("*/*"))
    assert kept == ["ids_epoch_4_iter_4", "ids_epoch_5_iter_5"]


def test_model_may_decline_a_checkpoint_and_name_it(tmp_path):
    class Choosy(IdModel):
        def should_save_checkpoint(self):
            return len(self.batches) == 2

        def append_metadata_to_chkpt_name(self, name):
            return f"{name}_loss_{len(self.batches)}"

    options = {"total_steps": 3, "chkpt_frequency": 1}
    _, recorder = train(Choosy(), IndexData(1), tmp_path, **options)
    assert recorder.saved == ["ids_epoch_2_iter_2_loss_2", "ids_epoch_3_iter_3_loss_3"]


def test_run_ends_after_so_many_validations_without_improvement(tmp_path):
    verdicts = iter([True, False, True, False, False, True])

    class Judged(IdModel):
        def have_metrics_improved(self):
            return next(verdicts)

    model = Judged()
    options = {"valid_frequency": 1, "early_stop_cycles": 2, "total_steps": math.inf}
    assert train(model, IndexData(3), tmp_path, **options)[0] is True
    assert len(model.batches) == 5 * 3


def test_early_stop_inside_an_epoch_ends_at_once(tmp_path):
    class Worse(IdModel):
        def have_metrics_improved(self):
            return False

    model = Worse()
    options = {"valid_frequency": 2, "early_stop_cycles": 2, "total_steps": 100}
    assert train(model, IndexData(9), tmp_path, train_unit="iteration", **options)[0]
    assert len(model.batches) == 4


def test_phases_follow_one_another(tmp_path):
    class Phased(IdModel):
        def should_advance_dataset_phase(self):
            return self.trainer.datamodule.train_dataset.length < 3

    class Data(helios.DataModule):
        def setup(self):
            for length in (1, 2, 3):
                self._add_train_phase(IndexDataset(length))

    model = Phased()
    train(model, Data(), tmp_path, total_steps=4)
    assert model.batches == [[0], [0], [1], [0], [1], [2], [0], [1], [2]]


# Running losses and batches.


def test_running_losses_add_up_until_a_validation_has_ended(tmp_path):
    seen = []

    class Sums(IdModel):
        def train_step(self, batch, state):
            super().train_step(batch, state)
            self._loss_items["items"] = float(batch.sum())

        def on_validation_end(self, validation_cycle):
            losses = self._running_losses
            seen.append((losses["items"], self.state_of_run.running_iter))
            super().on_validation_end(validation_cycle)
            assert losses == {}

        def on_training_batch_start(self, state):
            self.state_of_run = state
            super().on_training_batch_start(state)
            assert self._loss_items == {}

    train(Sums(), IndexData(4), tmp_path, total_steps=4, valid_frequency=2)
    assert seen == [(12.0, 8), (12.0, 8)]


def test_running_losses_ask_for_no_gradients(tmp_path):
    model = IdModel()
    train(model, IndexData(2), tmp_path, total_steps=1)
    assert not model._running_losses["loss"].requires_grad


def test_batches_pass_through_batch_to_device(tmp_path):
    class Moved(IdModel):
        def batch_to_device(self, batch, phase):
            assert phase in helios.BatchPhase
            return batch + {"train": 100, "valid": 200, "test": 300}[phase.value]

    model = Moved()
    data = IndexData(1, valid=1)
    train(model, data, tmp_path, total_steps=1, valid_frequency=1)
    helios.Trainer(use_cpu=True).test(model, data)
    assert (model.batches, model.validated) == ([[100]], [[200], [300]])


# The same bits as loops written by hand.


def samples():
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(SAMPLES, 4, generator=generator)
    return TensorDataset(inputs, inputs.sum(1, keepdim=True))


def make_parts():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return net, optimizer, scheduler


class Regression(helios.Model):
    """Does on every batch what a loop without accumulation does."""

    def __init__(self):
        super().__init__("regression")
        self.losses = []
        self.rates = []

    def setup(self, for_inference=False):
        self.net, self.optimizer, self.scheduler = make_parts()

    def train_step(self, batch, state):
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.net(inputs), targets)
        self.backward(loss)
        self.clip_gradients(self.net.parameters(), self.optimizer, 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item().hex())
        self.rates.append(self.scheduler.get_last_lr()[0])


class TensorData(helios.DataModule):
    def setup(self):
        self._add_train_phase(samples(), {"batch_size": 3})


def by_helios(root, **options):
    model = Regression()
    train(model, TensorData(), root, total_steps=EPOCHS, **options)
    return model.losses, model.rates, digest(model.net.state_dict())


def by_torch(accumulation_steps):
    rng.seed_rngs(rng.get_default_seed())
    net, optimizer, scheduler = make_parts()
    losses, rates = [], []
    for _ in range(EPOCHS):
        batches = list(DataLoader(samples(), 3, generator=torch.Generator()))
        for number, (inputs, targets) in enumerate(batches, 1):
            loss = nn.functional.mse_loss(net(inputs), targets)
            (loss / accumulation_steps).backward()
            if number % accumulation_steps == 0 or number == len(batches):
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.item().hex())
            rates.append(scheduler.get_last_lr()[0])
    return losses, rates, digest(net.state_dict())


def by_accelerate(accelerator):
    rng.seed_rngs(rng.get_default_seed())
    net, optimizer, scheduler = make_parts()
    loader = DataLoader(samples(), 3, generator=torch.Generator())
    net, optimizer, scheduler, loader = accelerator.prepare(
        net, optimizer, scheduler, loader
    )
    losses, rates = [], []
    for _ in range(EPOCHS):
        for inputs, targets in loader:
            with accelerator.accumulate(net):
                loss = nn.functional.mse_loss(net(inputs), targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.item().hex())
            rates.append(scheduler.get_last_lr()[0])
    return losses, rates, digest(net.state_dict())


@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_run_computes_the_bits_of_a_torch_loop(tmp_path, accumulation_steps):
    done = by_helios(tmp_path, accumulation_steps=accumulation_steps)
    assert done == by_torch(accumulation_steps)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("steps", [1, 3])
def test_run_computes_the_bits_of_an_accelerate_loop(
    tmp_path, own_accelerator, precision, steps
):
    accelerator = own_accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=steps
    )
    expected = by_accelerate(accelerator)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    options = {"mixed_precision": precision, "accumulation_steps": steps}
    assert by_helios(tmp_path, **options) == expected


def test_optimizer_acts_once_a_step_of_three_batches(tmp_path):
    seen = []

    class Counted(Regression):
        def setup(self, for_inference=False):
            super().setup()
            self.optimizer.register_step_post_hook(lambda *_: seen.append("step"))

        def train_step(self, batch, state):
            seen.append(self.net[0].weight.grad is not None)
            super().train_step(batch, state)

    model = Counted()
    train(model, TensorData(), tmp_path, total_steps=1, accumulation_steps=3)
    assert seen == [False, True, True, "step", False, True, "step"]
    assert model.rates == [0.05] * 2 + [0.05 * 0.9] * 2 + [0.05 * 0.9 * 0.9]


class ClearedFirst(Regression):
    """The same step, but clears the gradients before it rather than after."""

    def train_step(self, batch, state):
        inputs, targets = batch
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.net(inputs), targets)
        self.backward(loss)
        self.clip_gradients(self.net.parameters(), self.optimizer, 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.losses.append(loss.item().hex())


@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_gradients_may_be_cleared_before_or_after_the_step(
    tmp_path, accumulation_steps
):
    options = {"total_steps": EPOCHS, "accumulation_steps": accumulation_steps}
    before, after = ClearedFirst(), Regression()
    train(before, TensorData(), tmp_path / "before", **options)
    train(after, TensorData(), tmp_path / "after", **options)
    assert before.losses == after.losses
    assert digest(before.net.state_dict()) == digest(after.net.state_dict())


def test_schedulers_may_be_stepped_in_hooks_under_accumulation(tmp_path):
    class Hooked(Regression):
        def setup(self, for_inference=False):
            super().setup()
            lrs = torch.optim.lr_scheduler
            self.scheduler = lrs.MultiplicativeLR(self.optimizer, lambda step: 1.0)
            self.by_epoch = lrs.ExponentialLR(self.optimizer, 0.5)

        def on_training_epoch_end(self, current_epoch):
            self.by_epoch.step()

    model = Hooked()
    train(model, TensorData(), tmp_path, total_steps=2, accumulation_steps=3)
    assert model.by_epoch.get_last_lr() == [0.0125]


def test_given_accelerator_is_honoured(tmp_path, own_accelerator):
    accelerator = own_accelerator(
        cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2
    )
    seen = []

    class Asking(Regression):
        def train_step(self, batch, state):
            super().train_step(batch, state)
            seen.append(self.accelerator is accelerator)

    model = Asking()
    trainer = helios.Trainer(
        accelerator=accelerator, total_steps=EPOCHS, enable_progress_bar=False
    )
    assert trainer.fit(model, TensorData())
    assert all(seen)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    alone = by_helios(tmp_path, mixed_precision="bf16", accumulation_steps=2)
    assert (model.losses, model.rates, digest(model.net.state_dict())) == alone


def test_runs_of_several_precisions_follow_one_another_in_a_process(tmp_path):
    order = ["no", "bf16", "fp16", "no", "fp16", "bf16"]
    results = {}
    for number, precision in enumerate(order):
        done = by_helios(tmp_path / str(number), mixed_precision=precision)
        assert results.setdefault(precision, done) == done
    assert len({digest for _, _, digest in results.values()}) == 3


def test_default_tensor_settings_are_put_back(tmp_path):
    by_helios(tmp_path, enable_deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()


def test_settings_that_are_as_they_were_are_left_alone(tmp_path, monkeypatch):
    # torch imports much to set them, and a stop may have ended that halfway.
    monkeypatch.setattr(torch, "use_deterministic_algorithms", None)
    by_helios(tmp_path)


# Models of many kinds.


class Gan(helios.Model):
    """Two networks with an optimizer each, trained against one another."""

    def __init__(self):
        super().__init__("gan")

    def setup(self, for_inference=False):
        self.generator = nn.Linear(2, 1)
        self.critic = nn.Linear(1, 1)
        self.optim_g = torch.optim.Adam(self.generator.parameters(), lr=0.1)
        self.optim_c = torch.optim.Adam(self.critic.parameters(), lr=0.1)

    def train_step(self, batch, state):
        real = batch.float()[:, None]
        fake = self.generator(torch.randn(len(real), 2))
        loss = self.critic(fake.detach()).mean() - self.critic(real).mean()
        self.backward(loss)
        self.optim_c.step()
        self.optim_c.zero_grad()
        self.backward(-self.critic(fake).mean())
        self.optim_g.step()
        self.optim_g.zero_grad()
        self.optim_c.zero_grad()


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_two_networks_train_against_one_another(tmp_path, accumulation_steps):
    model = Gan()
    options = {"total_steps": 3, "accumulation_steps": accumulation_steps}
    train(model, IndexData(6, batch_size=2), tmp_path, **options)

    rng.seed_rngs(rng.get_default_seed())
    by_hand = Gan()
    by_hand.setup()
    for batch in [[0, 1], [2, 3], [4, 5]] * 3 if accumulation_steps == 1 else []:
        real = torch.tensor(batch).float()[:, None]
        fake = by_hand.generator(torch.randn(2, 2))
        (by_hand.critic(fake.detach()).mean() - by_hand.critic(real).mean()).backward()
        by_hand.optim_c.step()
        by_hand.optim_c.zero_grad()
        (-by_hand.critic(fake).mean()).backward()
        by_hand.optim_g.step()
        by_hand.optim_g.zero_grad()
        by_hand.optim_c.zero_grad()
    if accumulation_steps == 1:
        assert digest(model.generator.state_dict()) == digest(
            by_hand.generator.state_dict()
        )
        assert digest(model.critic.state_dict()) == digest(by_hand.critic.state_dict())
    else:
        assert digest(model.critic.state_dict()) != digest(by_hand.critic.state_dict())
    checkpoint = read_checkpoint(find_last_checkpoint(tmp_path))
    assert set(load_file(checkpoint.path / "model.safetensors")) == {
        f"{net}.{name}"
        for net in ("generator", "critic")
        for name in ("weight", "bias")
    }


class Distilled(IdModel):
    """A frozen teacher, and a student."""

    def __init__(self):
        super().__init__("distilled")

    def setup(self, for_inference=False):
        super().setup()
        self.teacher = nn.Linear(1, 1).requires_grad_(False)
        self.first_teacher = digest(self.teacher.state_dict())


def test_frozen_network_is_saved_and_not_trained(tmp_path):
    model = Distilled()
    train(model, IndexData(4), tmp_path, total_steps=1)
    assert digest(model.teacher.state_dict()) == model.first_teacher
    again = Distilled()
    helios.Trainer(use_cpu=True, chkpt_root=tmp_path).test(again, IndexData())
    assert digest(again.state_dict()["networks"]) == digest(
        model.state_dict()["networks"]
    )


class Nested(helios.Model):
    """Networks in containers of every kind."""

    def __init__(self):
        super().__init__("nested")

    def setup(self, for_inference=False):
        self.in_list = [nn.Linear(1, 1), nn.Linear(1, 1)]
        self.in_tuple = (nn.Linear(1, 1),)
        self.in_dict = {"a": {"b": nn.Linear(1, 1)}}
        self.modules = nn.ModuleList([nn.Linear(1, 1)])
        self.named = nn.ModuleDict({"c": nn.Linear(1, 1)})
        self.optimizers = {"all": [torch.optim.SGD(self.parameters(), lr=0.01)]}

    def nets(self):
        in_modules = [self.modules[0], self.named["c"]]
        return [*self.in_list, *self.in_tuple, self.in_dict["a"]["b"], *in_modules]

    def parameters(self):
        return [p for net in self.nets() for p in net.parameters()]

    def train_step(self, batch, state):
        assert all(net.training for net in self.nets())
        hidden = batch.float()[:, None]
        for net in self.nets():
            hidden = net(hidden)
        self.backward(hidden.square().mean())
        self.optimizers["all"][0].step()
        self.optimizers["all"][0].zero_grad()


def test_networks_in_containers_are_trained_and_saved(tmp_path):
    model = Nested()
    train(model, IndexData(4), tmp_path, total_steps=2)
    state = model.state_dict()
    assert list(state["networks"]) == [
        *("in_list.0", "in_list.1", "in_tuple.0", "in_dict.a.b", "modules.0", "named.c")
    ]
    assert list(state["optimizers"]) == ["optimizers.all.0"]
    again = Nested()
    train(again, IndexData(4), tmp_path, total_steps=2)
    assert digest(again.state_dict()) == digest(state)


def test_state_of_a_model_holds_everything_that_training_changes(tmp_path):
    model = RandomModel()
    train(model, RandomData(), tmp_path, total_steps=1)
    assert {kind: list(part) for kind, part in model.state_dict().items()} == {
        "networks": ["net", "heads.a", "heads.b.0"],
        "optimizers": ["optimizers.0", "optimizers.1"],
        "schedulers": ["schedulers.0", "schedulers.1"],
        "parameters": ["temperature"],
        "others": ["generator", "numpy_generator", "python_generator"],
        "user": ["best", "history"],
    }


# Weights on the disk.


def test_weights_are_read_without_helios(tmp_path):
    model = Regression()
    train(model, TensorData(), tmp_path, total_steps=1)
    (file,) = tmp_path.glob("*/*/model.safetensors")
    net, _, _ = make_parts()
    net.load_state_dict(load_file(file))
    assert digest(net.state_dict()) == digest(model.net.state_dict())


def test_tensor_of_the_user_that_is_in_the_state_is_stored_once(tmp_path):
    class Sharing(Regression):
        def user_state_dict(self):
            own = torch.ones(2, 2)
            return {"weight": self.net[0].weight, "own": own, "same": own}

    model = Sharing()
    train(model, TensorData(), tmp_path, total_steps=1)
    checkpoint = read_checkpoint(find_last_checkpoint(tmp_path))
    stored = [n for f in ("model", "training") for n in checkpoint.tensors[f]]
    shapes = [
        tuple(checkpoint.tensors["training"][n].shape)
        for n in checkpoint.tensors["training"]
    ]
    assert shapes.count((2, 2)) == 1
    assert sum("own" in name or "same" in name for name in stored) == 1
    # The weight itself, and its two averages of AdamW.
    everything = {**checkpoint.tensors["model"], **checkpoint.tensors["training"]}
    assert sum(tuple(t.shape) == (8, 4) for t in everything.values()) == 3
    user = checkpoint.tree("training")["model"]["user"]
    assert torch.equal(user["weight"], model.net[0].weight)
    assert torch.equal(user["same"], torch.ones(2, 2))


def test_trained_state_holds_the_weights_alone(tmp_path):
    model = Regression()
    train(model, TensorData(), tmp_path, total_steps=1)
    assert digest(model.trained_state_dict()) == digest({"net": model.net.state_dict()})


# How older projects are written.


class Old(helios.Model):
    """Own state dictionaries, and `fast_init`."""

    def __init__(self):
        super().__init__("old")
        self.inits = []
        self.loads = []
        self.batches = []

    def setup(self, fast_init=False):
        self.inits.append(fast_init)
        self._net = nn.Linear(1, 1).to(self.device)
        self._optimizer = torch.optim.SGD(self._net.parameters(), lr=0.01, momentum=0.9)

    def load_state_dict(self, state_dict, fast_init=False):
        self.loads.append(fast_init)
        self._net.load_state_dict(state_dict["net"])
        if not fast_init:
            self._optimizer.load_state_dict(state_dict["optimizer"])

    def state_dict(self):
        return {
            "net": self._net.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def train(self):
        self._net.train()

    def eval(self):
        self._net.eval()

    def train_step(self, batch, state):
        self.batches.append(batch.tolist())
        self._optimizer.zero_grad()
        loss = self._net(batch.float()[:, None]).square().mean()
        loss.backward()
        self._optimizer.step()
        self._loss_items["loss"] = loss.detach()

    def on_training_batch_end(self, state, should_log=False):
        super().on_training_batch_end(state, should_log)
        if should_log:
            helios.core.loggers.get_root_logger().info("%s", self._loss_items)


class OldData(helios.DataModule):
    def setup(self):
        params = helios.DataLoaderParams(batch_size=2, shuffle=True)
        self._train_dataset = self._create_dataset(IndexDataset(7), params)
        self._valid_dataset = self._create_dataset(IndexDataset(2), params)
        self._test_dataset = self._create_dataset(IndexDataset(2), params)
        params.batch_size = 1000


class OldWithoutLogs(Old):
    on_training_batch_end = helios.Model.on_training_batch_end


def test_older_project_trains_resumes_and_tests(tmp_path):
    whole, first, second, tested = [OldWithoutLogs() for _ in range(4)]
    train(whole, OldData(), tmp_path / "whole", total_steps=4, valid_frequency=1)
    train(first, OldData(), tmp_path / "parts", total_steps=2, valid_frequency=1)
    train(second, OldData(), tmp_path / "parts", total_steps=4, valid_frequency=1)
    assert first.batches + second.batches == whole.batches
    assert digest(second.state_dict()) == digest(whole.state_dict())
    assert sorted(chain.from_iterable(whole.batches[:4])) == list(range(7))
    assert (second.inits, set(second.loads)) == ([False], {False})
    helios.Trainer(use_cpu=True, chkpt_root=tmp_path / "parts").test(tested, OldData())
    assert (tested.inits, tested.loads) == ([True], [True])
    assert digest(tested._net.state_dict()) == digest(second._net.state_dict())


class OldWithScores(OldWithoutLogs):
    """Counts in its validation, and saves that itself."""

    validated = 0

    def valid_step(self, batch, step):
        self.validated += 1

    def state_dict(self):
        return {**super().state_dict(), "validated": self.validated}

    def load_state_dict(self, state_dict, fast_init=False):
        super().load_state_dict(state_dict, fast_init)
        self.validated = state_dict["validated"]


class Average(Regression):
    """Validates with averaged weights, put in the place of its own."""

    def setup(self, for_inference=False):
        super().setup()
        self.average = torch.optim.swa_utils.AveragedModel(self.net)

    def train_step(self, batch, state):
        super().train_step(batch, state)
        self.average.update_parameters(self.net)

    def swap(self):
        own, averaged = self.net.parameters(), self.average.module.parameters()
        for mine, other in zip(own, averaged, strict=True):
            mine.data, other.data = other.data, mine.data

    def on_validation_start(self, validation_cycle):
        super().on_validation_start(validation_cycle)
        self.swap()

    def on_validation_end(self, validation_cycle):
        super().on_validation_end(validation_cycle)
        self.swap()


class ValidatedTensorData(TensorData):
    def setup(self):
        super().setup()
        self._add_valid_dataset(samples(), {"batch_size": 7})


@pytest.mark.parametrize(
    ("kind", "data"), [(OldWithScores, OldData), (Average, ValidatedTensorData)]
)
def test_interrupted_validation_leaves_no_trace(tmp_path, kind, data):
    options = {"total_steps": 3, "valid_frequency": 1}
    whole, first, second = kind(), kind(), kind()
    train(whole, data(), tmp_path / "whole", StopAt(), **options)
    stop = StopAt(validation=1)
    assert not train(first, data(), tmp_path / "parts", stop, **options)[0]
    assert train(second, data(), tmp_path / "parts", StopAt(), **options)[0]
    assert digest(second.state_dict()) == digest(whole.state_dict())


def test_record_of_a_checkpoint_says_how_far_the_run_is(tmp_path):
    train(IdModel(), IndexData(3), tmp_path, total_steps=2)
    (file,) = tmp_path.glob("*/*/helios.json")
    progress = json.loads(file.read_text())["record"]["progress"]
    assert {k: progress[k] for k in ("global_epoch", "current_iteration")} == {
        "global_epoch": 2,
        "current_iteration": 6,
    }


def test_log_points_come_at_every_second_step(tmp_path):
    options = {"total_steps": 5, "print_frequency": 2, "train_unit": "iteration"}
    _, recorder = train(IdModel(), IndexData(3), tmp_path, **options)
    assert [step for step, _, _ in recorder.logged] == [2, 4]


def test_callback_state_is_saved_with_the_run(tmp_path):
    class Counter(helios.Callback):
        batches = 0

        def on_training_batch_end(self, session):
            self.batches += 1

        def state_dict(self):
            return {"batches": self.batches}

        def load_state_dict(self, state):
            self.batches = state["batches"]

    train(IdModel(), IndexData(3), tmp_path, Counter(), total_steps=1)
    counter = Counter()
    train(IdModel(), IndexData(3), tmp_path, counter, total_steps=3)
    assert counter.batches == 9
    assert isinstance(RecordingCallback(), helios.Callback)


@pytest.mark.parametrize("place", ["prepare_data", "setup"])
def test_stop_that_is_asked_for_while_data_are_set_up_is_honoured(tmp_path, place):
    class Data(IndexData):
        asks = True

    def asking(self):
        if self.asks:
            self.trainer.request_stop("the test")
        return getattr(IndexData, place)(self)

    setattr(Data, place, asking)
    model, again = IdModel(), IdModel()
    assert not train(model, Data(3), tmp_path, total_steps=1)[0]
    assert model.batches == []
    Data.asks = False
    assert train(again, Data(3), tmp_path, total_steps=1)[0]
    assert len(again.batches) == 3
