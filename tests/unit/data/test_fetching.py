"""What a data set and a collate function draw, and what is said when they fail."""

import contextlib
import pickle
import random
import signal

import numpy as np
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    Dataset,
    StackDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from helios.data.batches import KeyedBatch
from helios.data.fetching import SeededDataset, init_worker
from helios.data.seeding import sample_rng
from helios.errors import DataError
from helios.rng import capture_rng


class Noise(Dataset):
    """Item i is i and a draw of each generator."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        draws = torch.rand(()).item(), random.random(), np.random.standard_normal()
        return (int(index), *draws)


class Failing(Noise):
    def __init__(self, error):
        self.error = error

    def __getitem__(self, index):
        if index == 3:
            raise self.error
        return torch.zeros(index + 1)


def rng_state():
    """All bits of the global generators' states."""
    tree = capture_rng()
    return str(tree | {"torch": tree["torch"].tolist()})


def tags(items):
    """Collate to the items themselves and what the collate function draws."""
    return list(items), torch.rand(()).item(), random.random(), np.random.random()


def fetch(dataset, indices, *, key=5, number=0, collate_fn=tags):
    batch = KeyedBatch(key, 2, number, indices, len(indices))
    (collated,) = SeededDataset(dataset, collate_fn).__getitems__(batch)
    return collated


def test_draws_of_a_sample_depend_on_key_and_index_alone():
    items = fetch(Noise(), [4, 7, 4])[0]
    assert items[0] == items[2]
    assert items[0][1:] != items[1][1:]
    assert fetch(Noise(), [7], number=9)[0] == [items[1]]
    assert fetch(Noise(), [np.int64(7)])[0] == [items[1]]
    assert fetch(Noise(), [torch.tensor(7)])[0] == [items[1]]
    assert fetch(Noise(), [7], key=6)[0] != [items[1]]


def test_draws_of_the_collate_function_tell_batches_and_ranks_apart():
    same = [fetch(Noise(), [4, 7])[1:] for _ in range(2)]
    assert same[0] == same[1]
    others = [fetch(Noise(), [4, 7], number=1), fetch(Noise(), [5, 7])]
    assert len({same[0], *(other[1:] for other in others)}) == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda data: Subset(data, list(range(20))),
        lambda data: Subset(Subset(data, range(20)), range(20)),
        lambda data: ConcatDataset([data, data]),
    ],
)
def test_wrapped_data_sets_are_seeded_by_sample(make):
    dataset = make(Noise())
    assert fetch(dataset, [4, 7])[0] == fetch(Noise(), [4, 7])[0]
    assert fetch(dataset, [7])[0] == fetch(Noise(), [4, 7])[0][1:]


class Fetching(Noise):
    """Fetches batches; item i is i and draws for the batch as a whole."""

    def __getitems__(self, indices):
        draws = super().__getitem__(0)[1:]
        return [(int(index), *draws) for index in indices]


class FetchingStack(StackDataset):
    def __getitems__(self, indices):
        return Fetching().__getitems__(indices)


@pytest.mark.parametrize(
    "make",
    [
        lambda data: data,
        lambda data: Subset(data, list(range(20))),
        lambda data: Subset(Subset(data, range(20)), range(20)),
        lambda data: FetchingStack(data),
    ],
)
def test_data_set_that_fetches_batches_draws_for_each_of_them(make):
    dataset = make(Fetching())
    whole = [item[1:] for item in fetch(dataset, [4, 7])[0]]
    assert len(set(whole)) == 1
    assert [item[1:] for item in fetch(dataset, [4, 7])[0]] == whole
    others = [fetch(dataset, [4, 7], number=1), fetch(dataset, [5, 7])]
    others += [fetch(dataset, [4, 7], key=6)]
    assert len({whole[0], *(other[0][0][1:] for other in others)}) == 4
    # They are none of a sample, nor those of the collate function.
    assert whole[0][:2] != fetch(dataset, [4, 7])[1:3]
    assert whole[0] != fetch(Noise(), [4])[0][0][1:]


def test_stack_of_a_data_set_that_fetches_batches_is_seeded_by_batch():
    for dataset in (StackDataset(Fetching(), Noise()), StackDataset(x=Fetching())):
        once, twice = (fetch(dataset, [4, 7])[0] for _ in range(2))
        assert once == twice


