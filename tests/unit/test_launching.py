"""How many ranks a run starts, on machines that this one is not."""

import os
import re

import pytest
import torch
from click.testing import CliRunner

from helios import launching
from helios.adopting import LAUNCHED, adopt_ranks
from helios.arguments import check_arguments
from helios.cli import main
from helios.engine import Accelerator, Engine
from helios.errors import LaunchError
from helios.trainer import Trainer


class Started(Exception):
    """Instead of starting ranks."""


@pytest.fixture
def asks(monkeypatch):
    """Asks on a machine with four GPUs."""
    for name in (*LAUNCHED, "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)

    def start(count, max_restarts):
        raise Started(count)

    def ask(*, has_command=True, **given):
        monkeypatch.setattr(launching, "_start", start)
        monkeypatch.setattr(launching, "_has_command", lambda: has_command)
        asked = {"use_cpu": None, "gpus": None, "num_processes": None, **given}
        try:
            launching.start_ranks_if_asked(**asked)
        except Started as started:
            return started.args[0]
        return 1

    yield ask
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


def test_all_gpus_are_used_or_those_that_are_chosen(asks):
    assert asks(use_cpu=True) == 1
    assert asks(num_processes=1) == 1
    assert asks(gpus=[3]) == 1
    assert asks() == 4
    assert asks(num_processes=3) == 3
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert asks(gpus=[1, 3]) == 2
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert asks(use_cpu=True, num_processes=2) == 2


def test_gpus_are_counted_among_those_that_are_visible(asks, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6,5,4")
    assert asks(gpus=[1, 3]) == 2
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6,4"
    # A rank sees two, and its Trainer is given the same list.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_arguments(Trainer(gpus=[1, 3]))
    with pytest.raises(ValueError, match="this machine shows 2"):
        Trainer(gpus=[1, 2])


def test_more_than_there_are_is_an_error(asks):
    with pytest.raises(LaunchError, match="`num_processes` is 5; this machine shows 4"):
        asks(num_processes=5)
    with pytest.raises(LaunchError, match=r"`num_processes` is 3 and `gpus` is \[0\]"):
        asks(num_processes=3, gpus=[0])


def test_without_a_command_one_gpu_is_used_unless_more_are_asked_for(asks, caplog):
    assert asks(has_command=False) == 1
    assert "one of 4 GPUs is used" in caplog.text
    with pytest.raises(LaunchError, match="notebook_launcher"):
        asks(has_command=False, gpus=[0, 1])


@pytest.mark.parametrize("name", LAUNCHED)
def test_ranks_of_a_launcher_start_none(asks, monkeypatch, name):
    monkeypatch.setenv(name, "2")
    assert asks(num_processes=2) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_processes", "5"], "5 ranks are asked for on this host, which shows 4"),
        (["--gpu_ids", "1,4", "--num_processes", "2"], "`--gpu_ids` is 1,4; this mach"),
        (["--gpu_ids", "1,2", "--num_processes", "3"], "3 ranks .* which shows 2 GPUs"),
        (["--cpu", "--multi_gpu", "--num_processes", "2"], "only use one of `--cpu`"),
    ],
)
def test_launch_command_refuses_gpus_that_are_not_there(
    asks, monkeypatch, options, message
):
    for where in (torch.cuda, torch.accelerator):
        monkeypatch.setattr(where, "is_available", lambda: True)
    done = CliRunner().invoke(main, ["launch", *options, "script.py"])
    assert done.exit_code == 2, done.output
    assert re.search(message, " ".join(done.output.split()))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, r"2 processes \(PMI_SIZE\), and nothing"),
        (
            {
                **{"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
                **{"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            },
            "4 processes on several hosts, and MASTER_ADDR is not set",
        ),
    ],
)
def test_processes_that_cannot_find_each_other_are_an_error(
    asks, monkeypatch, environment, message
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=message):
        adopt_ranks()


def test_pmi_of_slurm_is_slurms(asks, monkeypatch):
    slurm = {"STEP_NUM_TASKS": 2, "PROCID": 1, "LOCALID": 0, "JOB_ID": 5}
    slurm |= {"STEP_NODELIST": "n[3-4]"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("PMI_SIZE", "2")
    adopt_ranks()
    found = [os.environ[n] for n in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR")]
    assert found == ["2", "1", "0", "n3"]


def test_accelerator_that_does_not_see_the_ranks_is_refused(asks, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match=r"Accelerate sees one.*leave out an `accel"):
        Engine(accelerator=Accelerator(cpu=False))
