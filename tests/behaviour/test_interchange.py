"""Checkpoints of others: runs that go on from them, and what is given out to them."""

import json
import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file
from support import StopAt, digest, train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import helios
from helios import rng
from helios.checkpoint import find_last_checkpoint, read_checkpoint
from helios.cli import main
from helios.differences import differences

FIXTURE = Path(__file__).parents[1] / "fixtures" / "format_2"
# In another epoch Accelerate's loader would draw from the generators too.
BATCHES, EPOCHS = 6, 2
OPTIONS = {"total_steps": EPOCHS, "chkpt_frequency": 1, "random_seed": 3}


def dataset():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(4 * BATCHES, 5, generator=generator)
    return TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))


def networks():
    torch.manual_seed(7)
    body = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.3))
    head = nn.Linear(8, 1)
    return body, head


def trained_by(body, head):
    body_optimizer = torch.optim.AdamW(body.parameters(), lr=0.02)
    head_optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(body_optimizer, 4, 0.5)
    return body_optimizer, head_optimizer, scheduler


class Ported(helios.Model):
    """The same as `with_accelerate` trains."""

    def __init__(self):
        super().__init__("ported")

    def setup(self, for_inference=False):
        self.body, self.head = networks()
        found = trained_by(self.body, self.head)
        self.body_optimizer, self.head_optimizer, self.scheduler = found

    def train_step(self, batch, state):
        inputs, targets = batch
        loss = (self.head(self.body(inputs)) - targets).square().mean()
        self.backward(loss)
        for optimizer in (self.body_optimizer, self.head_optimizer):
            optimizer.step()
            optimizer.zero_grad()
        self.scheduler.step()


class Data(helios.DataModule):
    def setup(self):
        self._add_train_phase(dataset(), {"batch_size": 4})


def with_accelerate(accelerator, save_to=None, load_from=None, save_at=8, is_safe=True):
    """A hand-written loop, which saves after some steps, or goes on from there."""
    body, head = networks()
    body_optimizer, head_optimizer, scheduler = trained_by(body, head)
    found = accelerator.prepare(
        body, head, body_optimizer, head_optimizer, scheduler, DataLoader(dataset(), 4)
    )
    body, head, body_optimizer, head_optimizer, scheduler, loader = found
    rng.seed_rngs(5)
    step, done = 0, 0 if load_from is None else save_at
    for _ in range(EPOCHS):
        for inputs, targets in loader:
            step += 1
            if step < done:
                continue
            if step == done:  # only now: the loader draws from the generators too
                accelerator.load_state(load_from)
                continue
            loss = (head(body(inputs)) - targets).square().mean()
            accelerator.backward(loss)
            for optimizer in (body_optimizer, head_optimizer):
                optimizer.step()
                optimizer.zero_grad()
            scheduler.step()
            if step == save_at and save_to is not None:
                accelerator.save_state(save_to, safe_serialization=is_safe)
    return {
        "body": body.state_dict(),
        "head": head.state_dict(),
        "optimizer": body_optimizer.state_dict(),
        "momentum": head_optimizer.state_dict(),
        "scheduler": scheduler.state_dict()["last_epoch"],
        "rng": rng.capture_rng(),
    }


def state_of(model):
    return {
        "body": model.body.state_dict(),
        "head": model.head.state_dict(),
        "optimizer": model.body_optimizer.state_dict(),
        "momentum": model.head_optimizer.state_dict(),
        "scheduler": model.scheduler.state_dict()["last_epoch"],
        "rng": rng.capture_rng(),
    }


def run(*arguments):
    return CliRunner().invoke(main, ["checkpoint", *map(str, arguments)])


@pytest.mark.parametrize("is_safe", [True, False])
def test_run_goes_on_from_an_accelerate_folder_to_the_same_bits(
    tmp_path, accelerator, is_safe
):
    saved = tmp_path / "saved"
    expected = with_accelerate(accelerator, save_to=saved, is_safe=is_safe)
    assert (saved / "pytorch_model_1.bin").exists() is not is_safe
    done = run(
        *("import", tmp_path / "saved", tmp_path / "root", "--save-name", "ported"),
        *("--epoch", 1, "--batch", 2, "--json"),
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.output)
    assert report["unknown"] == [
        "the steps: as the files say, taken as 8",
        "the order of the samples: a Session keeps it where nothing is shuffled, or a "
        "seedable sampler does it; elsewhere it is that of Helios from here on",
    ]
    path = find_last_checkpoint(tmp_path / "root" / "ported")
    assert str(path) == report["path"]
    model = Ported()
    assert train(model, Data(), tmp_path / "root", **OPTIONS)[0]
    assert digest(state_of(model)) == digest(expected)
    # What it saved itself from there on is as any other.
    record = read_checkpoint(find_last_checkpoint(tmp_path / "root" / "ported")).record
    assert record["progress"]["current_iteration"] == BATCHES * EPOCHS
    assert "imported" not in record