def test_stack_of_others_is_seeded_by_sample():
    dataset = StackDataset(Noise(), a := Noise())
    assert fetch(dataset, [4, 7])[0][1] == fetch(dataset, [7], number=3)[0][0]
    assert fetch(StackDataset(x=a), [7])[0] == [{"x": fetch(a, [7])[0][0]}]


class Own(Noise):
    """Item i is draws of the sample's own generators, and of the global ones."""

    def __getitem__(self, index):
        assert sample_rng() is sample_rng()
        return own_draws(), super().__getitem__(index)


def own_draws():
    numpy, generator = sample_rng()
    return numpy.random(), torch.rand((), generator=generator).item()


def collate_own(items):
    return list(items), own_draws()


def test_own_generators_follow_the_sample_and_the_batch():
    items, of_batch = fetch(Own(), [4, 7], collate_fn=collate_own)
    assert fetch(Own(), [7], number=9, collate_fn=collate_own)[0] == items[1:]
    assert fetch(Own(), [4, 7], collate_fn=collate_own) == (items, of_batch)
    others = [fetch(Own(), [4, 7], number=1, collate_fn=collate_own)[1]]
    others += [own for own, _ in items]
    others += [fetch(Own(), [4], key=6, collate_fn=collate_own)[0][0][0]]
    assert len({of_batch, *others}) == 5


def test_own_generators_leave_the_global_ones_alone():
    assert [globals_ for _, globals_ in fetch(Own(), [4, 7])[0]] == fetch(
        Noise(), [4, 7]
    )[0]


@pytest.mark.parametrize("dataset", [Own(), Failing(OSError())])
def test_outside_a_batch_own_generators_are_drawn_anew(dataset):
    with contextlib.suppress(OSError):
        fetch(dataset, [4, 3], collate_fn=collate_own)
    assert own_draws() != own_draws()
    torch.manual_seed(1)
    draws = own_draws()
    torch.manual_seed(1)
    assert own_draws() == draws


def test_indices_may_be_anything():
    class Named(Noise):
        def __getitem__(self, index):
            return index, torch.rand(()).item()

    found = fetch(Named(), ["a", ("b", 1), -1], collate_fn=list)
    assert [name for name, _ in found] == ["a", ("b", 1), -1]
    assert len({draw for _, draw in found}) == 3
    assert fetch(Named(), [("b", 1)], collate_fn=list) == found[1:2]


@pytest.mark.parametrize("dataset", [Noise(), Failing(OSError())])
def test_main_process_keeps_its_random_numbers(dataset):
    random.gauss(0, 1), np.random.standard_normal()
    state = rng_state()
    with contextlib.suppress(OSError):
        fetch(dataset, [4, 3])
    assert rng_state() == state


TENSORS = {
    "plain": lambda: (torch.randn(9, 3), torch.arange(9), torch.rand(9, 2, 2) > 0.5),
    "transposed": lambda: (torch.randn(3, 9).t(), torch.randn(2, 9, 3)[1]),
    "channels_last": lambda: (
        torch.randn(9, 3, 4, 5).to(memory_format=torch.channels_last),
    ),
    "strange": lambda: (
        torch.randn(9, 0),
        torch.randn(9, 2, dtype=torch.cfloat).conj(),
        torch.tensor([float("nan"), -0.0, float("inf")] * 3),
        torch.randn(9, 2).to(torch.bfloat16),
    ),
    "parameter": lambda: (torch.nn.Parameter(torch.randn(9, 2)),),
}


@pytest.mark.parametrize("name", TENSORS)
def test_gathered_tensors_are_those_of_the_default_collate(name):
    dataset = TensorDataset(*TENSORS[name]())
    indices = [3, 0, 8, 3]
    expected = default_collate([dataset[i] for i in indices])
    state = rng_state()
    found = fetch(dataset, indices, collate_fn=None)
    assert rng_state() == state
    assert type(found) is type(expected) is list
    for one, other in zip(found, expected, strict=True):
        assert type(one) is type(other)
        assert (one.dtype, one.shape, one.stride()) == (
            other.dtype,
            other.shape,
            other.stride(),
        )
        assert one.is_contiguous()
        assert one.requires_grad == other.requires_grad
        storages = one.detach().clone(), other.detach().clone()
        assert bytes(storages[0].view(torch.uint8).flatten().tolist()) == bytes(
            storages[1].view(torch.uint8).flatten().tolist()
        )


