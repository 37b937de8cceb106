"""What of torch decides on bits: its switches, and the order of sums over ranks."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def settle_buckets(net: Any) -> None:
    """Give each gradient its place for good; every rank must call.

    DDP arranges the gradients anew after its first backward, as they came. With three
    ranks and more, that changes the order in which their sums are made, and so the
    bits of a resumed run's first step. A backward of nothing takes that step's place.
    """
    is_plain = isinstance(net, nn.parallel.DistributedDataParallel)
    if not is_plain or net.find_unused_parameters or net.static_graph:
        return  # the former keeps the first order, the latter takes it from the step
    net.reducer.prepare_for_backward([])
    for parameter in reversed([p for p in net.parameters() if p.requires_grad]):
        torch.autograd.backward(parameter, torch.zeros_like(parameter))
    net.zero_grad()


@contextlib.contextmanager
def torch_flags(benchmark: bool, deterministic: bool) -> Iterator[None]:
    """Set torch's switches for one run."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    cudnn.benchmark = benchmark
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        cudnn.benchmark = before[0]
        # torch imports much for it, and a stop may have cut just that off.
        if torch.are_deterministic_algorithms_enabled() != before[1]:
            torch.use_deterministic_algorithms(before[1])
