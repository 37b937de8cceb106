"""The batches of each rank: pure functions of an order and a position."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import data

from helios.data import replay
from helios.data.batches import GivenBatches, SampleBatches, listed, shorten
from helios.data.lengths import ResumableLengthGroupedSampler
from helios.data.replay import ReplayedSampler
from helios.data.samplers import (
    ResumableDistributedSampler,
    ResumableRandomSampler,
    ResumableSampler,
    ResumableSequentialSampler,
)
from helios.data.weighted import ResumableWeightedRandomSampler
from helios.rng import capture_rng, derive_key, seed_rngs

PROPERTY = settings(deadline=None, derandomize=True, max_examples=25)
sizes = st.integers(1, 60), st.integers(1, 7), st.integers(1, 5)


class Walked(ResumableSampler):
    """Yields the order of `ResumableRandomSampler`, one after the other."""

    def order(self, epoch, start):
        whole = ResumableRandomSampler(self.data_source, seed=self.seed)
        return iter(list(whole.order(epoch, 0))[start:])


class Older(ResumableSampler):
    """An older project's: overrides `__iter__`, and reads `start_iter` late."""

    def __iter__(self):
        own = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self), generator=own).tolist()
        yield from order[self.start_iter * self.batch_size :]


class OlderDrawing(ResumableSampler):
    """As above, but draws from the global generators, at the call already."""

    def __iter__(self):
        order = torch.randperm(len(self)).tolist()
        random.shuffle(order)
        return iter(order[self.start_iter * self.batch_size :])


class Drawing(ResumableSampler):
    """Draws from the global generators while it walks."""

    def order(self, epoch, start):
        for position in range(len(self)):
            drawn = int(torch.randint(5, ())) + int(np.random.randint(5))
            drawn += position + random.randrange(5)
            if position >= start:
                yield drawn % len(self)


class DrawingAtOnce(ResumableSampler):
    """Draws from the global generators at the call."""

    def order(self, epoch, start):
        return iter(np.random.permutation(len(self)).tolist()[start:])


class Computed(ResumableSampler):
    def at(self, epoch, positions):
        return (positions * 7 + epoch) % len(self)


class GivenLists(ResumableSampler):
    """A batch sampler: batches of 1, 2 and 3 samples in turn."""

    def order(self, epoch, start):
        for number in range(start, len(self)):
            first = 100 * epoch + 6 * number
            yield list(range(first, first + 1 + number % 3))


class OlderLists(ResumableSampler):
    """As above; overrides `__iter__`."""

    def __iter__(self):
        first = self.start_iter * self.batch_size
        yield from GivenLists(self.data_source).order(self.epoch, first)


