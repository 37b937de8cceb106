"""The keyed permutation: a bijection, and as random as torch's."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from helios.data.permutation import Permutation
from helios.rng import derive_key

# Each test of a statistic has this chance to fail for a perfect shuffle; the seeds are
# fixed, so that it either does or does not.
P_LIMIT = 1e-4
KNOWN = {
    7: [4, 1, 5, 0, 6, 2, 3],
    100: [61, 62, 85, 70, 93, 23, 77],
    1000: [15, 687, 884, 621, 506, 835, 853],
    2**62: [2890303004425104474, 1414596942079302028],
}


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


@pytest.mark.parametrize("n", [1, 512, 513, 1000, 5000])
def test_iteration_continues_an_order_at_any_position(n):
    order = Permutation(n, 9)
    whole = list(order.iterate())
    assert all(type(value) is int for value in whole)
    for start in {0, 1, n // 2, n - 1, n, n + 5}:
        assert list(order.iterate(start)) == whole[start:]


def test_known_orders_never_change():
    assert Permutation(7, 1).block(0, 7).tolist() == KNOWN[7]
    assert Permutation(100, 1).block(0, 7).tolist() == KNOWN[100]
    assert Permutation(1000, 1).block(0, 7).tolist() == KNOWN[1000]
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


@pytest.mark.parametrize("n", [50, 1000, 2**40])
def test_positions_may_have_any_shape(n):
    order = Permutation(n, 4)
    positions = np.arange(48).reshape(2, 3, 8)[:, ::-1]
    assert np.array_equal(order.at(positions), order.block(0, 48)[positions])
    assert order.at(np.empty((0, 3), np.int64)).shape == (0, 3)


def test_positions_are_left_alone():
    positions = np.arange(70)
    Permutation(70, 4).at(positions)
    assert np.array_equal(positions, np.arange(70))


@pytest.mark.parametrize("n", [10**9 + 7, 2**61 - 1, 2**62])
def test_a_million_values_of_a_huge_order_are_distinct_and_uniform(n):
    order, count = Permutation(n, 11), 10**6
    start = n // 3
    block = order.block(start, count)
    assert block.min() >= 0
    assert block.max() < n
    assert np.unique(block).size == count
    for first, size in (0, 1), (4095, 2), (777_777, 5000), (count - 1, 1):
        part = order.block(start + first, size)
        assert np.array_equal(part, block[first : first + size])
    # Neighbours, and positions that share the one half of the network's state.
    far = order.at(start % 1000 + np.arange(10**5) * math.isqrt(n // 10**5))
    rows = math.isqrt(n - 1) + 1
    column = order.at(np.arange(10**5 if n > 2**40 else 10**4) * -(-n // rows))
    for values in block, far, column:
        assert stats.kstest(values / n, "uniform").pvalue > P_LIMIT
        assert stats.kstest(np.diff(values) % n / n, "uniform").pvalue > P_LIMIT
        low = np.bincount(values % 251, minlength=251)
        assert stats.chisquare(low).pvalue > P_LIMIT


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_of_few_samples_are_as_frequent(n):
    count = 60 * math.factorial(n)
    keys = [derive_key(i // 7, i % 7) for i in range(count)]
    found = [tuple(Permutation(n, key).block(0, n).tolist()) for key in keys]
    observed = [found.count(order) for order in itertools.permutations(range(n))]
    assert stats.chisquare(observed).pvalue > P_LIMIT


SIZES = [(7, 2000), (65, 1500), (100, 1500), (513, 600), (1000, 400), (4097, 100)]
SIZES += [(65536, 8)]
LONG = [(n, 15 * count) for n, count in SIZES] + [(2**20 + 1, 8)]


def of_many_orders(test):
    """Runs a test with orders of Helios, and with torch's as the control."""
    slow = [pytest.param(*size, marks=pytest.mark.slow) for size in LONG]
    test = pytest.mark.parametrize(("n", "count"), SIZES + slow)(test)
    return pytest.mark.parametrize("kind", ["helios", "torch"])(test)


