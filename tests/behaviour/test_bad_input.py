"""What cannot be trained on is refused clearly, and before the training begins."""

import re

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.utils import DistributedType
from support import (
    IdModel,
    IndexData,
    IndexDataset,
    RandomData,
    RandomModel,
    StopAt,
    digest,
    train,
)
from torch import nn
from torch.utils.data import IterableDataset

import helios
from helios.checkpoint import CheckpointStore
from helios.data import ResumableSampler, create_dataloader
from helios.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    DataError,
    LaunchError,
    ModelError,
    ResumeError,
    UnstorableError,
)


def fit(model, data, root=None, **options):
    return train(model, data, root, **{"total_steps": 1, **options})[0]


# Data.


def test_empty_data_set_is_refused():
    model = IdModel()
    with pytest.raises(DataError, match="the data set is empty"):
        fit(model, IndexData(0))
    assert model.batches == []


def test_loader_that_would_yield_nothing_is_refused():
    with pytest.raises(DataError, match="lower `batch_size` or turn `drop_last` off"):
        fit(IdModel(), IndexData(3, batch_size=4, drop_last=True))


def test_validation_data_are_looked_at_before_the_training():
    class Data(IndexData):
        def setup(self):
            super().setup()
            self._add_valid_dataset(IndexDataset(0))

    model = IdModel()
    with pytest.raises(DataError, match="the data set is empty"):
        fit(model, Data(), valid_frequency=1)
    assert model.batches == []


def test_sampler_that_yields_nothing_is_refused():
    class Nothing(ResumableSampler):
        def order(self, epoch, start):
            return iter(())

    with pytest.raises(DataError, match="the training loader yielded nothing"):
        fit(IdModel(), IndexData(sampler=Nothing(range(3))))


def test_data_set_without_length_is_refused():
    class Endless(IndexDataset):
        __len__ = None

    class Data(helios.DataModule):
        def setup(self):
            self._add_train_phase(Endless(3))

    with pytest.raises(DataError, match="has a length"):
        fit(IdModel(), Data())


class NoData(helios.DataModule):
    def setup(self):
        pass


def test_datamodule_without_training_data_is_refused():
    with pytest.raises(DataError, match="no training data"):
        fit(IdModel(), NoData())


@pytest.mark.parametrize("part", ["train", "valid"])
def test_loader_that_cannot_be_entered_anywhere_is_refused(part):
    class Data(IndexData):
        pass

    loader = torch.utils.data.DataLoader(IndexDataset(4))
    setattr(Data, f"{part}_dataloader", lambda self: (loader, None))
    model = IdModel()
    with pytest.raises(DataError, match=r"return `helios\.data\.create_dataloader"):
        fit(model, Data())
    assert model.batches == []


@pytest.mark.parametrize("phase", ["valid", "test"])
def test_evaluation_without_data_is_refused(phase):
    trainer = helios.Trainer(use_cpu=True)
    run = trainer.validate if phase == "valid" else trainer.test
    with pytest.raises(DataError, match=f"no {phase}.* data"):
        run(IdModel(), NoData())