@pytest.mark.parametrize("indices", [[-1, 3], [torch.tensor(3), 0], [np.int32(2)]])
def test_any_indices_of_gathered_tensors_give_what_one_by_one_does(indices):
    dataset = TensorDataset(torch.randn(9, 3))
    found = fetch(dataset, indices, collate_fn=None)
    assert torch.equal(found[0], default_collate([dataset[i] for i in indices])[0])


def test_indices_of_gathered_tensors_are_not_rounded():
    with pytest.raises(IndexError):
        fetch(TensorDataset(torch.zeros(3)), [1.0, 2.0], collate_fn=None)


def test_subclass_of_tensor_dataset_is_not_gathered():
    class Augmented(TensorDataset):
        def __getitem__(self, index):
            return torch.rand(())

    found = fetch(Augmented(torch.zeros(9)), [1, 2], collate_fn=None)
    assert found[0] != found[1]


@pytest.mark.parametrize("error", [OSError("disk"), KeyError("x"), ZeroDivisionError()])
def test_error_of_a_sample_keeps_its_type_and_names_the_sample(error):
    with pytest.raises(type(error)) as caught:
        fetch(Failing(error), [4, 3, 5], number=7)
    assert caught.value is error
    assert error.__notes__ == ["Helios: in sample 3 (epoch 2, batch 7)"]


def test_error_of_gathering_names_the_sample():
    with pytest.raises(IndexError) as caught:
        fetch(TensorDataset(torch.zeros(3)), [1, 8], collate_fn=None)
    assert caught.value.__notes__ == ["Helios: in sample 8 (epoch 2, batch 0)"]


@pytest.mark.parametrize(
    ("lengths", "shapes"),
    [
        ([1, 2], "(1,) of [0]; (2,) of [1]"),
        ([3] * 30 + [4], "(4,) of [30]; (3,) of [0, 1, 2, 3, 4, 5, 6, 7] and 22 more"),
        (range(10), "; ".join(f"({i},) of [{i}]" for i in range(8)) + "; and 2 more"),
    ],
)
def test_error_of_collating_names_samples_epoch_and_shapes(lengths, shapes):
    class Ragged(Noise):
        def __getitem__(self, index):
            return torch.zeros(lengths[index])

    indices = list(range(len(lengths)))
    with pytest.raises(RuntimeError, match="equal size") as caught:
        fetch(Ragged(), indices, collate_fn=None, number=4)
    more = f" and {len(lengths) - 8} more" * (len(lengths) > 8)
    assert caught.value.__notes__ == [
        f"Helios: in collating samples {indices[:8]}{more} with the shapes {shapes} "
        "(epoch 2, batch 4)"
    ]


def test_shapes_of_items_with_parts_are_named():
    class Parts(Noise):
        def __getitem__(self, index):
            return {"x": (torch.zeros(index, 2), "text"), "y": np.zeros(3), "z": index}

    with pytest.raises(RuntimeError, match="equal size") as caught:
        fetch(Parts(), [1, 2], collate_fn=None)
    shape = "{'x': [(1, 2), 'str'], 'y': (3,), 'z': 'int'} of [1]"
    assert shape in caught.value.__notes__[0]


def test_lengths_of_long_items_are_named():
    class Words(Noise):
        def __getitem__(self, index):
            return ["word"] * index

    with pytest.raises(RuntimeError, match="equal size") as caught:
        fetch(Words(), [10, 11], collate_fn=None)
    for index in 10, 11:
        assert f"'str', 'and {index - 8} more'] of [{index}]" in str(
            caught.value.__notes__
        )


def test_stop_iteration_does_not_end_the_epoch_in_silence():
    message = r"StopIteration in sample 3 \(epoch 2, batch 0\)"
    with pytest.raises(DataError, match=message):
        fetch(Failing(StopIteration()), [3])


def test_workers_ignore_the_signals_of_a_group():
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        pickle.loads(pickle.dumps(init_worker))(0)
        assert all(signal.getsignal(n) is signal.SIG_IGN for n in handlers)
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(handlers)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