@functools.lru_cache(maxsize=3)  # of one test's sizes
def orders_of(kind, n, count, *, later=0, other=0):
    """Orders of `count` seeds and epochs, or of others near them; shape (count, n)."""
    if kind == "torch":
        generator = torch.Generator().manual_seed(1 + later + 2 * other)
        drawn = [torch.randperm(n, generator=generator) for _ in range(count)]
        return torch.stack(drawn).numpy()
    keys = [derive_key(i // 7 * 2 + other, i % 7 * 2 + later) for i in range(count)]
    return np.stack([Permutation(n, key).block(0, n) for key in keys])


def bins_of(n):
    """The bin of each value in range(n), and how many values each bin has."""
    bins = min(n // 2, 16)
    place = np.arange(n) * bins // n
    return place, np.bincount(place)


def tables_of(rows, columns):
    """How often two bins meet, in each of the orders: shape (count, bins, bins)."""
    place, width = bins_of(columns.shape[1])
    tables = np.zeros((len(columns), width.size, width.size))
    number = np.arange(len(columns))[:, None]
    np.add.at(tables, (number, place[rows], place[columns]), 1)
    return tables


def ps_of_independence(rows, columns):
    """Do the bins meet by chance in all orders together, and in each of them?"""
    n = columns.shape[1]
    tables, width = tables_of(rows, columns), bins_of(n)[1]
    freedom, expected = (width.size - 1) ** 2, np.outer(width, width) / n
    deviation = (tables.mean(axis=0) - expected) ** 2 / expected
    whole = stats.chi2.sf(deviation.sum() * len(tables) * (n - 1) / n, freedom)
    # Nor do they meet too regularly: the mean is exact.
    each = ((tables - expected) ** 2 / expected).sum(axis=(1, 2))
    return whole, stats.ttest_1samp(each, freedom * n / (n - 1)).pvalue


def centred(orders):
    n = orders.shape[-1]
    return (orders - (n - 1) / 2) / math.sqrt((n * n - 1) / 12)


def lags_of(n):
    """Neighbours, and positions that share the one half of the network's state."""
    columns = -(-n // (math.isqrt(n - 1) + 1))
    near = {1, 2, 3, columns - 1, columns, columns + 1, 2 * columns, n // 3}
    return sorted(lag for lag in near if 0 < 2 * lag < n)


@of_many_orders
def test_each_position_has_each_value_as_often(kind, n, count):
    orders = orders_of(kind, n, count)
    positions = np.arange(n)[None]
    assert min(ps_of_independence(positions, orders)) > P_LIMIT


@of_many_orders
def test_neighbours_are_unrelated(kind, n, count):
    orders, width = orders_of(kind, n, count), bins_of(n)[1]
    steps_place = np.arange(n - 1) * min(n - 1, 64) // (n - 1)
    steps_width = np.bincount(steps_place)
    for lag in lags_of(n):
        others = np.roll(orders, -lag, axis=1)

        # Neighbours differ by anything as often, modulo n.
        steps = steps_place[(others - orders) % n - 1]
        observed = np.bincount(steps.ravel(), minlength=steps_width.size)
        expected = steps.size * steps_width / (n - 1)
        assert stats.chisquare(observed, expected).pvalue > P_LIMIT, lag

        # Each pair of values is as frequent.
        expected = (np.outer(width, width) - np.diag(width)) / (n - 1)
        deviation = (tables_of(orders, others).mean(axis=0) - expected) ** 2 / expected
        chi_square = count * deviation.sum()
        assert stats.chi2.sf(chi_square, (width.size - 1) ** 2) > P_LIMIT, lag

        # Serial correlation.
        products = (centred(orders) * centred(others)).sum(axis=1)
        assert stats.ttest_1samp(products, -n / (n - 1)).pvalue > P_LIMIT, lag


@of_many_orders
def test_runs_of_three_and_four_have_each_order_as_often(kind, n, count):
    orders = orders_of(kind, n, count)
    for length in 3, 4:
        runs = orders[:, : n // length * length].reshape(-1, length)
        ranks = np.argsort(runs, axis=1) @ (length ** np.arange(length))
        observed = np.unique(ranks, return_counts=True)[1]
        assert observed.size == math.factorial(length)
        assert stats.chisquare(observed).pvalue > P_LIMIT


@of_many_orders
def test_fixed_points_are_those_of_random_orders(kind, n, count):
    orders = orders_of(kind, n, count)
    for shift in 0, 1, n // 2:
        fixed = (orders == (np.arange(n) + shift) % n).sum(axis=1)
        whole = int(fixed.sum())
        sides = stats.poisson.cdf(whole, count), stats.poisson.sf(whole - 1, count)
        assert min(sides) > P_LIMIT / 2
        if count >= 100:  # one of them has 0, 1, 2, 3, or more: near Poisson(1)
            observed = np.bincount(np.minimum(fixed, 4), minlength=5)
            expected = np.diff([0, *stats.poisson.cdf(range(4), 1), 1]) * count
            assert stats.chisquare(observed, expected).pvalue > P_LIMIT


@of_many_orders
@pytest.mark.parametrize("other", [{"later": 1}, {"other": 1}], ids=["epoch", "seed"])
def test_orders_of_next_epoch_and_next_seed_are_unrelated(kind, n, count, other):
    one, two = orders_of(kind, n, count), orders_of(kind, n, count, **other)
    assert min(ps_of_independence(one, two)) > P_LIMIT
    products = (centred(one) * centred(two)).sum(axis=1)
    assert stats.ttest_1samp(products, 0).pvalue > P_LIMIT
    same = int((one == two).sum())
    sides = stats.poisson.cdf(same, count), stats.poisson.sf(same - 1, count)
    assert min(sides) > P_LIMIT / 2


@pytest.mark.parametrize("n", [60, 600, 5000])
def test_one_changed_bit_of_the_key_changes_the_whole_order(n):
    keys = [derive_key(5, i) for i in range(64)]
    one = np.stack([Permutation(n, key).block(0, n) for key in keys])
    two = np.stack(
        [Permutation(n, key ^ 1 << i).block(0, n) for i, key in enumerate(keys)]
    )
    assert min(ps_of_independence(one, two)) > P_LIMIT
    assert stats.poisson.sf((one == two).sum() - 1, len(keys)) > P_LIMIT
