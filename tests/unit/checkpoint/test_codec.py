import collections
import contextlib
import datetime
import enum
import json
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helios.checkpoint import Encoder, decode, register_type
from helios.checkpoint.tensorfile import CODES
from helios.errors import CheckpointCorruptError, UnstorableError

FEW = settings(
    derandomize=True,
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TORCH_DTYPES = [*CODES, torch.complex128]
NUMPY_DTYPES = ["?", "i1", "<u2", ">i4", "<i8", "<f2", ">f4", "<f8", "<c8", ">c16"]


class Color(enum.Enum):
    RED = "red"


@dataclass
class Box:
    value: Any


class Pair(NamedTuple):
    left: int
    right: int


register_type(Color, "Color", lambda color: color.value, Color)
register_type(Box, "Box", vars, lambda tree: Box(**tree))


def through_json(tree: Any) -> Any:
    encoder = Encoder()
    plain = encoder.encode(tree, file="f")
    return decode(json.loads(json.dumps(plain, allow_nan=False)), encoder.files)


def assert_same(a: Any, b: Any) -> None:
    """Equal in types and in bits, orders included."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        bits = [bytes(t.contiguous().reshape(-1).view(torch.uint8)) for t in (a, b)]
        assert bits[0] == bits[1]
    elif isinstance(a, np.ndarray | np.generic):
        assert (a.dtype.str, a.shape, a.tobytes()) == (
            *(b.dtype.str, b.shape, b.tobytes()),
        )
    elif isinstance(a, float):
        assert struct.pack("d", a) == struct.pack("d", b)
    elif isinstance(a, complex):
        assert struct.pack("dd", a.real, a.imag) == struct.pack("dd", b.real, b.imag)
    elif isinstance(a, dict):
        assert_same(list(a.items()), list(b.items()))
    elif isinstance(a, set | frozenset):
        assert_same(sorted(a, key=repr), sorted(b, key=repr))
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, Box):
        assert_same(a.value, b.value)
    else:
        assert a == b
        assert isinstance(a, int) or repr(a) == repr(b)  # repr of huge ints raises


@st.composite
def tensors(draw: Any) -> torch.Tensor:
    dtype = draw(st.sampled_from(TORCH_DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = int(np.prod(shape, dtype=int)) * dtype.itemsize
    data = draw(st.binary(min_size=count, max_size=count))
    if dtype is torch.bool:
        data = bytes(byte & 1 for byte in data)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


@st.composite
def arrays(draw: Any) -> Any:
    dtype = np.dtype(draw(st.sampled_from(NUMPY_DTYPES)))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = int(np.prod(shape, dtype=int)) * dtype.itemsize
    data = draw(st.binary(min_size=count, max_size=count))
    array = np.frombuffer(data, dtype).reshape(shape)
    return array.flat[0] if array.size and draw(st.booleans()) else array


texts = st.text(st.characters(exclude_categories=()), max_size=5)
bit_floats = st.binary(min_size=8, max_size=8).map(lambda b: struct.unpack("d", b)[0])
zones = st.timedeltas(datetime.timedelta(hours=-23), datetime.timedelta(hours=23)).map(
    datetime.timezone
)
keys = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers() | st.integers(-(10**40), 10**40),
        st.floats() | bit_floats,
        texts,
        st.binary(max_size=9),
        st.sampled_from([Color.RED, "$", "v", torch.bfloat16, PurePosixPath("a/b")]),
    ),
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3)
    ),
    max_leaves=4,
)
leaves = st.one_of(
    keys,
    tensors(),
    arrays(),
    st.complex_numbers(),
    st.timedeltas(),
    st.datetimes(timezones=st.none() | zones),
    st.sampled_from([Path("x/y"), torch.device("cuda:3"), torch.Size([2, 0])]),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(texts, inner, max_size=3),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(keys, inner, max_size=3).map(collections.OrderedDict),
        st.sets(keys, max_size=3),
        inner.map(Box),
    ),
    max_leaves=12,
)


@FEW
@given(trees)
def test_any_tree_comes_back_with_its_types_and_bits(tree: Any) -> None:
    assert_same(tree, through_json(tree))


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_every_dtype_comes_back_from_a_view_with_gaps(dtype: torch.dtype) -> None:
    data = torch.arange(4 * 6 * dtype.itemsize, dtype=torch.uint8) % 2
    view = data.view(dtype).reshape(4, 6)[::2].t()
    assert_same(view, through_json({"v": view})["v"])


def test_conjugated_and_negated_views_are_stored_as_what_they_show() -> None:
    for dtype in (torch.complex64, torch.complex128):
        value = torch.tensor([1 + 2j, 3 - 4j], dtype=dtype)
        got = through_json([value.conj(), value.conj().imag, value])
        assert got[0].tolist() == [1 - 2j, 3 + 4j]
        assert got[1].tolist() == [-2.0, 4.0]
        assert got[2].tolist() == [1 + 2j, 3 - 4j]


def test_half_complex_and_packed_floats_come_back() -> None:
    for name in ("float16", "uint8"):
        data = torch.tensor([[1, 2], [3, 4]], dtype=getattr(torch, name))
        other = "complex32" if name == "float16" else "float4_e2m1fn_x2"
        if hasattr(torch, other):
            assert_same(
                data.view(getattr(torch, other)),
                through_json(data.view(getattr(torch, other))),
            )


def test_what_json_would_misread_comes_back() -> None:
    pair = "\ud83d" + "\ude00"  # two characters, which JSON takes for one
    for tree in (pair, {pair: 1}, {"$": 1}, {"$": "int", "v": "0x1"}, {"v": "$"}):
        assert_same(tree, through_json(tree))


def test_huge_integers_keep_their_value() -> None:
    tree = {"n": -(7**9000), 10**5000: torch.zeros(1)}
    assert_same(tree, through_json(tree))


def test_defaultdict_without_factory_keeps_its_type() -> None:
    got = through_json(collections.defaultdict(None, {1: 2}))
    assert type(got) is collections.defaultdict
    assert got == {1: 2}


def test_parameter_comes_back_as_a_detached_tensor() -> None:
    got = through_json(torch.nn.Parameter(torch.ones(2)))
    assert type(got) is torch.Tensor
    assert not got.requires_grad


def test_names_in_the_file_are_those_of_the_state_dict() -> None:
    encoder = Encoder()
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    encoder.encode(net.state_dict(), file="model")
    assert list(encoder.files["model"]) == list(net.state_dict())
    encoder.encode({"gen": {"w": torch.ones(1)}, 3: [torch.ones(2)]}, file="two")
    assert list(encoder.files["two"]) == ["gen.w", "3.0"]


def test_names_that_collide_or_are_unsafe_are_made_unique_and_safe() -> None:
    tree = {"a": {"b": torch.zeros(1)}, "a.b": torch.ones(1), "\n": torch.ones(2)}
    tree |= {"__metadata__": torch.ones(3), "\ud800": torch.ones(4), "": torch.ones(5)}
    encoder = Encoder()
    plain = encoder.encode(tree, file="f")
    assert_same(tree, decode(plain, encoder.files))
    names = ["a.b", "a.b~1", "_", "__metadata__~1", "_~1", "value"]
    assert list(encoder.files["f"]) == names


def test_tied_tensors_are_stored_once_and_come_back_as_one_object() -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    half = torch.ones(2, dtype=torch.complex128)
    encoder = Encoder()
    model = encoder.encode({"a": shared, "b": shared[:], "h": half}, file="model")
    rest = encoder.encode([shared.detach(), shared.t(), half, [half]], file="training")
    assert list(encoder.files["model"]) == ["a", "h"]
    assert list(encoder.files["training"]) == ["1"]
    assert encoder.aliases == {"model": {"b": "a"}, "training": {}}
    got, others = decode([model, rest], encoder.files)
    assert got["a"] is got["b"]
    assert got["a"] is others[0]
    assert others[1].tolist() == shared.t().tolist()
    assert others[2] is others[3][0]


def test_zero_sized_tensors_are_tied_by_identity_only() -> None:
    one, two = torch.empty(0, 3), torch.empty(0, 3)
    got = through_json([one, two, one])
    assert got[0] is got[2]
    assert got[0] is not got[1]


def test_tensors_freed_between_calls_are_not_taken_for_one_another() -> None:
    encoder = Encoder()
    full = [
        encoder.encode(torch.full((3000,), n, dtype=dtype).conj(), file="f")
        for dtype in (torch.float64, torch.complex128)
        for n in range(20)
    ]
    empty = [encoder.encode(torch.empty(0), file="f") for _ in range(20)]
    got = decode(full, encoder.files)
    assert [tensor[0].real.item() for tensor in got] == [*range(20), *range(20)]
    assert len({id(tensor) for tensor in decode(empty, encoder.files)}) == 20


def cyclic() -> Any:
    tree: list[Any] = [1]
    tree.append({"again": tree})
    return tree


def deep() -> Any:
    tree: Any = 0
    for _ in range(5000):
        tree = [tree]
    return tree


class Level(enum.IntEnum):
    LOW = 1


class Sub(torch.Tensor):
    pass


REFUSED = {
    "function": (lambda: {"optimizer": {"state": {3: {"hook": print}}}},
                 "optimizer.state[3].hook"),
    "object": (lambda: [0, object()], "[1]"),
    "root": (lambda: object(), "the tree"),
    "key": (lambda: {"a": {print: 1}}, "a[<built-in function print>]"),
    "meta": (lambda: {"w": torch.ones(2, device="meta")}, "w"),
    "empty meta": (lambda: {"w": torch.ones(0, device="meta")}, "w"),
    "sparse": (lambda: {"w": [torch.ones(2, 2).to_sparse()]}, "w[0]"),
    "subclass": (lambda: {"w": Box(Sub())}, "w.value"),
    "bits": (lambda: {"w": torch.ones(1).to(torch.uint8).view(torch.bits8)}, "w"),
    "dict subclass": (lambda: {"c": collections.Counter("ab")}, "c"),
    "factory": (lambda: {"c": collections.defaultdict(list)}, "c"),
    "list subclass": (lambda: {"c": type("L", (list,), {})()}, "c"),
    "str subclass": (lambda: {"c": type("S", (str,), {})("x")}, "c"),
    "int subclass": (lambda: {"c": Level.LOW}, "c"),
    "named tuple": (lambda: {"c": (1, Pair(1, 2))}, "c[1]"),
    "object array": (lambda: {"c": np.array([None])}, "c"),
    "text array": (lambda: {"c": np.array(["a"])}, "c"),
    "text scalar": (lambda: {"c": np.str_("a")}, "c"),
    "matrix": (lambda: {"c": np.ma.array([1])}, "c"),
    "module": (lambda: {"net": torch.nn.Linear(1, 1)}, "net"),
    "cycle": (cyclic, "[1].again"),
    "depth": (deep, "[0]" * 100),
    "odd name": (lambda: {"a.b": {"x y": print}}, "['a.b']['x y']"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_stored_is_refused_with_its_path(case: str) -> None:
    make, path = REFUSED[case]
    with pytest.raises(UnstorableError) as caught:
        Encoder().encode(make(), file="f")  # type: ignore[no-untyped-call]  # lambdas
    assert str(caught.value).startswith(f"`{path}` ")
    assert "user_state_dict" in str(caught.value)


def test_freed_storage_and_quantised_tensors_are_refused() -> None:
    freed = torch.ones(4)
    freed.untyped_storage().resize_(0)
    with pytest.raises(UnstorableError, match=r"^`w` is a tensor without data"):
        Encoder().encode({"w": freed}, file="f")
    with warnings.catch_warnings(action="ignore"):  # torch is giving them up
        quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    with pytest.raises(UnstorableError, match=r"^`w` is a tensor of torch.qint8"):
        Encoder().encode({"w": quantised}, file="f")


def test_registering_replaces_its_own_class_and_refuses_another_of_that_name() -> None:
    register_type(Box, "Box", vars, lambda tree: Box(**tree))
    with pytest.raises(ValueError, match="Box"):
        register_type(Pair, "Box", list, lambda tree: Pair(*tree))
    register_type(Pair, "Pair", list, lambda tree: Pair(*tree))
    try:
        assert through_json(Pair(1, 2)) == Pair(1, 2)
    finally:
        from helios.checkpoint.types import FROM_TREE, TO_TREE

        del TO_TREE[Pair], FROM_TREE["@Pair"]


def test_a_converter_that_raises_is_reported_with_the_path() -> None:
    register_type(Oops, "Oops", lambda oops: 1 / 0, lambda tree: Oops())
    with pytest.raises(UnstorableError, match=r"^`a\[0\]` .*division by zero"):
        Encoder().encode({"a": [Oops()]}, file="f")
    with pytest.raises(CheckpointCorruptError):
        decode({"$": "@Color", "v": "no such color"}, {})


class Oops:
    pass


def test_an_unknown_type_says_to_register_it() -> None:
    with pytest.raises(CheckpointCorruptError, match="register_type"):
        decode({"$": "@Gone", "v": 1}, {})


def is_key(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


TAGS = [
    *("tensor", "dict", "OrderedDict", "defaultdict", "int", "float", "str", "bytes"),
    *("complex", "tuple", "set", "frozenset", "path", "pure_path", "timezone"),
    *("datetime", "timedelta", "dtype", "device", "size", "array", "number", "@Box"),
    *("@Color", "unheard of"),
]
FILES = {"f": {"t": torch.arange(4.0), "u": torch.arange(8, dtype=torch.uint8)}}
junk_leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(
        ["f", "t", "u", "torch.complex128", "<f4", "O", "V8", "0x1", "cpu"]
    ),
    st.sampled_from([(), b"x", object(), torch.ones(1)]),
    st.just({"$": "tensor", "v": ["f", "u"]}),
)
junk = st.recursive(
    junk_leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.fixed_dictionaries({"$": st.sampled_from(TAGS) | inner, "v": inner}),
        st.fixed_dictionaries({"dtype": inner, "shape": inner, "data": inner}),
        st.fixed_dictionaries({"time": inner, "fold": inner, "tzinfo": inner}),
        st.dictionaries(st.sampled_from(["$", "v", "x"]) | inner.filter(is_key), inner),
    ),
    max_leaves=8,
)


@settings(FEW, max_examples=1500)
@given(junk)
def test_malformed_plain_data_are_corrupt_and_nothing_else(plain: Any) -> None:
    with contextlib.suppress(CheckpointCorruptError):
        decode(plain, FILES)


def nodes(plain: Any, path: tuple[Any, ...] = ()) -> Any:
    yield path
    if isinstance(plain, list | dict):
        items = enumerate(plain) if isinstance(plain, list) else plain.items()
        for key, value in items:
            yield from nodes(value, (*path, key))


@settings(FEW, max_examples=300)
@given(trees, junk, st.data())
def test_a_tree_with_one_node_replaced_is_decoded_or_corrupt(
    tree: Any, other: Any, data: Any
) -> None:
    encoder = Encoder()
    plain = [json.loads(json.dumps(encoder.encode(tree, file="f")))]
    *above, last = data.draw(st.sampled_from([p for p in nodes(plain) if p]))
    node = plain
    for step in above:
        node = node[step]
    node[last] = other
    with contextlib.suppress(CheckpointCorruptError):
        decode(plain, encoder.files)


def test_plain_data_nested_too_deep_are_corrupt() -> None:
    with pytest.raises(CheckpointCorruptError):
        decode(_deep_plain(), {})


def _deep_plain() -> Any:
    plain: Any = 1
    for _ in range(20_000):
        plain = {"$": "tuple", "v": [plain]}
    return plain
