"""Wrong arguments fail when the object is made, with a message that names them."""

import math
import re

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from support import IdModel, IndexData, IndexDataset

import helios
from helios.data import ResumableSamplerType
from helios.state import Schedule, TrainingUnit

WRONG = (TypeError, ValueError)
SCHEDULES = [
    ({"total_steps": 0}, ValueError, "`total_steps` must be >= 1.*, got 0"),
    ({"total_steps": -3}, ValueError, "`total_steps` must be >= 1.*, got -3"),
    ({"total_steps": 1.5}, WRONG, "`total_steps` must be .*, got 1.5"),
    ({"total_steps": "3"}, WRONG, "`total_steps` must be .*, got '3'"),
    ({"total_steps": True}, WRONG, "`total_steps` must be .*, got True"),
    ({"total_steps": math.nan}, WRONG, "`total_steps` must be .*, got nan"),
    ({"total_steps": -math.inf}, WRONG, "`total_steps` must be .*, got -inf"),
    ({"valid_frequency": 0}, ValueError, "`valid_frequency` must be .*>= 1.*, got 0"),
    ({"valid_frequency": 1.0}, WRONG, "`valid_frequency` must be an int.*, got 1.0"),
    ({"chkpt_frequency": -1}, ValueError, "`chkpt_frequency` must be .*>= 1.*, got -1"),
    ({"chkpt_frequency": True}, WRONG, "`chkpt_frequency` must be an int.*, got True"),
    ({"print_frequency": 0}, ValueError, "`print_frequency` must be .*>= 1.*, got 0"),
    ({"print_frequency": "2"}, WRONG, "`print_frequency` must be an int.*, got '2'"),
    ({"accumulation_steps": 0}, ValueError, "`accumulation_steps` .* >= 1.*, got 0"),
    ({"accumulation_steps": 2.0}, WRONG, "`accumulation_steps` .* int.*, got 2.0"),
    ({"early_stop_cycles": 0}, ValueError, "`early_stop_cycles` .* >= 1.*, got 0"),
    ({"early_stop_cycles": 2}, ValueError, "`early_stop_cycles` .* `valid_frequency`"),
]
TRAINERS = [
    ({"train_unit": "step"}, ValueError, "`train_unit` must be 'epoch' or 'iteration'"),
    ({"train_unit": 3}, WRONG, "`train_unit` must be .*, got 3"),
    ({"train_unit": None}, WRONG, "`train_unit` must be .*, got None"),
    ({"run_name": ""}, ValueError, "`run_name` must be a plain file name, got ''"),
    ({"run_name": "a/b"}, ValueError, "`run_name` must be a plain file name"),
    ({"run_name": ".hidden"}, ValueError, "`run_name` must be a plain file name"),
    ({"run_name": 3}, WRONG, "`run_name` must be .*, got 3"),
    ({"mixed_precision": "fp64"}, ValueError, "`mixed_precision` must be .* 'fp64'"),
    ({"keep_last": 0}, ValueError, "`keep_last` must be .*>= 1.*, got 0"),
    ({"keep_last": "all"}, WRONG, "`keep_last` must be an int.*, got 'all'"),
    ({"num_processes": 0}, ValueError, "`num_processes` must be .*>= 1.*, got 0"),
    ({"max_restarts": -1}, ValueError, "`max_restarts` must be an int >= 0, got -1"),
    ({"random_seed": "1"}, WRONG, "`random_seed` must be an int, got '1'"),
    ({"random_seed": True}, WRONG, "`random_seed` must be an int, got True"),
    ({"callbacks": [print]}, WRONG, "`callbacks` must be .*, got .*print"),
    ({"callbacks": [helios.Callback]}, WRONG, "`callbacks` must be .*, got .*Callback"),
    ({"callbacks": helios.Callback()}, WRONG, "`callbacks` must be .*, got .*Callback"),
    ({"chkpt_root": 3}, WRONG, "`chkpt_root` must be a path, got 3"),
    ({"log_root": 3}, WRONG, "`log_root` must be a path, got 3"),
    ({"log_path": 3}, WRONG, "`log_path` must be a path, got 3"),
    ({"run_path": 3}, WRONG, "`run_path` must be a path, got 3"),
    ({"src_root": 3}, WRONG, "`src_root` must be .*, got 3"),
    ({"src_root": "nowhere"}, ValueError, "`src_root` must be .*, got 'nowhere'"),
    ({"enable_tensorboard": True}, ValueError, "`enable_tensorboard` .* `log_root`"),
    ({"enable_file_logging": True}, ValueError, "`enable_file_logging` .* `log_root`"),
    ({"gpus": [0], "use_cpu": True}, ValueError, "`use_cpu` and `gpus` exclude"),
    ({"gpus": [4096]}, ValueError, r"`gpus` .*4096.* this machine shows"),
    ({"gpus": [-1]}, ValueError, r"`gpus` .*-1.* this machine shows"),
    ({"gpus": ["0"]}, WRONG, "`gpus` .*'0'"),
    ({"gpus": 0}, WRONG, "`gpus` must be .*, got 0"),
    ({"gpus": []}, WRONG, r"`gpus` .*\[\]"),
    (
        {"enable_cudnn_benchmark": True, "enable_deterministic": True},
        ValueError,
        "`enable_cudnn_benchmark` and `enable_deterministic` exclude each other",
    ),
    ({"resume": 3}, WRONG, "`resume` must be .*, got 3"),
    ({"accelerator": "mine"}, WRONG, "`accelerator` must be .*, got 'mine'"),
    ({"train_exceptions": [3]}, WRONG, "`train_exceptions` must be .*3"),
    ({"train_exceptions": [int]}, WRONG, "`train_exceptions` must be .*int"),
    ({"train_exceptions": OSError}, WRONG, "`train_exceptions` must be .*OSError"),
    ({"test_exceptions": ["OSError"]}, WRONG, "`test_exceptions` must be .*OSError"),
]
NAMES = [3, None, "", ".hidden", "a/b", "a\\b", "a\0b"]
PARAMS = [
    ({"batch_size": 0}, ValueError, "`batch_size` must be >= 1.*, got 0"),
    ({"batch_size": "4"}, TypeError, "`batch_size` must be int, got '4'"),
    ({"batch_size": True}, TypeError, "`batch_size` must be int, got True"),
    ({"batchsize": 4}, ValueError, "`batchsize` is no .* the nearest: `batch_size`"),
    ({"num_worker": 4}, ValueError, "`num_worker` is no .* the nearest: `num_workers`"),
    ({"num_workers": -1}, ValueError, "`num_workers` must be >= 0, got -1"),
    ({"shuffle": 1}, TypeError, "`shuffle` must be bool, got 1"),
    ({"random_seed": "x"}, TypeError, "`random_seed` must be .*, got 'x'"),
    ({"collate_fn": 3}, TypeError, "`collate_fn` must be callable, got 3"),
    ({"sampler": "random"}, TypeError, "`sampler` must be .*, got 'random'"),
    ({"sampler": iter([0])}, TypeError, "`sampler` must be .*, got <list_iter"),
    (
        {"sampler": ResumableSamplerType.RANDOM, "shuffle": True},
        ValueError,
        "`shuffle` must be False",
    ),
    ({"prefetch_factor": 2}, ValueError, "`prefetch_factor` needs .*, got 2"),
    ({"persistent_workers": True}, ValueError, "`persistent_workers` .*, got True"),
    ({"timeout": 3}, ValueError, "`timeout` needs `num_workers` .*, got 3"),
]


