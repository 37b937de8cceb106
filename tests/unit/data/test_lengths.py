"""Length-grouped batches: a permutation, with less padding than a shuffle."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from helios.data.batches import SampleBatches
from helios.data.lengths import ResumableLengthGroupedSampler
from helios.data.samplers import ResumableRandomSampler

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
P_LIMIT = 1e-4


def sampler_of(lengths, batch_size, window=4, **options):
    options = {"window_batches": window, "seed": 8, **options}
    return ResumableLengthGroupedSampler(lengths, batch_size=batch_size, **options)


def draw_lengths(n):
    return np.random.default_rng(1).integers(1, 500, n)


def padding_of(order, lengths, size):
    """Padded tokens, where each batch is as long as its longest sample."""
    batches = [lengths[order[i : i + size]] for i in range(0, len(order), size)]
    return sum((batch.max() - batch).sum() for batch in batches)


@PROPERTY
@given(
    st.integers(1, 200),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(0, 3),
    st.data(),
)
def test_epoch_is_a_permutation_that_can_be_entered_anywhere(
    n, size, window, epoch, data
):
    sampler = sampler_of(draw_lengths(n), size, window)
    whole = list(sampler.order(epoch, 0))
    assert sorted(whole) == list(range(n))
    start = data.draw(st.integers(0, n))
    again = sampler_of(draw_lengths(n), size, window)
    assert list(again.order(epoch, start)) == whole[start:]
    positions = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=9)), int)
    assert again.at(epoch, positions).tolist() == [whole[i] for i in positions]


def test_batches_of_a_window_share_its_samples_out_by_length():
    lengths, size, window = draw_lengths(1003), 8, 10
    order = np.array(list(sampler_of(lengths, size, window).order(2, 0)))
    full = len(order) // size * size
    for first in range(0, full, size * window):
        batches = lengths[order[first : min(first + size * window, full)]]
        batches = batches.reshape(-1, size)
        batches = batches[np.argsort(batches[:, 0], kind="stable")]
        # Each batch begins where the one before ends: no two overlap.
        assert (batches[1:].min(axis=1) >= batches[:-1].max(axis=1)).all()


@pytest.mark.parametrize(("window", "most"), [(2, 0.6), (10, 0.17), (50, 0.05)])
def test_padding_is_less_than_that_of_a_shuffle(window, most):
    lengths, size = draw_lengths(5003), 16
    plain = ResumableRandomSampler(lengths, seed=8)
    random = padding_of(list(plain.order(0, 0)), lengths, size)
    order = list(sampler_of(lengths, size, window).order(0, 0))
    assert padding_of(order, lengths, size) < most * random


def test_batches_come_in_random_order_of_length():
    lengths, size, window = np.arange(400), 8, 50
    longest = np.zeros(50)
    for epoch in range(400):
        order = list(sampler_of(lengths, size, window).order(epoch, 0))
        longest[order.index(399) // size] += 1
    assert stats.chisquare(longest).pvalue > P_LIMIT


def test_windows_are_random_samples_of_the_lengths():
    lengths = np.arange(400)
    first = [
        lengths[i]
        for epoch in range(50)
        for i in list(sampler_of(lengths, 8, 5).order(epoch, 0))[:40]
    ]
    assert stats.chisquare(np.bincount(np.array(first) // 40)).pvalue > P_LIMIT


def test_samples_of_the_short_batch_are_of_any_length():
    lengths, size = np.arange(43), 10
    last = np.zeros(43)
    for epoch in range(2000):
        last[list(sampler_of(lengths, size, 50).order(epoch, 0))[-3:]] += 1
    # Three at once, without repeats: a little more even than multinomial.
    assert stats.chisquare(last).pvalue > P_LIMIT


def test_epochs_and_seeds_have_orders_of_their_own():
    lengths = draw_lengths(100)
    orders = {
        tuple(sampler_of(lengths, 4, seed=seed).order(epoch, 0))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_batches_are_grouped_over_all_ranks(world):
    lengths = draw_lengths(600)
    ranks = []
    for rank in range(world):
        sampler = sampler_of(lengths, 1, 5)
        plan = SampleBatches(
            sampler,
            batch_size=12 // world,
            drop_last=False,
            seed=0,
            rank=rank,
            world_size=world,
        )
        assert sampler.batch_size == 12
        ranks.append([batch.indices for batch in plan])
    found = [np.concatenate(parts).tolist() for parts in zip(*ranks, strict=True)]
    order = list(sampler_of(lengths, 12, 5).order(0, 0))
    assert found == [order[i : i + 12] for i in range(0, 600, 12)]


def test_other_batch_size_or_seed_is_no_stale_window():
    lengths = draw_lengths(90)
    sampler, positions = sampler_of(lengths, 4), np.arange(12)
    for size, seed, epoch in (4, 8, 0), (6, 8, 0), (6, 1, 0), (6, 1, 1):
        sampler.batch_size, sampler.seed = size, seed
        expected = sampler_of(lengths, size, seed=seed).at(epoch, positions)
        assert np.array_equal(sampler.at(epoch, positions), expected)


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor, np.float32])
def test_lengths_may_be_of_any_kind(make):
    lengths = draw_lengths(50)
    expected = list(sampler_of(lengths, 4).order(0, 0))
    assert list(sampler_of(make(lengths.tolist()), 4).order(0, 0)) == expected


@pytest.mark.parametrize("lengths", [[], 3, [[1], [2]], ["a"], [True], None])
def test_wrong_lengths_are_errors(lengths):
    with pytest.raises(ValueError, match="`lengths` must be a list of numbers, not"):
        sampler_of(lengths, 4)


@pytest.mark.parametrize("window", [0, -3, 2.0, True, None])
def test_wrong_window_is_an_error(window):
    with pytest.raises(ValueError, match="`window_batches` must be an int >= 1, got"):
        sampler_of([1, 2], 4, window)


def test_identity_names_lengths_and_window():
    samplers = sampler_of([1, 2], 1), sampler_of([1, 3], 1), sampler_of([1, 2], 1, 5)
    assert len({str(sampler.identity()) for sampler in samplers}) == 3
