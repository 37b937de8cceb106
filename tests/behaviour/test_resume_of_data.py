"""Data of many kinds, stopped after any batch, go on to the same bits."""

import numpy as np
import pytest
import torch
from support import AugmentedDataset, Case, IdModel, StopAt, digest, train
from support.data import random_collate
from support.kinds import (
    KINDS,
    LENGTH,
    WEIGHTS,
    KindData,
    KindModel,
    ShardedStream,
    StatefulStream,
    Stream,
)
from torch.utils import data

import helios
from helios.data import ResumableSampler, ResumableWeightedRandomSampler

OPTIONS = {
    "total_steps": 4,
    "valid_frequency": 2,
    "print_frequency": 2,
    "accumulation_steps": 2,
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_stop_at_any_batch(tmp_path, make):
    case = Case(KindModel, lambda: KindData(make), **OPTIONS)
    case.check(tmp_path)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_stop_at_every_batch_one_after_the_other(tmp_path, make):
    case = Case(KindModel, lambda: KindData(make), **OPTIONS)
    case.check(tmp_path, [[StopAt(batch=batch) for batch in range(12)]])


class Lazily(data.Sampler):
    """Looks at each index in which epoch it is; so long that it is not read at once."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return ((index + self.epoch) % len(self) for index in range(len(self)))

    def __len__(self):
        return 3000


class Asking(IdModel):
    """Asks how long an epoch is after each batch."""

    def on_training_batch_end(self, state, should_log=False):
        super().on_training_batch_end(state, should_log)
        assert self.get_train_steps_per_epoch() == 6


def test_to_ask_for_the_steps_of_an_epoch_leaves_its_order_alone():
    class Data(helios.DataModule):
        def setup(self):
            params = {"sampler": Lazily(), "batch_size": 500}
            self._add_train_phase(range(3000), params)

    model = Asking()
    train(model, Data(), None, total_steps=2)
    first, second = np.reshape(model.batches, (2, 3000)).tolist()
    assert first == list(range(3000))
    assert second == [*range(1, 3000), 0]


class Growing(ResumableSampler):
    """Begins where the model says."""

    begin = 0

    def at(self, epoch, positions):
        return (positions + self.begin) % len(self)


class Teacher(IdModel):
    """Changes the sampler before each epoch."""

    def on_training_epoch_start(self, current_epoch):
        super().on_training_epoch_start(current_epoch)
        self.trainer.datamodule.sampler.begin = 3 * current_epoch


@pytest.mark.parametrize("stop", [None, 2, 4])
def test_sampler_that_the_model_changes_between_epochs(tmp_path, stop):
    class Data(helios.DataModule):
        def setup(self):
            self.sampler = Growing(range(8))
            self._add_train_phase(range(8), {"sampler": self.sampler, "batch_size": 4})
            self._add_valid_dataset(
                range(8), {"sampler": self.sampler, "batch_size": 2}
            )

    found = []
    for callback in StopAt(batch=stop), StopAt():
        model = Teacher()
        options = {"total_steps": 3, "valid_frequency": 1}
        if train(model, Data(), tmp_path, callback, **options)[0]:
            assert model.validated
        found += model.batches
        if stop is None:
            break
    assert [batch[0] for batch in found] == [0, 4, 3, 7, 6, 2]


WITH_WORKERS = {
    name: KINDS[name]
    for name in (
        "weighted",
        "torch_random",
        "fetches_batches",
        "stream",
        "sharded_stream",
        "stateful_stream",
    )
}


@pytest.mark.parametrize("make", WITH_WORKERS.values(), ids=WITH_WORKERS)
def test_workers_resume_exactly(tmp_path, make):
    case = Case(KindModel, lambda: KindData(make, num_workers=2), **OPTIONS)
    case.check(tmp_path, [[StopAt(batch=3), StopAt(batch=6)]])


@pytest.mark.parametrize("make", WITH_WORKERS.values(), ids=WITH_WORKERS)
def test_workers_may_change_at_a_resume(tmp_path, make):
    def part(root, workers, *callbacks):
        case = Case(KindModel, lambda: KindData(make, num_workers=workers), **OPTIONS)
        return case.run(root, *callbacks)

    _, whole, _ = part(tmp_path / "whole", 2, StopAt())
    ids = []
    for workers, stop in (2, 3), (0, 8), (3, None):
        _, model, _ = part(tmp_path / "parts", workers, StopAt(batch=stop))
        ids += model.ids
    assert ids == whole.ids
    assert digest(model.state_dict()) == digest(whole.state_dict())


class Phases(helios.DataModule):
    """Phases whose data, batch sizes, samplers and workers differ."""

    def setup(self):
        collate = {"collate_fn": random_collate}
        self._add_train_phase(
            AugmentedDataset(LENGTH), {"batch_size": 4, "shuffle": True, **collate}
        )
        self._add_train_phase(StatefulStream(), {"batch_size": 3, **collate})
        sampler = ResumableWeightedRandomSampler(WEIGHTS[:10])
        self._add_train_phase(
            AugmentedDataset(10), {"batch_size": 5, "sampler": sampler, **collate}
        )
        self._add_train_phase(Stream(9), {"batch_size": 2, **collate})
        self._add_valid_dataset(Stream(6), {"batch_size": 3, **collate})


class Phased(KindModel):
    """Goes on to the next phase after each epoch, while there is one."""

    def should_advance_dataset_phase(self):
        return self.trainer.datamodule._phase < 3


@pytest.mark.parametrize("unit", ["epoch", "iteration"])
def test_phases_of_all_kinds_resume_exactly_around_their_switches(tmp_path, unit):
    total = {"epoch": 5, "iteration": 14}[unit]
    case = Case(Phased, Phases, **{**OPTIONS, "train_unit": unit, "total_steps": total})
    case.check(tmp_path)


class Broken(AugmentedDataset):
    """Cannot load one of its samples, until it is mended."""

    def __init__(self, index):
        super().__init__(LENGTH)
        self.index = index

    def __getitem__(self, index):
        if index == self.index:
            raise OSError("unreadable")
        return super().__getitem__(index)


@pytest.mark.parametrize("position", range(0, LENGTH, 3))
def test_run_whose_data_failed_goes_on_at_the_same_batch(tmp_path, position):
    def case(index):
        return Case(
            KindModel, lambda: KindData(lambda: Broken(index), shuffle=True), **OPTIONS
        )

    _, whole, _ = case(None).run(tmp_path / "whole")
    broken = np.ravel([i for batch in whole.ids[:5] for i in batch])[position].item()
    with pytest.raises(OSError, match="unreadable"):
        case(broken).run(tmp_path / "parts")
    is_finished, model, _ = case(None).run(tmp_path / "parts")
    assert is_finished
    assert model.ids == whole.ids[position // 4 :]
    assert digest(model.state_dict()) == digest(whole.state_dict())


class CountingStream(Stream):
    """Shuffles by a count of epochs that it keeps in its state."""

    def __init__(self, length):
        super().__init__(length)
        self.count, self.position = 0, 0

    def __iter__(self):
        self.epoch = self.count
        order = self.order()
        while self.position < len(order):
            self.position += 1
            yield self.source[order[self.position - 1]]
        self.count, self.position = self.count + 1, 0

    def state_dict(self):
        return {"count": self.count, "position": self.position}

    def load_state_dict(self, state):
        self.count, self.position = state["count"], state["position"]


@pytest.mark.parametrize(
    ("length", "params"), [(16, {}), (17, {}), (18, {"drop_last": True})]
)
@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_stream_that_ends_with_a_batch_goes_on_as_its_state_says(
    tmp_path, length, params, accumulation_steps
):
    options = {**OPTIONS, "accumulation_steps": accumulation_steps}
    case = Case(
        KindModel, lambda: KindData(lambda: CountingStream(length), **params), **options
    )
    case.check(tmp_path)


class Changing:
    """A sampler of the user's whose epochs have several lengths."""

    yields_batches = True

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return (3, 5, 2, 4)[self.epoch % 4]

    def __iter__(self):
        for _ in range(len(self)):
            yield torch.randperm(LENGTH)[:3].tolist()


def test_sampler_whose_length_changes_is_read_to_its_end_in_each_epoch(tmp_path):
    def make():
        return AugmentedDataset(LENGTH), {"sampler": Changing()}

    case = Case(KindModel, lambda: KindData(make), **OPTIONS)
    assert len(case.run(tmp_path / "alone", StopAt())[1].ids) == 14
    case.check(tmp_path)


class ValidShards(helios.DataModule):
    """Validates on a stream that its workers share."""

    def __init__(self, workers):
        super().__init__()
        self.workers = workers

    def setup(self):
        self._add_train_phase(AugmentedDataset(8), {"batch_size": 4})
        params = {"batch_size": 4, "num_workers": self.workers}
        self._add_valid_dataset(ShardedStream(17), params)


@pytest.mark.parametrize("workers", [0, 1])
def test_validation_of_shards_is_the_same_with_other_workers(tmp_path, workers):
    options = {"total_steps": 3, "valid_frequency": 1}
    _, _, recorder = Case(KindModel, lambda: ValidShards(2), **options).run(
        tmp_path / "whole"
    )
    logged = []
    for count, stop in (2, 3), (workers, None):
        case = Case(KindModel, lambda count=count: ValidShards(count), **options)
        logged += case.run(tmp_path / "parts", StopAt(batch=stop))[2].logged
    assert logged == recorder.logged


def test_stream_with_a_state_that_is_used_twice_is_refused(tmp_path):
    stream = StatefulStream()

    class Twice(helios.DataModule):
        def setup(self):
            self._add_train_phase(stream, {"batch_size": 4})
            self._add_valid_dataset(stream, {"batch_size": 4})

    with pytest.raises(helios.HeliosError, match="is used twice"):
        Case(KindModel, Twice, **OPTIONS).run(tmp_path)


def test_run_does_not_fail_for_a_batch_that_it_does_not_need(tmp_path):
    class Ending(Stream):
        def __iter__(self):
            yield from (self.source[index] for index in range(8))
            raise OSError("unreadable")

    options = {"train_unit": "iteration", "total_steps": 2}
    case = Case(KindModel, lambda: KindData(Ending), **options)
    assert case.run(tmp_path)[0]


def test_data_set_of_another_length_is_refused_at_a_resume(tmp_path):
    def case(length):
        return Case(
            KindModel, lambda: KindData(lambda: AugmentedDataset(length)), **OPTIONS
        )

    case(LENGTH).run(tmp_path, StopAt(batch=3))
    with pytest.raises(helios.HeliosError, match="'samples of phase 0': 18"):
        case(LENGTH + 1).run(tmp_path, StopAt())


def test_replayed_stream_says_what_it_costs(tmp_path, capsys):
    case = Case(KindModel, lambda: KindData(Stream), **OPTIONS)
    case.run(tmp_path, StopAt(batch=3))
    assert "read again" not in capsys.readouterr().err
    case.run(tmp_path, StopAt())
    assert "12 samples are read again" in capsys.readouterr().err
