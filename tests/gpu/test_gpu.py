"""Exact resume on a CUDA device."""

import pytest
import torch
from support import RandomData, RandomModel, StopAt, digest, train
from support.kinds import KINDS, KindData, KindModel

from helios.checkpoint import find_last_checkpoint, read_checkpoint

pytestmark = pytest.mark.gpu
OPTIONS = {
    "total_steps": 4,
    "valid_frequency": 1,
    "accumulation_steps": 2,
    "enable_deterministic": True,
    "use_cpu": None,
}


class CudaModel(RandomModel):
    """Draws from the device's generator too."""

    def train_step(self, batch, state):
        assert self.net[0].weight.is_cuda
        ids, inputs, targets = batch
        noise = 0.01 * torch.randn(inputs.shape, device=self.device)
        super().train_step((ids, inputs + noise, targets), state)


class CudaKindModel(CudaModel, KindModel):
    """Takes batches of one sample, too."""


def pinned():
    return RandomData(num_workers=1, pin_memory=True)


def run(root, *stops, make_model=CudaModel, make_data=pinned, **options):
    ids, logged = [], []
    for stop in [*stops, None]:
        model, data = make_model(), make_data()
        is_finished, recorder = train(
            model, data, root, StopAt(batch=stop), **OPTIONS, **options
        )
        assert is_finished == (stop is None)
        ids += model.ids
        logged += recorder.logged
    checkpoint = read_checkpoint(find_last_checkpoint(root))
    trees = [digest(checkpoint.tree(name)) for name in ("training", "rank_0")]
    return ids, logged, digest(model.state_dict()), trees


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_run_on_a_gpu_resumes_exactly(tmp_path, precision):
    whole = run(tmp_path / "whole", mixed_precision=precision)
    parts = run(tmp_path / "parts", 1, 6, 10, 11, mixed_precision=precision)
    assert parts == whole


@pytest.mark.parametrize("kind", ["fetches_batches", "stream", "stateful_stream"])
def test_batch_that_is_copied_ahead_is_not_counted(tmp_path, kind):
    make = {
        "make_model": CudaKindModel,
        "make_data": lambda: KindData(KINDS[kind], num_workers=1),
    }
    whole = run(tmp_path / "whole", **make)
    parts = run(tmp_path / "parts", 1, 6, 10, 11, **make)
    # Of the rank's tree, streams keep how long they took.
    assert parts[:3] == whole[:3]
    assert parts[3][0] == whole[3][0]


def test_fp16_on_a_gpu_has_a_scaler_whose_state_is_saved(tmp_path):
    run(tmp_path, mixed_precision="fp16")
    scaler = read_checkpoint(find_last_checkpoint(tmp_path)).tree("training")["scaler"]
    assert scaler["scale"] > 0
    assert scaler["_growth_tracker"] == 8


def test_what_was_on_the_gpu_comes_back_to_it_from_the_file(tmp_path):
    run(tmp_path)
    checkpoint = read_checkpoint(find_last_checkpoint(tmp_path))
    device = torch.device("cuda", 0)
    state = checkpoint.tree("training", own=True, device=device)["model"]
    entries = [e for o in state["optimizers"].values() for e in o["state"].values()]
    assert {(name, v.device.type) for e in entries for name, v in e.items()} == {
        *(("step", "cpu"), ("exp_avg", "cuda"), ("exp_avg_sq", "cuda")),
        ("momentum_buffer", "cuda"),
    }
    assert not checkpoint.tree("rank_0", own=True, device=device)["rng"][
        "torch"
    ].is_cuda