class Shard(ResumableSampler):
    """A user's: every `ranks`-th sample, without padding."""

    is_sharded = True

    def __init__(self, n, rank, ranks):
        super().__init__(range(n))
        self.indices = np.arange(rank, n // ranks * ranks, ranks)

    def at(self, epoch, positions):
        return self.indices[positions]

    def __len__(self):
        return len(self.indices)


SAMPLERS = {
    "random": lambda n: ResumableRandomSampler(range(n), seed=5),
    "sequential": lambda n: ResumableSequentialSampler(range(n), seed=5),
    "weighted": lambda n: ResumableWeightedRandomSampler(np.arange(1, n + 1), seed=5),
    "lengths": lambda n: ResumableLengthGroupedSampler(
        np.arange(n) % 9, window_batches=2, seed=5
    ),
    "walked": lambda n: Walked(range(n), seed=5),
    "older": lambda n: Older(range(n), seed=5),
    "older_drawing": lambda n: OlderDrawing(range(n), seed=5),
    "drawing": lambda n: Drawing(range(n), seed=5),
    "drawing_at_once": lambda n: DrawingAtOnce(range(n), seed=5),
    "computed": lambda n: Computed(range(n), seed=5),
    "replayed": lambda n: ReplayedSampler(data.RandomSampler(range(n)), seed=5),
}
BATCH_SAMPLERS = {
    "lists": lambda n: GivenLists(range(n), seed=5),
    "older_lists": lambda n: OlderLists(range(n), seed=5),
    "replayed_lists": lambda n: ReplayedSampler(
        data.BatchSampler(data.RandomSampler(range(3 * n)), 3, False), seed=5
    ),
}
of_samplers = pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
of_batch_samplers = pytest.mark.parametrize(
    "make", BATCH_SAMPLERS.values(), ids=BATCH_SAMPLERS
)
of_all = pytest.mark.parametrize(
    "make",
    [*SAMPLERS.values(), *BATCH_SAMPLERS.values()],
    ids=[*SAMPLERS, *BATCH_SAMPLERS],
)


def plan_of(sampler, *, batch_size=4, drop_last=False, **ranks):
    """The plan that a loader would make."""
    options = {"drop_last": drop_last, "seed": 3, **ranks}
    if replay.yields_batches(sampler):
        return GivenBatches(sampler, **options)
    return SampleBatches(sampler, batch_size=batch_size, **options)


def plain(batches):
    """Requests that can be compared."""
    return [batch._replace(indices=listed(batch.indices)) for batch in batches]


def ranks_of(make, size, world, *, epoch=0, start=0, drop_last=False):
    """The batches of an epoch, one list a rank."""
    ranks = []
    for rank in range(world):
        plan = plan_of(
            make(), batch_size=size, drop_last=drop_last, rank=rank, world_size=world
        )
        plan.seek(epoch, start)
        ranks.append(plain(plan))
        assert len(ranks[-1]) == max(0, len(plan) - start)
        assert plan.batches_per_epoch == len(plan)
    return ranks


def global_batches(ranks, *, padding=False):
    """The global batches' indices."""
    return [
        [i for part in parts for i in part.indices[: None if padding else part.real]]
        for parts in zip(*ranks, strict=True)
    ]


def chained(lists):
    return list(itertools.chain.from_iterable(lists))


def rng_state():
    """All bits of the global generators' states."""
    tree = capture_rng()
    return str(tree | {"torch": tree["torch"].tolist()})


@of_samplers
@PROPERTY
@given(*sizes, st.integers(0, 3))
def test_ranks_together_have_each_sample_of_the_epoch_once(make, n, size, world, epoch):
    ranks = ranks_of(lambda: make(n), size, world, epoch=epoch)
    alone = plan_of(make(n), batch_size=size * world)  # it may look at the batch size
    alone.seek(epoch)
    whole = chained(batch.indices for batch in plain(alone))
    assert chained(global_batches(ranks)) == whole
    assert len(whole) == n
    # Padding: fewer than one sample a rank, in the last batch, from the epoch's start.
    read = chained(global_batches(ranks, padding=True))
    assert len(read) - n < world
    assert read[n:] == list(itertools.islice(itertools.cycle(whole), len(read) - n))
    for parts in zip(*ranks, strict=True):
        counts = [len(part.indices) for part in parts]
        assert counts == counts[:1] * world
        is_padded = any(part.real < len(part.indices) for part in parts)
        assert {part.is_full for part in parts} == {not is_padded}
    for rank in ranks:
        assert all(len(batch.indices) == batch.real == size for batch in rank[:-1])
        assert [batch.number for batch in rank] == list(range(len(rank)))
        assert {batch[:2] for batch in rank} == {(derive_key(3, epoch), epoch)}


@of_all
@PROPERTY
@given(*sizes, st.booleans(), st.data())
def test_batches_do_not_depend_on_where_one_sought_to(
    make, n, size, world, drop_last, data
):
    options = {"epoch": 2, "drop_last": drop_last}
    whole = ranks_of(lambda: make(n), size, world, **options)
    start = data.draw(st.integers(0, len(whole[0]) + 1))
    rest = ranks_of(lambda: make(n), size, world, start=start, **options)
    assert rest == [rank[start:] for rank in whole]


@of_samplers
@PROPERTY
@given(st.integers(1, 60), st.integers(1, 12), st.booleans())
def test_global_batches_are_the_same_for_every_number_of_ranks(
    make, n, whole, drop_last
):
    found = [
        global_batches(
            ranks_of(lambda: make(n), whole // world, world, drop_last=drop_last)
        )
        for world in range(1, whole + 1)
        if whole % world == 0
    ]
    assert all(batches == found[0] for batches in found)


@PROPERTY
@given(*sizes, st.integers(0, 3), st.booleans())
def test_computed_and_walked_orders_are_cut_alike(n, size, world, epoch, drop_last):
    options = {"epoch": epoch, "drop_last": drop_last}
    one = ranks_of(lambda: SAMPLERS["random"](n), size, world, **options)
    assert one == ranks_of(lambda: SAMPLERS["walked"](n), size, world, **options)


@of_samplers
@PROPERTY
@given(*sizes)
def test_dropping_leaves_out_the_whole_short_global_batch(make, n, size, world):
    full = n // (size * world)
    kept = ranks_of(lambda: make(n), size, world)
    dropped = ranks_of(lambda: make(n), size, world, drop_last=True)
    assert dropped == [rank[:full] for rank in kept]
    for drop_last, count in (True, full * size * world), (False, n):
        plan = plan_of(
            make(n), batch_size=size, drop_last=drop_last, world_size=world, rank=0
        )
        assert plan.num_samples == count


@of_all
def test_seek_equals_iterating_epoch_after_epoch(make):
    def plan():
        return plan_of(make(2501), batch_size=7, world_size=2, rank=1)

    batches = plan()
    epochs = [plain(batches) for _ in range(3)]
    assert len({str(epoch) for epoch in epochs}) == 3
    for epoch, start in (1, 3), (0, len(epochs[0]) - 1), (2, 150), (1, len(epochs[1])):
        again = plan()
        again.seek(epoch, start)
        assert plain(again) == epochs[epoch][start:]
        if epoch < 2:
            assert plain(again) == epochs[epoch + 1]
    batches.seek(1)
    assert plain(batches) == epochs[1]
    batches.seek(1)
    assert plain(batches) == epochs[1]


@of_all
def test_epoch_left_in_the_middle_is_followed_by_the_next(make):
    batches = plan_of(make(40))
    next(iter(batches))
    following = plain(batches)
    assert {batch.epoch for batch in following} == {1}
    batches.seek(1)
    assert plain(batches) == following


@of_all
def test_global_generators_are_neither_used_nor_touched(make):
    seed_rngs(9)
    sampler = make(2500)
    state = rng_state()
    batches = plan_of(sampler, batch_size=7, world_size=3)
    order = plain(batches)
    assert rng_state() == state
    seed_rngs(10)
    batches.seek(0)
    iterator = iter(batches)
    found = []
    for batch in iterator:
        found.append(batch)
        torch.rand(1), random.random(), np.random.random()
    assert plain(found) == order


@of_all
def test_start_iter_set_on_the_sampler_concerns_one_epoch(make):
    sampler = make(40)
    batches = plan_of(sampler)
    whole = plain(batches)
    sampler.set_epoch(0)
    sampler.start_iter = 6
    assert plain(batches) == whole[6:]
    assert sampler.start_iter == 0
    following = plain(batches)
    assert [batch.number for batch in following] == list(range(len(whole)))
    sampler.set_epoch(0)
    sampler.start_iter = len(whole)
    assert plain(batches) == []
    assert plain(batches) == following


@of_all
def test_start_iter_is_taken_with_the_first_batch(make):
    sampler = make(5000)
    batches = plan_of(sampler, batch_size=2)
    batches.seek(0, 2)
    iterator = iter(batches)
    assert next(iterator).number == 2
    assert sampler.start_iter == 0


def test_iterator_that_is_not_used_takes_nothing():
    batches = plan_of(SAMPLERS["random"](12))
    batches.seek(4, 1)
    iter(batches)
    first = next(iter(batches))
    assert (first.epoch, first.number) == (4, 1)


def test_requests_say_all_that_a_worker_and_the_loop_need():
    batches = plan_of(SAMPLERS["sequential"](7), rank=1, world_size=2, batch_size=2)
    assert plain(batches) == [
        (derive_key(3, 0), 0, 0, [2, 3], 2, True, None),
        (derive_key(3, 0), 0, 1, [6, 0], 1, False, None),
    ]
    assert next(iter(batches)).key == derive_key(3, 1)
    request = next(iter(plan_of(SAMPLERS["sequential"](30), batch_size=12)))
    text = "samples [0, 1, 2, 3, 4, 5, 6, 7] and 4 more (epoch 0, batch 0)"
    assert batches.describe(request) == text
    loaded = list(batches.receive(iter([(request, "data")])))
    assert [one[:2] for one in loaded] == [("data", 0)]
    assert loaded[0][3:] == (12, 12, True, None, None)


def test_short_last_batch_that_the_ranks_can_share_is_full():
    ranks = ranks_of(lambda: SAMPLERS["sequential"](10), 3, 2)
    assert [[batch.indices for batch in rank] for rank in ranks] == [
        [[0, 1, 2], [6, 7]],
        [[3, 4, 5], [8, 9]],
    ]
    assert all(batch.is_full for rank in ranks for batch in rank)


def test_data_set_smaller_than_the_ranks_is_read_round_and_round():
    ranks = ranks_of(lambda: SAMPLERS["sequential"](2), 3, 5)
    found = [[(batch.indices, batch.real) for batch in rank] for rank in ranks]
    assert found == [[([0], 1)], [([1], 1)], [([0], 0)], [([1], 0)], [([0], 0)]]


@PROPERTY
@given(*sizes, st.booleans(), st.integers(0, 2), st.data())
def test_distributed_samplers_have_the_cut_of_the_whole_order(
    n, size, world, drop_last, epoch, data
):
    options = {"epoch": epoch, "drop_last": drop_last}
    whole = ranks_of(lambda: SAMPLERS["random"](n), size, world, **options)
    start = data.draw(st.integers(0, len(whole[0])))
    for rank in range(world):
        sampler = ResumableDistributedSampler(
            range(n), num_replicas=world, rank=rank, drop_last=drop_last, seed=5
        )
        plan = plan_of(
            sampler, batch_size=size, drop_last=drop_last, rank=rank, world_size=world
        )
        full = plan_of(
            SAMPLERS["random"](n),
            batch_size=size,
            drop_last=drop_last,
            rank=rank,
            world_size=world,
        )
        assert plan.num_samples == full.num_samples
        plan.seek(epoch, start)
        found = plain(plan)
        assert [batch[:5] for batch in found] == [b[:5] for b in whole[rank][start:]]
        # Whether all ranks are full is known of what is not the last.
        for one, other in zip(found, whole[rank][start:], strict=True):
            assert other.is_full or not one.is_full


@PROPERTY
@given(*sizes, st.booleans(), st.booleans(), st.data())
def test_torch_distributed_samplers_are_not_shared_out_again(
    n, size, world, shuffle, drop_last, data_
):
    plans = []
    for rank in range(world):
        sampler = data.DistributedSampler(
            range(n), world, rank, shuffle=shuffle, drop_last=drop_last
        )
        plan = plan_of(
            ReplayedSampler(sampler, seed=1),
            batch_size=size,
            rank=rank,
            world_size=world,
        )
        plan.seek(1)
        plans.append(plan)
    ranks = [plain(plan) for plan in plans]
    real = sorted(chained(global_batches(ranks)))
    assert len(real) == len(set(real)) == plans[0].num_samples
    assert len(real) == (n // world * world if drop_last and n % world else n)
    start = data_.draw(st.integers(0, len(ranks[0])))
    for plan, rank in zip(plans, ranks, strict=True):
        plan.seek(1, start)
        assert plain(plan) == rank[start:]


def test_users_shard_is_taken_as_it_is():
    for rank in range(3):
        plan = plan_of(Shard(32, rank, 3), rank=rank, world_size=3)
        found = plain(plan)
        assert chained(batch.indices for batch in found) == list(range(rank, 30, 3))
        assert [batch.real for batch in found] == [4, 4, 2]
        assert plan.num_samples == 30


@of_batch_samplers
@PROPERTY
@given(st.integers(1, 20), st.integers(1, 5), st.booleans())
def test_given_batches_are_dealt_out_to_the_ranks(make, n, world, drop_last):
    whole = [batch.indices for batch in plain(plan_of(make(n)))]
    assert len(whole) == n
    ranks = ranks_of(lambda: make(n), 1, world, drop_last=drop_last)
    rows = list(zip(*ranks, strict=True))
    dealt = [part.indices for row in rows for part in row]
    full = n // world * world
    if drop_last:
        assert dealt == whole[:full]
    else:
        padded = list(itertools.islice(itertools.cycle(whole), len(dealt)))
        assert dealt == padded
        assert len(dealt) - n < world
    for number, part in enumerate(part for row in rows for part in row):
        assert part.real == len(part.indices) * (number < n)
        assert part.is_full == (world == 1)


def test_given_batches_are_lists_whatever_the_sampler_yields():
    class Arrays(ResumableSampler):
        def order(self, epoch, start):
            yield from [np.array([1, 2]), (3, 4), torch.tensor([5])][start:]

    sampler = Arrays(range(3))
    assert replay.yields_batches(sampler)
    assert [type(batch.indices) for batch in plan_of(sampler)] == [list] * 3
    assert plan_of(sampler).num_samples is None


def test_batch_sampler_over_a_sharded_one_is_not_shared_out_again():
    plans = []
    for rank in range(2):
        inner = data.DistributedSampler(range(20), 2, rank, seed=4)
        sampler = ReplayedSampler(data.BatchSampler(inner, 5, drop_last=False))
        plans.append(plan_of(sampler, rank=rank, world_size=2))
    epochs = [[plain(plan) for plan in plans] for _ in range(2)]
    assert epochs[0] != epochs[1]
    for ranks in epochs:
        assert sorted(chained(global_batches(ranks))) == list(range(20))


def test_seek_before_the_start_is_an_error():
    for place in (0, -1), (-1, 0):
        with pytest.raises(ValueError, match="`epoch`, `batch` must be >= 0, got"):
            plan_of(SAMPLERS["random"](4)).seek(*place)


def test_indices_are_plain_ints_in_lists():
    found = listed(np.arange(3))
    assert [type(index) for index in found] == [int] * 3
    assert listed(["a"]) == ["a"]
    assert shorten([1] * 8) == str([1] * 8)
    assert shorten("abcdefghijkl") == "'abcdefghijkl'"
