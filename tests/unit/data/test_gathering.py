"""Batches of in-memory data, gathered: the bits, types and strides of one by one."""

import pickle
import random
import subprocess
import sys
import warnings
from contextlib import nullcontext

import datasets
import numpy as np
import pytest
import torch
from datasets import Features, List, Value
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    ConcatDataset,
    StackDataset,
    Subset,
    TensorDataset,
    default_collate,
)
from torch.utils.data._utils.collate import default_collate_fn_map

from helios.data import gathering
from helios.data.gathering import gatherer
from helios.rng import capture_rng

COUNT = 9
BATCHES = [[3, 0, 8, 3], [5], [8, 8], list(range(COUNT))]
SPECIAL = torch.tensor([float("nan"), -0.0, float("inf")] * 3)


def noise(*shape):
    return torch.randn(COUNT, *shape, generator=torch.Generator().manual_seed(1))


def plain():
    return TensorDataset(noise(3), torch.arange(COUNT))


def numbers(dtype, *shape):
    return (noise(*shape).numpy() * 50).astype("int64").astype(dtype)


def frozen(array):
    array.flags.writeable = False
    return array


def mapped(path, mode="r"):
    np.save(path / "data.npy", numbers("float32", 4))
    return np.load(path / "data.npy", mmap_mode=mode)


COLUMNS = {
    "bool": (noise() > 0).tolist(),
    "label": list(range(COUNT)),
    "float": noise().tolist(),
    "text": [f"text {i} é\0" for i in range(COUNT)],
    "list": noise(3).tolist(),
    "nested": noise(2, 3).tolist(),
    "image": noise(2, 2).numpy(),
}
FEATURES = {
    "bool": Value("bool"),
    "label": datasets.ClassLabel(num_classes=COUNT),
    "float": Value("float64"),
    "text": Value("string"),
    "list": List(Value("float32")),
    "nested": List(List(Value("int16")), length=2),
    "image": datasets.Array2D((2, 2), "float32"),
}


def table(kind, columns=COLUMNS, features=FEATURES):
    features = features and Features(features)
    found = datasets.Dataset.from_dict(columns, features=features)
    return found.with_format(kind)


def single(values, feature, kind="torch"):
    """A table of one column."""
    return table(kind, {"x": values}, feature and {"x": feature})


class Decoded(Value):
    """A feature of a user's, whose decoding changes most values, but not the first."""

    def decode_example(self, value, token_per_repo_id=None):
        return 2 * value


def of_numbers(kind, dtype):
    values = numbers("int8").astype(bool if dtype == "bool" else "int64") % 50
    return single(values.tolist(), Value(dtype), kind)


ARROW = {
    f"{kind}_{name}": lambda _, k=kind, f=change: f(table(k))
    for kind in ("torch", "numpy")
    for name, change in {
        "table": lambda data: data,
        "columns": lambda data: data.with_format(
            data.format["type"], columns=["label", "list"]
        ),
        "shuffled": lambda data: data.shuffle(seed=1),
        "selected": lambda data: datasets.concatenate_datasets([data, data]).select(
            range(12, 3, -1)
        ),
        "in_chunks": lambda data: datasets.concatenate_datasets(
            [data.select(range(4)), data.select(range(4, COUNT))]
        ),
        "sliced": lambda data: datasets.concatenate_datasets([data, data]).select(
            range(2, 2 + COUNT)
        ),
        "subset": lambda data: Subset(data, range(COUNT - 1, -1, -1)),
        "in_a_stack": lambda data: StackDataset(x=data, y=noise(2)),
    }.items()
} | {
    f"{kind}_{dtype}": lambda _, k=kind, d=dtype: of_numbers(k, d)
    for kind in ("torch", "numpy")
    for dtype in ("bool", "int8", "uint8", "int64", "uint32", "float16", "float64")
}


def arrow_on_disk(path):
    table("torch").save_to_disk(path / "table")
    return datasets.load_from_disk(path / "table").with_format("torch")


