"""Two hosts of two ranks each: one is lost, comes back, and nothing has changed."""

import json
import os
import pathlib
import shutil
import sys
import time
from datetime import UTC, datetime

import pytest
from support import digest
from support.hosts import PORT, two_hosts

from helios.checkpoint import CheckpointStore, find_last_checkpoint, read_checkpoint

# In one process of the tests: a run takes long, and one is shared.
pytestmark = pytest.mark.xdist_group("hosts")

HERE = pathlib.Path(__file__).parent
SCRIPT = HERE / "hosts_script.py"
OPTIONS = {"total_steps": 3, "chkpt_frequency": 1, "accumulation_steps": 2}
OPTIONS |= {"async_save": False}  # the last one is whole when a host is lost
TIMEOUT_S = 90
CUT_S = 5  # a collective's time, where the network is cut


def torchrun(hosts, number):
    return [
        *("-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 2),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0].name}:{PORT}"),
    ]


def torchrun_with_numbers(hosts, number):
    return [
        *("-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 2),
        *("--node-rank", number, "--master-addr", hosts[0].name),
        *("--master-port", PORT),
    ]


def accelerate_launch(hosts, number):
    return [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", 2),
        *("--num_processes", 4, "--machine_rank", number),
        *("--main_process_ip", hosts[0].address, "--main_process_port", PORT),
    ]


def helios_launch(hosts, number):
    return [
        *("-c", "from helios.cli import main; main()", "launch", "--cpu"),
        *("--num_machines", 2, "--num_processes", 4, "--machine_rank", number),
        *("--main_process_ip", hosts[0].address, "--main_process_port", PORT),
    ]


def start(hosts, launcher, root, **options):
    """Start the job on both hosts, with ``root`` for data, checkpoints and logs."""
    folder = hosts[0].folder
    (folder / "temporary").mkdir(exist_ok=True)
    env = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"} | {
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)]),
        "TMPDIR": str(folder / "temporary"),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    arguments = [SCRIPT, folder, root, json.dumps({**OPTIONS, **options})]
    for number, host in enumerate(hosts):
        command = [*launcher(hosts, number), *arguments]
        host.start(sys.executable, *map(str, command), env=env)


def run(hosts, launcher, root, **options):
    """Run the job on both hosts to its end; the reports of the ranks, the outputs."""
    start(hosts, launcher, root, **options)
    outputs = []
    for host in hosts:
        code, output = host.end(TIMEOUT_S)
        assert code == 0, output
        outputs.append(output)
    folder = hosts[0].folder
    assert list((folder / "temporary").glob("net_epoch_*")) == []
    paths = [folder / f"rank_{rank}.json" for rank in range(4)]
    return [json.loads(path.read_text()) for path in paths], outputs


def lose(hosts, launcher, root, lose_it, **options):
    """Run the job until a host is lost; the seconds after which all of it has ended."""
    start(hosts, launcher, root, waits=True, **options)
    folder, until = hosts[0].folder, time.monotonic() + TIMEOUT_S
    while len(list(folder.glob("waits_*"))) < 4:
        assert all(host.is_running() for host in hosts), [h.end(0) for h in hosts]
        assert time.monotonic() < until
        time.sleep(0.02)
    lose_it()
    (folder / "go").touch()
    lost_s = time.monotonic()
    assert all(host.end(TIMEOUT_S)[0] != 0 for host in hosts)
    return time.monotonic() - lost_s


def check(found, whole):
    """Hold the ranks of a run that was resumed against those of one that was not."""
    for resumed, uninterrupted in zip(found, whole, strict=True):
        count = len(resumed["drawn"])
        assert 0 < count < len(uninterrupted["drawn"])
        drawn = uninterrupted["drawn"][-count:]
        assert resumed == {**uninterrupted, "drawn": drawn}


