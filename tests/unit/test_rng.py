"""Keys, and the state of the global generators."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from helios.errors import ResumeError
from helios.rng import (
    capture_rng,
    derive_key,
    get_default_numpy_rng,
    get_default_seed,
    isolated_rng,
    restore_rng,
    seed_globals,
    seed_rngs,
    uniforms,
)


def draws():
    """An odd number of normal numbers of each generator, so that pairs are split."""
    return (
        [*(random.gauss(0, 1) for _ in range(3)), random.random()],
        [*np.random.standard_normal(3).tolist(), np.random.random()],
        [*torch.randn(3).tolist(), torch.rand(()).item(), int(torch.randint(99, ()))],
    )


def test_key_of_known_integers_never_changes():
    assert derive_key() == 0
    assert derive_key(0) == 0x910A2DEC89025CC1
    assert derive_key(1729, 3) == 0x5E87943CCAA88032


def test_keys_tell_sign_size_and_number_of_parts_apart():
    parts = [
        (),
        (0,),
        (0, 0),
        (-1,),
        (1,),
        (2**64,),
        (2**64 - 1,),
        (-(2**64),),
        (2**64, 0),
    ]
    parts += [(2**128,), (-(2**128),), (1, 0), (0, 1), (2**200 + 1,), (2**200,)]
    keys = [derive_key(*p) for p in parts]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**64 for key in keys)


def test_one_changed_bit_changes_half_of_the_key():
    flips = np.zeros(64)
    for i in range(2000):
        changed = derive_key(7, i) ^ derive_key(7, i ^ (1 << (i % 40)))
        flips += [(changed >> bit) & 1 for bit in range(64)]
    assert np.all(np.abs(flips / 2000 - 0.5) < 5 * 0.5 / 2000**0.5)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers()), st.lists(st.integers()))
def test_different_parts_have_different_keys(one, other):
    assert (derive_key(*one) == derive_key(*other)) == (one == other)


def test_known_uniform_numbers_never_change():
    # The first of splitmix64 with seed 1234567, in the authors' test vector.
    words = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    found = uniforms(1234567, np.arange(3))
    assert found.tolist() == [(word >> 11) * 2.0**-53 for word in words]
    last = uniforms(2**64 - 1, np.array([2**62])).item()
    assert last == 0.26512196784043407


def test_uniform_numbers_can_be_entered_anywhere_and_leave_positions_alone():
    positions = np.arange(1000)
    whole = uniforms(5, positions)
    assert positions.tolist() == list(range(1000))
    assert whole.dtype == np.float64
    chosen = np.array([[999, 0], [17, 17]])
    assert np.array_equal(uniforms(5, chosen), whole[chosen])


@pytest.mark.parametrize("start", [0, 2**40, 2**62])
def test_uniform_numbers_are_uniform_and_independent(start):
    numbers = np.stack(
        [uniforms(derive_key(9, i), start + np.arange(20_000)) for i in range(20)]
    )
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-4
    low_bits = (numbers * 2**53).astype(np.int64) % 256
    assert stats.chisquare(np.bincount(low_bits.ravel())).pvalue > 1e-4
    # Neighbours, and the same positions of two keys.
    for one, other in (numbers[:, :-1], numbers[:, 1:]), (numbers[:-1], numbers[1:]):
        cells = (one * 16).astype(int) * 16 + (other * 16).astype(int)
        assert stats.chisquare(np.bincount(cells.ravel())).pvalue > 1e-4


def test_default_generator_is_seeded_with_the_default_seed():
    expected = np.random.default_rng(get_default_seed()).random(3)
    assert np.array_equal(get_default_numpy_rng().random(3), expected)


@pytest.mark.parametrize("seed", [0, 7, 2**40, -3])
def test_seed_rngs_repeats_all_draws(seed):
    seed_rngs(seed)
    first = draws()
    draws()
    seed_rngs(seed)
    assert draws() == first


def test_seed_globals_forgets_split_pairs():
    seed_globals(2**64 - 1)
    first = draws()
    seed_globals(2**64 - 1)
    assert draws() == first
    seed_globals(5)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_restore_continues_where_capture_was():
    draws()
    tree = capture_rng()
    expected = draws(), draws()
    restore_rng(tree, torch.device("cpu"))
    assert (draws(), draws()) == expected


def test_captured_tree_holds_plain_values():
    def check(value):
        if isinstance(value, dict | tuple):
            for part in value.values() if isinstance(value, dict) else value:
                check(part)
        else:
            assert isinstance(
                value, str | int | float | None | np.ndarray | torch.Tensor
            )

    check(capture_rng())


def test_numpy_bit_generator_of_another_kind_is_restored():
    original = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(3))
        tree = capture_rng()
        expected = np.random.random(5).tolist()
        restore_rng(tree)
        assert np.random.random(5).tolist() == expected
        np.random.set_bit_generator(np.random.MT19937(3))
        with pytest.raises(ValueError, match="MT19937"):
            restore_rng(tree)
    finally:
        np.random.set_bit_generator(original)


@pytest.mark.parametrize("part", ["python", "numpy", "torch"])
def test_restore_refuses_a_tree_without_a_part_and_changes_nothing(part):
    tree = capture_rng()
    draws()
    now = capture_rng()
    expected = draws()
    restore_rng(now)
    del tree[part]
    with pytest.raises(ResumeError, match=part):
        restore_rng(tree)
    assert draws() == expected


def test_restore_refuses_the_state_of_another_type_of_device():
    tree = capture_rng()
    with pytest.raises(ResumeError, match="cuda"):
        restore_rng(tree, torch.device("cuda", 0))
    with pytest.raises(ResumeError, match="cuda"):
        restore_rng({**tree, "cuda": tree["torch"]})


@pytest.mark.gpu
def test_device_generator_is_restored():
    device = torch.device("cuda", 0)
    tree = capture_rng(device)
    expected = torch.randn(5, device=device).tolist()
    restore_rng(tree, device)
    assert torch.randn(5, device=device).tolist() == expected


@pytest.mark.parametrize("before", range(4))
@pytest.mark.parametrize("inside", range(4))
def test_isolation_leaks_no_draw_in_or_out(before, inside):
    def run(isolated):
        seed_rngs(11)
        outside = [np.random.standard_normal() for _ in range(before)]
        outside += [random.gauss(0, 1) for _ in range(before)]
        within = None
        if isolated:
            with isolated_rng(3):
                within = [np.random.standard_normal() for _ in range(inside)]
                within += [random.gauss(0, 1) for _ in range(inside)]
                within += [torch.randn(()).item() for _ in range(inside)]
        return within, [outside, draws(), draws()]

    expected = run(False)[1]
    assert run(True)[1] == expected
    within = run(True)[0]
    np.random.standard_normal(), random.gauss(0, 1), torch.randn(())
    assert run(True)[0] == within


def test_isolations_nest():
    seed_rngs(5)
    with isolated_rng(1):
        expected = draws()
    outer = draws()
    seed_rngs(5)
    with isolated_rng(1):
        np.random.standard_normal()
        with isolated_rng(2), isolated_rng(1):
            assert draws() == expected
        np.random.standard_normal()
    assert draws() == outer
    with isolated_rng(1):
        with isolated_rng(2):
            draws()
        assert draws() == expected


def test_isolation_ends_with_an_exception():
    seed_rngs(5)
    expected = draws()
    seed_rngs(5)
    with pytest.raises(StopIteration), isolated_rng():
        raise StopIteration(draws())
    assert draws() == expected
