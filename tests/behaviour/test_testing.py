"""The checks for users' tests find what they are for, and nothing else."""

import collections
import logging
import os
import random
import re
import resource
import time

import numpy as np
import pytest
import torch
from support import AugmentedDataset, IndexDataset, RandomData, RandomModel
from support.data import random_collate
from support.kinds import KINDS
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset

import helios
from helios.errors import DataError
from helios.rng import capture_rng
from helios.testing import assert_resumes_anywhere, check_dataset

HERE = {"num_workers": 0}
WAYS = pytest.mark.parametrize("way", [{}, HERE], ids=["worker", "here"])


def fault(dataset, params=None, **options):
    """What is said of a data set."""
    with pytest.raises(DataError) as caught:
        check_dataset(dataset, params, **options)
    return str(caught.value)


class Faulty(IndexDataset):
    """Twelve samples; what each is beside its index, `value` says."""

    def __init__(self, length=12):
        super().__init__(length)
        self.begin()

    def begin(self):
        pass

    def __getitem__(self, index):
        return index, {"value": self.value(index)}


class OwnNumpy(Faulty):
    def begin(self):
        self.rng = np.random.default_rng(0)

    def value(self, index):
        return self.rng.normal(size=3)


class OwnTorch(Faulty):
    def begin(self):
        self.parts = [torch.Generator()]

    def value(self, index):
        return torch.rand(2, generator=self.parts[0])


class OwnPython(Faulty):
    def begin(self):
        self.options = {"rng": random.Random(0)}

    def value(self, index):
        return self.options["rng"].random()


class OwnState(Faulty):
    def begin(self):
        self.rng = np.random.RandomState(0)

    def value(self, index):
        return self.rng.rand()


class Counter(Faulty):
    def begin(self):
        self.count = 0

    def value(self, index):
        self.count += 1
        return self.count


class Carried(Faulty):
    """Mixes the sample before in."""

    def begin(self):
        self.before = 0

    def value(self, index):
        mixed, self.before = (index, self.before), index
        return mixed


class Buffer(Faulty):
    """Draws no more than it needs, and keeps the rest."""

    def begin(self):
        self.drawn = torch.empty(0)

    def value(self, index):
        if len(self.drawn) == 0:
            self.drawn = torch.rand(5)
        first, self.drawn = self.drawn[0], self.drawn[1:]
        return first


class Curriculum(Faulty):
    """Changes in the middle of an epoch."""

    def begin(self):
        self.seen, self.level = set(), 0

    def value(self, index):
        self.seen.add(index)
        self.level = int(len(self.seen) > 6)
        return self.level


class Unordered(Faulty):
    """Keeps the last samples in a ring."""

    def begin(self):
        self.last = collections.deque(maxlen=2)

    def value(self, index):
        self.last.append(index)
        return list(self.last)


STATES = {
    "own_numpy": (OwnNumpy, "dataset.rng"),
    "own_torch": (OwnTorch, "dataset.parts[0]"),
    "own_python": (OwnPython, "dataset.options['rng']"),
    "own_state": (OwnState, "dataset.rng"),
    "counter": (Counter, "dataset.count"),
    "carried": (Carried, "dataset.before"),
    "buffer": (Buffer, "dataset.drawn"),
    "curriculum": (Curriculum, "dataset.level"),
    "ring": (Unordered, "dataset.last"),
}


@WAYS
@pytest.mark.parametrize(("make", "path"), STATES.values(), ids=STATES)
def test_state_that_changes_samples_is_found_and_named(make, path, way):
    found = fault(make(), **way)
    assert re.search(r"sample \d+: `item\[1\]\['value'\]", found), found
    assert f"`{path}`: " in found


class Clock(Faulty):
    def value(self, index):
        return time.perf_counter()


class Date(Faulty):
    def value(self, index):
        return time.time_ns()


class Fresh(Faulty):
    """An unseeded generator for each sample."""

    def value(self, index):
        return np.random.default_rng().random()


@WAYS
@pytest.mark.parametrize("make", [Clock, Date, Fresh])
def test_what_comes_from_outside_is_found_and_no_attribute_accused(make, way):
    found = fault(make(), **way)
    assert found.count("`item[1]['value']` was") == 8
    assert "(differences: 12)" in found
    assert "nothing that was found" in found


