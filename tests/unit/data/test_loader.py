"""The loader: the same batches whatever loads them, from wherever it begins."""

import functools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, RandomSampler

from helios.data.loader import DataLoaderParams, create_dataloader
from helios.data.samplers import (
    ResumableRandomSampler,
    ResumableSampler,
    ResumableSamplerType,
    ResumableSequentialSampler,
)
from helios.errors import DataError
from helios.rng import capture_rng, seed_rngs

WORKERS = {
    "none": {},
    "two": {"num_workers": 2},
    "persistent": {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 1},
    "one": {"num_workers": 1, "prefetch_factor": 4},
    "spawn": {
        "num_workers": 1,
        "persistent_workers": True,
        "multiprocessing_context": "spawn",
    },
    "debug": {"num_workers": 2, "persistent_workers": True, "debug_mode": True},
}


class Backwards(ResumableSampler):
    """A user's."""

    def order(self, epoch, start):
        return iter(range(len(self) - 1 - start, -1, -1))


class Augmented(Dataset):
    """Item i is i and draws of all three global generators."""

    def __init__(self, length=23):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        draws = random.gauss(0, 1), np.random.standard_normal(), torch.randn(()).item()
        return torch.tensor([float(index), *draws], dtype=torch.float64)


def mixed(items):
    """Collate to two tensors, the second of which is drawn."""
    draws = random.random(), np.random.random(), torch.rand(()).item()
    return torch.stack(items), torch.tensor(draws, dtype=torch.float64)


def make(length=23, **options):
    options = {"batch_size": 4, "shuffle": True, "collate_fn": mixed, **options}
    return create_dataloader(Augmented(length), seed=3, **options)[0]


def rng_state():
    """All bits of the global generators' states."""
    tree = capture_rng()
    return str(tree | {"torch": tree["torch"].tolist()})


def contents(batches):
    return [(one.tolist(), two.tolist()) for one, two in batches]


@functools.cache
def uninterrupted():
    loader = make()
    return [contents(loader) for _ in range(4)]


@pytest.mark.parametrize("name", WORKERS)
def test_batches_are_the_same_whatever_loads_them(name):
    loader = make(**WORKERS[name])
    expected = uninterrupted()
    assert contents(loader) == expected[0]
    iterator = iter(loader)
    assert contents([next(iterator), next(iterator)]) == expected[1][:2]
    loader.seek(1, 2)
    assert contents(loader) == expected[1][2:]
    assert contents(loader) == expected[2]
    loader.seek(0, 5)
    assert contents(loader) == expected[0][5:]
    loader.seek(3)
    assert contents(loader) == expected[3]


@pytest.mark.parametrize("name", ["none", "two", "persistent"])
def test_iterating_leaves_the_random_numbers_of_training_alone(name):
    seed_rngs(1)
    random.gauss(0, 1), np.random.standard_normal()
    state = rng_state()
    loader = make(**WORKERS[name])
    for _ in range(2):
        for _ in loader:
            assert rng_state() == state
            random.gauss(0, 1), np.random.standard_normal(), torch.randn(3)
            state = rng_state()


def test_epochs_differ_in_order_and_in_draws():
    epochs = uninterrupted()
    orders = [[int(row[0]) for batch in epoch for row in batch[0]] for epoch in epochs]
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    draws = {tuple(row[1:]) for epoch in epochs for batch in epoch for row in batch[0]}
    assert len(draws) == 4 * 23


def test_seek_equals_skipping_from_every_batch():
    expected = uninterrupted()
    loader = make()
    for epoch in range(3):
        for batch in range(len(loader) + 1):
            loader.seek(epoch, batch)
            assert contents(loader) == expected[epoch][batch:]
            assert contents(loader) == expected[epoch + 1]


