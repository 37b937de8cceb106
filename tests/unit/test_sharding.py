"""Pieces of tensors, as ranks have them, and what is made of them."""

import itertools
import math
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from helios import sharding
from helios.checkpoint import Encoder
from helios.errors import UnstorableError


def join(pieces, shape, layout=None, dim=0):
    return sharding.join(pieces, shape, dim, torch.float32, layout)


@settings(deadline=None, max_examples=200)
@given(
    shape=st.lists(st.integers(0, 7), min_size=1, max_size=3),
    dim=st.integers(0, 2),
    cuts=st.sets(st.integers(1, 6)),
    order=st.randoms(use_true_random=False),
)
def test_pieces_make_the_tensor_that_they_are_of(shape, dim, cuts, order):
    tensor, dim = torch.arange(float(math.prod(shape))).reshape(shape), dim % len(shape)
    edges = sorted({0, shape[dim], *(cut for cut in cuts if cut < shape[dim])})
    pairs = itertools.pairwise(edges)
    pieces = [(low, tensor.narrow(dim, low, high - low)) for low, high in pairs]
    order.shuffle(pieces)
    assert join(pieces, shape, dim=dim).equal(tensor)


ONES = torch.ones(2, 3)
WRONG = {
    "the last is missing": [(0, ONES)],
    "the first is missing": [(2, ONES)],
    "one is there twice": [(0, ONES), (0, ONES)],
    "one is too many": [(0, ONES), (2, ONES), (4, ONES)],
    "one begins before": [(-2, ONES), (0, ONES), (2, ONES)],
    "they overlap": [(0, ONES), (1, ONES), (3, ONES[:1])],
    "another shape": [(0, ONES), (2, torch.ones(2, 2))],
    "another dtype": [(0, ONES), (2, ONES.double())],
    "a vector": [(0, torch.ones(4))],
}


@pytest.mark.parametrize("pieces", WRONG.values(), ids=WRONG)
def test_pieces_of_another_tensor_are_refused(pieces):
    with pytest.raises(ValueError, match=r"piece"):
        join(pieces, [4, 3])


def test_claimed_shape_takes_no_memory():
    tracemalloc.start()
    for shape in ([10**6, 10**6], [10**30], [-2, -6], [1, 10**9]):
        with pytest.raises(ValueError, match="piece"):
            join([(0, torch.ones([1] * len(shape)))], shape)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.fixture
def mesh():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_piece_of_a_lone_rank_is_the_tensor(mesh):
    whole = torch.arange(6.0).reshape(2, 3)
    tensor = distribute_tensor(whole, mesh, [Shard(1)])
    assert sharding.is_sharded(tensor)
    assert not sharding.is_sharded(whole)
    start, piece = sharding.piece_of(tensor)
    assert (start, sharding.shard_dim(tensor)) == (0, 1)
    assert piece.equal(whole)
    layout = sharding.layout_of([whole, tensor])
    made = join([(start, piece)], [2, 3], layout, dim=1)
    assert isinstance(made, DTensor)
    assert made.full_tensor().equal(whole)
    assert made.placements == (Shard(1),)


@pytest.mark.parametrize(("rank", "start"), [(0, 0), (1, 3), (2, None), (3, None)])
def test_only_the_first_of_equal_ranks_has_the_piece(rank, start):
    # Ranks 2 and 3 have the same as 0 and 1. Nothing is sent in such a group.
    store = FakeStore()
    torch.distributed.init_process_group("fake", store=store, rank=rank, world_size=4)
    mesh = init_device_mesh("cpu", (2, 2))
    layout = [Replicate(), Shard(0)]
    tensor = DTensor.from_local(torch.ones(3, 2), mesh, layout, run_check=False)
    piece = sharding.piece_of(tensor)
    torch.distributed.destroy_process_group()
    assert (None if piece is None else piece[0]) == start


def test_only_what_has_the_shape_of_a_sharded_one_is_cut_like_it(mesh):
    live = distribute_tensor(torch.zeros(2, 3), mesh, [Shard(0)])
    values = {"w": torch.ones(2, 3), "step": torch.ones(()), "lr": 0.1, "new": ONES}
    found = sharding.all_like({"w": live, "step": live, "lr": live}, values)
    assert isinstance(found.pop("w"), DTensor)
    assert found == {k: v for k, v in values.items() if k != "w"}


def test_tensors_that_lie_in_another_way_are_refused_with_their_path(mesh):
    tensor = distribute_tensor(torch.ones(2, 3), mesh, [Replicate()])
    with pytest.raises(
        UnstorableError, match=r"`net\.weight` cannot be stored: it lies"
    ):
        Encoder().encode({"net": {"weight": tensor}}, file="model")


def test_tied_tensors_are_one_and_names_do_not_collide(mesh):
    tensor = distribute_tensor(torch.ones(2, 3), mesh, [Shard(0)])
    other = distribute_tensor(torch.zeros(2, 3), mesh, [Shard(0)])
    encoder = Encoder()
    tree = {"a": tensor, "b": tensor.detach(), "c.d": tensor * 2, "c": {"d": other}}
    plain = encoder.encode(tree, file="model")
    names = [plain[k]["v"][0] for k in ("a", "b", "c.d")] + [plain["c"]["d"]["v"][0]]
    assert names == ["model.a", "model.a", "model.c.d", "model.c.d~"]
    assert set(encoder.pieces) >= {"model.a", "model.c.d", "model.c.d~"}