class Cache(Faulty):
    """Keeps what it has drawn once."""

    def begin(self):
        self.cache = {}

    def value(self, index):
        if index not in self.cache:
            self.cache[index] = random.random()
        return self.cache[index]


def test_cache_of_random_results_is_found():
    assert "`dataset.cache`: 0 entries, then 12 entries" in fault(Cache())


class Lazy(Faulty):
    """Draws something for all samples at the first one."""

    def value(self, index):
        if not hasattr(self, "offset"):
            self.offset = random.random()
        return self.offset


def test_random_value_made_at_first_use_is_found():
    found = fault(Lazy())
    assert "(differences: 12)" in found
    assert "`dataset`: a Lazy in the state" in found


def test_message_names_index_path_both_values_and_the_cure():
    found = fault(Counter(3), **HERE).splitlines()
    assert found[0].startswith("Counter gives other samples for the same random numb")
    assert re.fullmatch(
        r"  sample \d: `item\[1\]\['value'\]` was 1, and then 9", found[1]
    )
    assert found[4:6] == ["  what changed in it:", "  `dataset.count`: 0, then 9"]
    assert "sample_rng" in found[6]


# What is right.


class Plain(Dataset):
    """Samples of many types; NaN is the same as itself."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        numbers = np.array([index, None], dtype=object), np.float32(index)
        text = {"text": f"number {index}", "raw": b"\0", "set": {index}}
        return float("nan"), torch.tensor([torch.nan]), numbers, text, None


class Reused(IndexDataset):
    """Gives the same memory away for each sample."""

    def __init__(self, length):
        super().__init__(length)
        self.memory = torch.zeros(2)

    def __getitem__(self, index):
        return self.memory.copy_(torch.rand(2))


class Tree:
    """A sample that contains itself."""

    def __init__(self, value):
        self.children, self.value = [self], value


class Trees(IndexDataset):
    def __getitem__(self, index):
        return Tree(index)


RIGHT = {
    "augmented": lambda: AugmentedDataset(200),
    "one": lambda: IndexDataset(1),
    "list": lambda: [3, 1, 2],
    "plain": Plain,
    "reused": lambda: Reused(6),
    "trees": lambda: Trees(2),
    "subset": lambda: Subset(AugmentedDataset(9), [3, 1]),
    **{name: KINDS[name] for name in ("fetches_batches", "sample_rng", "concatenated")},
    **{name: KINDS[name] for name in ("stream", "sharded_stream", "stateful_stream")},
}


@WAYS
@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT)
def test_sound_data_sets_pass(make, way):
    assert check_dataset(make(), **way) is None


class Recording(IndexDataset):
    def __init__(self, length):
        super().__init__(length)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return index


def test_samples_are_spread_over_the_data_set_and_its_ends_are_among_them():
    dataset = Recording(1000)
    check_dataset(dataset, samples=10)
    assert sorted({*dataset.read}) == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    # The order of another epoch, then the other way round.
    first, second = dataset.read[:10], dataset.read[10:]
    assert sorted(first) == sorted(second)
    assert first not in (second, second[::-1])


def test_many_samples_need_few_open_files():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = max(map(int, os.listdir("/proc/self/fd"))) + 80
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
    try:
        assert check_dataset(AugmentedDataset(200), samples=200) is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_sampler_of_the_parameters_is_kept():
    dataset = Recording(10)
    check_dataset(dataset, {"sampler": [[7, 2], [5]]})
    assert {*dataset.read} == {2, 5, 7}


@WAYS
def test_random_numbers_of_the_caller_stay_as_they_are(way):
    def state():
        tree = capture_rng()
        return str(tree | {"torch": tree["torch"].tolist()})

    before = state()
    check_dataset(AugmentedDataset(5), collate_fn=random_collate, **way)
    fault(OwnNumpy(), **way)
    assert state() == before


@pytest.mark.parametrize("samples", [0, -1, 2.5, None])
def test_number_of_samples_must_be_one_at_least(samples):
    with pytest.raises(ValueError, match="`samples` must be an int >= 1, got"):
        check_dataset(IndexDataset(4), samples=samples)


def test_data_set_that_yields_nothing_is_refused():
    class Nothing(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(DataError, match="Nothing yields nothing"):
        check_dataset(Nothing())
    with pytest.raises(DataError, match="the data set is empty"):
        check_dataset(IndexDataset(0))


def test_parameters_of_a_training_are_taken():
    params = {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 2}
    params |= {"shuffle": True, "batch_size": 5, "drop_last": True}
    dataset = Recording(8)
    check_dataset(dataset, params)
    # Twice a whole batch; the other one is short, and dropped.
    assert len(dataset.read) == 10
    check_dataset(Recording(30), params, samples=3)
    check_dataset(AugmentedDataset(8), {"debug_mode": True})
    assert "`dataset.count`: 0, then " in fault(Counter(8), {"debug_mode": True})


def test_unknown_parameter_is_refused():
    with pytest.raises(ValueError, match="the nearest: `batch_size`"):
        check_dataset(IndexDataset(4), {"batchsize": 2})


class Broken(IndexDataset):
    def __getitem__(self, index):
        if index == 3:
            raise OSError("no such picture")
        return index


@WAYS
def test_exception_of_the_data_set_passes_through_and_names_the_sample(way):
    with pytest.raises(OSError, match="no such picture") as caught:
        check_dataset(Broken(6), **way)
    shown = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "Helios: in sample 3 (epoch 1, batch " in shown


# Wrappers, batches, collation.


def test_faulty_part_of_a_concatenation_is_named_by_the_outer_index():
    parts = [IndexDataset(5), Subset(OwnNumpy(), [4, 2]), IndexDataset(3)]
    found = fault(ConcatDataset(parts))
    assert sorted(re.findall(r"sample (\d+):", found)) == ["5", "6"]
    assert "`dataset.datasets[1].dataset.rng`: a Generator in the state" in found


class Transform:
    def __init__(self):
        self.rng = np.random.default_rng(1)

    def __call__(self, value):
        return value + self.rng.normal()


class Transformed(IndexDataset):
    def __init__(self, length):
        super().__init__(length)
        self.steps = [float, Transform()]

    def __getitem__(self, index):
        for step in self.steps:
            index = step(index)
        return index


def test_faulty_transform_inside_a_subset_is_named():
    found = fault(Subset(Transformed(9), range(2, 9)))
    assert "`dataset.dataset.steps[1].rng`: a Generator in the state" in found
    assert "sample 0: `item` was" in found
    assert "sample 7" not in found


class FetchedCounter(Counter):
    """Counts in batches."""

    def __getitems__(self, indices):
        self.count += 1
        return [(index, {"value": self.count}) for index in indices]


def test_state_of_a_data_set_that_fetches_batches_is_found():
    found = fault(FetchedCounter(20), batch_size=8)
    assert "(differences: 20)" in found
    assert "`dataset.count`: 0, then 6" in found


class Collate:
    """Keeps the batch before."""

    def __init__(self):
        self.before = 0

    def __call__(self, items):
        mixed, self.before = [*items, self.before], sum(items)
        return torch.tensor(mixed)

    method = __call__


@WAYS
@pytest.mark.parametrize("name", ["__call__", "method"])
def test_state_of_a_collate_function_is_found(name, way):
    collate = Collate()
    params = {"collate_fn": getattr(collate, name), "batch_size": 2}
    found = fault(IndexDataset(8), helios.DataLoaderParams(**params), **way)
    assert re.search(r"samples \[\d, \d\]: `batch\[2\]` was \d+, and then \d+", found)
    assert "`collate_fn.before`: 0, then " in found


def take_apart(items):
    """Collate, and leave nothing of the samples."""
    found = torch.tensor([item[1].pop("value") for item in items])
    items.clear()
    return found


def test_sample_is_named_where_a_collate_function_takes_the_samples_apart():
    found = fault(Counter(6), collate_fn=take_apart, batch_size=3)
    assert len(re.findall(r"sample \d: `item\[1\]\['value'\]` was", found)) == 6
    assert "batch" not in found.replace("`batch_size`", "")


class Zeros(Faulty):
    """Gives 0.0 and -0.0, and not in turn."""

    def begin(self):
        self.count = 0

    def value(self, index):
        self.count += 1
        sign = -1 if self.count % 3 else 1
        return torch.tensor([[1.0, 0.0 * sign]], dtype=torch.bfloat16)


def test_values_are_compared_in_bits():
    found = fault(Zeros(), **HERE)
    assert re.search(
        r"`item\[1\]\['value'\]\[0\]\[1\]` was -?0.0, and then -?0.0", found
    )


class Shapes(Faulty):
    """Grows from call to call."""

    def begin(self):
        self.count = 0

    def value(self, index):
        self.count += 1
        return torch.zeros(self.count, 2)


def test_shapes_that_differ_are_told():
    found = fault(Shapes(2), **HERE)
    assert (
        "was 'torch.float32, shape (1, 2)', and then 'torch.float32, shape (" in found
    )


class CountedTrees(Counter):
    def value(self, index):
        return Tree(super().value(index))


def test_samples_may_be_any_objects():
    assert re.search(r"`item\[1\]\['value'\]\S*\.value` was", fault(CountedTrees()))


class Swelling(Counter):
    """Its samples get longer and longer."""

    def value(self, index):
        return [0] * super().value(index)


def test_missing_part_of_a_sample_is_told():
    found = fault(Swelling(2), **HERE)
    assert re.search(r"\['value'\]\[\d\]` was 'nothing', and then 0", found)


class Circular(Counter):
    """Is reached from itself."""

    def begin(self):
        super().begin()
        self.me = {"me": self}


def test_changed_attribute_is_named_once():
    found = fault(Circular())
    assert found.count(": 0, then 24") == 1


class Sparse(OwnTorch):
    def value(self, index):
        return super().value(index).diag().to_sparse()


def test_sparse_tensors_are_compared():
    with torch.sparse.check_sparse_tensor_invariants():
        assert "`item[1]['value'][0][0]` was" in fault(Sparse(), **HERE)


# Streams.


class Stream(IterableDataset):
    """Yields numbers, and their sums so far, with noise."""

    def __iter__(self):
        self.total = 0
        for index in range(20):
            self.total += index
            yield index, self.total + random.random()


class OnceOnly(Stream):
    """Goes on where the last epoch has ended."""

    def __init__(self):
        self.source = iter(range(500))

    def __iter__(self):
        return ((index, random.random()) for index in self.source)


class Growing(Stream):
    """Is longer each time."""

    def __init__(self):
        self.length = 5

    def __iter__(self):
        self.length += 1
        yield from range(self.length)


class Stateful(Stream):
    """Knows where it is."""

    keys = ("position", "total")

    def __init__(self):
        self.position = self.total = 0

    def __iter__(self):
        while self.position < 20:
            self.position += 1
            self.total += random.randrange(9)
            yield self.position, self.total
        self.position = self.total = 0

    def state_dict(self):
        return {key: getattr(self, key) for key in self.keys}

    def load_state_dict(self, state):
        vars(self).update(state)


class Forgetful(Stateful):
    """Saves its position, and not the sum."""

    keys = ("position",)


class Late(Stateful):
    """Comes back one sample too late."""

    def load_state_dict(self, state):
        self.total = state["total"]
        self.position = state["position"] + (state["position"] > 0)


class LateIterator(Stream):
    """Its iterator saves the position, and not what it has read ahead."""

    def __iter__(self):
        return Shuffling()


class Shuffling:
    def __init__(self):
        self.position, self.buffer = 0, []

    def __iter__(self):
        return self

    def __next__(self):
        while self.position < 20 and len(self.buffer) < 3:
            self.buffer.append(self.position)
            self.position += 1
        if not self.buffer:
            raise StopIteration
        return self.buffer.pop(random.randrange(len(self.buffer)))

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


@WAYS
@pytest.mark.parametrize("make", [Stream, Stateful])
def test_sound_streams_pass(make, way):
    assert check_dataset(make(), **way) is None
    assert check_dataset(make(), batch_size=3, samples=10, **way) is None
    assert check_dataset(make(), samples=5, debug_mode=True, **way) is None


BAD_STREAMS = {
    "once": (OnceOnly, "sample 0: `item[0]` was"),
    "growing": (Growing, "there were 6 batches, and then "),
    "forgetful": (Forgetful, "sample 2: `item[1]` was"),
    "late": (Late, "sample 2: `item[0]` was 3, and then 4"),
    "iterator": (LateIterator, "sample 2: `item` was 0, and then 4"),
}


@WAYS
@pytest.mark.parametrize(("make", "message"), BAD_STREAMS.values(), ids=BAD_STREAMS)
def test_stream_that_cannot_be_entered_again_is_found(make, message, way):
    assert message in fault(make(), **way)


def test_samples_of_a_stream_are_numbered_across_batches():
    found = fault(Forgetful(), batch_size=3)
    assert re.findall(r"sample (\d+):", found) == list("01234567")


# Whole trainings.

OPTIONS = {"total_steps": 2, "use_cpu": True, "valid_frequency": 1}


def failure(*args, **options):
    """What is said of a training."""
    with pytest.raises(AssertionError) as caught:
        assert_resumes_anywhere(*args, **{**OPTIONS, **options})
    return str(caught.value)


def data():
    return RandomData(length=12)


@pytest.mark.parametrize("crash", [False, True], ids=["stopped", "crashed"])
@pytest.mark.parametrize("unit", ["epoch", "iteration"])
def test_sound_training_resumes_anywhere(crash, unit):
    options = {"train_unit": unit, "print_frequency": 1, "crash": crash}
    assert assert_resumes_anywhere(RandomModel, data, **OPTIONS | options) is None


class Unsaved(RandomModel):
    """Changes its loss by a number that it forgets."""

    def __init__(self):
        super().__init__("unsaved")
        self.strength, self.mean = 1.0, torch.zeros(2)

    def train_step(self, batch, state):
        self.strength *= 1.5
        self.mean[1] += 1
        ids, inputs, targets = batch
        super().train_step((ids, inputs * self.strength, targets), state)


def test_attribute_that_the_model_does_not_save_is_found_and_suspected():
    found = failure(Unsaved, data, stops=[2], print_frequency=1)
    head, _, causes = found.partition("what may be the cause:")
    assert "was stopped after the batches [2] does not end as without" in head
    assert "`model['networks']['net']['0.weight'][0][0]` is " in head
    assert "`log['loss of step 3']` is " in head
    assert "`model.strength` is 5.0625, and 11.390625 without a stop" in causes
    assert "`model.mean[1]` is 4.0, and 6.0 without a stop" in causes
    assert "heads" not in causes


def test_attribute_that_the_model_does_not_save_is_found_by_crashes():
    found = failure(Unsaved, data, stops=[4], crash=True)
    assert "that crashed after the batches [4] does" in found
    assert "`model.strength` is 3.375, and 11.390625 without a stop" in found


def test_crashes_before_the_first_checkpoint_lose_nothing_that_counts():
    options = {**OPTIONS, "chkpt_frequency": None, "stops": [1, 4], "crash": True}
    assert assert_resumes_anywhere(Unsaved, data, **options) is None


class FaultyData(helios.DataModule):
    def setup(self):
        self._add_train_phase(NoisyData(12), {"batch_size": 4})


class NoisyData(AugmentedDataset):
    """Draws from a generator of its own."""

    def __init__(self, length):
        super().__init__(length)
        self.rng = np.random.default_rng(0)

    def __getitem__(self, index):
        index, inputs, target = super().__getitem__(index)
        return index, inputs + np.float32(self.rng.normal()), target


@pytest.mark.parametrize("crash", [False, True], ids=["stopped", "crashed"])
def test_state_of_the_training_data_is_found_and_named(crash):
    found = failure(RandomModel, FaultyData, stops=[1, 4], crash=crash)
    assert "NoisyData gives other samples" in found
    assert "`dataset.rng`: a Generator in the state" in found


class Rising(RandomData):
    """Forgets how hard its data are."""

    def __init__(self):
        super().__init__(length=12)
        self.level = 0


class Leveled(RandomModel):
    """Has its data get harder."""

    def on_training_epoch_start(self, current_epoch):
        self.trainer.datamodule.level += 1

    def train_step(self, batch, state):
        ids, inputs, targets = batch
        level = self.trainer.datamodule.level
        super().train_step((ids, inputs * level, targets), state)


class CachedData(helios.DataModule):
    def setup(self):
        self._add_train_phase(Remembering(12), {"batch_size": 4})


class Remembering(AugmentedDataset):
    """Draws for each sample once."""

    def __init__(self, length):
        super().__init__(length)
        self.cache = {}

    def __getitem__(self, index):
        if index not in self.cache:
            self.cache[index] = super().__getitem__(index)
        return self.cache[index]


def test_cache_of_the_training_data_is_found_and_named():
    found = failure(RandomModel, CachedData, stops=[4])
    assert "`dataset.cache`: 0 entries, then 12 entries" in found


class Unseeded(RandomModel):
    """Makes a number of each process its own."""

    def __init__(self):
        super().__init__("unseeded")
        self.shift = torch.rand(1).item()

    def train_step(self, batch, state):
        ids, inputs, targets = batch
        super().train_step((ids, inputs + self.shift, targets), state)


def test_number_that_each_process_draws_anew_is_found():
    assert "`model.shift` is 0." in failure(Unseeded, data, stops=[2])


def test_attribute_of_the_datamodule_is_suspected():
    found = failure(Leveled, Rising, stops=[4])
    assert "`datamodule.level` is 1, and 2 without a stop" in found


class Uneven(RandomModel):
    """Logs what it does not save."""

    count = 0

    def train_step(self, batch, state):
        super().train_step(batch, state)
        self.count += 1
        self.log("count", self.count)


def test_difference_in_the_log_alone_is_found():
    found = failure(Uneven, data, stops=[2], print_frequency=1)
    assert "`log['count of step 3']` is 1.0, and 3.0 without a stop" in found
    assert "`model['" not in found


class Drawing(RandomModel):
    """Draws a number more at the end of a run that was not stopped."""

    calls = 0

    def train_step(self, batch, state):
        super().train_step(batch, state)
        self.calls += 1
        if self.calls == 6:
            torch.rand(1)


def test_difference_in_the_random_numbers_alone_is_found():
    found = failure(Drawing, data, stops=[2], valid_frequency=None)
    assert "`rng['torch'][" in found
    assert "`model['" not in found
    assert "`model.calls` is 4, and 6 without a stop" in found


def test_training_that_differs_without_a_stop_is_found_with_no_stops():
    class Timed(RandomModel):
        def user_state_dict(self):
            return {**super().user_state_dict(), "time": time.perf_counter()}

    assert "`model['user']['time']` is" in failure(Timed, data, stops=[])


@pytest.mark.parametrize("stops", [[-1], [7], [2, 99], ["x"], [0.5]])
def test_stops_must_be_batches_of_the_training(stops):
    with pytest.raises(ValueError, match=r"`stops` must be in 0 to 6, got \["):
        assert_resumes_anywhere(RandomModel, data, stops=stops, **OPTIONS)


def test_stops_must_be_several():
    with pytest.raises(TypeError, match="'int' object is not iterable"):
        assert_resumes_anywhere(RandomModel, data, stops=3, **OPTIONS)


def test_exception_of_a_run_passes_through():
    class Failing(RandomModel):
        def train_step(self, batch, state):
            raise OSError("no device")

    with pytest.raises(OSError, match="no device"):
        assert_resumes_anywhere(Failing, data, **OPTIONS)


def test_all_that_is_the_callers_stays_as_it_is():
    class Kept(helios.Callback):
        calls = 0

        def on_training_batch_end(self, session):
            self.calls += 1

    callback, before = Kept(), torch.get_rng_state()
    options = {"stops": [2], "callbacks": [callback]}
    assert_resumes_anywhere(RandomModel, data, **OPTIONS | options)
    assert callback.calls == 0
    assert logging.root.manager.disable == logging.NOTSET
    assert torch.equal(torch.get_rng_state(), before)