class NumberStream(IterableDataset):
    """Numbers."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter(range(self.count))


def test_steps_of_an_epoch_that_are_not_known_are_refused():
    class Asking(IdModel):
        def setup(self, for_inference=False):
            self.get_train_steps_per_epoch()

    class TestData(helios.DataModule):
        def setup(self):
            self._add_test_dataset(IndexDataset(1))

    with pytest.raises(DataError, match="training data"):
        helios.Trainer(use_cpu=True).test(Asking(), TestData())


# Models.


def test_model_without_parameters_is_refused():
    class Empty(IdModel):
        def setup(self, for_inference=False):
            self.net = nn.ReLU()

    with pytest.raises(ModelError, match="Empty has no parameter to train"):
        fit(Empty(), IndexData())


def test_model_with_only_frozen_parameters_is_refused():
    class Frozen(IdModel):
        def setup(self, for_inference=False):
            self.net = nn.Linear(1, 1).requires_grad_(False)

    with pytest.raises(ModelError, match="Frozen has no parameter to train"):
        fit(Frozen(), IndexData())


def test_model_without_train_step_is_refused():
    class Idle(helios.Model):
        def setup(self, for_inference=False):
            self.net = nn.Linear(1, 1)

    with pytest.raises(ModelError, match="Idle does not override `train_step`"):
        fit(Idle("idle"), IndexData())


def test_model_without_setup_cannot_be_made():
    class Unset(helios.Model):
        pass

    with pytest.raises(TypeError, match="setup"):
        Unset("unset")


class Unstorable(IdModel):
    def user_state_dict(self):
        return {"schedule": {"hook": lambda: None}}


@pytest.mark.parametrize("async_save", [True, False])
def test_state_that_cannot_be_stored_is_refused_before_training(tmp_path, async_save):
    model = Unstorable()
    with pytest.raises(UnstorableError, match=r"schedule\.hook"):
        fit(model, IndexData(), tmp_path, async_save=async_save)
    assert model.batches == []
    assert not list(tmp_path.glob("*/*"))


def test_state_that_cannot_be_stored_does_not_matter_where_nothing_is_stored():
    assert fit(Unstorable(), IndexData())


class LaterUnstorable(IdModel):
    def user_state_dict(self):
        return {"hook": (lambda: None) if len(self.batches) > 2 else None}


def test_state_that_cannot_be_stored_any_more_is_named(tmp_path):
    with pytest.raises(UnstorableError, match="hook"):
        fit(LaterUnstorable(), IndexData(), tmp_path)
    assert not list(tmp_path.glob("*/*"))


# Folders.


@pytest.mark.parametrize("place", ["below a file", "/proc"])
def test_unwritable_chkpt_root_is_refused_before_training(tmp_path, place):
    (tmp_path / "file").write_text("")
    root = "/proc/helios" if place == "/proc" else tmp_path / "file" / "checkpoints"
    model = IdModel()
    with pytest.raises(CheckpointError, match="`chkpt_root` cannot be written to"):
        fit(model, IndexData(), root)
    assert model.batches == []


@pytest.mark.parametrize("flag", ["enable_file_logging", "enable_tensorboard"])
def test_unwritable_log_root_is_refused_before_training(tmp_path, flag):
    (tmp_path / "file").write_text("")
    model = IdModel()
    with pytest.raises(OSError, match="file"):
        fit(model, IndexData(), log_root=tmp_path / "file" / "logs", **{flag: True})
    assert model.batches == []


# Resuming.


def test_resume_that_must_be_needs_a_checkpoint(tmp_path):
    model = IdModel()
    with pytest.raises(CheckpointNotFoundError, match='`resume` is "must"'):
        fit(model, IndexData(), tmp_path, resume="must")
    with pytest.raises(CheckpointNotFoundError, match='`resume` is "must"'):
        fit(model, IndexData(), resume="must")
    assert model.batches == []
    fit(model, IndexData(), tmp_path)
    assert fit(model, IndexData(), tmp_path, resume="must", total_steps=2)


def test_resume_from_a_path_that_is_no_checkpoint_is_refused(tmp_path):
    model = IdModel()
    for path in (tmp_path, tmp_path / "nowhere", str(tmp_path)):
        with pytest.raises(CheckpointNotFoundError, match=r"is not .*checkpoint"):
            fit(model, IndexData(), tmp_path, resume=path)
    assert model.batches == []


def test_resume_from_a_path_goes_on_from_there(tmp_path):
    whole, first, second = IdModel(), IdModel(), IdModel()
    fit(whole, IndexData(), tmp_path / "a", total_steps=3, chkpt_frequency=1)
    fit(first, IndexData(), tmp_path / "a", resume="never", total_steps=1)
    path = tmp_path / "a" / "ids" / "ids_epoch_1_iter_12"
    fit(second, IndexData(), tmp_path / "b", resume=path, total_steps=3)
    assert second.batches == whole.batches[12:]
    assert digest(second.state_dict()) == digest(whole.state_dict())


def test_resume_never_starts_afresh(tmp_path):
    first, second = IdModel(), IdModel()
    fit(first, IndexData(), tmp_path)
    fit(second, IndexData(), tmp_path, resume="never")
    assert first.batches == second.batches


def test_test_that_must_find_a_checkpoint_needs_one(tmp_path):
    trainer = helios.Trainer(use_cpu=True, chkpt_root=tmp_path, resume="must")
    with pytest.raises(CheckpointNotFoundError, match='`resume` is "must"'):
        trainer.test(IdModel(), IndexData())


def test_callback_without_state_may_come_and_go(tmp_path):
    fit(IdModel(), IndexData(), tmp_path)
    train(IdModel(), IndexData(), tmp_path, helios.Callback(), total_steps=2)
    assert fit(IdModel(), IndexData(), tmp_path, total_steps=3)


@pytest.mark.parametrize("name", ["a/b", "", ".hidden"])
def test_checkpoint_name_that_is_no_file_name_is_refused(tmp_path, name):
    class Named(IdModel):
        def append_metadata_to_chkpt_name(self, _):
            return name

    with pytest.raises(
        (ValueError, helios.HeliosError), match="append_metadata_to_chkpt_name"
    ):
        fit(Named(), IndexData(), tmp_path)


SAVED = {"length": 20, "batch_size": 4, "shuffle": True}
CHANGES = [
    ({"length": 22}, {}, r"samples.* 20\D.* 22\D"),
    ({"batch_size": 5}, {}, r"global.batch.* 4\D.* 5\D"),
    ({"shuffle": False}, {}, "sampler.*RandomSampler.*SequentialSampler"),
    ({"drop_last": True}, {}, "drop_last.*False.*True"),
    ({"random_seed": 3}, {}, "seed"),
    ({"phases": 2}, {}, "samples.*24"),
    ({}, {"random_seed": 3}, "seed"),
    ({}, {"accumulation_steps": 2}, "`accumulation_steps` was 1, is 2"),
    ({}, {"mixed_precision": "bf16"}, "`mixed_precision` was no, is bf16"),
]


@pytest.mark.parametrize(("data", "options", "message"), CHANGES)
def test_changed_run_is_refused_unless_it_is_allowed(tmp_path, data, options, message):
    options = {"total_steps": 2, **options}
    saved, changed = RandomData(**SAVED), RandomData(**{**SAVED, **data})
    assert not train(RandomModel(), saved, tmp_path, StopAt(3), total_steps=2)[0]
    model = RandomModel()
    with pytest.raises(ResumeError, match=message) as caught:
        train(model, changed, tmp_path, StopAt(), **options)
    assert "`allow_inexact=True`" in str(caught.value)
    assert model.ids == []
    assert train(model, changed, tmp_path, StopAt(), allow_inexact=True, **options)[0]
    assert model.ids


def test_another_kind_of_device_is_refused_unless_it_is_allowed(tmp_path, capsys):
    assert not train(RandomModel(), RandomData(), tmp_path, StopAt(3), total_steps=2)[0]
    (path,) = (store := CheckpointStore(tmp_path / "random")).list()
    record = store.records()[path]
    record["identity"]["device_type"] = "cuda"  # as if it had been one
    states = record["trees"]["rank_0"]["rng"]
    states["cuda"] = states["torch"]
    store.amend(path, identity=record["identity"], trees=record["trees"])
    with pytest.raises(ResumeError, match="`device_type` was cuda, is cpu"):
        train(RandomModel(), RandomData(), tmp_path, total_steps=2)
    model = RandomModel()
    assert train(model, RandomData(), tmp_path, total_steps=2, allow_inexact=True)[0]
    assert model.ids
    assert "are of no use to another" in capsys.readouterr().err


def test_everything_that_changed_is_listed(tmp_path):
    train(RandomModel(), RandomData(), tmp_path, total_steps=1)
    with pytest.raises(ResumeError) as caught:
        fit(
            RandomModel(),
            RandomData(length=30, batch_size=6),
            tmp_path,
            random_seed=4,
            accumulation_steps=2,
        )
    for name in ("samples", "batch", "seed", "accumulation_steps"):
        assert name in str(caught.value)


class Backwards(ResumableSampler):
    """A sampler of the user's."""

    def order(self, epoch, start):
        return iter(range(len(self) - 1 - start, -1, -1))