GATHERED = {
    "tensor": lambda _: noise(3),
    "scalars": lambda _: SPECIAL.clone(),
    "frozen_parameter": lambda _: torch.nn.Parameter(noise(2), requires_grad=False),
    "plain": lambda _: plain(),
    "bools": lambda _: TensorDataset(noise(2, 2) > 0.5),
    "transposed": lambda _: TensorDataset(torch.randn(3, COUNT).t(), noise(2, 4)[:, 1]),
    "channels_last": lambda _: TensorDataset(
        noise(3, 4, 5).to(memory_format=torch.channels_last)
    ),
    "strange": lambda _: TensorDataset(
        noise(0),
        torch.view_as_complex(noise(3, 2)).conj(),
        torch.view_as_complex(noise(3, 2)).conj().imag,
        SPECIAL.to(torch.bfloat16),
        noise(1).expand(COUNT, 4),
    ),
    "tuple": lambda _: StackDataset(plain(), noise(2), numbers("int32")),
    "dict": lambda _: StackDataset(y=numbers("int64"), x=StackDataset(a=plain())),
    "list_subset": lambda _: Subset(plain(), [4, 0, -1, 3, 3, 2, 1, 8, -9]),
    "range_subset": lambda _: Subset(noise(2), range(8, -1, -1)),
    "array_subset": lambda _: Subset(plain(), np.arange(COUNT, dtype=np.int16)[::-1]),
    "tensor_subset": lambda _: Subset(plain(), torch.arange(COUNT).flip(0)),
    "subset_of_subset": lambda _: Subset(
        Subset(StackDataset(x=numbers("uint8", 3)), range(8, -1, -1)), (2, 3, 1) * 3
    ),
    "memmap": mapped,
    "memmap_of_scalars": lambda path: mapped(path)[:, 1],
    "frozen_array": lambda _: frozen(numbers("float64", 2)),
    "fortran": lambda _: np.asfortranarray(numbers("float32", 2, 3)),
    "broadcast": lambda _: np.broadcast_to(numbers("float32", 1), (COUNT, 5)),
    "reversed_scalars": lambda _: numbers("float64")[::-1],
} | {
    f"{np.dtype(dtype)}_{len(shape)}": lambda _, d=dtype, s=shape: numbers(d, *s)
    for dtype in (bool, "int8", "uint16", "uint32", "int64", "f2", "f8", "complex128")
    for shape in [(), (3,), (2, 2)]
}
GATHERED |= ARROW | {"arrow_on_disk": arrow_on_disk}