def test_ranks_share_the_global_batches_out_and_draw_the_same_for_a_sample():
    alone = make(batch_size=6)
    ranks = [make(batch_size=3, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(2):
        parts = [contents(loader) for loader in ranks]
        for whole, *halves in zip(contents(alone), *parts, strict=True):
            both = halves[0][0] + halves[1][0]
            assert both[: len(whole[0])] == whole[0]
            assert halves[0][1] != halves[1][1]
    assert ranks[0].num_samples == 23
    assert ranks[0].batches_per_epoch == len(ranks[0]) == 4


def test_data_that_are_not_distributed_are_read_whole_by_each_rank():
    loader = make(rank=1, world_size=2, is_distributed=False)
    assert contents(loader) == uninterrupted()[0]


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, ResumableSequentialSampler),
        ({"shuffle": True}, ResumableRandomSampler),
        ({"sampler": ResumableSamplerType.RANDOM}, ResumableRandomSampler),
        ({"sampler": ResumableSamplerType.SEQUENTIAL}, ResumableSequentialSampler),
    ],
)
def test_params_choose_the_sampler(options, kind):
    loader, sampler = create_dataloader(
        Augmented(), {"batch_size": 3}, seed=1, **options
    )
    assert type(sampler) is kind
    first = contents((batch, batch) for batch in loader)
    loader.seek(0, 1)
    assert contents((batch, batch) for batch in loader) == first[1:]


def test_sampler_of_the_user_is_used_as_it_is():
    sampler = Backwards(range(5))
    loader, found = create_dataloader(Augmented(5), seed=1, sampler=sampler)
    assert found is sampler
    assert [int(batch[0, 0]) for batch in loader] == [4, 3, 2, 1, 0]


def test_random_seed_of_the_params_wins():
    assert contents(make(random_seed=3)) == uninterrupted()[0]
    assert contents(make(random_seed=4)) != uninterrupted()[0]


def test_error_in_a_worker_names_the_sample():
    class Broken(Augmented):
        def __getitem__(self, index):
            raise OSError("disk")

    loader, _ = create_dataloader(Broken(), seed=1, num_workers=1)
    with pytest.raises(OSError, match=r"disk[\s\S]*in sample 0 of batch 0"):
        list(loader)


