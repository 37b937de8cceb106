"""The loader: the same batches whatever loads them, from wherever it begins."""

import functools
import gc
import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from itertools import chain

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
)
from torch.utils.data._utils import signal_handling

from helios.data.loader import DataLoaderParams, create_dataloader
from helios.data.samplers import (
    ResumableRandomSampler,
    ResumableSampler,
    ResumableSamplerType,
    ResumableSequentialSampler,
)
from helios.data.seeding import sample_rng
from helios.errors import DataError
from helios.rng import capture_rng, seed_rngs
from helios.workers import awaited, end_workers

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
    "forkserver": {
        "num_workers": 2,
        "persistent_workers": True,
        "multiprocessing_context": "forkserver",
    },
    "debug": {"num_workers": 2, "persistent_workers": True, "debug_mode": True},
}


SLOW_TO_START = ["spawn", "forkserver"]


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


class Fetching(Augmented):
    """Fetches batches, and draws for a batch as a whole."""

    def __getitems__(self, indices):
        noise = super().__getitem__(0)
        return [noise + index for index in indices]


class OwnNumbers(Augmented):
    """Item i is i and draws of the sample's own generators."""

    def __getitem__(self, index):
        numpy, generator = sample_rng()
        draws = numpy.normal(), torch.randn(2, generator=generator).tolist()
        return torch.tensor([float(index), draws[0], *draws[1]], dtype=torch.float64)


def own_and_mixed(items):
    """Collate as `mixed` does, and add draws of the batch's own generators."""
    rows, draws = mixed(items)
    numpy, generator = sample_rng()
    own = numpy.normal(), torch.randn((), generator=generator).item()
    return rows, torch.cat([draws, torch.tensor(own)])


def transform(rows):
    """Add noise to rows of `datasets`: batches of them."""
    noise = random.random() + np.random.standard_normal() + torch.randn(()).item()
    return {"x": [torch.tensor([x, noise], dtype=torch.float64) for x in rows["x"]]}


def mixed_columns(rows):
    return mixed([row["x"] for row in rows])


def table():
    columns = {"x": [float(i) for i in range(23)]}
    return datasets.Dataset.from_dict(columns)


KINDS = {
    "fetching": (Fetching, mixed),
    "own_numbers": (OwnNumbers, own_and_mixed),
    "concatenated": (lambda: ConcatDataset([Augmented(11), Fetching(12)]), mixed),
    "subset": (lambda: Subset(Augmented(40), range(1, 24)), mixed),
    "nested": (
        lambda: ConcatDataset(
            [
                Subset(ConcatDataset([Fetching(9), OwnNumbers(9)]), range(3, 15)),
                Subset(Subset(Augmented(), range(22, 2, -1)), range(11)),
            ]
        ),
        own_and_mixed,
    ),
    "subset_of_fetching": (
        lambda: Subset(Subset(Fetching(), range(22, -1, -1)), range(23)),
        mixed,
    ),
    "datasets": (lambda: table().with_transform(transform), mixed_columns),
}


@pytest.mark.parametrize(
    ("kind", "workers"),
    [(kind, workers) for kind in KINDS for workers in ("two", "persistent")]
    + [(kind, workers) for kind in ("nested", "datasets") for workers in SLOW_TO_START],
)
def test_draws_are_those_of_one_process_in_any_worker(kind, workers):
    make_data, collate_fn = KINDS[kind]
    options = {"batch_size": 4, "shuffle": True, "collate_fn": collate_fn, "seed": 3}
    alone, _ = create_dataloader(make_data(), **options)
    expected = [contents(alone) for _ in range(2)]
    drawn = [row for epoch in expected for _, row in epoch]
    assert len(set(map(str, drawn))) == 12
    loader, _ = create_dataloader(make_data(), **options, **WORKERS[workers])
    state = rng_state()
    assert [contents(loader) for _ in range(2)] == expected
    loader.seek(1, 2)
    assert contents(loader) == expected[1][2:]
    assert rng_state() == state


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
    create_dataloader(Augmented(5), seed=1, sampler=sampler)  # and forgotten
    loader, found = create_dataloader(Augmented(5), seed=1, sampler=sampler)
    assert found is sampler
    assert len(pickle.loads(pickle.dumps(sampler))) == 5
    assert [int(batch[0, 0]) for batch in loader] == [4, 3, 2, 1, 0]


