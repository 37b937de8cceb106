"""The order in which DistributedDataParallel sums gradients up, made the same again."""

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
