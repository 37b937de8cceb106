"""The order of samples: a pure function of seed, epoch and position."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helios.data.samplers import (
    SAMPLER_REGISTRY,
    ResumableDistributedSampler,
    ResumableRandomSampler,
    ResumableSampler,
    ResumableSequentialSampler,
    ResumableSubsetRandomSampler,
    checksum,
    create_sampler,
)
from helios.rng import get_default_seed

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)


class Reversed(ResumableSampler):
    """Computes positions."""

    def at(self, epoch, positions):
        return len(self) - 1 - (positions + epoch) % len(self)


class Old(ResumableSampler):
    """An older project's: overrides `__iter__`, and reads `start_iter` late."""

    def __iter__(self):
        own = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self), generator=own).tolist()
        yield from order[self.start_iter * self.batch_size :]


MAKERS = {
    "sequential": lambda n: ResumableSequentialSampler(range(n), seed=5),
    "random": lambda n: ResumableRandomSampler(range(n), seed=5),
    "subset": lambda n: ResumableSubsetRandomSampler(np.arange(n) * 3, seed=5),
    "distributed": lambda n: ResumableDistributedSampler(
        range(n), num_replicas=3, rank=1, seed=5, batch_size=4
    ),
    "user": lambda n: Reversed(range(n), seed=5),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("n", [1, 2, 64, 65, 9000])
def test_order_from_any_position_is_the_rest_of_the_epoch(name, n):
    sampler = MAKERS[name](n)
    whole = list(sampler.order(3, 0))
    assert len(whole) == len(sampler)
    assert all(type(index) is int for index in whole)
    for start in {0, 1, len(whole) // 2, 4096, len(whole) - 1, len(whole)}:
        assert list(sampler.order(3, start)) == whole[start:]


@pytest.mark.parametrize("name", MAKERS)
def test_positions_may_be_asked_for_in_any_order_and_shape(name):
    sampler = MAKERS[name](500)
    whole = np.array(list(sampler.order(1, 0)))
    positions = np.random.default_rng(0).integers(0, len(whole), (5, 7))
    found = sampler.at(1, positions)
    assert found.dtype == np.int64
    assert np.array_equal(found, whole[positions])


@pytest.mark.parametrize("make", [ResumableRandomSampler, ResumableSubsetRandomSampler])
def test_seed_and_epoch_name_the_order(make):
    orders = {
        tuple(make(range(50), seed=seed).order(epoch, 0))
        for seed in (0, 1, -1, 2**70)
        for epoch in range(4)
    }
    assert len(orders) == 16
    assert all(sorted(order) == list(range(50)) for order in orders)
    again = make(range(50), seed=1)
    again.set_epoch(2)
    assert tuple(again) in orders


def test_sampler_without_a_seed_has_the_default_one_until_it_gets_one():
    sampler = ResumableRandomSampler(range(9))
    assert not sampler.has_seed
    assert sampler.seed == get_default_seed()
    assert ResumableRandomSampler(range(9), seed=0).has_seed


@pytest.mark.parametrize("name", MAKERS)
def test_start_iter_concerns_the_next_iteration_only(name):
    sampler = MAKERS[name](40)
    whole = list(sampler)
    sampler.batch_size, sampler.start_iter = 4, 2
    first = iter(sampler)
    assert sampler.start_iter == 0
    assert list(sampler) == whole
    assert list(first) == whole[8:]
    sampler.start_iter = 10
    assert list(sampler) == whole[40:]


def test_iteration_follows_set_epoch():
    sampler = ResumableRandomSampler(range(30), seed=1)
    for epoch in 0, 1, 5:
        sampler.set_epoch(epoch)
        assert list(sampler) == list(sampler.order(epoch, 0))


def test_base_class_says_what_to_override():
    with pytest.raises(
        NotImplementedError, match="ResumableSampler must override `at`"
    ):
        list(ResumableSampler(range(3)))


def test_most_derived_override_counts():
    class Ordered(Reversed):
        def order(self, epoch, start):
            yield from range(start, len(self))

    class Both(ResumableSampler):
        def order(self, epoch, start):
            yield from range(start, len(self))

        def at(self, epoch, positions):
            return positions

    class Lengthened(Old):
        def __len__(self):
            return 3

    class Computed(Ordered):
        def at(self, epoch, positions):
            return positions

    kinds = {
        ResumableSampler: "__iter__",
        Reversed: "at",
        Ordered: "order",
        Both: "at",
        Old: "__iter__",
        Lengthened: "__iter__",
        Computed: "at",
        ResumableRandomSampler: "at",
    }
    found = {kind: kind(range(3)).overridden() for kind in kinds}
    assert found == kinds


def test_subset_is_shuffled_and_may_repeat_an_index():
    sampler = ResumableSubsetRandomSampler([7, 7, 2, 9], seed=3)
    assert len(sampler) == 4
    assert {tuple(sampler.order(epoch, 0)) for epoch in range(99)} >= {(2, 7, 9, 7)}
    for epoch in range(9):
        assert sorted(sampler.order(epoch, 0)) == [2, 7, 7, 9]


@pytest.mark.parametrize(
    "indices", [range(3, 9), np.arange(3, 9, dtype=np.uint8), torch.arange(3, 9)]
)
def test_subset_takes_arrays(indices):
    sampler = ResumableSubsetRandomSampler(indices, seed=3)
    assert sampler.at(0, np.arange(6)).dtype == np.int64
    assert sorted(sampler) == list(range(3, 9))
    expected = ResumableSubsetRandomSampler(list(range(3, 9)), seed=3)
    assert sampler.identity() == expected.identity()


@pytest.mark.parametrize("indices", [[], [1.0], [[1, 2]], 3, [True], ["a"], [None]])
def test_wrong_subset_is_an_error(indices):
    with pytest.raises(ValueError, match="`indices` must be a list of ints, not empty"):
        ResumableSubsetRandomSampler(indices)


@PROPERTY
@given(
    st.integers(1, 60),
    st.integers(1, 6),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
)
def test_ranks_of_distributed_samplers_have_each_sample(
    n, size, ranks, shuffle, drop_last
):
    samplers = [
        ResumableDistributedSampler(
            range(n),
            num_replicas=ranks,
            rank=rank,
            batch_size=size,
            shuffle=shuffle,
            drop_last=drop_last,
            seed=2,
        )
        for rank in range(ranks)
    ]
    assert all(sampler.is_sharded for sampler in samplers)
    parts = [list(sampler.order(1, 0)) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(part) for part in parts]
    assert len({len(part) for part in parts}) == 1
    real = [
        index for i, part in enumerate(parts) for index in part[: samplers[0].real(i)]
    ]
    assert len(real) == len(set(real))
    assert len(real) == (n - n % (size * ranks) if drop_last else n)
    padded = sum(map(len, parts)) - len(real)
    assert padded < ranks
    if not shuffle and not drop_last:
        assert sorted(real) == list(range(n))


def test_identity_names_what_the_order_depends_on():
    def distributed(shuffle):
        return ResumableDistributedSampler(
            range(9), num_replicas=1, rank=0, shuffle=shuffle
        )

    samplers = [
        ResumableSequentialSampler(range(9)),
        ResumableRandomSampler(range(9)),
        ResumableRandomSampler(range(9), seed=1),
        ResumableRandomSampler(range(9), seed=2),
        ResumableSubsetRandomSampler([1, 2, 3]),
        ResumableSubsetRandomSampler([1, 2, 4]),
        distributed(True),
        distributed(False),
    ]
    found = {str(sampler.identity()) for sampler in samplers}
    assert len(found) == len(samplers)


def test_identity_does_not_depend_on_the_seed_of_the_run():
    sampler = ResumableRandomSampler(range(9))
    before = sampler.identity()
    sampler.seed = 99
    assert sampler.identity() == before


def test_samplers_are_made_by_name():
    sampler = create_sampler("ResumableRandomSampler", range(9), seed=4)
    assert list(sampler) == list(ResumableRandomSampler(range(9), seed=4))
    assert {kind.__name__ for _, kind in SAMPLER_REGISTRY} >= {
        "ResumableSequentialSampler",
        "ResumableSubsetRandomSampler",
        "ResumableDistributedSampler",
    }


def test_checksum_tells_values_apart_and_takes_any_layout():
    values = np.arange(12).reshape(3, 4)
    assert checksum(values[:, ::2]) == checksum(values[:, ::2].copy())
    assert checksum(values[0]) != checksum(values[1])
