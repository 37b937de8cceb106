"""Data sets of `datasets` and `torchdata`, on disk and in streams, resume exactly.

The packages are imported in the tests, once their environment is set.
"""

import asyncio
import functools
import gc
import random
from itertools import chain

import numpy as np
import pytest
import torch
from support import AugmentedDataset, Case, StopAt, digest
from support.data import random_collate
from support.kinds import KindData, KindModel
from torch.utils import data

from helios.checkpoint.codec import Encoder, decode
from helios.data import sample_rng
from helios.data.loader import create_dataloader

# `datasets` leaves files (of CSV) and event loops open where it is stopped half-way.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

LENGTH = 26  # in four files, the last one of which is shorter
OPTIONS = {
    "total_steps": 3,
    "valid_frequency": 2,
    "print_frequency": 2,
    "accumulation_steps": 2,
}
# Inside of the first and of the second epoch, and at the end of that one.
STOPS = [[StopAt(batch=2), StopAt(batch=9), StopAt(validation=0)]]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Rows in Arrow, Parquet and CSV files; `datasets` writes nowhere else."""
    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        for name in "HF_HOME", "HF_DATASETS_CACHE", "HF_MODULES_CACHE":
            patch.setenv(name, str(folder / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        import datasets

        # Another test may have imported it before.
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        datasets.disable_progress_bars()
        inputs = torch.randn(LENGTH, 4, generator=torch.Generator().manual_seed(5))
        rows = [
            {"index": i, **{f"x{j}": x for j, x in enumerate(row)}}
            for i, row in enumerate(inputs.tolist())
        ]
        whole = datasets.Dataset.from_list(rows)
        whole.save_to_disk(folder / "arrow", num_shards=4)
        for number in range(4):
            part = datasets.Dataset.from_list(rows[number * 7 : number * 7 + 7])
            part.to_parquet(folder / f"{number}.parquet")
            part.to_csv(folder / f"{number}.csv")
        yield folder


@pytest.fixture(autouse=True)
def leftovers():
    """Closes what `datasets` leaves open while that may be said of it."""
    yield
    gc.collect()


def streamed(folder, kind="parquet"):
    from datasets import load_dataset

    files = "arrow/*.arrow" if kind == "arrow" else f"*.{kind}"
    found = {"data_files": str(folder / files), "cache_dir": str(folder / "cache")}
    return load_dataset(kind, streaming=True, split="train", **found)


def stored_rows(folder, form=None):
    from datasets import load_from_disk

    return load_from_disk(folder / "arrow").with_format(form)


def noisy(row):
    noise = random.uniform(0.0, 0.1) + np.random.normal(0.0, 0.1) + torch.randn(())
    return {**row, "x0": row["x0"] + noise.item()}


def noisy_batch(rows):
    shift = random.random() + np.random.random() + torch.rand(()).item()
    rows["x0"] = [x + shift + random.random() for x in rows["x0"]]
    return rows


def collate(rows):
    items = []
    for row in rows:
        inputs = torch.stack([torch.as_tensor(row[f"x{j}"]) for j in range(4)]).float()
        items.append((int(row["index"]), inputs, inputs.sum().sign()))
    return random_collate(items)


def case_of(make, **params):
    params = {"collate_fn": collate, **params}
    return Case(KindModel, lambda: KindData(make, **params), **OPTIONS)


# Whole runs.


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_stored_rows_resume_exactly(tmp_path, folder, form, num_workers):
    case = case_of(
        lambda: stored_rows(folder, form), shuffle=True, num_workers=num_workers
    )
    case.check(tmp_path, STOPS)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stored_rows_with_a_random_transform_resume_exactly(
    tmp_path, folder, num_workers
):
    def make():
        rows = stored_rows(folder)
        rows.set_transform(noisy_batch)
        return rows

    case = case_of(make, shuffle=True, num_workers=num_workers)
    case.check(tmp_path, STOPS)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["parquet", "csv", "arrow"])
def test_streams_of_files_resume_exactly(tmp_path, folder, kind, num_workers):
    case = case_of(lambda: streamed(folder, kind).map(noisy), num_workers=num_workers)
    case.check(tmp_path, STOPS)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["parquet", "csv", "arrow"])
def test_shuffled_streams_of_files_resume_exactly(tmp_path, folder, kind, num_workers):
    # From several Parquet files at a time, `datasets` ends with a sleep of 5 s.
    at_once = {"max_buffer_input_shards": 1} if kind == "parquet" else {}

    def make():
        rows = streamed(folder, kind).shuffle(seed=7, buffer_size=5, **at_once)
        return rows.map(noisy)

    case_of(make, num_workers=num_workers).check(tmp_path, STOPS)


def test_shuffled_stream_says_that_it_is_read_again(tmp_path, folder, capsys):
    case = case_of(lambda: streamed(folder, "arrow").shuffle(seed=7, buffer_size=5))
    case.run(tmp_path, StopAt(batch=3))
    case.run(tmp_path, StopAt())
    assert "12 samples are read again" in capsys.readouterr().err


def test_workers_may_change_at_a_resume_of_shards(tmp_path, folder):
    def part(root, workers, *callbacks):
        case = case_of(lambda: streamed(folder).map(noisy), num_workers=workers)
        return case.run(root, *callbacks)

    _, whole, _ = part(tmp_path / "whole", 2, StopAt())
    ids = []
    for workers, stop in (2, 3), (0, 10), (3, 12), (1, None):
        _, model, _ = part(tmp_path / "parts", workers, StopAt(batch=stop))
        ids += model.ids
    assert ids == whole.ids
    assert digest(model.state_dict()) == digest(whole.state_dict())


def mapped_nodes(sampler=data.RandomSampler):
    from torchdata import nodes

    rows = AugmentedDataset(LENGTH)
    indices = nodes.SamplerWrapper(sampler(range(LENGTH)))
    return nodes.Loader(nodes.Mapper(indices, rows.__getitem__))


def mixed_nodes():
    from torchdata import nodes

    rows = AugmentedDataset(LENGTH)
    sources = {
        "all": nodes.Mapper(nodes.IterableWrapper(range(20)), rows.__getitem__),
        "few": nodes.MapStyleWrapper(rows, data.RandomSampler(range(20, LENGTH))),
    }
    weights = {"all": 0.7, "few": 0.3}
    return nodes.Loader(nodes.MultiNodeWeightedSampler(sources, weights, seed=3))


class Buffered(data.IterableDataset):
    """Shuffles in a buffer, which is in its state, and so is its generator."""

    def __init__(self):
        self.rows, self.generator = AugmentedDataset(LENGTH), random.Random(4)
        self.position, self.buffer = 0, []

    def __iter__(self):
        while self.position < LENGTH or self.buffer:
            while self.position < LENGTH and len(self.buffer) < 5:
                self.buffer.append(self.position)
                self.position += 1
            drawn = self.generator.randrange(len(self.buffer))
            yield self.rows[self.buffer.pop(drawn)]
        self.position = 0

    def state_dict(self):
        own = self.generator.getstate()
        return {"at": self.position, "buffer": list(self.buffer), "generator": own}

    def load_state_dict(self, state):
        self.position, self.buffer = state["at"], list(state["buffer"])
        self.generator.setstate(state["generator"])


OF_TORCHDATA = {
    "mapped": mapped_nodes,
    "weighted": lambda: mapped_nodes(
        lambda rows: data.WeightedRandomSampler([1.0] * len(rows), len(rows))
    ),
    "mixed": mixed_nodes,
    "protocol": Buffered,
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("make", OF_TORCHDATA.values(), ids=OF_TORCHDATA)
def test_nodes_and_stateful_data_sets_resume_exactly(tmp_path, make, num_workers):
    case = case_of(make, collate_fn=random_collate, num_workers=num_workers)
    case.check(tmp_path, STOPS)


class Validated(KindData):
    """Validates on the same kind of data, too."""

    def setup(self):
        super().setup()
        self._add_valid_dataset(self.make(), self.params)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_validation_on_nodes_is_the_same_after_a_resume(tmp_path, num_workers):
    # A second validation must not go on from the first one, which a resume has not.
    options = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    case = Case(KindModel, lambda: Validated(mapped_nodes, **options), **OPTIONS)
    case.options = {**OPTIONS, "valid_frequency": 1}
    case.check(tmp_path, [[StopAt(batch=8)]])


# Pipelines, read by a loader.


def rows_of(numbers, shards=4):
    from datasets import Dataset

    return Dataset.from_dict({"i": list(numbers)}).to_iterable_dataset(shards)


def numbers(shards=4):
    return rows_of(range(LENGTH), shards)


def others():
    return rows_of(range(100, 100 + LENGTH), 2)


def drawn(row):
    return {**row, "n": random.random() + np.random.random() + torch.rand(()).item()}


def several(draw):
    """A batched map that draws a number for each row."""

    def function(rows):
        return {**rows, "n": [draw() for _ in rows["i"]]}

    return lambda: numbers().map(function, batched=True, batch_size=3)


async def waiting(row):
    await asyncio.sleep(0)
    return {"i": row["i"] + 1}


async def drawn_waiting(row):
    await asyncio.sleep(0)
    return drawn(row)


def joined(**options):
    from datasets import interleave_datasets

    return interleave_datasets([numbers(), others()], **options)


def end_to_end():
    from datasets import concatenate_datasets

    return concatenate_datasets([numbers(), others()])


def half_shuffled():
    from datasets import interleave_datasets

    return interleave_datasets([numbers().shuffle(seed=1, buffer_size=5), others()])


class Wrapped(data.IterableDataset):
    """A user's data set around one of `datasets`."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        yield from self.rows

    def set_epoch(self, epoch):
        self.rows.set_epoch(epoch)

    def state_dict(self):
        return self.rows.state_dict()

    def load_state_dict(self, state):
        self.rows.load_state_dict(state)


