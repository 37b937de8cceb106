"""Samplers that were not made for Helios resume too, and leave no trace."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch.utils import data

from helios.data.batches import GivenBatches, SampleBatches, listed
from helios.data.replay import ReplayedSampler, draw_apart, yields_batches
from helios.data.samplers import ResumableRandomSampler, ResumableSampler
from helios.errors import DataError, ResumeError
from helios.rng import capture_rng, isolated_rng, seed_rngs

N = 2500  # more than is drawn ahead at once


class Unreadable(data.Dataset):
    """Has a length, and no sample that could be loaded."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        raise AssertionError("a sampler loads no samples")


class Own:
    """A user's, of no base class: draws from a generator of its own."""

    def __init__(self, generator):
        self.generator = generator

    def __len__(self):
        return N

    def __iter__(self):
        draw = {
            torch.Generator: lambda: int(
                torch.randint(N, (), generator=self.generator)
            ),
            random.Random: lambda: self.generator.randrange(N),
            np.random.Generator: lambda: int(self.generator.integers(N)),
            np.random.RandomState: lambda: int(self.generator.randint(N)),
        }[type(self.generator)]
        return iter([draw() for _ in range(N)])


class Global:
    """A user's: draws from all three global generators, an odd number of times."""

    def __len__(self):
        return N

    def __iter__(self):
        for _ in range(N):
            drawn = random.gauss(0, 99) + np.random.normal(0, 99)
            yield int(drawn + torch.randn(()).item() * 99) % N


class Epochs:
    """A user's, shuffled by `set_epoch` alone."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return N

    def __iter__(self):
        yield from (i * 7 + self.epoch for i in range(N))


def torch_generator():
    return torch.Generator().manual_seed(3)


def shuffled():
    return data.RandomSampler(Unreadable(), generator=torch_generator())


SAMPLERS = {
    "random": lambda: data.RandomSampler(Unreadable()),
    "random_own": shuffled,
    "repeated": lambda: data.RandomSampler(Unreadable(), True, 3000),
    "weighted": lambda: data.WeightedRandomSampler(np.arange(1, N), 3000),
    "subset": lambda: data.SubsetRandomSampler(range(5, N)),
    "distributed": lambda: data.DistributedSampler(Unreadable(), 2, 1),
    "own_torch": lambda: Own(torch_generator()),
    "own_python": lambda: Own(random.Random(3)),
    "own_numpy": lambda: Own(np.random.default_rng(3)),
    "own_philox": lambda: Own(np.random.Generator(np.random.Philox(3))),
    "own_old_numpy": lambda: Own(np.random.RandomState(3)),
    "default_generator": lambda: Own(torch.default_generator),
    "global": Global,
    "epochs": Epochs,
}
BATCH_SAMPLERS = {
    "batches": lambda: data.BatchSampler(data.RandomSampler(Unreadable()), 2, False),
    "batches_own": lambda: data.BatchSampler(shuffled(), 2, True),
    "batches_of_own": lambda: data.BatchSampler(Own(random.Random(3)), 2, False),
    "batches_of_epochs": lambda: data.BatchSampler(Epochs(), 2, False),
    "batches_of_shard": lambda: data.BatchSampler(
        data.DistributedSampler(Unreadable(), 2, 0), 1, False
    ),
}
FIXED = {
    "list": lambda: [3, 1, 2] * 500,
    "range": lambda: range(2, N, 2),
    "sequential": lambda: data.SequentialSampler(Unreadable()),
    "list_of_lists": lambda: [[3, 1], [2]] * 500,
}
ALL = {**SAMPLERS, **BATCH_SAMPLERS, **FIXED}
of_all = pytest.mark.parametrize("make", ALL.values(), ids=ALL)


def rng_state():
    """All bits of the global generators' states."""
    tree = capture_rng()
    return str(tree | {"torch": tree["torch"].tolist()})


def orders(sampler, epochs):
    return [list(sampler.order(epoch, 0)) for epoch in epochs]


class Drawing(Own):
    """Draws each index when it is asked for."""

    def __iter__(self):
        return (int(torch.randint(N, (), generator=self.generator)) for _ in range(N))


def test_generator_may_be_shared_with_other_samplers():
    generator = torch_generator()
    alone = orders(ReplayedSampler(Drawing(torch_generator()), seed=5), range(2))
    order = ReplayedSampler(Drawing(generator), seed=5).order(0, 0)
    found = list(itertools.islice(order, 10))
    others = orders(ReplayedSampler(Drawing(generator), seed=6), range(2))
    state = generator.get_state()  # a model may draw from it too
    assert found + list(order) == alone[0]
    assert generator.get_state().equal(state)
    assert others[0] != alone[0]


@of_all
def test_order_is_a_function_of_seed_and_epoch_and_can_be_entered_anywhere(make):
    one, two = ReplayedSampler(make(), seed=5), ReplayedSampler(make(), seed=5)
    one.check()
    first, second, third = orders(one, range(3))
    assert len(first) == len(one) == len(make())
    # Epochs in any order, and another sampler, that was used before.
    list(two.sampler)
    assert orders(two, (2, 0, 1)) == [third, first, second]
    for start in 0, 1, 1023, 1024, 1025, len(first) - 1, len(first), len(first) + 9:
        assert list(two.order(1, start)) == second[start:]