class Tally:
    """Counts steps, as an object of a script's own."""

    def __init__(self):
        self.steps = 0

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def registering(folder, accelerator, *, save_to=None):
    """A loop by hand, whose tally and scheduler are registered, or its port."""
    set_seed(3)
    net, tally = nn.Linear(5, 1), Tally()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loader = DataLoader(dataset(), 4)
    net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    accelerator.register_for_checkpointing(tally, scheduler)
    session = None
    if save_to is None:
        session = helios.Session(accelerator, folder, loaders=loader)
    for _ in range(2) if session is None else session.epochs(2):
        for inputs, targets in loader if session is None else session.batches():
            accelerator.backward((net(inputs) - targets).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            tally.steps += 1
            if save_to is not None and tally.steps == 5:
                accelerator.save_state(save_to)
    return net.weight.tolist(), scheduler.last_epoch, tally.steps


def test_what_was_registered_is_taken_up_whatever_it_is(tmp_path, accelerator):
    saved = tmp_path / "saved"
    whole = registering(None, accelerator, save_to=saved)
    done = run(
        *("import", saved, tmp_path, "--save-name", "ported", "--step", 5),
        *("--epoch", 0, "--batch", 5),
    )
    assert done.exit_code == 0, done.output
    AcceleratorState._reset_state(reset_partial_state=True)
    assert registering(tmp_path / "ported", Accelerator(cpu=True)) == whole


@pytest.mark.parametrize("is_named", [True, False])
def test_objects_go_by_their_names_or_in_their_order(tmp_path, accelerator, is_named):
    with_accelerate(accelerator, save_to=tmp_path / "saved")
    names = ("--networks", "head,body") if is_named else ()
    saved = tmp_path / "saved"
    done = run("import", saved, tmp_path / "r", "--save-name", "ported", *names)
    assert done.exit_code == 0
    assert "not known: the epoch: nobody says, taken as 0" in done.output
    if is_named:  # the wrong way round
        with pytest.raises(helios.HeliosError, match="does not fit the model's `body`"):
            train(Ported(), Data(), tmp_path / "r", **OPTIONS)
    else:
        model = Ported()
        assert not train(model, Data(), tmp_path / "r", StopAt(batch=0), **OPTIONS)[0]
        for name, value in load_file(saved / "model.safetensors").items():
            assert model.body.state_dict()[name].equal(value)


class TiedModel(helios.Model):
    """Two layers of the same weight, of which Accelerate saves one name."""

    def setup(self, for_inference=False):
        self.net = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
        self.net[1].weight = self.net[0].weight
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.02)

    def train_step(self, batch, state):
        inputs, targets = batch
        loss = (self.net(inputs).sum(dim=1, keepdim=True) - targets).square().mean()
        self.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_tied_weights_come_over_from_accelerate(tmp_path, accelerator):
    theirs = TiedModel("tied")
    theirs.setup()
    accelerator.prepare(theirs.net, theirs.optimizer)
    accelerator.save_state(tmp_path / "saved")
    assert "1.weight" not in load_file(tmp_path / "saved" / "model.safetensors")
    root, ours = tmp_path / "root", TiedModel("tied")
    common = (root, "--save-name", "tied", "--epoch", EPOCHS)
    assert run("import", tmp_path / "saved", *common).exit_code == 0
    train(ours, Data(), root, resume="must", **OPTIONS)
    assert ours.net[1].weight is ours.net[0].weight
    assert digest(dict(ours.net.state_dict())) == digest(dict(theirs.net.state_dict()))


def test_wrong_names_and_wrong_sources_are_refused(tmp_path, accelerator):
    with_accelerate(accelerator, save_to=tmp_path / "saved")
    common = (tmp_path / "root", "--save-name", "ported")
    for source, options, message in (
        (tmp_path / "saved", ("--networks", "net"), "1 names .* has 2"),
        (tmp_path / "saved", ("--save-name", "a/b"), "must be a plain file name"),
        (tmp_path, (), "has no weights"),
        (__file__, (), "cannot be read without running code"),
        (FIXTURE, (), "is a checkpoint of Helios already"),
    ):
        found = run("import", source, *common, *options)
        assert found.exit_code == 2
        assert "weights_only=False" not in found.output  # torch's advice
        assert re.search(message, found.output)
    assert not (tmp_path / "root").exists()