def in_batches():
    from torchdata import nodes

    drawing = nodes.Mapper(nodes.IterableWrapper(range(LENGTH)), lambda i: drawn({}))
    return nodes.Loader(nodes.Unbatcher(nodes.Batcher(drawing, 3, drop_last=False)))


def threaded():
    from torchdata import nodes

    indices = nodes.SamplerWrapper(data.RandomSampler(range(LENGTH)))
    return nodes.Loader(nodes.Prefetcher(nodes.Mapper(indices, str), 2))


CONTINUED = {
    "rows": numbers,
    "five_shards": lambda: numbers(5),
    "map": lambda: numbers().map(drawn),
    "filter": lambda: numbers().filter(lambda _: random.random() < 0.7).map(drawn),
    "batched_map": lambda: numbers().map(
        lambda rows: {"i": rows["i"] * 2}, batched=True, batch_size=3
    ),
    "batched_filter": lambda: numbers().filter(
        lambda rows: [i % 3 > 0 for i in rows["i"]], batched=True, batch_size=4
    ),
    "batches": lambda: numbers().batch(3, drop_last_batch=True),
    "waiting": lambda: numbers().map(waiting),
    "with_indices": lambda: numbers().map(lambda row, k: {"k": k}, with_indices=True),
    "skip_and_take": lambda: numbers().skip(3).take(17),
    "repeated": lambda: numbers().repeat(2),
    "torch": lambda: numbers().map(drawn).with_format("torch"),
    "numpy": lambda: numbers().with_format("numpy"),
    "shards_shuffled": lambda: numbers().shuffle(
        seed=1, buffer_size=1, max_buffer_input_shards=1
    ),
    "interleaved": joined,
    "interleaved_at_random": lambda: joined(
        probabilities=[0.7, 0.3], seed=3, stopping_strategy="all_exhausted"
    ).map(drawn),
    "wrapped": lambda: Wrapped(numbers()),
    "threaded_nodes": threaded,
}
REPLAYED = {
    "shuffled": lambda: numbers().shuffle(seed=1, buffer_size=6),
    "shuffled_map": lambda: numbers().shuffle(seed=1, buffer_size=6).map(drawn),
    "shards_joined": lambda: numbers().shuffle(seed=1, buffer_size=1),
    "concatenated": end_to_end,
    "half_shuffled": half_shuffled,
    "wrapped_shuffled": lambda: Wrapped(numbers().shuffle(seed=1, buffer_size=6)),
    "batched_random": several(random.random),
    "batched_numpy": several(np.random.random),
    "batched_torch": several(lambda: torch.rand(()).item()),
    "batched_own": several(lambda: sample_rng().numpy.random()),
    "drawn_batches": lambda: numbers().map(drawn).batch(2),
    "drawn_waiting": lambda: numbers().map(drawn_waiting),
    "nodes_in_batches": in_batches,
    "shuffled_nodes_in_batches": lambda: shuffled_nodes_that_draw(),
}


