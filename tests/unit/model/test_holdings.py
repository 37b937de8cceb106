"""What is found among a model's attributes."""

import torch
from torch import nn

from helios.model import holdings


def copied(module, state, prefix, metadata):
    """A hook as others have it: what is saved is a copy, of another dtype."""
    for name in state:
        state[name] = state[name].double()


def test_buffers_are_the_live_ones_that_are_saved() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2))
    net.register_buffer("cache", torch.ones(1), persistent=False)
    net.register_state_dict_post_hook(copied)
    found = holdings.find({"net": net, "rate": 0.1}).buffers()
    names = ("running_mean", "running_var", "num_batches_tracked")
    assert list(found) == [f"net.0.{name}" for name in names]
    assert all(found[f"net.0.{name}"] is getattr(net[0], name) for name in names)