@pytest.mark.parametrize("name", ["two", "persistent", "spawn"])
def test_group_signal_does_not_take_the_workers(name):
    loader = make(**WORKERS[name])
    iterator = iter(loader)  # the signals may come before the worker's first line
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    assert contents(iterator) == uninterrupted()[0]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize("persistent", [True, False])
def test_process_with_a_live_iterator_exits_at_once(persistent):
    script = f"""
        from torch.utils.data import TensorDataset
        import torch
        from helios.data.loader import create_dataloader
        loader, _ = create_dataloader(TensorDataset(torch.zeros(99)), seed=1,
            num_workers=1, persistent_workers={persistent})
        iterator = iter(loader)
        next(iterator)
        raise SystemExit(7)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    run = subprocess.run(command, timeout=60, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (7, "")


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


class Unsized(Dataset):
    def __getitem__(self, index):
        return index


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (Stream(), {}, "iterable data sets are not supported yet, got Stream"),
        ([], {}, "the data set is empty"),
        (Unsized(), {}, "Unsized has a length of 0, or none"),
        (Unsized(), {"sampler": ResumableSamplerType.RANDOM}, "of 0, or none"),
        ([1], {"drop_last": True, "batch_size": 2}, "1 samples fill no batch"),
        ([1, 2], {"drop_last": True, "world_size": 3}, "2 samples fill no batch"),
        ([1], {"sampler": Backwards([])}, "the data set is empty"),
    ],
)
def test_data_that_cannot_be_loaded_are_errors(dataset, options, message):
    with pytest.raises(DataError, match=message):
        create_dataloader(dataset, seed=1, **options)


def test_data_set_without_length_is_read_by_a_sampler_that_has_one():
    sampler = Backwards(range(3))
    loader, _ = create_dataloader(Unsized(), seed=1, sampler=sampler, batch_size=3)
    assert [batch.tolist() for batch in loader] == [[2, 1, 0]]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "`batch_size` must be >= 1, got 0"),
        ({"batch_size": True}, TypeError, "`batch_size` must be int, got True"),
        ({"batch_size": 2.0}, TypeError, "`batch_size` must be int, got 2.0"),
        ({"random_seed": "1"}, TypeError, r"`random_seed` must be int \| None"),
        ({"shuffle": 1}, TypeError, "`shuffle` must be bool, got 1"),
        ({"is_distributed": 0}, TypeError, r"`is_distributed` must be bool \| None"),
        ({"num_workers": -1}, ValueError, "`num_workers` must be >= 0"),
        ({"collate_fn": 3}, TypeError, "`collate_fn` must be .*Callable.*, got 3"),
        ({"sampler": "random"}, TypeError, "`sampler` must be .*SamplerType"),
        ({"sampler": [1]}, TypeError, r"got \[1\]; others are not supported yet"),
        ({"sampler": RandomSampler([1])}, TypeError, "others are not supported yet"),
        (
            {"sampler": ResumableSamplerType.RANDOM, "shuffle": True},
            ValueError,
            "`shuffle` must be False",
        ),
        ({"prefetch_factor": 2}, ValueError, "`prefetch_factor` needs `num_workers`"),
        ({"persistent_workers": True}, ValueError, "`persistent_workers` needs"),
        ({"timeout": 3}, ValueError, "`timeout` needs `num_workers` >= 1, got 3"),
        ({"timeout": -1, "num_workers": 1}, ValueError, "`timeout` must be >= 0"),
        ({"timeout": float("nan"), "num_workers": 1}, ValueError, "`timeout` must be"),
        ({"timeout": "1"}, TypeError, r"`timeout` must be int \| float, got '1'"),
        ({"multiprocessing_context": "fork"}, ValueError, "needs `num_workers`"),
        ({"prefetch_factor": 0, "num_workers": 1}, ValueError, "`prefetch_factor`"),
    ],
)
def test_wrong_params_are_errors_when_made(options, error, message):
    with pytest.raises(error, match=message):
        DataLoaderParams(**options)
    with pytest.raises(error, match=message):
        create_dataloader([1, 2], DataLoaderParams(), seed=1, **options)


def test_debug_mode_disarms_the_settings_of_workers():
    options = {
        "prefetch_factor": 2,
        "persistent_workers": True,
        "timeout": 3,
        "multiprocessing_context": "fork",
        "debug_mode": True,
    }
    for num_workers in 0, 4:
        loader = make(num_workers=num_workers, **options)
        assert loader.num_workers == 0
        assert contents(loader) == uninterrupted()[0]


def test_start_method_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="start method"):
        make(num_workers=1, multiprocessing_context="x")


def test_params_go_through_a_dictionary():
    params = DataLoaderParams(batch_size=3, sampler=ResumableSamplerType.RANDOM)
    assert DataLoaderParams.from_dict(params.to_dict()) == params
    assert list(params.to_dict()) == [
        "random_seed",
        "batch_size",
        "shuffle",
        "num_workers",
        "pin_memory",
        "drop_last",
        "is_distributed",
        "sampler",
        "collate_fn",
        "prefetch_factor",
        "persistent_workers",
        "pin_memory_device",
        "timeout",
        "multiprocessing_context",
        "debug_mode",
    ]


@pytest.mark.parametrize(
    ("name", "nearest"), [("batchsize", "batch_size"), ("workers", "num_workers")]
)
def test_unknown_parameter_is_an_error_that_names_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"`{name}` is no .* nearest: `{nearest}`"):
        DataLoaderParams.from_dict({name: 1})


def test_params_are_not_changed_by_the_loader():
    params = DataLoaderParams(batch_size=3)
    create_dataloader([1, 2], params, seed=1, shuffle=True)
    assert params == DataLoaderParams(batch_size=3)