def test_changed_sampler_of_the_users_is_refused(tmp_path):
    first = RandomData(shuffle=False, sampler=Backwards(range(20)))
    assert not train(RandomModel(), first, tmp_path, StopAt(3), total_steps=2)[0]
    second = RandomData(shuffle=False)
    with pytest.raises(ResumeError, match="sampler"):
        train(RandomModel(), second, tmp_path, StopAt(), total_steps=2)


class OwnLoader(helios.DataModule):
    """Makes the loader of its training data itself."""

    def __init__(self, dataset, **params):
        super().__init__()
        self.dataset, self.params = dataset, params

    def setup(self):
        pass

    def train_dataloader(self):
        return create_dataloader(self.dataset, self.params)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({"dataset": range(9)}, {"dataset": range(8)}, r"samples.* 9\D.* 8\D"),
        ({"batch_size": 2}, {"batch_size": 3}, r"global.batch.* 2\D.* 3\D"),
        ({"shuffle": True}, {"shuffle": False}, "sampler"),
        (
            {"dataset": NumberStream(8), "num_workers": 2},
            {"dataset": NumberStream(8), "num_workers": 1},
            r"streams.* 2\D.* 1\D",
        ),
    ],
)
def test_changed_loader_of_the_users_is_refused(tmp_path, before, after, message):
    common = {"dataset": range(9), "batch_size": 2}
    saved, changed = OwnLoader(**common | before), OwnLoader(**common | after)
    assert not train(IdModel(), saved, tmp_path, StopAt(2), total_steps=2)[0]
    with pytest.raises(ResumeError, match=message):
        train(IdModel(), changed, tmp_path, StopAt(), total_steps=2)
    saved = OwnLoader(**common | before)
    assert train(IdModel(), saved, tmp_path, StopAt(), total_steps=2)[0]


