import collections
import contextlib
import dataclasses
import enum
import json
import struct
import sys
import warnings
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helios.checkpoint import Encoder, decode, register_type
from helios.checkpoint.tensors import write_tensors
from helios.errors import CheckpointCorruptError, CheckpointError, UnstorableError

FEW = settings(
    derandomize=True,
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TORCH_DTYPES = [
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz),
    *(torch.float8_e5m2, torch.float8_e5m2fnuz),
    # Those that safetensors doesn't know go as bytes.
    *(torch.complex128, torch.bits8),
]
NEWER = ("float8_e8m0fnu", "float4_e2m1fn_x2")
TORCH_DTYPES += [getattr(torch, name) for name in NEWER if hasattr(torch, name)]
NUMPY_DTYPES = ["?", "i1", "<u2", ">i4", "<i8", "<f2", ">f4", "<f8", "<c8", ">c16"]
NUMPY_DTYPES += ["<M8[ns]", "<m8[s]", "|S3"]


class Pair(NamedTuple):
    left: int
    right: int


class Level(enum.IntEnum):
    LOW = 1


class Colour(enum.Enum):
    RED = "red"
    CRIMSON = "red"
    ODD = (1, 2.0)


class Access(enum.Flag):
    READ = 1
    WRITE = 2


@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    weights: Any
    made: int = dataclasses.field(init=False, default=3)


class Celsius:
    def __init__(self, degrees: float) -> None:
        self.degrees = degrees

    def __eq__(self, other: object) -> bool:
        return type(other) is Celsius and other.degrees == self.degrees

    def __repr__(self) -> str:
        return f"Celsius({self.degrees})"


register_type(Point)
register_type(Celsius, lambda c: [c.degrees], lambda t: Celsius(*t), name="celsius")


def decoded(plain: Any, files: Mapping[str, Mapping[str, torch.Tensor]]) -> Any:
    return decode(plain, lambda path, file, name, *where: files[file][name])


def through_json(tree: Any) -> Any:
    encoder = Encoder()
    # As the store does it.
    text = json.dumps(encoder.encode(tree, file="f"), ensure_ascii=False)
    plain = json.loads(text.encode(errors="surrogatepass"))
    return decoded(plain, encoder.files)


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
    elif isinstance(a, Point):
        assert_same([a.x, a.weights, a.made], [b.x, b.weights, b.made])
    elif isinstance(a, list | tuple | collections.deque):
        assert getattr(a, "maxlen", None) == getattr(b, "maxlen", None)
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
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
keys = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers() | st.integers(-(10**40), 10**40),
        st.floats() | bit_floats,
        texts,
        st.binary(max_size=9),
        st.sampled_from(["$", "v", torch.bfloat16, 2**63, -(2**64)]),
    ),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=4,
)
leaves = st.one_of(
    keys,
    tensors(),
    arrays(),
    st.complex_numbers(),
    st.datetimes(timezones=st.none() | st.just(UTC)) | st.dates() | st.timedeltas(),
    st.times() | st.sampled_from([Path("/a/b"), PureWindowsPath("c:\\x")]),
    st.sampled_from([torch.device("cuda:3"), torch.Size([2, 0])]),
    st.sampled_from([Level.LOW, *Colour, *Access, Access.READ | Access.WRITE]),
    st.sampled_from(
        [range(3, 9, 2), np.str_("ä"), np.array(["a", "bc"]), Celsius(1.5)]
    ),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(texts, inner, max_size=3),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(keys, inner, max_size=3).map(collections.OrderedDict),
        st.sets(keys, max_size=3) | st.frozensets(keys, max_size=3),
        st.dictionaries(keys, st.integers(), max_size=3).map(collections.Counter),
        st.dictionaries(keys, inner, max_size=3).map(
            lambda d: collections.defaultdict(list, d)
        ),
        st.lists(inner, max_size=3).map(lambda v: collections.deque(v, 5)),
        st.tuples(inner, inner).map(lambda pair: Pair(*pair)),
        st.tuples(st.integers(), inner).map(lambda pair: Point(*pair)),
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
    value = torch.tensor([1 + 2j, 3 - 4j])
    encoder = Encoder()
    tree = [value.conj(), value.conj().imag, value.imag, value]
    got = decoded(encoder.encode(tree, file="f"), encoder.files)
    assert got[0].tolist() == [1 - 2j, 3 + 4j]
    assert got[1].tolist() == [-2.0, 4.0]
    assert got[2].tolist() == [2.0, -4.0]
    assert got[3].tolist() == [1 + 2j, 3 - 4j]
    assert not any(t.is_conj() or t.is_neg() for t in encoder.files["f"].values())


def test_what_json_would_misread_comes_back() -> None:
    pair = "\ud83d" + "\ude00"  # two characters, which JSON takes for one
    for tree in (pair, {pair: 1}, {"$": 1}, {"$": "int", "v": "0x1"}, {"v": "$"}):
        assert_same(tree, through_json(tree))


def test_huge_integers_keep_their_value() -> None:
    tree = {"n": -(7**9000), 10**5000: torch.zeros(1), (10**5000,): 2**63}
    assert_same(tree, through_json(tree))


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
    assert_same(tree, decoded(plain, encoder.files))
    names = ["a.b", "a.b~1", "_", "__metadata__~3", "_~4", "value"]
    assert list(encoder.files["f"]) == names


def test_a_name_that_looks_like_one_made_unique_is_no_trap() -> None:
    ones = [torch.full((1,), n) for n in range(4)]
    tree = {"a.b~2": ones[0], "a": {"b": ones[1]}, "a.b": ones[2], "a.b~2~2": ones[3]}
    encoder = Encoder()
    assert_same(tree, decoded(encoder.encode(tree, file="f"), encoder.files))


def test_tied_tensors_are_stored_once_and_come_back_as_one_object() -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    half = torch.ones(2, dtype=torch.float16)
    encoder = Encoder()
    model = encoder.encode({"a": shared, "b": shared[:], "h": half}, file="model")
    rest = encoder.encode([shared.detach(), shared.t(), half, [half]], file="training")
    assert list(encoder.files["model"]) == ["a", "h"]
    assert list(encoder.files["training"]) == ["1"]
    assert encoder.aliases == {"model": {"b": "a"}, "training": {}}
    got, others = decoded([model, rest], encoder.files)
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
        for dtype in (torch.float64, torch.complex64)
        for n in range(20)
    ]
    empty = [encoder.encode(torch.empty(0), file="f") for _ in range(20)]
    got = decoded(full, encoder.files)
    assert [tensor[0].real.item() for tensor in got] == [*range(20), *range(20)]
    assert len({id(tensor) for tensor in decoded(empty, encoder.files)}) == 20