def plain(value):
    if isinstance(value, dict):
        return {name: plain(member) for name, member in value.items()}
    if isinstance(value, list):
        return [plain(member) for member in value]
    return value.tolist() if hasattr(value, "tolist") else value


def keep(items):
    return [plain(item) for item in items], random.random()


def make(dataset, **options):
    options = {"batch_size": 4, "collate_fn": keep, **options}
    return create_dataloader(dataset, seed=3, **options)[0]


def contents(loader):
    return [loaded[:-1] for loaded in loader.fetch()]


def stored(cursor):
    encoder = Encoder()
    return decode(encoder.encode(cursor, file="rank_0"), encoder.files)


def plain_batches(batches):
    return [batch[:-1] for batch in batches]


def check(kind, streams=2, **options):
    """Hold a resume at each batch against three epochs; how many were replayed."""
    loader, replayed = make(kind(), streams=streams, **options), []
    sizes = {name: options[name] for name in options if name == "batch_size"}
    epochs = [(list(loader.fetch()), loader.plan.next_epoch()) for _ in range(3)]
    for epoch, (batches, end) in enumerate(epochs):
        following = epochs[epoch + 1][0] if epoch < 2 else []
        for done in range(1, len(batches) + 1, 2):
            loader = make(kind(), streams=streams, **sizes)
            loader.seek(epoch, done, stored(batches[done - 1].cursor))
            if done < len(batches):
                replayed.append(loader.plan.replayed()[0])
            found = list(loader.fetch())
            assert plain_batches(found) == plain_batches(batches[done:])
            for more, batch in enumerate(found[:-1], done + 1):  # and once more
                again = make(kind(), streams=streams, **sizes)
                again.seek(epoch, more, stored(batch.cursor))
                assert contents(again) == plain_batches(batches[more:])
        if following:
            assert contents(loader) == plain_batches(following)
            loader = make(kind(), streams=streams, **sizes)
            loader.seek(epoch + 1, 0, stored(end))
            assert loader.plan.replayed() == (0, 0.0)
            assert contents(loader) == plain_batches(following)
    return replayed