@pytest.mark.parametrize(
    "make", {**SAMPLERS, **BATCH_SAMPLERS}.values(), ids={**SAMPLERS, **BATCH_SAMPLERS}
)
def test_epochs_have_orders_of_their_own(make):
    first, second, third = orders(ReplayedSampler(make(), seed=5), range(3))
    assert first != second != third != first


@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - {"distributed", "epochs"}))
def test_seed_of_the_run_decides_on_the_order(name):
    one, two = (ReplayedSampler(SAMPLERS[name](), seed=seed) for seed in (1, 2))
    assert list(one.order(0, 0)) != list(two.order(0, 0))


@of_all
def test_global_generators_are_neither_used_nor_touched(make):
    seed_rngs(1)
    sampler = ReplayedSampler(make(), seed=5)
    state = rng_state()
    sampler.check()
    expected = list(sampler.order(1, 0))
    assert rng_state() == state
    seed_rngs(2)
    found = []
    for item in sampler.order(1, 0):
        torch.rand(1), random.random(), np.random.random()
        found.append(item)
    assert found == expected
    seed_rngs(3)
    other = torch.rand(1), random.random(), np.random.normal()
    seed_rngs(3)
    assert yields_batches(sampler) == isinstance(expected[0], list)
    assert (torch.rand(1), random.random(), np.random.normal()) == other


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_loaders_of_other_samplers_do_not_disturb(make):
    one, two = ReplayedSampler(make(), seed=5), ReplayedSampler(make(), seed=5)
    mixed = list(zip(one.order(0, 0), two.order(0, 0), strict=True))
    assert [pair[0] for pair in mixed] == [pair[1] for pair in mixed]
    assert [pair[0] for pair in mixed] == list(one.order(0, 0))


def test_order_is_that_of_the_sampler_itself():
    sampler = data.DistributedSampler(Unreadable(), 2, 1, seed=4)
    replayed = ReplayedSampler(sampler)
    found = orders(replayed, range(2))
    for epoch in range(2):
        sampler.set_epoch(epoch)
        assert found[epoch] == list(sampler)


def test_set_epoch_of_a_sampler_counts_more_than_that_of_the_one_inside():
    class Outer(data.Sampler):
        def __init__(self):
            self.inner = Epochs()
            self.sampler = self.inner

        def set_epoch(self, epoch):
            self.inner.set_epoch(epoch + 100)

        def __iter__(self):
            return iter(self.inner)

        def __len__(self):
            return N

    assert next(ReplayedSampler(Outer()).order(3, 0)) == 103


def test_samplers_that_hold_each_other_are_walked_once():
    outer = data.BatchSampler(shuffled(), 2, False)
    outer.sampler.parent = outer
    first, second = orders(ReplayedSampler(outer), (1, 1))
    assert first == second


def plan_of(make, **ranks):
    sampler = ReplayedSampler(make(), seed=5)
    if yields_batches(sampler):
        return GivenBatches(sampler, drop_last=False, seed=0, **ranks)
    return SampleBatches(sampler, batch_size=2, drop_last=False, seed=0, **ranks)


@of_all
def test_fingerprint_of_the_order_is_the_cursor(make):
    plan = plan_of(make)
    plan.seek(1)
    batches = list(plan)
    (cursor,) = {batch.cursor for batch in batches}
    assert type(cursor) is int
    again = plan_of(make)
    again.seek(1, 500, cursor)
    rest = [listed(batch.indices) for batch in again]
    assert rest == [listed(batch.indices) for batch in batches[500:]]


def test_order_that_differs_at_the_resume_is_refused():
    plan = plan_of(SAMPLERS["epochs"])
    plan.seek(1)
    cursor = next(iter(plan)).cursor
    changed = plan_of(SAMPLERS["epochs"])
    changed.sampler.sampler.set_epoch = lambda epoch: None
    changed.seek(1, 3, cursor)
    with pytest.raises(ResumeError, match="Epochs yields another order for epoch 1"):
        next(iter(changed))
    # Of the epochs after that one, nothing was recorded.
    changed.seek(1, 3)
    assert next(iter(changed)).number == 3


def test_cursor_concerns_the_epoch_that_was_sought_only():
    plan = plan_of(SAMPLERS["random"])
    plan.seek(0)
    cursor = next(iter(plan)).cursor
    again = plan_of(SAMPLERS["random"])
    again.seek(0, 1249, cursor)
    assert len(list(again)) == 1
    assert {batch.epoch for batch in again} == {1}


def test_iterators_are_refused():
    exhausted = iter([])
    for sampler in exhausted, iter([1, 2]), (i for i in range(3)), map(int, [1]):
        with pytest.raises(TypeError, match="`sampler` must be re-iterable, got iter"):
            ReplayedSampler(sampler)


