"""The order of samples, batches and ranks, as pure functions of a position."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helios.data.samplers import (
    KeyedBatch,
    ResumableBatchSampler,
    ResumableRandomSampler,
    ResumableSampler,
    ResumableSequentialSampler,
)
from helios.rng import capture_rng, derive_key, seed_rngs

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
sizes = st.integers(1, 60), st.integers(1, 7), st.integers(1, 5)


def batch_sampler(sampler, **options):
    options = {"batch_size": 4, "drop_last": False, "seed": 3, **options}
    return ResumableBatchSampler(sampler, **options)


def rng_state():
    """All bits of the global generators' states."""
    tree = capture_rng()
    return str(tree | {"torch": tree["torch"].tolist()})


def epoch_of_ranks(n, size, world, *, epoch=0, start=0, drop_last=False, make=None):
    """The batches' indices, one list a rank."""
    make = make or (lambda rank: ResumableRandomSampler(range(n), seed=5))
    ranks = []
    for rank in range(world):
        batches = batch_sampler(
            make(rank),
            batch_size=size,
            drop_last=drop_last,
            rank=rank,
            world_size=world,
        )
        batches.seek(epoch, start)
        ranks.append([batch.indices for batch in batches])
        if start == 0:
            assert len(batches) == len(ranks[-1])
    return ranks


def global_batches(ranks):
    return [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]


class OldSampler(ResumableSampler):
    """An older project's: overrides `__iter__`, and reads `start_iter` late."""

    def __iter__(self):
        own = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self), generator=own).tolist()
        start = self.start_iter * self.batch_size
        yield from order[start:]


MAKERS = {
    "random": lambda n: ResumableRandomSampler(range(n), seed=5),
    "sequential": lambda n: ResumableSequentialSampler(range(n), seed=5),
    "old": lambda n: OldSampler(range(n), seed=5),
}


@PROPERTY
@given(*sizes, st.integers(0, 3))
def test_ranks_together_read_each_sample_of_the_epoch(n, size, world, epoch):
    ranks = epoch_of_ranks(n, size, world, epoch=epoch)
    whole = list(ResumableRandomSampler(range(n), seed=5).order(epoch, 0))
    read = list(itertools.chain(*global_batches(ranks)))
    assert read[:n] == whole
    # Padding: fewer than one sample a rank, from the start of the epoch.
    assert len(read) - n < world
    assert read[n:] == list(itertools.islice(itertools.cycle(whole), len(read) - n))
    shapes = [[len(batch) for batch in rank] for rank in ranks]
    assert all(shape == shapes[0] for shape in shapes)
    assert all(count == size for count in shapes[0][:-1])


@PROPERTY
@given(*sizes, st.booleans(), st.data())
def test_shards_do_not_depend_on_the_cursor(n, size, world, drop_last, data):
    whole = epoch_of_ranks(n, size, world, epoch=2, drop_last=drop_last)
    start = data.draw(st.integers(0, len(whole[0])))
    rest = epoch_of_ranks(n, size, world, epoch=2, start=start, drop_last=drop_last)
    assert rest == [rank[start:] for rank in whole]


@PROPERTY
@given(*sizes, st.integers(1, 5))
def test_world_size_does_not_change_full_global_batches(n, size, world, other):
    one = global_batches(epoch_of_ranks(n, size * other, world))
    two = global_batches(epoch_of_ranks(n, size * world, other))
    full, rest = divmod(n, size * world * other)
    assert one[:full] == two[:full]
    if rest:
        assert one[full][:rest] == two[full][:rest]


@PROPERTY
@given(*sizes)
def test_dropping_leaves_out_the_whole_short_global_batch(n, size, world):
    full = n // (size * world)
    kept = epoch_of_ranks(n, size, world)
    dropped = epoch_of_ranks(n, size, world, drop_last=True)
    assert dropped == [rank[:full] for rank in kept]
    batches = batch_sampler(
        MAKERS["random"](n), batch_size=size, drop_last=True, world_size=world
    )
    assert batches.num_samples == full * size * world
    batches = batch_sampler(MAKERS["random"](n), batch_size=size, world_size=world)
    assert batches.num_samples == n


