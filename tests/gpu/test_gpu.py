"""Exact resume on a CUDA device."""

import contextlib
import gc
import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from support import RandomData, RandomModel, StopAt, digest, train
from support.kinds import KINDS, KindData, KindModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import helios
from helios.checkpoint import find_last_checkpoint, read_checkpoint

RANKS_SCRIPT = pathlib.Path(__file__).parents[1] / "distributed" / "sharded_script.py"

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
    tree = read_checkpoint(find_last_checkpoint(tmp_path)).tree("training")
    scaler = tree["scaler"]["scaler"]
    assert scaler["scale"] > 0
    assert 0 < scaler["_growth_tracker"] <= 12  # steps since a scale that was too large


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


class ConvolutionalModel(CudaModel):
    """Sees its inputs as images first: kernels that cuDNN chooses."""

    def setup(self, for_inference=False):
        super().setup(for_inference)
        self.images = nn.Sequential(
            *(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 8, 2, padding=1), nn.ReLU()),
            *(nn.Conv2d(8, 4, 3), nn.Flatten()),
        )
        own = torch.optim.Adam(self.images.parameters(), lr=0.02)
        self.optimizers = (*self.optimizers, own)

    def train_step(self, batch, state):
        ids, inputs, targets = batch
        super().train_step((ids, self.images(inputs), targets), state)


class CompiledModel(CudaModel):
    """Compiled to kernels of its own, random ones too."""

    def setup(self, for_inference=False):
        super().setup(for_inference)
        head = nn.Sequential(nn.Dropout(0.2), self.heads["a"])
        self.heads["a"] = torch.compile(head)


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of torch's own code
@pytest.mark.parametrize("make_model", [ConvolutionalModel, CompiledModel])
def test_kernels_that_are_chosen_or_made_at_run_time_give_the_same_bits(
    tmp_path, make_model
):
    whole = run(tmp_path / "whole", make_model=make_model)
    parts = run(tmp_path / "parts", 1, 6, make_model=make_model)
    assert parts == whole


@pytest.mark.parametrize(
    ("before", "after"), [(None, True), (True, None)], ids=["to_cpu", "to_gpu"]
)
def test_run_goes_on_on_another_kind_of_device_where_that_is_allowed(
    tmp_path, before, after
):
    options = {"total_steps": 4}
    stopped, _ = train(
        RandomModel(),
        RandomData(),
        tmp_path,
        StopAt(batch=6),
        use_cpu=before,
        **options,
    )
    assert not stopped
    with pytest.raises(helios.errors.ResumeError, match="device_type"):
        train(RandomModel(), RandomData(), tmp_path, use_cpu=after, **options)
    options["allow_inexact"] = True
    model = RandomModel()
    assert train(model, RandomData(), tmp_path, use_cpu=after, **options)[0]
    assert model.device.type == ("cpu" if after else "cuda")


class SpyOnBuffers(helios.Callback):
    def on_training_end(self, session):
        buffers = session.saver._background._buffers
        self.pinned = {name: b.is_pinned() for (_, name), b in buffers.items()}


def test_what_is_copied_from_the_gpu_is_copied_to_pinned_memory(tmp_path):
    spy = SpyOnBuffers()
    train(RandomModel(), RandomData(), tmp_path, spy, use_cpu=None, total_steps=2)
    assert spy.pinned["net.0.weight"]
    assert not spy.pinned["rng.torch"]


class BigModel(helios.Model):
    """Half a GiB of weights, and twice that in the optimizer."""

    def setup(self, for_inference=False):
        self.net = nn.Linear(8, 2**24)
        self.optimizer = torch.optim.Adam(self.net.parameters())

    def train_step(self, batch, state):
        _, inputs, _ = batch
        if state.global_iteration == 4:
            torch.cuda.reset_peak_memory_stats()
        loss = self.net(inputs.repeat(1, 2)).mean()
        self.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_resume_holds_the_state_once_and_the_moments_twice_at_most(tmp_path):
    options = {"use_cpu": None, "total_steps": 2}
    train(BigModel("big"), RandomData(), tmp_path, StopAt(batch=3), **options)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    size = (8 + 1) * 2**24 * 4
    held = torch.cuda.memory_allocated()
    peaks = []

    class Peak(helios.Callback):
        def on_training_batch_end(self, session):
            peaks.append((torch.cuda.max_memory_allocated() - held) / size)

    train(BigModel("big"), RandomData(), tmp_path, Peak(), **options)
    print(f"peak after the first batch, in weights: {peaks[0]:.2f}, later {peaks[-1]}")
    assert peaks[0] < 5.5


