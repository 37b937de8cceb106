"""The keyed permutation: a bijection, and as random as torch's."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helios.data.permutation import Permutation
from helios.rng import derive_key

# Each test of a statistic has this chance to fail for a perfect shuffle; the seeds are
# fixed, so that it either does or does not.
P_LIMIT = 1e-4
KNOWN = {
    7: [4, 1, 5, 0, 6, 2, 3],
    100: [51, 52, 22, 16, 62, 7, 26],
    2**62: [2890303004425104474, 1414596942079302028],
}


def p_of_chi_square(observed, expected, freedom=None):
    """Chance of such deviations (Wilson and Hilferty, 1931)."""
    freedom = freedom or observed.size - 1
    chi_square = ((observed - expected) ** 2 / expected).sum()
    spread = math.sqrt(2 / (9 * freedom))
    z = ((chi_square / freedom) ** (1 / 3) - (1 - spread**2)) / spread
    return 0.5 * math.erfc(z / math.sqrt(2))


def p_of_z(z):
    return math.erfc(abs(z) / math.sqrt(2))


def helios_orders(n, count):
    """Orders of several seeds and epochs, shape (count, n)."""
    keys = [derive_key(i // 7, i % 7) for i in range(count)]
    return np.stack([Permutation(n, key).block(0, n) for key in keys])


def torch_orders(n, count):
    generator = torch.Generator().manual_seed(1)
    return np.stack(
        [torch.randperm(n, generator=generator).numpy() for _ in range(count)]
    )


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.integers(0, 3000), st.integers())
def test_order_is_a_bijection(n, key):
    order = Permutation(n, key).block(0, n)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))


@pytest.mark.parametrize("n", [2**16, 65537, 10**5])
def test_long_order_is_a_bijection(n):
    assert np.array_equal(np.sort(Permutation(n, 3).block(0, n)), np.arange(n))


@settings(deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 2**62), st.integers(0, 2**64 - 1))
def test_block_and_iteration_agree(data, n, key):
    start = data.draw(st.integers(0, n - 1))
    order = Permutation(n, key)
    count = min(n - start, 100)
    block = order.block(start, count).tolist()
    assert len(set(block)) == count
    assert all(0 <= value < n for value in block)
    assert list(itertools.islice(order.iterate(start), count)) == block
    assert order.block(start + count - 1, 1).tolist() == block[-1:]


@pytest.mark.parametrize("n", [1, 64, 65, 1000, 5000])
def test_iteration_continues_an_order_at_any_position(n):
    order = Permutation(n, 9)
    whole = list(order.iterate())
    assert all(type(value) is int for value in whole)
    for start in {0, 1, n // 2, n - 1, n, n + 5}:
        assert list(order.iterate(start)) == whole[start:]


def test_known_orders_never_change():
    assert Permutation(7, 1).block(0, 7).tolist() == KNOWN[7]
    assert Permutation(100, 1).block(0, 7).tolist() == KNOWN[100]
    assert Permutation(2**62, 1).block(2**61, 2).tolist() == KNOWN[2**62]


def test_positions_outside_are_errors():
    order = Permutation(10, 0)
    for start, count in (5, 6), (-1, 1), (10, 1), (3, -1):
        with pytest.raises(IndexError, match="`start` and `count`"):
            order.block(start, count)
    with pytest.raises(ValueError, match="`n` must be in"):
        Permutation(2**62 + 1, 0)
    with pytest.raises(ValueError, match="`n` must be in"):
        Permutation(-1, 0)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_of_few_samples_are_as_frequent(n):
    count = 60 * math.factorial(n)
    found = [tuple(order) for order in helios_orders(n, count).tolist()]
    observed = np.array([found.count(o) for o in itertools.permutations(range(n))])
    assert p_of_chi_square(observed, np.full(observed.size, 60.0)) > P_LIMIT


@pytest.mark.parametrize("make", [helios_orders, torch_orders])
@pytest.mark.parametrize(
    ("n", "count"), [(7, 4000), (52, 4000), (65, 8000), (1000, 500), (65537, 10)]
)
def test_statistics_are_those_of_a_random_shuffle(make, n, count):
    orders = make(n, count)
    bins = min(n, 32)
    place = np.arange(n) * bins // n
    width = np.bincount(place, minlength=bins)

    # Each position has each value as often: a table of positions and values, in bins.
    table = np.zeros((bins, bins))
    np.add.at(table, (np.broadcast_to(place, orders.shape), place[orders]), 1)
    expected = count * np.outer(width, width) / n
    assert p_of_chi_square(table, expected, (bins - 1) ** 2) > P_LIMIT

    # Neighbours differ by anything as often, modulo n.
    steps = np.diff(orders, axis=1) % n
    places = (np.arange(1, n) - 1) * bins // (n - 1)
    observed = np.bincount(places[steps - 1].ravel(), minlength=bins)
    width = np.bincount(places, minlength=bins)
    chosen = width > 0
    expected = (steps.size * width / (n - 1))[chosen]
    assert p_of_chi_square(observed[chosen], expected) > P_LIMIT

    # Serial correlation at lags 1 to 3: mean -1/(n-1), variance near 1/n.
    centred = (orders - (n - 1) / 2) / math.sqrt((n * n - 1) / 12)
    for lag in 1, 2, 3:
        products = (centred[:, :-lag] * centred[:, lag:]).sum(axis=1)
        z = (products + (n - lag) / (n - 1)).mean() / math.sqrt((n - lag) / count)
        assert p_of_z(z) > P_LIMIT

    # Fixed points: mean 1, variance 1.
    fixed = (orders == np.arange(n)).sum(axis=1)
    assert p_of_z((fixed.mean() - 1) * math.sqrt(count)) > P_LIMIT

    # Orders of different keys are unrelated.
    z = (centred[:-1] * centred[1:]).sum(axis=1).sum() / math.sqrt((count - 1) * n)
    assert p_of_z(z) > P_LIMIT
