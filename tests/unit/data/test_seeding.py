"""Keys of samples, and the generators that they seed."""

import random
import threading

import numpy as np
import pytest
import torch

from helios.data.seeding import forget_key, number_of, sample_rng, seed_for


@pytest.fixture(autouse=True)
def no_key():
    yield
    forget_key()


def draws():
    """Draws of the global generators, and of those of the sample."""
    numpy, generator = sample_rng()
    return [
        torch.rand(()).item(),
        random.random(),
        np.random.random(),
        numpy.random(),
        torch.rand((), generator=generator).item(),
    ]


def test_same_numbers_give_the_same_draws_of_all_five_generators():
    seed_for(5, 7)
    once = draws()
    torch.rand(3), random.gauss(0, 1), np.random.standard_normal()
    seed_for(5, 7)
    assert draws() == once


@pytest.mark.parametrize("parts", [(5, 8), (6, 7), (7, 5), (5, 7, 0), (5,), (5, -7)])
def test_other_numbers_give_other_draws_of_all_five_generators(parts):
    seed_for(5, 7)
    once = draws()
    seed_for(*parts)
    assert not set(draws()) & set(once)


def test_own_generators_do_not_repeat_the_global_ones():
    seed_for(5, 7)
    found = sample_rng()
    assert torch.rand(()).item() != torch.rand((), generator=found.torch).item()
    seed_for(5, 7)
    assert np.random.random() != sample_rng().numpy.random()


def test_own_generators_go_on_within_a_sample():
    seed_for(5, 7)
    assert sample_rng() is sample_rng()
    first = sample_rng().numpy.random()
    assert sample_rng().numpy.random() != first


def test_own_generators_are_those_of_the_thread():
    seed_for(5, 7)
    expected = sample_rng().numpy.random()
    seed_for(5, 7)
    found = []

    def other():
        seed_for(1, 2)
        found.append(sample_rng().numpy.random())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert sample_rng().numpy.random() == expected
    assert found != [expected]


@pytest.mark.parametrize("index", [7, np.int64(7), torch.tensor(7)])
def test_number_of_an_index_is_its_value(index):
    assert number_of(index) == 7


def test_number_of_another_index_tells_it_from_others_in_every_process():
    assert number_of("a") == 464479994  # the CRC of its repr, and no salted hash
    assert len({number_of(index) for index in ("a", "b", ("a", 1), 1.5)}) == 4
