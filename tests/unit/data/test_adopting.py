"""Ordinary loaders that are made resumable: the same batches, from anywhere."""

import itertools
import pickle

import pytest
import torch
from accelerate import Accelerator, DistributedType, skip_first_batches
from accelerate.data_loader import (
    BatchSamplerShard,
    DataLoaderShard,
    IterableDatasetShard,
)
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from helios.data import create_dataloader, make_resumable
from helios.data.adopting import EvenBatches
from helios.data.samplers import ResumableRandomSampler, ResumableSequentialSampler
from helios.errors import DataError, ResumeError


@pytest.fixture
def accelerator():
    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    config = DataLoaderConfiguration(use_seedable_sampler=True)
    yield Accelerator(cpu=True, dataloader_config=config)
    reset()


DATA = TensorDataset(torch.arange(11))


class Backwards(Sampler):
    """The samples from the last one on; in odd epochs without the very last."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(range(10 - self.epoch % 2, -1, -1))

    def __len__(self):
        return 11 - self.epoch % 2


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(11)[:, None])


def loaders():
    sampler = Backwards()
    yield {"batch_size": 3}
    yield {"batch_size": 3, "drop_last": True}
    yield {"batch_size": 4, "sampler": sampler}
    yield {"batch_sampler": BatchSampler(SequentialSampler(DATA), 2, False)}
    yield {"batch_sampler": [[0, 1, 2], [3], [4, 5]]}
    yield {"batch_size": 4, "num_workers": 1, "persistent_workers": True}
    yield {"batch_size": 3, "dataset": Stream()}
    yield {"batch_size": 3, "dataset": Stream(), "drop_last": True, "num_workers": 1}


def ids(batches):
    return [batch[0].flatten().tolist() for batch in batches]


def make(arguments):
    return DataLoader(**{"dataset": DATA, **arguments})


@pytest.mark.parametrize("number", range(8))
def test_batches_are_those_of_the_ordinary_loader_from_any_batch_on(number):
    arguments = list(loaders())[number]
    whole = ids(make(arguments))
    loader = make_resumable(make(arguments))
    states = [loader.state_dict()]
    found = []
    for batch in loader:
        found.append(batch)
        states.append(loader.state_dict())
    assert ids(found) == whole
    following = ids(loader)
    for done, state in enumerate(states):
        other = make_resumable(make(arguments))
        other.load_state_dict(pickle.loads(pickle.dumps(state)))
        assert ids(other) == whole[done:]
        assert ids(other) == following


@pytest.mark.parametrize(
    "arguments",
    [
        {"shuffle": True},
        {"shuffle": True, "generator": torch.Generator().manual_seed(1)},
        {"sampler": RandomSampler(DATA, replacement=True, num_samples=13)},
        {"sampler": SubsetRandomSampler(range(1, 10))},
    ],
)
def test_shuffles_depend_on_seed_and_epoch_alone(arguments):
    def orders(seed):
        loader = make_resumable(make({"batch_size": 2, **arguments}), seed=seed)
        return [ids(loader) for _ in range(3)]

    first = orders(4)
    assert len({str(order) for order in first}) == 3
    torch.rand(5)
    assert orders(4) == first
    assert orders(5) != first
    loader = make_resumable(make({"batch_size": 2, **arguments}), seed=4)
    loader.load_state_dict({"epoch": 2, "batch": 3, "cursor": None, "streams": 1})
    assert ids(loader) == first[2][3:]


def test_seed_that_was_set_is_the_default():
    set_seed(6)
    found = ids(make_resumable(make({"shuffle": True})))
    assert found == ids(make_resumable(make({"shuffle": True}), seed=6))


def test_iteration_that_was_broken_off_is_followed_by_the_next_epoch():
    loader = make_resumable(make({"batch_size": 3, "shuffle": True}), seed=1)
    epochs = [ids(loader) for _ in range(3)]
    again = make_resumable(make({"batch_size": 3, "shuffle": True}), seed=1)
    assert ids(itertools.islice(again, 2)) == epochs[0][:2]
    assert ids(again) == epochs[1]
    again.set_epoch(2)
    assert ids(again) == epochs[2]
    again.load_state_dict({"epoch": 1, "batch": 2, "cursor": None, "streams": 1})
    again.set_epoch(1)  # as scripts do before each epoch
    assert ids(again) == epochs[1][2:]


def test_prepared_loader_has_the_batches_and_draws_the_numbers_of_accelerate(
    accelerator,
):
    for arguments in (
        {"batch_size": 4, "shuffle": True},
        {"batch_size": 4, "shuffle": True, "drop_last": True},
        {"batch_size": 4, "generator": torch.Generator()},
        {"batch_size": 4, "num_workers": 1, "persistent_workers": True},
        {"batch_size": 3, "dataset": Stream()},
    ):
        torch.manual_seed(2)
        before = accelerator.prepare(make(arguments))
        whole = [ids(before) for _ in range(2)]
        state = torch.get_rng_state()
        torch.manual_seed(2)
        after = make_resumable(accelerator.prepare(make(arguments)))
        assert [ids(after) for _ in range(2)] == whole
        assert torch.equal(torch.get_rng_state(), state)
        assert accelerator.prepare(after) is after


def test_accelerate_knows_of_the_last_batch(accelerator):
    accelerator.gradient_state.plugin_kwargs["num_steps"] = 2
    loader = make_resumable(accelerator.prepare(make({"batch_size": 4})))
    seen = []
    for (batch,) in loader:
        with accelerator.accumulate():
            seen.append((accelerator.sync_gradients, len(batch)))
        assert accelerator.gradient_state.remainder == 3
    assert seen == [(False, 4), (True, 4), (True, 3)]
    assert not accelerator.gradient_state.in_dataloader


def test_place_is_saved_with_what_accelerate_saves(accelerator, tmp_path):
    def registered():
        accelerator._custom_objects.clear()
        loader = make_resumable(make({"batch_size": 2, "shuffle": True}), seed=1)
        accelerator.register_for_checkpointing(loader)
        return loader

    loader = registered()
    whole = [ids(loader) for _ in range(2)]
    loader = registered()
    list(loader)
    for number, _ in enumerate(loader):
        if number == 2:
            accelerator.save_state(str(tmp_path / "saved"))
            break
    loader = registered()
    accelerator.load_state(str(tmp_path / "saved"))
    assert ids(loader) == whole[1][3:]


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("length", [3, 8, 11, 12, 13, 17])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_get_the_batches_that_accelerate_deals_out(
    ranks, length, drop_last, is_split
):
    size = 2 * ranks if is_split else 2
    batches = BatchSampler(range(length), size, drop_last)
    if len(batches) < ranks and drop_last:
        return
    for rank in range(ranks):
        dealt = BatchSamplerShard(batches, ranks, rank, split_batches=is_split)
        for kind in (ResumableSequentialSampler, ResumableRandomSampler):
            sampler = kind(range(length), seed=1)
            order = list(sampler.order(0, 0))
            expected = [[order[i] for i in batch] for batch in dealt]
            plan = EvenBatches(
                sampler,
                batch_size=2,
                drop_last=drop_last,
                seed=1,
                rank=rank,
                world_size=ranks,
            )
            for first in range(len(expected) + 1):
                found = [list(found) for found, _, _ in plan.cut(0, first)]
                assert found == expected[first:]
            real = sum(real for _, real, _ in plan.cut(0, 0))
            assert real <= sum(map(len, expected))


def test_worker_init_fn_is_called_too():
    def init(worker_id):
        torch.utils.data.get_worker_info().dataset.dataset.tensors[0][0] = 77

    data = TensorDataset(torch.arange(4).share_memory_())
    arguments = {"dataset": data, "num_workers": 1, "worker_init_fn": init}
    assert ids(make_resumable(make(arguments)))[0] == [77]


class Own(DataLoader):
    def __iter__(self):
        return map(len, super().__iter__())


def shard(**options):
    batches = BatchSampler(SequentialSampler(DATA), 2, False)
    return DataLoaderShard(
        DATA, batch_sampler=BatchSamplerShard(batches, 2, 0, **options)
    )


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (lambda: [1], TypeError, "`dataloader` must be a torch DataLoader.* got list"),
        (lambda: Own(DATA), DataError, "a Own, whose own `__iter__` cannot be entered"),
        (lambda: DataLoader(DATA, batch_size=None), DataError, "has `batch_size=None`"),
        (lambda: DataLoader(Stream(), batch_size=None), DataError, "`batch_size=None`"),
        (lambda: create_dataloader(DATA)[0], DataError, "a loader of Helios already"),
        (
            lambda: skip_first_batches(DataLoader(DATA), 2),
            DataError,
            "leave out `skip_first_batches`",
        ),
        (lambda: shard(even_batches=False), DataError, "has `even_batches=False`"),
        (lambda: DataLoader(TensorDataset(torch.ones(0))), DataError, "is empty"),
    ],
)
def test_loaders_that_cannot_be_taken_over_are_refused(
    accelerator, loader, error, message
):
    with pytest.raises(error, match=message):
        make_resumable(loader())


def test_stream_of_accelerate_is_taken_out_of_what_shares_it_out(accelerator):
    shared = IterableDatasetShard(Stream(), 2, num_processes=1, process_index=0)
    loader = make_resumable(DataLoaderShard(shared, batch_size=2))
    assert ids(loader) == ids(DataLoader(Stream(), batch_size=2))
    assert accelerator.distributed_type is DistributedType.NO


def test_other_number_of_streams_is_refused():
    loader = make_resumable(make({"dataset": Stream(), "batch_size": 2}))
    with pytest.raises(ResumeError, match="was read in 2 streams, and is read in 1"):
        loader.load_state_dict({**loader.state_dict(), "streams": 2})
