"""Differences of two values, and their paths."""

import collections
import enum

import numpy as np
import pytest
import torch

from helios.differences import differences


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Holder:
    def __init__(self, value):
        self.value = value


def cyclic(value):
    tree = [value]
    tree.append({"again": tree})
    return tree


SAME = [
    [1, "a", None, b"x", float("nan"), -0.0],
    {"a": torch.tensor([float("nan"), 1.0]), "b": torch.ones(0, 3)},
    np.array([None, 1], dtype=object),
    Holder({1: (2, 3)}),
    cyclic(3),
    Colour.RED,
    collections.deque([1]),
]


@pytest.mark.parametrize("value", SAME, ids=lambda v: type(v).__name__)
def test_equal_values_have_none(value):
    assert list(differences(value, value, "x")) == []


CASES = {
    "number": (1, 2, [("x", 1, 2)]),
    "type": (1, 1.0, [("x", 1, 1.0)]),
    "sign of zero": ([0.0], [-0.0], [("x[0]", 0.0, -0.0)]),
    "several": ([1, 2, 3], [1, 5, 6], [("x[1]", 2, 5), ("x[2]", 3, 6)]),
    "missing": (
        {"a": 1},
        {"b": 1},
        [("x['a']", 1, "nothing"), ("x['b']", "nothing", 1)],
    ),
    "longer": ([1], [1, 2], [("x[1]", "nothing", 2)]),
    "attribute": (Holder([1]), Holder([2]), [("x.value[0]", 1, 2)]),
    "enum": (Colour.RED, Colour.BLUE, [("x", Colour.RED, Colour.BLUE)]),
    "cycle": (cyclic(1), cyclic(2), [("x[0]", 1, 2)]),
    "dtype": (
        torch.ones(2),
        torch.ones(2).half(),
        [("x", "torch.float32, shape (2,)", "torch.float16, shape (2,)")],
    ),
    # Of an array the first place only.
    "tensor": (
        torch.zeros(2, 3),
        torch.tensor([[0.0, 0, 0], [0, 1, 2]]),
        [("x[1][1]", 0.0, 1.0)],
    ),
    "bits": (torch.tensor([0.0]), torch.tensor([-0.0]), [("x[0]", 0.0, -0.0)]),
    "short floats": (
        torch.ones(2).bfloat16(),
        torch.tensor([1.0, 2.0]).bfloat16(),
        [("x[1]", 1.0, 2.0)],
    ),
    "scalar tensor": (torch.tensor(1), torch.tensor(2), [("x", 1, 2)]),
}


@pytest.mark.parametrize(("first", "second", "expected"), CASES.values(), ids=CASES)
def test_different_values_are_named_by_their_paths(first, second, expected):
    assert repr(list(differences(first, second, "x"))) == repr(expected)


@pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")
def test_half_precision_complex_numbers_are_compared():
    one = torch.tensor([1 + 2j, 3j]).to(torch.complex32)
    other = torch.tensor([1 + 2j, 4j]).to(torch.complex32)
    assert list(differences(one, one.clone(), "x")) == []
    assert list(differences(one, other, "x")) == [("x[1]", 3j, 4j)]