def test_accelerate_goes_on_from_an_exported_folder_to_the_same_bits(
    tmp_path, accelerator
):
    whole, half = Ported(), Ported()
    assert train(whole, Data(), None, **OPTIONS)[0]
    assert not train(half, Data(), tmp_path / "root", StopAt(batch=8), **OPTIONS)[0]
    path = find_last_checkpoint(tmp_path / "root" / "ported")
    done = run("export", path, tmp_path / "out", "--accelerate")
    assert done.exit_code == 0, done.output
    assert "not in there: the position in the data" in done.output
    found = with_accelerate(accelerator, load_from=tmp_path / "out")
    expected = state_of(whole)
    assert accelerator.step == 8
    assert digest(found) == digest(expected)


@pytest.mark.parametrize("is_named", [True, False])
def test_import_is_exported_again_as_far_as_it_goes(tmp_path, accelerator, is_named):
    saved, root = tmp_path / "saved", tmp_path / "root"
    with_accelerate(accelerator, save_to=saved)
    (saved / "random_states_0.pkl").unlink()
    names = ("--networks", "body,head") if is_named else ()
    made = run("import", saved, root, "--save-name", "ported", *names, "--json")
    path = json.loads(made.output)["path"]
    done = run("export", path, tmp_path / "out", "--accelerate", "--json")
    assert done.exit_code == 0, done.output
    assert "the random numbers of rank_0" in json.loads(done.stdout)["left_out"]
    for name in ("model.safetensors", "model_1.safetensors"):
        found, expected = load_file(tmp_path / "out" / name), load_file(saved / name)
        assert digest(found) == digest(expected)


class Tied(helios.Model):
    """A tied weight, a state that is no tensor, and a number of its own."""

    def __init__(self, dtype=torch.float32):
        super().__init__("tied")
        self.dtype = dtype

    def setup(self, for_inference=False):
        self.net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), Counted())
        self.net[1].weight = self.net[0].weight
        self.net.register_buffer("phase", torch.ones(2, dtype=self.dtype))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)

    def train_step(self, batch, state):
        self.backward(self.net(batch[0][:, :3]).square().mean())
        self.optimizer.step()


class Counted(nn.Identity):
    def get_extra_state(self):
        return 3

    def set_extra_state(self, state):
        assert state == 3


def test_exported_weights_load_without_helios(tmp_path):
    model = Tied()
    train(model, Data(), tmp_path / "root", total_steps=1)
    path = find_last_checkpoint(tmp_path / "root" / "tied")
    out = tmp_path / "weights.safetensors"
    done = run("export", path, out)
    assert done.exit_code == 0, done.output
    assert "not in there: 2._extra_state" in done.output
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    found = load_file(out)
    names = {"0.weight", "0.bias", "1.weight", "1.bias", "phase"}
    assert found.keys() == names
    shards = tmp_path / "shards"
    assert run("export", path, shards, "--shard-bytes", 60).exit_code == 0
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == names
    assert len({*index["weight_map"].values()}) == 2
    for name, file in index["weight_map"].items():
        assert load_file(shards / file)[name].equal(found[name])
        assert found[name].equal(model.net.state_dict()[name])


def test_export_of_what_has_no_form_there_leaves_nothing(tmp_path):
    train(Tied(torch.complex64), Data(), tmp_path / "root", total_steps=1)
    path = find_last_checkpoint(tmp_path / "root" / "tied")
    done = run("export", path, tmp_path / "weights.safetensors")
    assert done.exit_code == 2
    assert "phase has dtype torch.complex64" in done.output
    both = run("export", path, tmp_path / "out", "--accelerate", "--shard-bytes", 9)
    assert both.exit_code == 2
    assert [found.name for found in tmp_path.iterdir()] == ["root"]


class Older(Ported):
    """Says itself what its state is."""

    def state_dict(self):
        return {
            "body": self.body.state_dict(),
            "head": self.head.state_dict(),
            "body_optimizer": self.body_optimizer.state_dict(),
            "head_optimizer": self.head_optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "score": 0.5,
        }

    def load_state_dict(self, state, for_inference=False):
        assert state["score"] == 0.5
        for name in ("body", "head", "body_optimizer", "head_optimizer", "scheduler"):
            getattr(self, name).load_state_dict(state[name])