def name_of(value):
    if isinstance(value, dict):
        text = " ".join(f"{name}={setting!r}" for name, setting in value.items())
        return re.sub(" at 0x[0-9a-f]+", "", text)  # the same in every process
    return None


@pytest.mark.parametrize(("arguments", "kind", "message"), SCHEDULES, ids=name_of)
def test_schedule_refuses(arguments, kind, message):
    with pytest.raises(kind, match=message):
        Schedule(**{"train_unit": TrainingUnit.EPOCH, "total_steps": 3, **arguments})


@pytest.mark.parametrize(
    ("arguments", "kind", "message"), [*SCHEDULES, *TRAINERS], ids=name_of
)
def test_trainer_refuses(arguments, kind, message):
    with pytest.raises(kind, match=message):
        helios.Trainer(**arguments)


@pytest.mark.parametrize("name", NAMES)
def test_model_refuses_a_save_name_that_is_no_plain_file_name(name):
    with pytest.raises(WRONG, match=r"`save_name` .*, got"):
        IdModel(name)


@pytest.mark.parametrize(("params", "kind", "message"), PARAMS, ids=name_of)
def test_datamodule_refuses(params, kind, message):
    class Data(helios.DataModule):
        def setup(self):
            self._add_train_phase(IndexDataset(4), params)

    with pytest.raises(kind, match=message):
        helios.Trainer(total_steps=1, use_cpu=True).fit(IdModel(), Data())
    with pytest.raises(kind, match=message):
        helios.DataLoaderParams.from_dict(params)


def test_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="total_step"):
        helios.Trainer(total_step=3)


def test_fit_needs_total_steps():
    with pytest.raises(ValueError, match="`total_steps` is not set"):
        helios.Trainer(use_cpu=True).fit(IdModel(), IndexData())


@pytest.mark.parametrize("method", ["fit", "validate", "test"])
def test_model_and_datamodule_must_be_of_their_kinds(method):
    run = getattr(helios.Trainer(total_steps=1, use_cpu=True), method)
    with pytest.raises(TypeError, match=r"`model` must be a .*Model, got"):
        run(IndexData(), IdModel())
    with pytest.raises(TypeError, match=r"`datamodule` must be a .*DataModule, got"):
        run(IdModel(), [1, 2, 3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixed_precision": "bf16"}, "`mixed_precision` is 'bf16', `accelerator` has"),
        ({"accumulation_steps": 2}, "`accumulation_steps` is 2, `accelerator` has"),
    ],
    ids=name_of,
)
def test_trainer_refuses_what_its_accelerator_contradicts(arguments, message):
    try:
        with pytest.raises(ValueError, match=message):
            helios.Trainer(accelerator=Accelerator(cpu=True), **arguments)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_wrong_arguments_fail_before_any_data_set_is_made():
    class Data(IndexData):
        def prepare_data(self):
            raise AssertionError("data were prepared")

    trainer = helios.Trainer(use_cpu=True, num_processes=3, total_steps=1)
    with pytest.raises(helios.HeliosError, match="`num_processes` is 3"):
        trainer.fit(IdModel(), Data())


@pytest.mark.parametrize("unit", ["epoch", "EPOCH", "Epoch", TrainingUnit.EPOCH])
def test_training_unit_is_known_by_its_name_in_any_case(unit):
    model = IdModel()
    trainer = helios.Trainer(train_unit=unit, total_steps=2, use_cpu=True)
    assert trainer.fit(model, IndexData(2))
    assert len(model.batches) == 4


def test_paths_may_be_strings(tmp_path):
    trainer = helios.Trainer(total_steps=1, use_cpu=True, chkpt_root=str(tmp_path))
    trainer.fit(IdModel(), IndexData())
    assert [p.name for p in tmp_path.glob("*/*")] == ["ids_epoch_1_iter_12"]