@pytest.mark.parametrize("name", MAKERS)
def test_seek_equals_skipping_epoch_after_epoch(name):
    batches = batch_sampler(MAKERS[name](2501), batch_size=7, world_size=2)
    epochs = [list(batches) for _ in range(3)]
    assert len({str(epoch) for epoch in epochs}) == 3
    for epoch, start in (1, 3), (0, len(epochs[0]) - 1), (2, 150), (1, len(epochs[1])):
        again = batch_sampler(MAKERS[name](2501), batch_size=7, world_size=2)
        again.seek(epoch, start)
        assert list(again) == epochs[epoch][start:]
        if epoch < 2:
            assert list(again) == epochs[epoch + 1]


@pytest.mark.parametrize("name", MAKERS)
def test_iteration_leaves_the_global_generators_alone(name):
    seed_rngs(9)
    batches = batch_sampler(MAKERS[name](2500), world_size=3, batch_size=7)
    state = rng_state()
    order = list(batches)
    assert rng_state() == state
    seed_rngs(10)
    batches.seek(0)
    assert list(batches) == order


@pytest.mark.parametrize("name", MAKERS)
def test_start_iter_set_on_the_sampler_concerns_one_epoch(name):
    sampler = MAKERS[name](40)
    batches = batch_sampler(sampler)
    whole = list(batches)
    sampler.set_epoch(0)
    sampler.start_iter = 6
    assert list(batches) == whole[6:]
    assert sampler.start_iter == 0
    following = list(batches)
    assert [batch.number for batch in following] == list(range(10))
    sampler.set_epoch(0)
    sampler.start_iter = len(whole)
    assert list(batches) == []
    assert list(batches) == following


def test_sampler_takes_start_iter_at_the_call():
    sampler = ResumableSequentialSampler(range(10))
    sampler.batch_size, sampler.start_iter = 4, 1
    first = iter(sampler)
    assert sampler.start_iter == 0
    assert list(sampler) == list(range(10))
    assert list(first) == list(range(4, 10))


def test_old_sampler_is_cleared_though_it_reads_late():
    sampler = OldSampler(range(5000), seed=1)
    batches = batch_sampler(sampler, batch_size=2)
    batches.seek(0, 2)
    iterator = iter(batches)
    assert next(iterator).number == 2
    assert sampler.start_iter == 0


def test_iterator_that_is_not_used_takes_nothing():
    batches = batch_sampler(MAKERS["random"](12))
    batches.seek(4, 1)
    iter(batches)
    assert next(iter(batches)).key == derive_key(3, 4)


def test_batches_carry_key_number_and_indices():
    batches = batch_sampler(MAKERS["sequential"](6), rank=1, world_size=2, batch_size=2)
    assert list(batches) == [
        KeyedBatch(derive_key(3, 0), 0, [2, 3]),
        KeyedBatch(derive_key(3, 0), 1, [5]),
    ]
    assert next(iter(batches)).key == derive_key(3, 1)


def test_data_set_smaller_than_the_ranks_is_read_round_and_round():
    assert epoch_of_ranks(2, 3, 5, make=lambda rank: MAKERS["sequential"](2)) == [
        [[0]],
        [[1]],
        [[0]],
        [[1]],
        [[0]],
    ]


def test_seed_and_epoch_name_the_order():
    orders = {
        tuple(ResumableRandomSampler(range(50), seed=seed).order(epoch, 0))
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16


def test_wrong_arguments_are_errors():
    with pytest.raises(ValueError, match="`epoch`, `batch` must be >= 0"):
        batch_sampler(MAKERS["random"](4)).seek(0, -1)
    with pytest.raises(NotImplementedError, match="must override `order`"):
        iter(ResumableSampler(range(3)))
