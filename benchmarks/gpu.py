"""What a step and a save cost on a GPU, beside plain torch and Accelerate.

``PYTHONPATH=. python benchmarks/gpu.py`` prints ratios. The network of the steps is
tiny, so that what the host does for a step is what is measured.
"""

import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.contenders import checkpoint, steps

ROUNDS, BATCH, WARM_UP = 5, 32, 100
STATE_BYTES = 1 << 30


class Task:
    """What to train, a thousand steps; ``features`` and ``use_cpu`` as in `steps`."""

    steps, features, folder, use_cpu = 1000, False, None, None

    def __init__(self) -> None:
        self.dataset = TensorDataset(
            torch.randn(self.steps * BATCH, 32),
            torch.randint(10, (self.steps * BATCH,)),
        )
        self.model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)


def plain(task: Task) -> None:
    task.model.cuda()
    optimizer = task.optimizer()
    for x, y in DataLoader(task.dataset, BATCH, shuffle=True):
        optimizer.zero_grad()
        cross_entropy(task.model(x.cuda()), y.cuda()).backward()
        optimizer.step()


def accelerate(task: Task) -> None:
    accelerator = Accelerator()
    loader = DataLoader(task.dataset, BATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(task.model, task.optimizer(), loader)
    for x, y in loader:
        optimizer.zero_grad()
        accelerator.backward(cross_entropy(model(x), y))
        optimizer.step()


def step_s(train) -> float:
    """Seconds a step: the median of stretches of 50, after those that warm up."""
    task, times = Task(), []
    task.model.register_forward_hook(lambda *_: times.append(time.perf_counter()))
    train(task)
    torch.cuda.synchronize()
    marks = times[WARM_UP::50]
    return statistics.median(b - a for a, b in pairwise(marks)) / 50


class State:
    """A model and its AdamW moments on the GPU, a GiB in all."""

    def __init__(self) -> None:
        width = int((STATE_BYTES / 3 / 4 / 8) ** 0.5)
        layers = [nn.Linear(width, width, bias=False) for _ in range(8)]
        self.model = nn.Sequential(*layers).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.model(torch.ones(1, width, device="cuda")).sum().backward()
        self.optimizer.step()


def saves() -> None:
    state = State()
    with tempfile.TemporaryDirectory() as folder:
        save, load, wait = checkpoint.helios(state)
        trees = {"model": state.model.state_dict(), "o": state.optimizer.state_dict()}
        tensors = [p.data for p in state.model.parameters()]
        moments = state.optimizer.state.values()
        tensors += [m[key] for m in moments for key in ("exp_avg", "exp_avg_sq")]
        pinned = [torch.empty_like(t, device="cpu").pin_memory() for t in tensors]

        def copy() -> None:
            for target, tensor in zip(pinned, tensors, strict=True):
                target.copy_(tensor, non_blocking=True)
            torch.cuda.synchronize()

        calls = {
            "a copy to pinned memory": copy,
            "torch.save: training waits": lambda: torch.save(
                trees, Path(folder) / "state.pt"
            ),
            "Helios: training waits": lambda: save(folder),
            "Helios: loaded, verified": lambda: load(folder),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                torch.cuda.synchronize()
                start = time.perf_counter()
                call()
                torch.cuda.synchronize()
                times[name].append(time.perf_counter() - start)
                wait()
    for name, found in times.items():
        print(f"{name}: {1e3 * statistics.median(found):.1f} ms")


def main() -> None:
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    loops = {"plain torch": plain, "Accelerate": accelerate, "Helios": steps.helios}
    found = [
        {name: step_s(loop) for name, loop in loops.items()} for _ in range(ROUNDS)
    ]
    for name in loops:
        own = statistics.median(times[name] for times in found)
        ratio = statistics.median(t[name] / t["Accelerate"] for t in found)
        print(f"{name}: {1e6 * own:.0f} µs a step, to Accelerate's {ratio:.2f}")
    saves()


if __name__ == "__main__":
    main()
