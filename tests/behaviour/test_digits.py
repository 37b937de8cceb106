"""The examples run as the README says, each in processes of its own."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "examples" / "digits.py"
DEMO = ROOT / "examples" / "demo.py"
ACCELERATE = ("-m", "accelerate.commands.accelerate_cli", "launch")
VALUES = re.compile(r"INFO (epoch \d+  step \d+  .*)")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(*command, cwd, timeout_s=100):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=ENVIRONMENT,
        timeout=timeout_s,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def digits(*launcher, cwd, epochs=30):
    """Train; what the log file says of it, and the accuracy in percent."""
    log = cwd / "runs" / "logs" / "digits.log"
    before = len(log.read_text()) if log.exists() else 0
    result = run(*launcher, DIGITS, "--epochs", epochs, cwd=cwd)
    assert result.returncode == 0, result.stdout
    text = log.read_text()[before:]
    return text, float(re.search(r"test accuracy: ([\d.]+) %", text)[1])


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A folder where two epochs have been trained, and the log file's text."""
    folder = tmp_path_factory.mktemp("digits")
    return folder, *digits(cwd=folder, epochs=2)


def checkpoints(folder):
    """Each file of each checkpoint, and when it was written."""
    files = (folder / "runs" / "checkpoints").rglob("*.*")
    return {file: file.stat().st_mtime_ns for file in files}


def test_digits_started_again_when_finished_only_tests(short):
    folder, _, accuracy = short
    before = checkpoints(folder)
    assert before
    text, again = digits(cwd=folder, epochs=2)
    assert "resumed from digits_epoch_2_" in text
    assert "train/loss" not in text
    assert again == accuracy
    assert checkpoints(folder) == before


@pytest.mark.slow
def test_digits_reaches_98_percent(tmp_path):
    _, accuracy = digits(cwd=tmp_path)
    assert accuracy >= 98


@pytest.mark.slow
def test_digits_under_accelerate_launch_logs_the_same_values(short, tmp_path):
    text, _ = digits(*ACCELERATE, cwd=tmp_path, epochs=2)
    assert VALUES.findall(text) == VALUES.findall(short[1])


@pytest.mark.slow
def test_digits_takes_the_precision_of_accelerate_launch(short, tmp_path):
    text, accuracy = digits(
        *ACCELERATE, "--mixed_precision", "bf16", cwd=tmp_path, epochs=2
    )
    assert "bf16" in text
    assert VALUES.findall(text) != VALUES.findall(short[1])
    assert accuracy > 50


@pytest.mark.slow
def test_demo_finds_the_killed_run_identical(tmp_path):
    result = run(DEMO, "--epochs", 8, "--seed", 1, cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    assert "Verdict: IDENTICAL" in result.stdout
    assert len(re.findall("killed in epoch .*: resumed from", result.stdout)) == 2
    assert (tmp_path / "runs" / "demo" / "curves.png").stat().st_size > 10_000


def test_demo_leaves_a_folder_alone_that_it_did_not_make(tmp_path):
    keep = tmp_path / "interrupted" / "keep.txt"
    keep.parent.mkdir()
    keep.touch()
    result = run(DEMO, "--folder", tmp_path, cwd=tmp_path)
    assert result.returncode == 1
    assert "choose another --folder" in result.stdout
    assert keep.exists()


def test_demo_ends_its_training_when_it_is_ended(tmp_path):
    demo = subprocess.Popen(
        [sys.executable, "-u", DEMO],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert any("training undisturbed" in line for line in demo.stdout)
    demo.send_signal(signal.SIGTERM)
    demo.stdout.close()
    assert demo.wait(30) == 1
    assert not [p for p in Path("/proc").glob("[0-9]*") if is_training(p, tmp_path)]


def is_training(process, folder):
    try:
        return os.readlink(process / "cwd") == str(folder)
    except OSError:
        return False


@pytest.fixture(scope="module")
def digest():
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.digest


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.tensor([-0.0, 1.0]), "b": [1]},
        {"a": torch.tensor([[0.0, 1.0]]), "b": [1]},
        {"a": torch.tensor([0.0, 1.0]).view(torch.int32), "b": [1]},
        {"c": torch.tensor([0.0, 1.0]), "b": [1]},
        {"a": torch.tensor([0.0, 1.0]), "b": [1.0]},
        {"a": torch.tensor([0.0, 1.0]), "b": {"0": 1, "1": 2}},
    ],
)
def test_digest_tells_trees_apart(digest, other):
    tree = {"a": torch.tensor([0.0, 1.0]), "b": [1]}
    assert digest(tree) == digest({"a": tree["a"].clone(), "b": [1]})
    assert digest(tree) != digest(other)