@pytest.mark.parametrize("kind", CONTINUED.values(), ids=CONTINUED)
def test_pipelines_go_on_by_their_states(kind):
    assert not any(check(kind))


@pytest.mark.parametrize("name", ["shards_joined", "concatenated"])
def test_joined_shards_go_on_by_their_states_where_they_are_not_dealt_out(name):
    assert not any(check(REPLAYED[name], streams=1))


@pytest.mark.parametrize("kind", REPLAYED.values(), ids=REPLAYED)
def test_pipelines_whose_states_do_not_say_all_are_read_again(kind):
    assert all(check(kind))


@pytest.mark.parametrize("name", ["map", "interleaved", "wrapped"])
def test_pipelines_read_by_workers_go_on_in_the_main_process(name):
    assert not any(check(CONTINUED[name], num_workers=2))


def shuffled_nodes():
    from torchdata import nodes

    indices = nodes.SamplerWrapper(data.RandomSampler(range(LENGTH)))
    return nodes.Loader(nodes.Mapper(indices, lambda i: {"i": i}))


def shuffled_nodes_that_draw(size=3, first=0):
    from torchdata import nodes

    def draw(i):
        return {"i": i, "drawn": random.random() if i >= first else 0.0}

    indices = nodes.SamplerWrapper(data.RandomSampler(range(LENGTH)))
    drawing = nodes.Mapper(indices, draw)
    return nodes.Loader(nodes.Unbatcher(nodes.Batcher(drawing, size, drop_last=False)))