class Unread:
    """No item is to be asked for."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        raise AssertionError("a sample was read")


def subclass(base, **members):
    return type("Own", (base,), members)


FREE_LAST = noise(2, 3, 4, 5).flatten(0, 1).to(memory_format=torch.channels_last)
NOT_GATHERED = {
    "unknown": Unread,
    "list": lambda: [1, 2],
    "own_tensors": lambda: subclass(TensorDataset)(noise(2)),
    "own_subset": lambda: subclass(
        Subset, __getitems__=lambda self, _: [], __getitem__=lambda self, _: 1
    )(noise(2), range(3)),
    "own_stack": lambda: subclass(StackDataset)(noise(2)),
    "own_array": lambda: noise(2).numpy().view(subclass(np.ndarray)),
    "concatenated": lambda: ConcatDataset([plain()]),
    "tensor_of_own_type": lambda: noise(2).as_subclass(subclass(torch.Tensor)),
    "unknown_part": lambda: StackDataset(plain(), Unread()),
    "unknown_inside": lambda: Subset(Unread(), range(3)),
    "of_gradients": lambda: TensorDataset(noise(2).requires_grad_()),
    "parameter": lambda: torch.nn.Parameter(noise(2)),
    "sparse": lambda: noise(2).to_sparse(),
    "single": lambda: torch.tensor(1.0),
    "meta": lambda: noise(2).to("meta"),
    "other_strides": lambda: FREE_LAST.unflatten(0, (COUNT, 2)),
    "empty": lambda: TensorDataset(torch.zeros(0, 2)),
    "foreign_bytes": lambda: numbers(">f4", 2),
    "strings": lambda: np.array(["a", "b"]),
    "objects": lambda: np.array([1, None]),
    "dates": lambda: np.array([1, 2], "datetime64[s]"),
    "unsigned_scalars": lambda: numbers("uint64"),
    "reversed_rows": lambda: numbers("float32", 2)[::-1],
    "mask_list": lambda: Subset(noise(2), [True, False]),
    "mask_array": lambda: Subset(noise(2), np.array([True, False])),
    "mask_tensor": lambda: Subset(noise(2), torch.ones(2, dtype=torch.uint8)),
    "floats": lambda: Subset(noise(2), [0.0, 1.0]),
    "pairs": lambda: Subset(noise(2), [[0, 1]]),
    "too_large": lambda: Subset(noise(2), [0, COUNT]),
    "too_small": lambda: Subset(noise(2), [0, -COUNT - 1]),
    "arrow_without_a_format": lambda: table(None),
    "arrow_of_a_transform": lambda: table(None).with_transform(lambda rows: rows),
    "arrow_of_own_dtype": lambda: table("torch").with_format(
        "torch", dtype=torch.float64
    ),
    "arrow_of_all_columns": lambda: table("torch").with_format(
        "torch", columns=["label"], output_all_columns=True
    ),
    "arrow_of_none": lambda: single([None] * COUNT, Value("float32")),
    "arrow_of_dicts": lambda: single([{"a": 1}] * COUNT, {"a": Value("int64")}),
    "arrow_of_images": lambda: (
        table("torch")
        .cast_column("image", List(List(Value("float32"))))
        .add_column("picture", [None] * COUNT, feature=datasets.Image())
    ),
    "arrow_of_decoded_numbers": lambda: single(list(range(COUNT)), Decoded("int64")),
    "arrow_of_decoded_lists": lambda: single([[0]] * COUNT, List(Decoded("int64"))),
    "arrow_of_unsigned": lambda: of_numbers("torch", "uint64"),
    "arrow_of_dates": lambda: single([1] * COUNT, Value("timestamp[s]"), "numpy"),
    "arrow_of_empty_lists": lambda: single([[]] * COUNT, List(Value("int64"))),
    "own_arrow": lambda: subclass(datasets.Dataset)(table("torch").data.table),
}


def one_by_one(dataset, indices):
    with warnings.catch_warnings():
        # torch can't make a tensor of a row of a read-only array without it.
        warnings.filterwarnings("ignore", message="The given NumPy array is not wr")
        if hasattr(dataset, "__getitems__"):  # loaders take it: it may be another's
            return default_collate(dataset.__getitems__(list(indices)))
        return default_collate([dataset[i] for i in indices])


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        assert_same(list(found.values()), list(expected.values()))
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, torch.Tensor):
        for trait in ("dtype", "shape", "device", "requires_grad", "grad_fn"):
            assert getattr(found, trait) == getattr(expected, trait)
        for trait in ("stride", "is_contiguous", "is_conj", "is_neg"):
            assert getattr(found, trait)() == getattr(expected, trait)()
        bits = [t.contiguous().view(-1).view(torch.uint8) for t in (found, expected)]
        assert bits[0].tolist() == bits[1].tolist()
    else:
        assert found == expected


def leaves(batch):
    if isinstance(batch, dict | list):
        values = batch.values() if isinstance(batch, dict) else batch
        return [leaf for value in values for leaf in leaves(value)]
    return [batch]


def gathered(dataset, indices):
    """The batch; that it was not fetched one by one is asserted."""
    gather = gatherer(dataset)
    assert gather is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(gathering, "_one_by_one")
        return gather(np.array(indices))


@pytest.mark.parametrize("name", GATHERED)
def test_batches_are_those_of_one_by_one(name, tmp_path):
    dataset = GATHERED[name](tmp_path)
    for indices in BATCHES:
        assert_same(gathered(dataset, indices), one_by_one(dataset, indices))


@given(indices=st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=40))
def test_any_indices_give_the_batch_of_one_by_one(indices):
    dataset = Subset(StackDataset(x=plain(), y=numbers("int32")), range(8, -1, -1))
    assert_same(gathered(dataset, indices), one_by_one(dataset, indices))


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize(
    ("values", "feature"),
    [
        ([1.0, 2.0, None], Value("float32")),
        ([1, 2, None], Value("int64")),
        (["a", "b", None], Value("string")),
        ([[1.0], [2.0], [3.0, 4.0]], List(Value("float32"))),
        ([[1.0], [2.0], []], List(Value("float32"))),
        ([[1, 2], [3, 4], [5, None]], List(Value("int64"))),
        ([[1, 2], [3, 4], None], List(Value("int64"))),
    ],
)
def test_samples_that_do_not_fit_are_fetched_one_by_one(kind, values, feature):
    dataset = single(values, feature, kind)
    assert_same(gathered(dataset, [1, 0]), one_by_one(dataset, [1, 0]))
    gather = gatherer(dataset)
    for indices in [[2], [2, 2], [1, 2], [0, 1, 2]]:
        try:
            expected = one_by_one(dataset, indices)
        except Exception as error:  # as text: of None values there are no tensors
            with pytest.raises(type(error)):
                gather(np.array(indices))
        else:
            assert_same(gather(np.array(indices)), expected)


@pytest.mark.parametrize(
    "form",
    [
        {"type": "torch", "columns": ["label", "list"]},
        {"type": "torch", "columns": ["list"], "dtype": torch.float64},
        {"type": "numpy", "columns": ["float", "text"]},
        {"type": None},
    ],
)
def test_new_format_of_a_table_is_followed(form):
    dataset = table("torch")
    gather = gatherer(dataset)
    dataset.set_format(**form)
    if form["type"] is None:
        dataset.set_format(None, columns=["label", "text"])
    assert_same(gather(np.array([3, 4])), one_by_one(dataset, [3, 4]))


@pytest.mark.parametrize("name", NOT_GATHERED)
def test_other_data_sets_are_not_gathered(name):
    assert gatherer(NOT_GATHERED[name]()) is None


def test_nothing_random_is_drawn():
    def state():
        tree = capture_rng()
        return str(tree | {"torch": tree["torch"].tolist()})

    random.gauss(0, 1)
    before = state()
    gathered(plain(), [1, 2])
    assert state() == before


@pytest.mark.parametrize("name", GATHERED)
def test_index_out_of_range_is_an_index_error(name, tmp_path):
    gather = gatherer(GATHERED[name](tmp_path))
    for index in (COUNT, 2**40):
        with pytest.raises(IndexError):
            gather(np.array([0, index]))


@pytest.mark.parametrize("name", sorted(set(GATHERED) - {"broadcast"}))
def test_change_of_a_batch_leaves_the_data_as_they_are(name, tmp_path):
    dataset = GATHERED[name](tmp_path)
    for indices in BATCHES:
        before = one_by_one(dataset, range(COUNT))
        for leaf in leaves(gathered(dataset, indices)):
            if isinstance(leaf, torch.Tensor):
                leaf.copy_(leaf == 0)
        assert_same(one_by_one(dataset, range(COUNT)), before)


def test_change_of_the_data_is_seen(tmp_path):
    for dataset in (noise(3), numbers("float32"), mapped(tmp_path, "r+")):
        gather = gatherer(dataset)
        dataset[3] = 77.0
        assert_same(gather(np.array([3, 4])), one_by_one(dataset, [3, 4]))


@pytest.mark.parametrize(
    ("dataset", "name", "value"),
    [
        (plain(), "tensors", (noise(1).to_sparse(), noise(2, 2))),
        (StackDataset(noise(2)), "datasets", (numbers(">f4", 1).tolist(),)),
        (Subset(noise(2), range(COUNT)), "indices", [7] * COUNT),
        (Subset(noise(2), range(COUNT)), "dataset", list(range(COUNT))),
    ],
)
def test_new_attributes_of_a_data_set_are_followed(dataset, name, value):
    gather = gatherer(dataset)
    setattr(dataset, name, value)
    if name == "tensors":
        dataset.tensors = value[1:]
    assert_same(gather(np.array([3, 4])), one_by_one(dataset, [3, 4]))


@pytest.mark.parametrize("name", ["plain", "fortran", "int64_0", "list_subset"])
def test_any_array_of_indices_is_taken_without_a_warning(name, tmp_path):
    dataset = GATHERED[name](tmp_path)
    expected = one_by_one(dataset, [6, 4, 2])
    backwards, gaps = np.array([2, 4, 6])[::-1], np.array([6, 0, 4, 0, 2])[::2]
    for indices in (frozen(np.array([6, 4, 2])), backwards, gaps):
        assert_same(gatherer(dataset)(indices), expected)


@pytest.mark.parametrize("name", ["plain", "memmap", "list_subset", "dict"])
def test_pickled_with_its_data_set_it_gathers_and_sends_no_data_twice(name, tmp_path):
    dataset = GATHERED[name](tmp_path)
    alone = len(pickle.dumps(dataset))
    both = pickle.dumps((dataset, gatherer(dataset)))
    assert len(both) < alone + 200
    copy, gather = pickle.loads(both)
    assert_same(gather(np.array([3, 0])), one_by_one(dataset, [3, 0]))
    if name == "plain":  # the same object, not one more
        copy.tensors[0][3] = 5.0
        assert_same(gather(np.array([3, 0])), one_by_one(copy, [3, 0]))


@pytest.mark.parametrize("name", ["plain", "int64_0", "float64_1", "dict"])
def test_torch_default_device_is_where_it_puts_batches(name, tmp_path):
    dataset = GATHERED[name](tmp_path)
    gather = gatherer(dataset)
    with torch.device("meta"):
        found = leaves(gather(np.array([1, 2])))
        expected = leaves(one_by_one(dataset, [1, 2]))
    assert [t.device for t in found] == [t.device for t in expected]


def test_changed_default_collation_is_not_bypassed(monkeypatch):
    stack = default_collate_fn_map[torch.Tensor]
    monkeypatch.setitem(
        default_collate_fn_map,
        torch.Tensor,
        lambda batch, **options: stack(batch, **options) + 1,
    )
    assert gatherer(plain()) is None


def test_package_datasets_is_not_imported():
    code = "import sys, torch; from helios.data.gathering import gatherer;"
    code += "sys.modules['datasets'] = None; assert gatherer(torch.ones(3))([0])"
    code = code.replace("([0])", "(__import__('numpy').zeros(1, int)).sum() == 1")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


@pytest.mark.gpu
@pytest.mark.parametrize("index", [2, COUNT])
def test_tensors_on_a_device_are_gathered_there(index):
    dataset = TensorDataset(noise(3).cuda(), torch.arange(COUNT))
    with nullcontext() if index < COUNT else pytest.raises(IndexError):
        found = gathered(dataset, [1, index])
        assert found[0].is_cuda
        assert torch.equal(found[0], one_by_one(dataset, [1, index])[0])