@pytest.mark.parametrize("kind", [Ported, Older])
@pytest.mark.parametrize("is_nested", [True, False])
def test_run_goes_on_from_a_pth_file(tmp_path, kind, is_nested):
    model = Older()
    assert train(model, Data(), None, **OPTIONS)[0]
    tree = {
        "model": model.state_dict(),
        "training": {"global_epoch": 2, "current_iteration": 12},
        "rng": torch.arange(3),
    }
    torch.save(tree if is_nested else tree["model"], tmp_path / "old.pth")
    done = run(
        *("import", tmp_path / "old.pth", tmp_path / "root", "--save-name", "ported"),
        *(() if is_nested else ("--epoch", 2)),
    )
    assert done.exit_code == 0, done.output
    assert ("not taken over: rng, training" in done.output) == is_nested
    found = kind()
    options = {**OPTIONS, "total_steps": 3}
    assert not train(found, Data(), tmp_path / "root", StopAt(batch=0), **options)[0]
    assert digest({**state_of(found), "rng": 0}) == digest(
        {**state_of(model), "rng": 0}
    )
    record = read_checkpoint(find_last_checkpoint(tmp_path / "root" / "ported")).record
    assert record["progress"]["global_epoch"] == 2
    assert record["progress"]["current_iteration"] == 12


def test_weights_alone_are_those_of_the_named_network(tmp_path):
    torch.save(networks()[1].state_dict(), tmp_path / "head.pth")
    common = ("import", tmp_path / "head.pth", tmp_path / "root", "--save-name", "one")
    assert run(*common, "--networks", "head").exit_code == 0
    tree = read_checkpoint(find_last_checkpoint(tmp_path / "root" / "one")).tree(
        "model"
    )
    assert tree.keys() == {"weight", "bias"}
    again = run(*common, "--networks", "head")
    assert (again.exit_code, "exists" in again.output) == (2, True)


class Touch:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"model": Touch(str(tmp_path / "made"))}, tmp_path / "old.pth")
    done = run("import", tmp_path / "old.pth", tmp_path / "r", "--save-name", "ported")
    assert done.exit_code == 2
    assert "without running code of its own: it needs" in done.output
    assert not (tmp_path / "made").exists()


def damage(name, data):
    """Put something else into a file of a folder of `save_state`."""

    def do(folder):
        if isinstance(data, bytes):
            (folder / name).write_bytes(data)
        else:
            torch.save(data, folder / name)

    return do


DAMAGES = {
    "weights": damage("model.safetensors", b"\xff\0\0"),
    "optimizer": damage("optimizer.bin", [1]),
    "random_states": damage("random_states_0.pkl", {"step": 1}),
}


@pytest.mark.parametrize("kind", [*DAMAGES, "ranks"])
def test_folder_that_does_not_hold_what_it_should_is_an_error(
    tmp_path, accelerator, kind
):
    train(Ported(), Data(), tmp_path / "root", **OPTIONS)
    path = find_last_checkpoint(tmp_path / "root" / "ported")
    run("export", path, tmp_path / "out", "--accelerate")
    if kind == "ranks":
        states = torch.load(tmp_path / "out/random_states_0.pkl", weights_only=False)
        torch.save(states, tmp_path / f"out/random_states_{10**8}.pkl")
    else:
        DAMAGES[kind](tmp_path / "out")
    done = run("import", tmp_path / "out", tmp_path / "r", "--save-name", "ported")
    assert done.exit_code == 2, done.output
    assert str(tmp_path / "out") in done.output
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("value", ["x", 2.5, -1])
def test_progress_that_is_none_is_an_error(tmp_path, value):
    tree = {"model": networks()[1].state_dict(), "state": {"global_epoch": value}}
    torch.save(tree, tmp_path / "old.pth")
    done = run("import", tmp_path / "old.pth", tmp_path / "r", "--save-name", "ported")
    assert done.exit_code == 2
    assert f"`global_epoch` is {value!r}, not an int >= 0" in done.output


def test_random_numbers_go_to_accelerate_and_back(tmp_path, accelerator):
    train(Ported(), Data(), tmp_path / "root", **OPTIONS)
    path = find_last_checkpoint(tmp_path / "root" / "ported")
    run("export", path, tmp_path / "out", "--accelerate")
    saved = read_checkpoint(path).tree("rank_0")["rng"]
    run("import", tmp_path / "out", tmp_path / "again", "--save-name", "ported")
    path = find_last_checkpoint(tmp_path / "again" / "ported")
    found = read_checkpoint(path).tree("rank_0")["rng"]
    assert list(differences(found, saved, "rng")) == []


def test_random_numbers_of_a_device_that_is_not_there_are_left_out(
    tmp_path, accelerator
):
    with_accelerate(accelerator, save_to=tmp_path / "saved")
    path = tmp_path / "saved" / "random_states_0.pkl"
    states = torch.load(path, weights_only=False)
    states["torch_cuda_manual_seed"] = [torch.zeros(16, dtype=torch.uint8)]
    torch.save(states, path)
    run("import", tmp_path / "saved", tmp_path / "root", "--save-name", "ported")
    model = Ported()
    assert not train(model, Data(), tmp_path / "root", StopAt(batch=0), **OPTIONS)[0]
    assert rng.capture_rng()["torch"].equal(states["torch_manual_seed"])