@pytest.mark.parametrize("first", [0, LENGTH - 2])
@pytest.mark.parametrize("batch_size", [2, 5])
@pytest.mark.parametrize("streams", [1, 2])
def test_nodes_that_draw_ahead_resume_exactly(first, batch_size, streams):
    kind = functools.partial(shuffled_nodes_that_draw, 6, first)
    check(kind, streams=streams, batch_size=batch_size)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    "kind",
    [
        lambda: numbers().shuffle(seed=1, buffer_size=LENGTH),
        shuffled_nodes,
        shuffled_nodes_that_draw,
    ],
    ids=["datasets", "nodes", "nodes that draw"],
)
def test_epochs_are_shuffled_anew(kind, num_workers):
    loader = make(kind(), num_workers=num_workers)
    orders = [[row["i"] for b in loader.fetch() for row in b.data[0]] for _ in range(3)]
    assert all(sorted(order) == list(range(LENGTH)) for order in orders)
    assert len(set(map(tuple, orders))) == 3


def test_workers_do_not_share_the_number_of_the_epoch():
    # They would set it at the same time, and add to it what it lacks.
    rows = numbers()
    loader = make(rows, num_workers=2)
    loader.seek(3)
    list(loader.fetch())
    assert rows.epoch == 0


def test_look_into_a_stream_before_training_takes_no_sample():
    expected = contents(make(numbers()))
    seen = numbers()
    iterator = iter(seen)
    next(iterator), next(iterator)
    loader = make(seen)
    assert contents(loader) == expected
    loader.seek(0)
    assert contents(loader) == expected


def indices(loaders):
    batches = chain(*(loader.fetch() for loader in loaders))
    return [row["i"] for batch in batches for row in batch.data[0][: batch.real]]


@pytest.mark.parametrize(
    ("shards", "workers", "ranks"),
    [(1, 2, 1), (4, 2, 2), (4, 4, 2), (3, 2, 2), (5, 0, 3), (2, 3, 3)],
)
def test_ranks_and_workers_share_a_stream_without_repeats(
    shards, workers, ranks, capfd
):
    loaders = [
        make(numbers(shards), num_workers=workers, rank=rank, world_size=ranks)
        for rank in range(ranks)
    ]
    assert sorted(indices(loaders)) == list(range(LENGTH))
    assert "Too many dataloader workers" not in capfd.readouterr().err


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_stream_that_the_user_split_by_node_is_not_split_again(shards, workers):
    from datasets.distributed import split_dataset_by_node

    def loader(rank):
        mine = split_dataset_by_node(numbers(shards), rank, 2)
        return make(mine, num_workers=workers, rank=rank, world_size=2)

    loaders = [loader(rank) for rank in range(2)]
    assert sorted(indices(loaders)) == list(range(LENGTH))
    assert all(found.plan.is_sharded for found in loaders)
    batches = list(loaders[1].fetch())
    again = loader(1)
    again.seek(1, 2, stored(batches[1].cursor))
    assert contents(again) == [batch[:-1] for batch in batches[2:]]


@pytest.mark.parametrize("ranks", [3, 4])  # which four shards cannot, and can go to
def test_shards_go_to_more_ranks_at_the_start_of_an_epoch(ranks):
    loader = make(numbers(), num_workers=0, streams=2)
    list(loader.fetch())
    cursor = stored(loader.plan.next_epoch())
    loaders = [make(numbers(), rank=rank, world_size=ranks) for rank in range(ranks)]
    for found in loaders:
        found.seek(1, 0, cursor)
    assert sorted(indices(loaders)) == list(range(LENGTH))
