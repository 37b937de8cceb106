"""Every fault at every place, under every launcher: the matrix of docs/stops.md."""

import contextlib
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from accelerate.state import AcceleratorState
from faults import stops_script

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = pathlib.Path(__file__).parent / "stops_script.py"
PAGE = ROOT / "docs" / "stops.md"
TIMEOUT_S = 100
MARK = "HELIOS_TESTS_MARK"  # in the environment of all processes of a cell
PLAIN = [sys.executable, SCRIPT]
ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no"),
    *("--dynamo_backend", "no", "--num_machines", "1", "--num_processes"),
]
#: How many ranks, and the command before the plan.
LAUNCHERS = {
    "plain": (1, PLAIN),
    "PID 1": (1, ["unshare", "--fork", "--pid", "setsid", *PLAIN]),
    "ranks of Helios": (2, PLAIN),
    "torchrun": (
        2,
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", SCRIPT),
        ],
    ),
    "accelerate, 1": (1, [*ACCELERATE, "1", SCRIPT]),
    "accelerate, 2": (
        2,
        [*ACCELERATE, "2", "--multi_gpu", "--main_process_port", "0", SCRIPT],
    ),
}
RUDE = ("SIGKILL", "SIGINT twice", "too slow")


def table(begin):
    """The rows of the table of the page whose head begins like that."""
    lines = iter(PAGE.read_text().splitlines())
    head = next(line for line in lines if line.startswith(f"| {begin} |"))
    heads = [cell.strip() for cell in head.split("|")[1:-1]]
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        cells = [
            cell.strip() for cell in line[1:].rstrip().removesuffix("|").split("|")
        ]
        rows.append(dict(zip(heads, cells, strict=True)))
    return rows


CELLS = [
    (row["what"], row["when"], launcher, int(workers))
    for row in table("what | when")
    for launcher in LAUNCHERS
    for workers in row[launcher].split()
]
# The batches that are done when a polite stop at a place has ended the run, of four an
# epoch. What a save writes behind the training may be written at any of them.
DONE = {"prepare_data": 0, "setup": 0, "training": 6, "window": 7}
DONE |= {"end of an epoch": 8, "validation": 8, "save": 8, "testing": 12}
DONE["loop by hand"] = 6
STATUSES = {row["it was"]: row for row in table("it was")}


def plan_of(folder, launcher, phase, fault=None, workers=0):
    plan = {"folder": str(folder), "launcher": launcher, "workers": workers}
    plan |= {"fault": fault, "phase": phase, "window": 2 if phase == "window" else 1}
    plan["async_save"] = fault not in RUDE  # else what is not on the disk is lost
    return {**plan, "ranks": LAUNCHERS[launcher][0]}


def start(folder, plan):
    """Start the script under a launcher, in a group and with a mark of its own."""
    command = LAUNCHERS[plan["launcher"]][1]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    clean = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    env = {**clean, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with open(folder / "output", "a") as output:  # what outlives it would keep a pipe
        return subprocess.Popen(
            [*command, json.dumps(plan)],
            env={**env, "ACCELERATE_USE_CPU": "true", MARK: str(folder)},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def left(folder):
    """The processes that have the folder's mark, and are no zombies."""
    mark, found = f"{MARK}={folder}\0".encode(), []
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def end(folder, process):
    """Wait for all of it to end; the status, as a shell would say it."""
    until = time.monotonic() + TIMEOUT_S
    try:
        process.wait(TIMEOUT_S)
        while left(folder) and time.monotonic() < until:
            time.sleep(0.01)
        assert left(folder) == [], (folder / "output").read_text()
    finally:
        for pid in left(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(TIMEOUT_S)
    code = process.returncode
    return code if code >= 0 else 128 - code


def _be_rank(rank, environment, plan):
    os.environ.update(environment)
    AcceleratorState._reset_state(reset_partial_state=True)  # what tests before it left
    with open(pathlib.Path(plan["folder"]) / "output", "a") as output:
        os.dup2(output.fileno(), 2)
    stops_script.run(plan)


def finish(folder, launcher, phase):
    """Run it to its end, on as many ranks, which are forked: they import nothing."""
    plan, context = (
        plan_of(folder, launcher, phase),
        multiprocessing.get_context("fork"),
    )
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    ranks = []
    for rank in range(plan["ranks"]):
        world = {"WORLD_SIZE": plan["ranks"], "RANK": rank, "LOCAL_RANK": rank}
        world |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        world |= {"ACCELERATE_USE_CPU": "true", MARK: folder}
        environment = {name: str(value) for name, value in world.items()}
        if plan["ranks"] == 1:
            environment = {}
        ranks.append(context.Process(target=_be_rank, args=(rank, environment, plan)))
        ranks[-1].start()
    for rank in ranks:
        rank.join(TIMEOUT_S)
        rank.kill()
        rank.join(TIMEOUT_S)
    codes = [rank.exitcode for rank in ranks]
    assert codes == [0] * len(ranks), (folder / "output").read_text()
    return [path.read_text() for path in sorted(folder.glob("report_*"))], ids(folder)


def ids(folder):
    """The batches that each rank has trained on."""
    paths = sorted(folder.glob("ids_*"))
    return {path.name: path.read_text().splitlines() for path in paths}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an undisturbed run comes to, by the number of ranks and the window."""
    found = {}

    def get(launcher, phase):
        is_other = phase in ("window", "loop by hand")  # than all the rest
        key = LAUNCHERS[launcher][0], phase if is_other else ""
        if key not in found:
            found[key] = finish(tmp_path_factory.mktemp("whole"), launcher, phase)
        return found[key]

    return get


def test_matrix_is_as_large_as_the_page_says():
    assert len(CELLS) == len(set(CELLS))
    (count,) = re.findall(r"(\d+) cells", PAGE.read_text())
    assert int(count) == len(CELLS)
    assert len(CELLS) >= 120


@pytest.mark.slow
@pytest.mark.timeout(3 * TIMEOUT_S)
@pytest.mark.parametrize(
    ("fault", "phase", "launcher", "workers"),
    CELLS,
    ids=["-".join(map(str, cell)) for cell in CELLS],
)
def test_cell(tmp_path, whole, fault, phase, launcher, workers):
    if launcher == "PID 1" and (os.geteuid() != 0 or not shutil.which("unshare")):
        pytest.skip("a PID namespace needs root and the program `unshare`")
    plan = plan_of(tmp_path, launcher, phase, fault, workers)
    code = end(tmp_path, start(tmp_path, plan))
    output = (tmp_path / "output").read_text()
    assert (tmp_path / "happened").exists(), output
    kind = {"SIGKILL": "killed", "SIGINT twice": "interrupted twice"}
    status = STATUSES[kind.get(fault, "stopped")][launcher]
    assert str(code) in status.split(), output
    first = ids(tmp_path)
    if fault not in RUDE and phase in DONE:
        assert {len(of_rank) for of_rank in first.values()} <= {DONE[phase]}, output
    for path in tmp_path.glob("ids_*"):
        path.unlink()
    reports, second = finish(tmp_path, launcher, phase)
    expected_reports, expected_ids = whole(launcher, phase)
    output = (tmp_path / "output").read_text()
    assert reports == expected_reports, output
    for name, expected in expected_ids.items():
        done, rest = first.get(name, []), second.get(name, [])
        assert rest == expected[len(expected) - len(rest) :], output
        lost = len(done) + len(rest) - len(expected)
        # The batches of an epoch, at most; in a polite stop, none.
        assert 0 <= lost <= (4 if fault in RUDE else 0), output
