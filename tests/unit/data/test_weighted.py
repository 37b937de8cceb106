"""Sampling by weight: the chances are right, and any position can be entered."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from helios.data.weighted import ResumableWeightedRandomSampler
from helios.rng import derive_key, uniforms

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
P_LIMIT = 1e-4
WEIGHTS = [0.0, 1, 2, 3, 0, 0.5, 10, 0]
CHANCES = np.array(WEIGHTS) / sum(WEIGHTS)
weight_lists = st.lists(
    st.sampled_from([0.0, 5e-324, 1e-300, 0.1, 1, 3, 1e300, 1.7e308]), min_size=1
).filter(any)


def sampler_of(weights=WEIGHTS, *args, **options):
    return ResumableWeightedRandomSampler(weights, *args, **{"seed": 4, **options})


def first_draws(sampler, count):
    """The draws of many epochs, shape (count, len)."""
    positions = np.arange(len(sampler))
    return np.stack([sampler.at(epoch, positions) for epoch in range(count)])


def p_of(drawn, chances):
    observed = np.bincount(drawn.ravel(), minlength=len(chances))
    assert not observed[chances == 0].any()
    chosen = chances > 0
    expected = drawn.size * chances[chosen]
    return stats.chisquare(observed[chosen], expected).pvalue


@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_each_sample_is_drawn_in_proportion_to_its_weight(seed):
    drawn = sampler_of(num_samples=100_000, seed=seed).at(0, np.arange(100_000))
    assert p_of(drawn, CHANCES) > P_LIMIT
    # The same in each part of an epoch, and at the same position of all epochs.
    assert p_of(drawn[50_000:51_000], CHANCES) > P_LIMIT
    assert p_of(first_draws(sampler_of(seed=seed), 4000)[:, 0], CHANCES) > P_LIMIT


def test_draws_with_replacement_are_independent():
    drawn = sampler_of(num_samples=100_000).at(3, np.arange(100_000))
    pairs = np.outer(CHANCES, CHANCES).ravel()
    for lag in 1, 2, 7:
        both = drawn[:-lag] * len(WEIGHTS) + drawn[lag:]
        assert p_of(both[:: lag + 1], pairs) > P_LIMIT
    following = sampler_of(num_samples=100_000).at(4, np.arange(100_000))
    assert p_of(drawn * len(WEIGHTS) + following, pairs) > P_LIMIT


def test_draws_without_replacement_have_the_chances_of_one_after_the_other():
    drawn = first_draws(sampler_of(replacement=False), 20_000)
    assert p_of(drawn[:, 0], CHANCES) > P_LIMIT
    # The second, given the first: in proportion to the weights that are left.
    left = np.where(np.eye(len(WEIGHTS), dtype=bool), 0.0, WEIGHTS)
    rest = left.sum(axis=1, keepdims=True)
    pairs = CHANCES[:, None] * left / rest
    assert p_of(drawn[:, 0] * len(WEIGHTS) + drawn[:, 1], pairs.ravel()) > P_LIMIT


def test_equal_weights_without_replacement_are_a_shuffle():
    drawn = first_draws(sampler_of([2.0] * 4, replacement=False), 6000)
    ranks = drawn @ (4 ** np.arange(4))
    observed = np.unique(ranks, return_counts=True)[1]
    assert observed.size == 24
    assert stats.chisquare(observed).pvalue > P_LIMIT


@PROPERTY
@given(weight_lists, st.booleans(), st.integers(0, 5), st.data())
def test_only_samples_with_a_weight_are_drawn(weights, replacement, epoch, data):
    sampler = sampler_of(weights, replacement=replacement)
    drawn = list(sampler.order(epoch, 0))
    assert len(drawn) == len(sampler)
    assert all(weights[index] > 0 for index in drawn)
    if not replacement:
        assert len(set(drawn)) == len(drawn)
    start = data.draw(st.integers(0, len(drawn)))
    assert (
        list(sampler_of(weights, replacement=replacement).order(epoch, start))
        == (drawn[start:])
    )


@pytest.mark.parametrize("replacement", [True, False])
def test_seek_equals_slice_epoch_after_epoch(replacement):
    sampler = sampler_of(np.arange(1, 6001), 5000, replacement)
    orders = [list(sampler.order(epoch, 0)) for epoch in (0, 1, 2, 1)]
    assert len({tuple(order) for order in orders}) == 3
    assert orders[1] == orders[3]
    for epoch, start in (2, 1), (0, 4097), (1, 4999), (1, 5000):
        assert list(sampler.order(epoch, start)) == orders[epoch][start:]
    positions = np.array([[4999, 0], [17, 4096]])
    found = sampler.at(2, positions)
    assert found.dtype == np.int64
    assert np.array_equal(found, np.array(orders[2])[positions])


def test_with_replacement_a_draw_does_not_depend_on_how_many_there_are():
    few, many = sampler_of(num_samples=3), sampler_of(num_samples=10**12)
    assert list(few) == [next(many.order(0, i)) for i in range(3)]
    assert len(many) == 10**12
    assert many.at(0, np.array([10**12 - 1])) in [1, 2, 3, 5, 6]


def test_uniform_number_of_zero_draws_no_sample_without_a_weight():
    # splitmix64 yields 0 where its counter is 0: solved for the position.
    step, seed = 0x9E3779B97F4A7C15, 0
    while (position := -derive_key(seed, 0) * pow(step, -1, 2**64) % 2**64) > 2**62:
        seed += 1
    positions = np.array([position - 1])
    assert uniforms(derive_key(seed, 0), positions).item() == 0
    sampler = sampler_of([0.0, 0.0, 1.0, 2.0], position, seed=seed)
    assert sampler.at(0, positions).item() == 2


def test_seed_that_the_loader_sets_counts():
    sampler = sampler_of(replacement=False)
    before = list(sampler)
    sampler.seed = 12
    assert list(sampler) != before
    assert list(sampler) == list(sampler_of(replacement=False, seed=12))


@pytest.mark.parametrize(
    ("replacement", "expected"), [(True, len(WEIGHTS)), (False, 5)]
)
def test_number_of_draws_is_that_of_the_samples_unless_it_is_given(
    replacement, expected
):
    assert len(sampler_of(replacement=replacement)) == expected
    sampler = sampler_of(num_samples=4, replacement=replacement)
    assert len(sampler) == len(list(sampler)) == 4


@pytest.mark.parametrize("replacement", [True, False])
def test_arrays_and_tensors_are_taken_as_lists_are(replacement):
    expected = list(sampler_of(replacement=replacement))
    for weights in np.array(WEIGHTS, np.float32), torch.tensor(WEIGHTS):
        assert list(sampler_of(weights, replacement=replacement)) == expected
    given = np.array(WEIGHTS)
    sampler_of(given)
    assert given.tolist() == WEIGHTS  # not changed


@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1e100, 1e307])
def test_scale_of_the_weights_does_not_count(scale):
    weights = [i * scale for i in range(1, 18)]
    sampler = sampler_of(weights, 100_000)
    drawn = sampler.at(0, np.arange(100_000))
    assert p_of(drawn, np.arange(1, 18) / 153) > P_LIMIT


def test_weights_that_differ_hugely_are_drawn_in_their_order():
    weights = [1e-305, 1e-320, 1.0, 1e-310, 1e-300]
    assert list(sampler_of(weights, replacement=False)) == [2, 4, 0, 3, 1]


@pytest.mark.parametrize(
    "weights",
    [
        [],
        [0.0, 0.0],
        [1.0, -1.0],
        [1.0, float("nan")],
        [1.0, float("inf")],
        [[1.0, 2.0]],
        3.0,
        None,
    ],
)
@pytest.mark.parametrize("replacement", [True, False])
def test_wrong_weights_are_errors(weights, replacement):
    with pytest.raises(ValueError, match="`weights` must be a list of finite numbers"):
        sampler_of(weights, replacement=replacement)


@pytest.mark.parametrize("count", [0, -1, 2.0, "3", True])
def test_wrong_number_of_draws_is_an_error(count):
    with pytest.raises(ValueError, match=r"`num_samples` must be >= 1, got"):
        sampler_of(num_samples=count)


def test_more_draws_than_samples_with_a_weight_are_an_error():
    text = "`num_samples` must be >= 1 and <= 5, as without replacement, got 6"
    with pytest.raises(ValueError, match=text):
        sampler_of(num_samples=6, replacement=False)
    assert len(sampler_of(num_samples=600)) == 600


def test_identity_names_weights_and_replacement():
    samplers = [
        sampler_of(),
        sampler_of(replacement=False),
        sampler_of(WEIGHTS[::-1]),
        sampler_of(seed=9),
        sampler_of(seed=None),
    ]
    assert len({str(sampler.identity()) for sampler in samplers}) == 5