def test_what_exactness_does_not_depend_on_may_change(tmp_path):
    train(IdModel(), IndexData(), tmp_path, StopAt(3), total_steps=2)
    model = IdModel()
    assert train(
        model,
        IndexData(valid=6, num_workers=1),
        tmp_path,
        StopAt(),
        total_steps=3,
        valid_frequency=2,
        chkpt_frequency=1,
        print_frequency=5,
    )[0]
    assert len(model.batches) == 33


class TwoNetworks(IdModel):
    def setup(self, for_inference=False):
        super().setup(for_inference)
        self.other = nn.Linear(1, 1)


class Wider(IdModel):
    def setup(self, for_inference=False):
        self.net = nn.Linear(1, 2)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01)


class TwoOptimizers(IdModel):
    def setup(self, for_inference=False):
        super().setup(for_inference)
        self.second = torch.optim.SGD(self.net.parameters(), lr=0.01)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (TwoNetworks, "the model holds the networks ['net', 'other']"),
        (Wider, "fit the model's `net`"),
        (TwoOptimizers, "the model holds the optimizers ['optimizer', 'second']"),
    ],
)
def test_model_of_other_parts_is_refused(tmp_path, kind, message):
    fit(IdModel(), IndexData(), tmp_path)
    model = kind()
    with pytest.raises(ResumeError, match=re.escape(message)):
        fit(model, IndexData(), tmp_path, total_steps=2)
    assert model.batches == []


def test_optimizer_over_other_parameters_is_refused(tmp_path):
    class Half(IdModel):
        def setup(self, for_inference=False):
            super().setup(for_inference)
            self.optimizer = torch.optim.SGD([self.net.weight], lr=0.01)

    fit(IdModel(), IndexData(), tmp_path)
    with pytest.raises(ResumeError, match="optimizer"):
        fit(Half(), IndexData(), tmp_path, total_steps=2)


# Devices and processes.


def test_world_size_without_the_other_ranks_is_refused(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("with a GPU, Accelerate waits for the other ranks")
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = IdModel()
    with pytest.raises(LaunchError, match="asks for 2 ranks"):
        fit(model, IndexData(), use_cpu=None)
    assert model.batches == []


def test_num_processes_that_are_not_there_are_refused():
    with pytest.raises(LaunchError, match="`num_processes` is 2: there is no command"):
        fit(IdModel(), IndexData(), num_processes=2)
    assert fit(IdModel(), IndexData(), num_processes=1)


def test_fp16_on_the_cpu_runs_in_fp16_with_a_scaler(tmp_path):
    seen = []

    class Half(IdModel):
        def setup(self, for_inference=False):
            layer = nn.Linear(1, 1)
            layer.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
            self.net = nn.Sequential(layer)
            self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01)

        def train_step(self, batch, state):
            with self.autocast():
                seen.append(torch.mm(torch.ones(1, 1), torch.ones(1, 1)).dtype)
            scale = self.accelerator.scaler.get_scale()
            loss = self.net(batch.float()[:, None])
            self.backward(0.5 * loss.sum())  # 1 x 65536 is no number of fp16
            seen.append(self.net[0].bias.grad.item() / scale)
            before = self.net[0].bias.item()
            self.optimizer.step()
            seen.append(before - self.net[0].bias.item() == pytest.approx(0.005))
            self.optimizer.zero_grad()

    fit(Half(), IndexData(1), tmp_path, mixed_precision="fp16")
    assert seen == [torch.float16, torch.float16, 0.5, True]


def test_scaler_of_another_precision_is_refused():
    class Old(IdModel):
        def setup(self, for_inference=False):
            super().setup(for_inference)
            self.create_scaler(torch.float16)

    with pytest.raises(ValueError, match=r"set `.*mixed_precision"):
        fit(Old(), IndexData())
    assert fit(Old(), IndexData(), mixed_precision="fp16")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("distributed_type", DistributedType.DEEPSPEED, "DEEPSPEED holds weights"),
        ("distributed_type", DistributedType.MEGATRON_LM, "MEGATRON_LM holds weights"),
        ("distributed_type", DistributedType.XLA, "XLA holds weights"),
        ("distributed_type", DistributedType.FSDP, "set `fsdp_version` to 2"),
        ("parallelism_config", ParallelismConfig(cp_size=2), "tensor, context and"),
    ],
)
def test_ways_to_share_work_out_that_cannot_be_saved_are_refused(
    monkeypatch, accelerator, name, value, message
):
    # As if it had been started so, which takes GPUs, or packages that are not here.
    monkeypatch.setitem(accelerator.state._shared_state, name, value)
    with pytest.raises(LaunchError, match=message):
        train(RandomModel(), RandomData(), None, accelerator=accelerator, total_steps=1)