@pytest.fixture
def hosts(tmp_path):
    with two_hosts(tmp_path / "hosts") as made:
        yield made


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that is not interrupted, with a folder that both hosts see."""
    with two_hosts(tmp_path_factory.mktemp("whole") / "hosts") as made:
        root = made[0].folder / "shared"
        root.mkdir()
        yield run(made, torchrun, root)[0]


def files(folder):
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(str(path) for path in found)


def test_job_runs_on_all_ranks_of_both_hosts(whole):
    assert [report["host"] for report in whole] == 2 * ["host0"] + 2 * ["host1"]
    assert len({report["weights"] for report in whole}) == 1
    assert len({str(report["drawn"]) for report in whole}) == 4
    assert all(report["is_finished"] for report in whole)
    assert all(report["is_wired"] for report in whole)
    assert all(report["tested"] == report["weights"] for report in whole)


def test_host_without_the_folder_is_killed_and_the_same_command_goes_on(hosts, whole):
    root, (disk, other) = hosts[0].disk, [host.own_disk for host in hosts]
    ended_s = lose(hosts, torchrun, root, hosts[1].kill, per_host=True)
    assert ended_s < 15
    saved = ["rank_0", "rank_1", "rank_2", "rank_3", "model", "training"]
    folder = pathlib.Path("runs", "net", "net_epoch_1_iter_2")
    assert {path.stem for path in (disk / folder).iterdir()} == {*saved, "helios"}
    # Nothing but each host's own log is on the other disk, and its own data.
    logs = ["logs/run.rank_2.log", "logs/run.rank_3.log"]
    assert files(other) == [*logs, "prepared"]
    assert [(d / "prepared").read_text() for d in (disk, other)] == ["0\n", "2\n"]
    # An earlier run has left another checkpoint of that name there.
    shutil.copytree(disk / folder, other / folder)
    shutil.copy(
        disk / folder / "rank_1.safetensors", other / folder / "rank_2.safetensors"
    )
    created = datetime.now(UTC)
    CheckpointStore(other / folder.parent).amend(other / folder, created=created)
    found, outputs = run(hosts, torchrun, root, per_host=True)
    assert "resumed from net_epoch_1_iter_2" in outputs[0]
    check(found, whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("launcher", [accelerate_launch, helios_launch])
def test_host_is_killed_and_the_same_command_goes_on(hosts, whole, launcher, number):
    root = hosts[0].folder / "shared"
    root.mkdir()
    ended_s = lose(hosts, launcher, root, hosts[number].kill)
    assert ended_s < 15
    names = ["run.log", *(f"run.rank_{rank}.log" for rank in (1, 2, 3))]
    found = files(root / "logs")
    # What the ranks of the other host know of the step that did not come to its end.
    *logs, curves = [name for name in found if not name.startswith("run_crash_")]
    assert logs == names
    assert curves.startswith("run/events.")
    assert ".host0." in curves
    assert (root / "prepared").read_text() == "0\n"
    found, outputs = run(hosts, launcher, root)
    assert "resumed from net_epoch_1_iter_2" in outputs[0]
    check(found, whole)


def helios_launch_again(hosts, number):
    options = helios_launch(hosts, number)
    return [*options[:3], "--max_restarts", 1, *options[3:]]


@pytest.mark.slow
def test_ranks_of_both_hosts_are_started_anew_where_one_is_killed(hosts, whole):
    root = hosts[0].folder / "shared"
    root.mkdir()
    found, outputs = run(hosts, helios_launch_again, root, kills_once=True)
    assert "resumed from net_epoch_1_iter_2" in outputs[0]
    check(found, whole)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [accelerate_launch, torchrun_with_numbers])
def test_network_is_cut_and_the_same_command_goes_on(hosts, whole, launcher):
    root = hosts[0].disk
    options = {"timeout_s": CUT_S, "per_host": True}

    def cut():
        hosts[1].set_link("down")

    ended_s = lose(hosts, launcher, root, cut, **options)
    assert CUT_S <= ended_s < CUT_S + 15
    hosts[1].set_link("up")
    found, outputs = run(hosts, launcher, root, **options)
    assert "resumed from net_epoch_1_iter_2" in outputs[0]
    check(found, whole)


VOTES = """
import os, pathlib, sys, time
from datetime import timedelta
import torch
from torch import distributed
from helios import wires
from helios.voting import Votes

wires._KEEPALIVE = {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3}
distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
votes, folder = Votes(torch.device("cpu")), pathlib.Path(sys.argv[1])
assert votes.is_wired
assert votes.any_of((False,)) == [False]
(folder / f"waits_{distributed.get_rank()}").touch()
while not (folder / "go").exists():
    time.sleep(0.05)
try:
    votes.any_of((False,))
except RuntimeError as error:
    print(error, flush=True)
    os._exit(0)
"""


@pytest.mark.slow
def test_rank_that_waits_for_a_vote_misses_a_host_that_is_gone(hosts):
    folder = hosts[0].folder
    for rank, host in enumerate(hosts):
        env = {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
        env |= {"RANK": str(rank), "WORLD_SIZE": "2", "PATH": os.environ["PATH"]}
        env |= {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": str(PORT)}
        host.start(sys.executable, "-c", VOTES, folder, env=env)
    until = time.monotonic() + TIMEOUT_S
    while len(list(folder.glob("waits_*"))) < 2:
        assert time.monotonic() < until, [host.end(0) for host in hosts]
        time.sleep(0.02)
    hosts[1].set_link("down")
    (folder / "go").touch()
    for host in hosts:
        code, output = host.end(20)
        assert code == 0, output
        assert "cannot exchange messages with rank" in output


@pytest.mark.slow
def test_gradients_of_ranks_that_do_not_see_the_folder_are_saved_too(hosts, whole):
    # Inside an accumulation window, on a rank of the other host's wish.
    found, _ = run(hosts, torchrun, hosts[0].disk, per_host=True, stop_at=4)
    assert [report["is_finished"] for report in found] == 4 * [False]
    checkpoint = read_checkpoint(find_last_checkpoint(hosts[0].own_disk / "runs"))
    assert checkpoint.record["progress"]["global_iteration"] == 4
    pending = [checkpoint.tree(f"rank_{rank}")["gradients"] for rank in range(4)]
    assert all(grad is not None for pairs in pending for _, grad in pairs)
    assert len({digest(pairs) for pairs in pending}) == 4
    check(run(hosts, torchrun, hosts[0].disk, per_host=True)[0], whole)
