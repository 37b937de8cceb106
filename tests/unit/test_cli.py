"""The `helios` command, and what importing Helios costs."""

import platform
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

import helios
from helios.cli import main


def run(*arguments):
    return CliRunner().invoke(main, arguments)


def test_version_is_printed():
    result = run("--version")
    assert (result.exit_code, result.output) == (
        0,
        f"helios, version {helios.__version__}\n",
    )


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_names_the_commands(option):
    result = run(option)
    assert result.exit_code == 0
    assert "env" in result.output


def test_unknown_command_is_an_error():
    result = run("trian")
    assert result.exit_code == 2
    assert "No such command 'trian'" in result.output


def test_env_reports_versions_devices_and_launch_environment(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    result = run("env")
    assert result.exit_code == 0
    torch_version = torch.__version__.partition("+")[0]
    for fact in (torch_version, platform.python_version(), "cpu", "bf16"):
        assert fact in result.output


def test_env_keeps_secrets_to_itself(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret-value")
    monkeypatch.setenv("HF_TOKEN", "secret-value")
    assert "secret-value" not in run("env").output


def test_command_and_package_are_imported_without_torch():
    script = (
        "import sys, helios, helios.cli\n"
        "helios.__version__\n"
        "print([m for m in ('torch', 'accelerate', 'numpy') if m in sys.modules])\n"
        "helios.Trainer\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["[]", "True"]


def test_every_public_name_is_there():
    for name in helios.__all__:
        assert getattr(helios, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        helios.Trainr  # noqa: B018