def test_sampler_of_the_user_serves_several_loaders():
    sampler = Backwards(range(8))
    loaders = [
        create_dataloader(Augmented(8), seed=1, sampler=sampler, batch_size=size)[0]
        for size in (2, 4)
    ]
    for batch_size, loader in zip((2, 4), loaders, strict=True):
        found = [batch[:, 0].tolist() for batch in loader]
        assert [len(batch) for batch in found] == [batch_size] * (8 // batch_size)
        assert list(chain(*found)) == [7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind", ["unpicklable", "group"])
def test_error_that_a_worker_cannot_send_arrives(num_workers, kind):
    def fail():
        if kind == "group":
            raise ExceptionGroup("several", [OSError("gone")])
        raise type("NoSuchKey", (OSError,), {})("gone")

    class Broken(Augmented):
        def __getitem__(self, index):
            fail()

    class BrokenStream(IterableDataset):
        def __iter__(self):
            yield 0
            fail()

    for dataset in Broken(), BrokenStream():
        loader, _ = create_dataloader(dataset, seed=1, num_workers=num_workers)
        with pytest.raises((OSError, ExceptionGroup, DataError)) as caught:
            list(loader)
        text = "".join(traceback.format_exception(caught.value))
        assert "gone" in text
        assert re.search(r"in sample [01] ", text)


def test_random_seed_of_the_params_wins():
    assert contents(make(random_seed=3)) == uninterrupted()[0]
    assert contents(make(random_seed=4)) != uninterrupted()[0]


def test_error_in_a_worker_names_the_sample():
    class Broken(Augmented):
        def __getitem__(self, index):
            raise OSError("disk")

    loader, _ = create_dataloader(Broken(), seed=1, num_workers=1)
    with pytest.raises(OSError, match=r"disk[\s\S]*in sample 0 \(epoch 0, batch 0\)"):
        list(loader)


class Deadly(Augmented):
    """Its worker dies at sample 12, as `end` says, once `may_end` is set."""

    def __init__(self, end):
        super().__init__(24)
        self.end, self.may_end = end, multiprocessing.Event()

    def __getitem__(self, index):
        if index == 12 and self.end is not None:
            self.may_end.wait()
            self.end()
        return super().__getitem__(index)


def kill_itself():
    os.kill(os.getpid(), signal.SIGKILL)


def overflow():
    os.kill(os.getpid(), signal.SIGSEGV)


def deadly(end=None, **options):
    options = {"batch_size": 2, "num_workers": 2, "collate_fn": mixed, **options}
    dataset = Deadly(end)
    return dataset, create_dataloader(dataset, seed=3, **options)[0]


@functools.cache
def undisturbed():
    return contents(deadly(num_workers=0)[1])


ENDS = {
    "killed": (kill_itself, r"signal SIGKILL, as where memory is short"),
    "exited": (lambda: os._exit(3), "exit status 3"),
    "ended": (lambda: os._exit(0), "exit status 0"),
    "crashed": (overflow, "signal SIGSEGV"),
}


@pytest.mark.parametrize("end", ENDS)
def test_death_of_a_worker_names_its_reason_and_what_it_loaded(end):
    act, reason = ENDS[end]
    dataset, loader = deadly(act)
    batches = iter(loader)
    found = [next(batches) for _ in range(5)]
    dataset.may_end.set()
    began = time.monotonic()
    with pytest.raises(DataError) as caught:
        found += batches
    assert time.monotonic() - began < 4  # torch by itself looks every 5 s
    # What it had loaded before may not have come: its number is not certain.
    assert re.fullmatch(
        rf"worker 0 of the loader died \({reason}\) while it had to load "
        r"samples \[12, 13\] \(epoch 0, batch 6\), then "
        r"samples \[16, 17\] \(epoch 0, batch 8\)(, then .*batch 10\))?; "
        "the run can be started again from the batch before",
        str(caught.value),
    )
    assert contents(found) == undisturbed()[: len(found)]
    assert len(found) in (5, 6)


@pytest.mark.parametrize("persistent", [False, True])
def test_death_of_a_worker_is_raised_by_a_fetch_and_not_in_a_step(persistent):
    dataset, loader = deadly(kill_itself, persistent_workers=persistent)
    before = multiprocessing.active_children()
    batches = iter(loader)
    started = set(multiprocessing.active_children()) - set(before)
    worker = min(started, key=lambda child: child.pid)
    found = [next(batches) for _ in range(5)]
    # The step: with torch's own handler of SIGCHLD this raises.
    dataset.may_end.set()
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    found.append("the step is done")
    with pytest.raises(DataError, match=r"worker 0 .*SIGKILL.* load samples \[12, 1"):
        list(batches)
    # And once only.
    assert contents(deadly()[1]) == undisturbed()


@pytest.mark.parametrize("persistent", [False, True])
def test_after_the_death_of_a_worker_loaders_go_on_from_the_same_batch(persistent):
    dataset, loader = deadly(kill_itself, persistent_workers=persistent)
    dataset.may_end.set()
    found = []
    with pytest.raises(DataError):
        found.extend(loader)
    done = len(found)
    _, other = deadly(persistent_workers=persistent)
    other.seek(0, done)
    assert contents(other) == undisturbed()[done:]
    loader.seek(0, 7)  # past the deadly sample
    assert contents(loader) == undisturbed()[7:]


@pytest.mark.parametrize("anew", [False, True])
def test_what_a_loader_waits_for_is_told_to_other_threads_until_it_has_come(anew):
    dataset, loader = deadly(lambda: None, persistent_workers=True)
    what = "worker 0 of the loader: samples [12, 13] (epoch 0, batch 6)"
    told, until_s = [], time.monotonic() + 30

    def ask():
        while what not in told and time.monotonic() < until_s:
            told.append(awaited())
        dataset.may_end.set()

    batches = iter(loader)
    if anew:  # before a persistent worker has done all that it was asked for
        what = "the workers of the loader"
        for _ in range(5):
            next(batches)
        loader.seek(0)
    asking = threading.Thread(target=ask)
    asking.start()
    found = contents(loader if anew else batches)
    asking.join()
    assert told[-1] == what
    assert awaited() == ""
    assert found == undisturbed()


def test_death_of_a_worker_between_epochs_is_raised_by_the_next():
    before = multiprocessing.active_children()
    _, loader = deadly(persistent_workers=True)
    assert contents(loader) == undisturbed()
    worker = (set(multiprocessing.active_children()) - set(before)).pop()
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(DataError, match=r"died \(signal SIGKILL.* to load nothing"):
        iter(loader)
    loader.seek(0, 3)
    assert contents(loader) == undisturbed()[3:]


def test_death_of_a_worker_ends_the_others():
    before = multiprocessing.active_children()
    dataset, loader = deadly(kill_itself, persistent_workers=True)
    dataset.may_end.set()
    with pytest.raises(DataError) as caught:
        list(loader)
    assert set(multiprocessing.active_children()) <= set(before)
    assert caught.tb is not None  # which keeps the loader's iterator


class Cut:
    """Ends its sender where it is received, which fails, as that of a tensor would."""

    def __reduce__(self):
        return cut_off, (os.getpid(),)


def cut_off(pid):
    os.kill(pid, signal.SIGKILL)
    raise ConnectionResetError


def test_death_of_a_worker_that_is_felt_as_a_broken_connection_is_named():
    _, loader = deadly(num_workers=1, collate_fn=lambda _: Cut())
    with pytest.raises(DataError, match="signal SIGKILL"):
        list(loader)


class Dying:
    """Ends its sender where it is received, while a file is being opened there."""

    def __reduce__(self):
        return open_file, (os.getpid(),)


def open_file(pid):
    def opener(*args):
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return os.open(*args)

    with open(os.devnull, opener=opener):
        pass


def test_death_of_a_worker_takes_nothing_along_where_it_is_noticed():
    # An error that came out of `opener` would leave the file to the collector.
    _, loader = deadly(num_workers=1, collate_fn=lambda _: Dying())
    batches = iter(loader)
    assert next(batches) is None
    with pytest.raises(DataError, match="signal SIGKILL"):
        list(batches)


class Process:
    """As `end_workers` wants it."""

    def __init__(self, pid):
        self.pid = pid

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

    def join(self):
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)


class Ending:
    """Has another loader's workers ended where it is received, on another thread."""

    def __reduce__(self):
        return end_left, ()


LEFT = []


def end_left():
    # As the collector does, which may run on any thread.
    thread = threading.Thread(target=end_workers, args=LEFT)
    thread.start()
    thread.join()


@pytest.mark.usefixtures("handler_of_children")
def test_workers_that_are_ended_with_their_iterator_are_no_deaths():
    # Of a user, who passes the signal on to torch.
    signal.signal(
        signal.SIGCHLD, lambda *_: signal_handling._error_if_any_worker_fails()
    )
    left = deadly(num_workers=1, persistent_workers=True)[1]
    next(iter(left))
    (worker,) = left._iterator._workers
    LEFT[:] = id(left._iterator), [Process(worker.pid)]
    found = list(deadly(num_workers=1, collate_fn=lambda _: Ending())[1])
    assert found == [None] * len(found)
    LEFT.clear()
    del left  # torch must not complain either
    gc.collect()


class Interrupted(Process):
    """One whose end a handler of SIGCHLD interrupts."""

    def join(self):
        super().join()
        raise RuntimeError("another worker has died")


def test_all_workers_are_ended_where_a_handler_of_the_user_raises():
    left = deadly(persistent_workers=True)[1]
    next(iter(left))
    workers = left._iterator._workers
    end_workers(id(left._iterator), [Interrupted(worker.pid) for worker in workers])
    for worker in workers:
        worker.join(10)
        assert worker.exitcode == -signal.SIGKILL


def test_error_of_the_user_is_no_death(tmp_path):
    def read(items):
        return (tmp_path / "missing").read_bytes()

    with pytest.raises(FileNotFoundError, match="in collating samples"):
        list(deadly(collate_fn=read)[1])


def test_death_of_a_worker_that_loads_a_stream_is_named():
    class DeadlyStream(IterableDataset):
        def __iter__(self):
            yield from range(5)
            os._exit(4)

    loader, _ = create_dataloader(DeadlyStream(), seed=1, num_workers=1, batch_size=2)
    with pytest.raises(DataError, match=r"exit status 4\).* batch 2 of the stream"):
        list(loader)


class Lazy(Dataset):
    """Complex numbers, conjugated or negated where somebody looks at them."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        value = torch.tensor([complex(index, index + 1)])
        return value.conj() if index % 2 else value.conj().imag


@pytest.mark.parametrize("name", ["two", "spawn"])
def test_lazily_conjugated_tensors_come_as_what_they_show(name):
    found = create_dataloader(Lazy(), collate_fn=first_of, **WORKERS[name])[0]
    assert [batch.tolist() for batch in found] == [[-1], [1 - 2j], [-3], [3 - 4j]]


def first_of(items):
    return items[0]


@pytest.fixture
def handler_of_children():
    """Puts the handler of SIGCHLD back."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.usefixtures("handler_of_children")
def test_handler_of_the_user_is_left_alone():
    heard = []

    def handler(number, frame):
        heard.append(number)

    signal.signal(signal.SIGCHLD, handler)
    assert contents(make(num_workers=1)) == uninterrupted()[0]
    assert signal.getsignal(signal.SIGCHLD) is handler
    heard.clear()
    signal.raise_signal(signal.SIGCHLD)
    assert heard == [signal.SIGCHLD]


@pytest.mark.parametrize("before", ["nothing", "a loader of torch"])
def test_handler_that_the_user_had_before_is_called_at_once(before):
    script = f"""
        import signal, subprocess
        heard = []
        signal.signal(signal.SIGCHLD, lambda number, frame: heard.append(number))
        import torch
        from torch.utils.data import DataLoader, TensorDataset
        from helios.data import create_dataloader
        dataset = TensorDataset(torch.arange(9))
        if {before != "nothing"}:
            assert len(list(DataLoader(dataset, num_workers=1))) == 9
        loader, _ = create_dataloader(dataset, num_workers=1, collate_fn=list)
        batches = iter(loader)
        next(batches)
        before = len(heard)
        subprocess.run(["true"])
        assert len(heard) == before + 1, heard
        assert len(list(batches)) == 8
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_end_of_another_child_is_no_error(handler_of_children):
    batches = iter(make(num_workers=2))
    found = [next(batches)]
    subprocess.run(["false"], check=False)
    found.append(next(batches))
    process = multiprocessing.Process(target=os._exit, args=(5,))
    process.start()
    process.join()
    assert contents(found) + contents(batches) == uninterrupted()[0]


@pytest.mark.parametrize("name", ["none", "two"])
def test_two_iterations_at_once_get_their_own_batches(name):
    loader = make(**WORKERS[name])
    pairs = list(zip(loader.fetch(), loader.fetch(), strict=True))
    for epoch, iteration in enumerate(zip(*pairs, strict=True)):
        assert contents(loaded.data for loaded in iteration) == uninterrupted()[epoch]
        for number, loaded in enumerate(iteration):
            assert loaded.number == number
            assert loaded.data[0][:, 0].tolist() == list(loaded.indices)


@pytest.mark.parametrize("name", ["two", "persistent", "spawn", "forkserver"])
def test_group_signal_does_not_take_the_workers(name):
    loader = make(**WORKERS[name])
    before = multiprocessing.active_children()
    iterator = iter(loader)  # the signals may come before the worker's first line
    for worker in set(multiprocessing.active_children()) - set(before):
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    assert contents(iterator) == uninterrupted()[0]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


class Garbage:
    """In a cycle with itself; tells where it is let go of."""

    def __init__(self, path):
        self.path, self.self = path, self

    def __del__(self):
        with open(self.path, "a") as file:
            print(os.getpid(), file=file)


class Collecting(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        gc.collect()
        return index, int(gc.isenabled())


@pytest.mark.parametrize("collects", [True, False])
def test_worker_leaves_the_garbage_of_its_parent_alone(tmp_path, collects):
    path = tmp_path / "deleted"
    gc.collect()
    try:
        if not collects:
            gc.disable()
        Garbage(path)
        loader, _ = create_dataloader(Collecting(), {"num_workers": 1})
        assert [batch[1].item() for batch in loader] == [1, 1]
        assert gc.isenabled() == collects
    finally:
        gc.enable()
    gc.collect()
    assert path.read_text().split() == [str(os.getpid())]


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
        ([], {}, "the data set is empty"),
        (Unsized(), {}, "Unsized has a length of 0, or none"),
        (Unsized(), {"sampler": ResumableSamplerType.RANDOM}, "of 0, or none"),
        ([1], {"drop_last": True, "batch_size": 2}, "1 samples fill no batch"),
        ([1, 2], {"drop_last": True, "world_size": 3}, "2 samples fill no batch"),
        ([1], {"sampler": Backwards([])}, "the sampler is empty: Backwards"),
        ([1], {"sampler": []}, "the sampler is empty: list"),
    ],
)
def test_data_that_cannot_be_loaded_are_errors(dataset, options, message):
    with pytest.raises(DataError, match=message):
        create_dataloader(dataset, seed=1, **options)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (Stream(), {"shuffle": True}, "`shuffle` must be left out .*Stream"),
        (Stream(), {"sampler": [1]}, "`sampler` must be left out .*Stream"),
        (
            range(9),
            {"sampler": [[1, 2], [3]], "batch_size": 2},
            r"`batch_size` must be left out with a batch sampler \(list\), got 2",
        ),
    ],
)
def test_parameters_that_do_not_suit_the_data_are_errors(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        create_dataloader(dataset, seed=1, **options)


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        ([4, 1, 3], [[4], [1], [3]]),
        (torch.tensor([4, 1, 3]), [[4], [1], [3]]),
        ([[4, 1], [3], [0, 2, 1]], [[4, 1], [3], [0, 2, 1]]),
        (BatchSampler(range(5), 3, drop_last=True), [[0, 1, 2]]),
    ],
)
def test_any_sampler_and_batch_sampler_is_used_and_can_be_sought(sampler, expected):
    loader, _ = create_dataloader(range(5), seed=1, sampler=sampler)
    for _ in range(2):
        assert [batch.tolist() for batch in loader] == expected
    loader.seek(1, 1)
    assert [batch.tolist() for batch in loader] == expected[1:]


def test_random_sampler_of_torch_repeats_its_epochs():
    loader, _ = create_dataloader(range(9), seed=1, sampler=RandomSampler(range(9)))
    epochs = [[int(batch) for batch in loader] for _ in range(2)]
    assert epochs[0] != epochs[1]
    for epoch in 1, 0:
        loader.seek(epoch, 4)
        assert [int(batch) for batch in loader] == epochs[epoch][4:]


def test_data_set_without_length_is_read_by_a_sampler_that_has_one():
    sampler = Backwards(range(3))
    loader, _ = create_dataloader(Unsized(), seed=1, sampler=sampler, batch_size=3)
    assert [batch.tolist() for batch in loader] == [[2, 1, 0]]


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


def test_params_are_not_changed_by_the_loader():
    params = DataLoaderParams(batch_size=3)
    create_dataloader([1, 2], params, seed=1, shuffle=True)
    assert params == DataLoaderParams(batch_size=3)