SCRIPT = """
import sys
import torch
sys.path[:0] = {paths!r}
from support import RandomData, RandomModel
import helios

class Model(RandomModel):
    def on_training_end(self):
        print("trained on", self.device, torch.cuda.current_device())

trainer = helios.Trainer(total_steps=1, chkpt_root="runs", {arguments})
trainer.fit(Model(), RandomData())
"""


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        ("", 0, "trained on cuda"),
        ("gpus=[0]", 0, "trained on cuda"),
        ("use_cpu=True", 0, "trained on cpu"),
        ("gpus=[99]", 1, "`gpus`"),
        ("num_processes=99", 1, "`num_processes`"),
    ],
)
def test_plain_script_chooses_its_devices(tmp_path, arguments, code, expected):
    tests = pathlib.Path(__file__).parents[1]
    paths = [str(tests.parent), str(tests)]
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(paths=paths, arguments=arguments))
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=100,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert expected in done.stdout + done.stderr


def run_on_one_gpu(ranks, *arguments, cwd, timeout_s=100):
    """Run `RANKS_SCRIPT` on so many ranks that share the first GPU.

    To Accelerate, each is the first rank of a host.
    """
    tests = RANKS_SCRIPT.parents[1]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)]),
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        **{"WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(RANKS_SCRIPT), *map(str, arguments)],
            cwd=cwd,
            env={**env, "RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [p.communicate(timeout=timeout_s)[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0] * ranks, "\n".join(outputs)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, {"backend": "nccl", "fsdp_version": 2}),
        (1, {"backend": "nccl", "fsdp_version": 2, "mixed_precision": "bf16"}),
        (1, {"backend": "nccl", "fsdp_version": None, "mixed_precision": "fp16"}),
        (2, {"backend": "gloo", "fsdp_version": None}),
        (3, {"backend": "gloo", "fsdp_version": None}),
    ],
    ids=["fsdp", "fsdp_bf16", "ddp_fp16", "two_ranks", "three_ranks"],
)
def test_ranks_on_a_gpu_resume_exactly(tmp_path, ranks, options):
    options = json.dumps({"gradient_accumulation_steps": 2, **options})
    each = {"enable_deterministic": True, "use_cpu": None, "kind": "mixed"}
    stops = [{"root": "parts", "stop": stop} for stop in (1, 4, 5)]
    found = []
    # In processes of their own: the Accelerator, and its scaler, outlives a run.
    for one in [{"root": "whole"}, *stops, {"root": "parts"}]:
        run_on_one_gpu(
            ranks, tmp_path, json.dumps([{**each, **one}]), options, cwd=tmp_path
        )
        files = [tmp_path / f"rank_{rank}.json" for rank in range(ranks)]
        found.append([json.loads(file.read_text())[0] for file in files])
    assert [run[0]["finished"] for run in found] == [True, False, False, False, True]
    for whole, resumed in zip(found[0], found[-1], strict=True):
        assert whole["device"] == "cuda:0"
        is_sharded = '"fsdp_version": 2' in options
        assert whole["type"] == ("DTensor" if is_sharded else "Parameter")
        assert resumed["weights"] == whole["weights"]


def loop_by_hand(root, stop=None):
    """Variables on both devices after a loop with dropout; None where it stops."""
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    accelerator = Accelerator(mixed_precision="bf16")
    set_seed(4)
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(net.parameters())
    loader = DataLoader(TensorDataset(torch.randn(24, 4)), batch_size=4, shuffle=True)
    net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    session = helios.Session(accelerator, root, loader)
    counts, losses = torch.zeros(3), []
    with contextlib.suppress(helios.RunStopped), session:
        for epoch in session.epochs(3, carry=["counts", "losses", "total"]):
            total = torch.zeros((), device=accelerator.device)
            for (inputs,) in session.batches(loader):
                loss = net(inputs).square().mean()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                total += loss.detach()
                counts[epoch] += 1
                if session.state.global_iteration == stop:
                    session.request_stop("the test")
            losses.append(total)
        return counts, losses, net.state_dict()
    return None


def test_variables_of_a_loop_by_hand_go_on_where_they_were(tmp_path):
    counts, losses, weights = loop_by_hand(tmp_path / "whole")
    assert counts.tolist() == [6, 6, 6]
    for stop in (2, 8, 11):
        assert loop_by_hand(tmp_path / "parts", stop) is None
    resumed = loop_by_hand(tmp_path / "parts")
    assert not resumed[0].is_cuda
    assert all(loss.is_cuda for loss in resumed[1])
    assert digest(resumed) == digest((counts, losses, weights))
