"""`helios launch`: what `accelerate launch` does, without its traps."""

import json
import os
import signal
import socket

import pytest
from click.testing import CliRunner
from support.commands import HELIOS, SCRIPT, end, pids_of_ranks, reports, start

from helios.cli import main

SHOW = """
import json, os, signal, sys
found = {k: v for k, v in os.environ.items() if k.startswith(("ACCELERATE", "FSDP"))}
found |= {"arguments": sys.argv[1:], "ranks": os.environ.get("WORLD_SIZE", "1")}
name = "report_" + os.environ.get("RANK", "0") + ".json"
open(name, "w").write(json.dumps({**found, "pid": os.getpid()}))
if sys.argv[1] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(sys.argv[1]))
"""
CPU_CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
mixed_precision: bf16
num_machines: 1
num_processes: 2
use_cpu: true
"""


def launched(*options, command=(str(SCRIPT),)):
    return {"command": (*HELIOS, "launch", *map(str, options), *command)}


def show(folder, *options, arguments=("0",)):
    """Run a script that writes down what it was given; exit status, output, reports."""
    folder.mkdir(exist_ok=True)
    (folder / "show.py").write_text(SHOW)
    before = os.getcwd()
    os.chdir(folder)
    try:
        ours = launched(*options, command=("show.py", *arguments))
        process = start(folder, **ours)
    finally:
        os.chdir(before)
    code, output = end(process)
    found = [json.loads(p.read_text()) for p in sorted(folder.glob("report_*.json"))]
    return code, output, found, process.pid


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What two ranks come to that the script has started itself."""
    folder = tmp_path_factory.mktemp("whole")
    code, output = end(start(folder, num_processes=2))
    assert code == 0, output
    return reports(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What a single process comes to."""
    folder = tmp_path_factory.mktemp("alone")
    code, output = end(start(folder))
    assert code == 0, output
    return reports(folder)


@pytest.mark.parametrize(
    ("options", "command"),
    [
        (("--cpu", "--num_processes", 2), (str(SCRIPT),)),
        # There is no GPU, or none is shown.
        (("--num_processes=2",), ("-m", "distributed.launched_script")),
    ],
)
def test_several_ranks_on_the_cpu_are_as_many_as_asked_for(
    tmp_path, whole, options, command, monkeypatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    ours = launched(*options, command=command)
    code, output = end(start(tmp_path, use_cpu=None, **ours))
    assert code == 0, output
    assert reports(tmp_path) == whole


@pytest.mark.parametrize("options", [(), ("--cpu", "--num_processes", 2)])
def test_arguments_of_the_script_are_passed_on_as_they_are(tmp_path, options):
    given = (
        "0",
        "--num_processes",
        "3",
        "-m",
        "--",
        "--help",
        "--config_file=x",
        "a b",
    )
    code, output, found, _ = show(tmp_path, *options, arguments=given)
    assert code == 0, output
    # `start` adds some of its own.
    assert [report["arguments"][: len(given)] for report in found] == [
        list(given)
    ] * max(1, len(options) - 1)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("what", "expected"), [("7", 7), ("kill", 128 + 9)])
def test_exit_status_is_the_scripts(tmp_path, ranks, what, expected):
    code, output, _, _ = show(tmp_path, "--num_processes", ranks, arguments=(what,))
    assert code == (-signal.SIGKILL if (ranks, what) == (1, "kill") else expected)
    assert "Traceback" not in output


def test_single_process_takes_the_place_of_the_command(tmp_path):
    *_, (report,), pid = show(tmp_path)
    assert report["pid"] == pid


def test_file_of_accelerate_config_is_honoured_and_options_come_before_it(tmp_path):
    (tmp_path / "config.yaml").write_text(CPU_CONFIG)
    options = ("--config_file", tmp_path / "config.yaml")
    *_, found, _ = show(tmp_path / "a", *options)
    assert [report["ranks"] for report in found] == ["2", "2"]
    assert {report["ACCELERATE_MIXED_PRECISION"] for report in found} == {"bf16"}
    assert {report["ACCELERATE_USE_CPU"] for report in found} == {"true"}
    options += ("--num_processes", 3, "--mixed_precision", "no")
    *_, found, _ = show(tmp_path / "b", *options)
    assert [report["ranks"] for report in found] == ["3", "3", "3"]
    assert {report["ACCELERATE_MIXED_PRECISION"] for report in found} == {"no"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("ranks", [1, 2])
def test_signal_reaches_the_script_which_saves_and_goes_on_later(
    tmp_path, whole, alone, number, ranks
):
    ours = launched("--num_processes", ranks)
    process = start(tmp_path, "wait", **ours)
    pids_of_ranks(tmp_path, ranks)
    process.send_signal(number)
    code, output = end(process)
    # A single process has ended as its script says: this one has all that it wanted.
    assert code == (128 + number if ranks == 2 else 0), output
    assert [report["is_finished"] for report in reports(tmp_path)] == ranks * [False]
    code, output = end(start(tmp_path, **ours))
    assert code == 0, output
    assert "resumed from net_epoch_" in output
    assert reports(tmp_path) == (whole if ranks == 2 else alone)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_are_started_anew_as_often_as_is_asked(tmp_path, whole, alone, ranks):
    ours = launched("--max_restarts", 1, "--num_processes", ranks)
    code, output = end(start(tmp_path, "kill once", async_save=False, **ours))
    assert code == 0, output
    assert "resumed from net_epoch_1_iter_" in output
    assert reports(tmp_path) == (whole if ranks == 2 else alone)


def test_port_that_somebody_else_has_is_left_to_them(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        options = ("--num_processes", 2, "--main_process_port", port)
        code, output, found, _ = show(tmp_path, *options)
        assert code == 0, output
        assert len(found) == 2
        options = ("--num_machines", 2, *options, "--main_process_ip", "127.0.0.1")
        code, output, _, _ = show(tmp_path, *options)
        assert code == 2, output
        assert f"on port `{port}`, but another process" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_processes", "3", "--num_machines", "2"], "which 2 hosts cannot share"),
        (["--num_processes", "2", "--num_machines", "2"], "`--main_process_ip` is not"),
        (
            [
                *("--num_processes", "2", "--num_machines", "2", "--machine_rank", "2"),
                *("--main_process_ip", "a"),
            ],
            "`--machine_rank` is 2; of 2 hosts it is one from 0 to 1",
        ),
        (["--nonsense"], "unrecognized arguments: --nonsense; `accelerate launch"),
        (
            ["--use_fsdp", "--num_processes", "2"],
            "FSDP is asked for, and works on GPUs",
        ),
        (["--config_file", "absent.yaml"], "absent.yaml"),
    ],
)
def test_what_cannot_be_launched_is_an_error_that_says_so(options, message):
    done = CliRunner().invoke(main, ["launch", *options, "script.py"])
    assert done.exit_code == 2, done.output
    assert message in done.output


def test_command_alone_says_what_it_needs():
    done = CliRunner().invoke(main, ["launch"])
    assert done.exit_code == 2
    assert "Missing argument" in done.output


def test_no_folder_is_left_behind(tmp_path):
    (tmp_path / "temporary").mkdir()
    env = {"TMPDIR": str(tmp_path / "temporary")}
    code, output = end(start(tmp_path, env=env, **launched("--num_processes", 2)))
    assert code == 0, output
    left = [path.name for path in (tmp_path / "temporary").iterdir()]
    assert [name for name in left if not name.startswith("torchinductor")] == []