class Counting:
    """Keeps state between iterations."""

    def __init__(self):
        self.count = 0

    def __len__(self):
        return 3

    def __iter__(self):
        self.count += 1
        yield from range(self.count, self.count + 3)


class Exhausted:
    """Wraps an iterator, which is used up after its first iteration."""

    def __init__(self):
        self.items = iter([0, 1, 2])

    def __len__(self):
        return 3

    def __iter__(self):
        return self.items


class Listed(Own):
    """Its generator is where it isn't looked for."""

    def __init__(self):
        self.generators = [random.Random(3)]

    @property
    def generator(self):
        return self.generators[0]


@pytest.mark.parametrize(
    "sampler",
    [Counting(), Exhausted(), Listed(), data.BatchSampler(Counting(), 2, False)],
    ids=["counting", "exhausted", "listed", "batches"],
)
def test_sampler_with_a_state_between_iterations_is_refused(sampler):
    name = type(sampler).__name__
    with pytest.raises(DataError, match=f"{name} yields another order when it is iter"):
        ReplayedSampler(sampler).check()


def test_check_accepts_what_can_be_repeated():
    for make in ALL.values():
        ReplayedSampler(make()).check()


@pytest.mark.parametrize(
    ("make", "is_sharded"),
    [
        (SAMPLERS["distributed"], True),
        (BATCH_SAMPLERS["batches_of_shard"], True),
        (SAMPLERS["random"], False),
        (BATCH_SAMPLERS["batches"], False),
        (FIXED["list"], False),
    ],
)
def test_distributed_samplers_are_known_as_shards(make, is_sharded):
    assert ReplayedSampler(make()).is_sharded == is_sharded


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(("n", "ranks"), [(10, 2), (11, 2), (10, 4), (2, 5), (1, 3)])
def test_padding_of_distributed_samplers_is_counted(n, ranks, drop_last):
    read = []
    for rank in range(ranks):
        sampler = data.DistributedSampler(range(n), ranks, rank, drop_last=drop_last)
        replayed = ReplayedSampler(sampler)
        read += list(replayed.order(0, 0))[: replayed.real(rank)]
    assert len(read) == len(set(read))
    assert len(read) == (n // ranks * ranks if drop_last and n > ranks else n) or (
        drop_last and n < ranks
    )


def test_repeats_of_a_users_distributed_sampler_are_no_padding():
    class Oversampling(data.DistributedSampler):
        def __iter__(self):
            return itertools.islice(itertools.cycle([0, 1]), 50)

        def __len__(self):
            return 50

    sampler = ReplayedSampler(Oversampling(range(4), 2, 0))
    plan = SampleBatches(sampler, batch_size=5, drop_last=False, seed=0, world_size=2)
    assert all(batch.real == 5 for batch in plan)
    assert plan.num_samples == 100


@pytest.mark.parametrize("item", [[1], (1, 2), np.array([1]), torch.tensor([1])])
def test_batches_are_told_from_samples(item):
    class One(ResumableSampler):
        def order(self, epoch, start):
            return iter([item][start:])

    assert yields_batches(One(range(1)))
    assert yields_batches(ReplayedSampler([item]))
    for one in 1, np.int64(1), torch.tensor(1), "a":
        assert not yields_batches(ReplayedSampler([one]))
    assert not yields_batches(ReplayedSampler([]))
    assert not yields_batches(ResumableRandomSampler(range(3)))


def test_asking_for_batches_leaves_the_cursor_alone():
    class Old(ResumableSampler):
        def __iter__(self):
            yield from range(self.epoch + self.start_iter, len(self))

    sampler = Old(range(9))
    sampler.set_epoch(2)
    sampler.start_iter = 3
    assert not yields_batches(sampler)
    assert (sampler.epoch, sampler.start_iter) == (2, 3)


def test_items_are_drawn_under_generators_of_their_own():
    def drawn():
        for _ in range(3000):
            yield random.gauss(0, 1), np.random.normal(), torch.randn(()).item()

    with isolated_rng(7):
        expected = list(drawn())
    seed_rngs(1)
    state = rng_state()
    items = draw_apart(drawn, 7)
    assert next(items) == expected[0]
    assert rng_state() == state
    np.random.normal(), random.gauss(0, 1)
    assert list(items) == expected[1:]


def test_error_of_a_sampler_leaves_the_global_generators_as_they_were():
    def failing():
        yield random.random()
        raise OSError("unreadable")

    state = rng_state()
    with pytest.raises(OSError, match="unreadable"):
        list(draw_apart(failing, 7))
    assert rng_state() == state


def test_length_of_a_sampler_without_one_is_an_error():
    class Endless:
        def __iter__(self):
            return itertools.count()

    sampler = ReplayedSampler(Endless())
    assert list(itertools.islice(sampler.order(0, 5), 2)) == [5, 6]
    with pytest.raises(TypeError, match="len"):
        len(sampler)


def test_identity_names_the_sampler():
    assert ReplayedSampler(shuffled()).identity() == {"sampler": "RandomSampler"}
