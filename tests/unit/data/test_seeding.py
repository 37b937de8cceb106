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
    Subset,
    TensorDataset,
    default_collate,
)

from helios.data.samplers import KeyedBatch
from helios.data.seeding import SeededDataset, init_worker
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
    batch = KeyedBatch(key, number, indices)
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
    assert error.__notes__ == ["Helios: in sample 3 of batch 7"]


def test_error_of_gathering_names_the_samples():
    with pytest.raises(IndexError) as caught:
        fetch(TensorDataset(torch.zeros(3)), [1, 8], collate_fn=None)
    assert caught.value.__notes__ == ["Helios: in sample [1, 8] of batch 0"]


def test_error_of_collating_names_the_samples():
    class Mixed(Noise):
        def __getitem__(self, index):
            return torch.zeros(index)

    with pytest.raises(RuntimeError, match="equal size") as caught:
        fetch(Mixed(), [1, 2], collate_fn=None, number=4)
    assert caught.value.__notes__ == ["Helios: in sample [1, 2] of batch 4"]


def test_stop_iteration_does_not_end_the_epoch_in_silence():
    with pytest.raises(DataError, match="StopIteration in sample 3 of batch 0"):
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
