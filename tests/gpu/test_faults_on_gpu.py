"""Numbers gone bad, and memory that is too small, on a CUDA device."""

import math

import pytest
import torch
from support import IndexData, digest, train
from torch import nn

import helios
from helios.errors import BadNumbersError
from helios.failures.bundle import read_bundle

pytestmark = pytest.mark.gpu
STEPS = {"train_unit": "iteration", "total_steps": 200, "use_cpu": None}


class Wide(helios.Model):
    """A network that keeps the device busy; some of its batches are spoiled."""

    def __init__(self, *spoiled):
        super().__init__("wide")
        self.spoiled = spoiled

    def setup(self, for_inference=False):
        self.net = nn.Sequential(nn.Linear(1, 512), nn.Linear(512, 1))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-9)

    def train_step(self, batch, state):
        loss = self.net(batch.float()[:, None]).square().mean()
        if state.global_iteration in self.spoiled:
            loss = loss * math.nan
        self.optimizer.zero_grad()
        self.backward(loss)
        self.optimizer.step()
        self._loss_items["loss"] = loss


class NoWaiting(helios.Callback):
    """Makes an error of whatever waits for the device, between two batches."""

    def on_training_batch_end(self, session):
        batch = session.state.global_iteration
        if batch in (3, 180):
            torch.cuda.set_sync_debug_mode("error" if batch == 3 else "default")

    def on_exception(self, session, error):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("policy", [None, "warn", "stop", "rollback"])
def test_looking_at_the_numbers_does_not_wait_for_the_device(policy):
    data = IndexData(800, valid=0, batch_size=4, pin_memory=True)
    assert train(Wide(), data, None, NoWaiting(), bad_numbers=policy, **STEPS)[0]


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_step_of_bad_numbers_is_left_out_on_a_gpu(tmp_path, policy):
    spoiled, plain = Wide(50, 120), Wide()
    for model, bad in ((spoiled, policy), (plain, None)):
        data = IndexData(800, valid=0, batch_size=4)
        root = tmp_path / str(bad)
        train(model, data, root, bad_numbers=bad, chkpt_frequency=20, **STEPS)
    assert all(p.isfinite().all() for p in spoiled.net.parameters())
    assert digest(spoiled.net.state_dict()) != digest(plain.net.state_dict())


@pytest.mark.parametrize("policy", ["stop", "warn"])
def test_bad_numbers_on_a_gpu_are_told(tmp_path, capsys, policy):
    data = IndexData(800, valid=0, batch_size=4)
    at = r"loss is nan, .*at step 51 \(epoch 0, batch 50\), samples \[200, 201, "
    if policy == "stop":
        with pytest.raises(BadNumbersError, match=at):
            train(Wide(50), data, tmp_path, bad_numbers=policy, **STEPS)
        assert not list(tmp_path.glob("wide/*"))
    else:
        assert train(Wide(50), data, None, bad_numbers=policy, **STEPS)[0]
        assert "at step 51 (epoch 0, batch 50)" in capsys.readouterr().err


MOST_BYTES = 1 << 30


@pytest.fixture
def small_gpu():
    """One that has a GiB for this process, whoever else is on it."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(MOST_BYTES / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


class Greedy(Wide):
    """Needs so much memory that three samples at once do not fit."""

    def train_step(self, batch, state):
        share = int(len(batch) * MOST_BYTES * 0.35)
        torch.empty(share, dtype=torch.uint8, device=self.device)
        torch.cuda.empty_cache()  # else what comes next may take a part of that room
        super().train_step(batch, state)


@pytest.mark.usefixtures("small_gpu")
def test_batch_that_is_too_large_for_a_gpu_is_told(tmp_path, capsys):
    options = {**STEPS, "total_steps": 2, "log_root": tmp_path, "crash_bundle": "batch"}
    with pytest.raises(torch.OutOfMemoryError):
        train(Greedy(), IndexData(8, valid=0, batch_size=4), None, **options)
    assert "the batch has the shapes (4,)" in capsys.readouterr().err
    bundle = read_bundle(tmp_path / "run_crash_batch_0_rank_0")
    assert bundle["values"]["batch"].tolist() == [0, 1, 2, 3]
    assert "cuda" in bundle["values"]["rng"]


@pytest.mark.usefixtures("small_gpu")
def test_batch_size_that_fits_a_gpu_is_found(tmp_path, capsys):
    options = {**STEPS, "total_steps": 2, "batch_size": "auto"}
    model = Greedy()
    assert train(model, IndexData(8, valid=0, batch_size=4), tmp_path, **options)[0]
    assert model.engine.accumulation_steps == 2
    assert "batches of 2 fit" in capsys.readouterr().err