def cyclic() -> Any:
    tree: list[Any] = [1]
    tree.append({"again": tree})
    return tree


def deep() -> Any:
    tree: Any = 0
    for _ in range(5000):
        tree = [tree]
    return tree


class Sub(torch.Tensor):
    pass


def hidden() -> Any:
    class Hidden(enum.Enum):
        ONE = 1

    return Hidden.ONE


REFUSED = {
    "function": (lambda: {"optimizer": {"state": {3: {"hook": print}}}},
                 "optimizer.state[3].hook"),
    "object": (lambda: [0, object()], "[1]"),
    "root": (lambda: object(), "the tree"),
    "key": (lambda: {"a": {1: 2, print: 1}}, "a['key 1']"),
    "below a key": (lambda: {"a": {(1, 2): {"b": print}}}, "a['key 0'].b"),
    "huge number": (lambda: {10**5000: print}, "['key 0']"),
    "meta": (lambda: {"w": torch.ones(2, device="meta")}, "w"),
    "empty meta": (lambda: {"w": torch.ones(0, device="meta")}, "w"),
    "sparse": (lambda: {"w": [torch.ones(2, 2).to_sparse()]}, "w[0]"),
    "subclass": (lambda: {"w": (Sub(),)}, "w[0]"),
    "local enum": (lambda: {"c": hidden(), "d": 1}, "c"),
    "local named tuple": (
        lambda: {"c": (1, collections.namedtuple("P", "x")(1))}, "c[1]"
    ),
    "dict subclass": (lambda: {"c": type("D", (dict,), {})()}, "c"),
    "below a named tuple": (lambda: {"c": Pair(1, print)}, "c[1].right"),
    "below a dataclass": (lambda: {"c": Point(1, [print])}, "c.weights[0]"),
    "time zone": (lambda: {"c": datetime.now(ZoneInfo("UTC"))}, "c"),
    "empty text": (lambda: {"c": np.str_("")}, "c"),
    "default": (lambda: {"c": collections.defaultdict(lambda: 1)}, "c"),
    "list subclass": (lambda: {"c": type("L", (list,), {})()}, "c"),
    "str subclass": (lambda: {"c": type("S", (str,), {})("x")}, "c"),
    "object array": (lambda: {"c": np.array([None])}, "c"),
    "record scalar": (lambda: {"c": np.zeros(1, "i4,f4")[0]}, "c"),
    "matrix": (lambda: {"c": np.ma.array([1])}, "c"),
    "module": (lambda: {"net": torch.nn.Linear(1, 1)}, "net"),
    "cycle": (cyclic, "[1].again" * 50 + "[1]"),
    "depth": (deep, "[0]" * 101),
    "odd name": (lambda: {"a.b": {"x y": print}}, "['a.b']['x y']"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_stored_is_refused_with_its_path(case: str) -> None:
    make, path = REFUSED[case]
    with pytest.raises(UnstorableError) as caught:
        Encoder().encode(make(), file="f")  # type: ignore[no-untyped-call]  # lambdas
    assert str(caught.value).startswith(f"`{path}` ")
    assert "user_state_dict" in str(caught.value)


def test_tensors_that_safetensors_cannot_write_or_read_are_refused() -> None:
    freed = torch.ones(4)
    freed.untyped_storage().resize_(0)
    with pytest.raises(UnstorableError, match=r"^`w` is .* without data"):
        Encoder().encode({"w": freed}, file="f")
    with warnings.catch_warnings(action="ignore"):  # torch is giving them up
        quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with pytest.raises(UnstorableError, match=r"^`w` is a nested tensor"):
        Encoder().encode({"w": nested}, file="f")
    with pytest.raises(UnstorableError, match=r"^`w` is quantised; keep `dequantize"):
        Encoder().encode({"w": quantised}, file="f")


def test_tied_tensors_of_a_dtype_that_goes_as_bytes_are_stored_once() -> None:
    value = torch.tensor([[1 + 2j, 3j]], dtype=torch.complex128)
    encoder = Encoder()
    plain = encoder.encode({"a": value, "b": value[:], "t": value.T}, file="f")
    assert list(encoder.files["f"]) == ["a", "t"]
    got = decoded(plain, encoder.files)
    assert_same(got, {"a": value, "b": value, "t": value.T})


def test_state_of_every_scheduler_of_torch_can_be_stored() -> None:
    schedulers = torch.optim.lr_scheduler
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    for scheduler in (
        schedulers.MultiStepLR(optimizer, [3, 5, 5]),
        schedulers.OneCycleLR(optimizer, 1.0, 10, cycle_momentum=False),
        schedulers.ReduceLROnPlateau(optimizer),
        schedulers.CosineAnnealingWarmRestarts(optimizer, 3),
        schedulers.CyclicLR(optimizer, 0.1, 1.0, cycle_momentum=False),
    ):
        state = scheduler.state_dict()
        assert through_json(state) == state


def test_class_that_is_not_imported_is_named_and_not_imported() -> None:
    plain = {"$": "enum", "v": ["this_module:Nothing", "ONE"]}
    with pytest.raises(CheckpointError, match="'this_module:Nothing', which is not th"):
        decoded(plain, {})
    for name in ("os:system", "builtins:eval", "subprocess:Popen", f"{__name__}:Point"):
        for tag in ("enum", "namedtuple"):
            node = {"$": tag, "v": [name, ["x"]]}
            with pytest.raises(CheckpointError, match="which is not there"):
                decoded(node, {})
    assert "this_module" not in sys.modules


def test_module_that_a_name_would_have_imported_is_not_imported() -> None:
    # Some modules import others when they are asked for an attribute.
    before = {*sys.modules}
    for name in ("torch:_inductor.Config", "torch:onnx.Nothing", "numpy:f2py.Nothing"):
        with pytest.raises(CheckpointError, match="which is not there"):
            decoded({"$": "enum", "v": [name, "ONE"]}, {})
    assert {*sys.modules} == before


@pytest.mark.parametrize("tag", ["tuple", "set", "frozenset", "size", "deque"])
def test_range_does_not_become_all_its_numbers(tag: str) -> None:
    bomb = {"$": "range", "v": [0, 10**12, 1]}
    payload = [None, bomb] if tag == "deque" else bomb
    with pytest.raises(CheckpointCorruptError, match="a range, not a list"):
        decoded({"$": tag, "v": payload}, {})


def test_fields_that_have_changed_are_an_error_and_not_mistaken() -> None:
    pair, point = f"{__name__}:Pair", f"{__name__}:Point"
    for fields in ({"right": 2, "left": 1}, [1, 2]):  # the latter as in older files
        node = {"$": "namedtuple", "v": [pair, fields]}
        assert decoded(node, {}) == Pair(1, 2)
    for node in (
        {"$": "namedtuple", "v": [pair, [1, 2, 3]]},
        {"$": "namedtuple", "v": [pair, {"left": 1, "z": 2}]},
        {"$": "type", "v": [point, {"x": 1, "weights": 2}]},
    ):
        with pytest.raises(CheckpointError, match=r"P(air|oint)' had .* fields") as got:
            decoded(node, {})
        assert got.type is CheckpointError  # the file is not at fault


def test_what_a_dataclass_has_besides_its_fields_is_not_lost() -> None:
    point = Point(1, [])
    object.__setattr__(point, "cache", {})
    with pytest.raises(UnstorableError, match=r"`a\[0\]` .* its fields: \['cache'\]"):
        Encoder().encode({"a": [point]}, file="f")

    class Heir(Point):
        pass

    with pytest.raises(TypeError, match=r"needed for .*Heir: only dataclasses"):
        register_type(Heir)


def test_class_that_is_defined_again_takes_the_place_of_the_older() -> None:
    def define() -> type:
        @dataclasses.dataclass
        class Cell:
            value: int

        return register_type(Cell)

    older, newer = define(), define()
    assert type(through_json(newer(3))) is newer
    with pytest.raises(UnstorableError):
        through_json(older(3))


def test_registered_name_that_is_not_known_says_what_to_import() -> None:
    with pytest.raises(CheckpointError, match="registered as 'kelvin'; import"):
        decoded({"$": "type", "v": ["kelvin", [1]]}, {})


def test_wrong_registrations_are_errors() -> None:
    with pytest.raises(TypeError, match="needed for Celsius: only dataclasses"):
        register_type(Celsius)
    with pytest.raises(TypeError, match="needed for Point"):
        register_type(Point, lambda p: [])
    with pytest.raises(ValueError, match="'celsius' is taken"):
        register_type(Point, name="celsius")
    assert register_type(Point) is Point


def is_key(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


TAGS = [
    *("tensor", "dict", "OrderedDict", "int", "float", "bytes", "complex", "tuple"),
    *("set", "dtype", "device", "size", "array", "number", "unheard of"),
    *("frozenset", "Counter", "defaultdict", "deque", "range", "path", "viewed"),
    *("datetime", "date", "time", "timedelta", "enum", "namedtuple", "type"),
]
FILES = {"f": {"t": torch.arange(4.0), "u": torch.arange(8, dtype=torch.uint8)}}
junk_leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(
        [
            "f",
            "t",
            "u",
            "torch.complex128",
            "celsius",
            "list",
            "<f4",
            "O",
            "V8",
            "0x1",
            "cpu",
        ]
    ),
    st.sampled_from([(), b"x", object(), torch.ones(1)]),
    st.just({"$": "tensor", "v": ["f", "u"]}),
)
junk = st.recursive(
    junk_leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.fixed_dictionaries({"$": st.sampled_from(TAGS) | inner, "v": inner}),
        st.tuples(st.sampled_from(["<f4", "O"]), inner, inner).map(list),
        st.dictionaries(st.sampled_from(["$", "v", "x"]) | inner.filter(is_key), inner),
    ),
    max_leaves=8,
)


@settings(FEW, max_examples=1500)
@given(junk)
def test_malformed_plain_data_are_corrupt_and_nothing_else(plain: Any) -> None:
    with contextlib.suppress(CheckpointError):
        decoded(plain, FILES)


def nodes(plain: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
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
    plain: Any = [json.loads(json.dumps(encoder.encode(tree, file="f")))]
    *above, last = data.draw(st.sampled_from([p for p in nodes(plain) if p]))
    node = plain
    for step in above:
        node = node[step]
    node[last] = other
    with contextlib.suppress(CheckpointError):
        decoded(plain, encoder.files)


def test_plain_data_nested_too_deep_are_corrupt() -> None:
    with pytest.raises(CheckpointCorruptError):
        decoded(_deep_plain(), {})


def _deep_plain() -> Any:
    plain: Any = 1
    for _ in range(20_000):
        plain = {"$": "tuple", "v": [plain]}
    return plain


def no_tensors(*place: Any) -> torch.Tensor:
    raise KeyError(place)


COLLIDING = [{"$": "int", "v": hex(k * (2**61 - 1))} for k in range(1, 2**15 + 2)]


@pytest.mark.parametrize("tag", ["set", "frozenset", "dict", "OrderedDict", "Counter"])
def test_keys_that_could_take_for_ever_are_refused(tag: str) -> None:
    payload = COLLIDING if "set" in tag else [[key, 1] for key in COLLIDING]
    with pytest.raises(CheckpointCorruptError, match="32769 keys, or members of sets"):
        decode([{"a": {"$": tag, "v": payload}}], no_tensors)


def test_numbers_and_texts_may_be_as_many_keys_as_one_likes() -> None:
    tree = {"ids": {*range(2**15 + 9)}, "names": {i: str(i) for i in range(2**15 + 9)}}
    assert decode(Encoder().encode(tree, file="f"), no_tensors) == tree


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_a_single_number_with_a_stride_is_stored(dtype: torch.dtype) -> None:
    view = torch.arange(8).to(dtype).reshape(2, 4)[:1, 3]
    encoder = Encoder()
    plain = encoder.encode({"a": view}, file="f")
    out = BytesIO()
    write_tensors(out, encoder.files["f"], {})
    found = decode(plain, lambda _, file, name, *__: encoder.files[file][name])
    assert found["a"].equal(view)
