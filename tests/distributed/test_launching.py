"""A plain command that starts its ranks, and what becomes of them."""

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
from support.commands import (
    ROOT,
    TIMEOUT_S,
    end,
    pids_of_ranks,
    reports,
    seconds_since_failure,
    start,
)

from helios.stopping.status import EXIT_STOPPED


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    code, output = end(start(folder, num_processes=2))
    assert code == 0, output
    return reports(folder)


def test_command_starts_its_ranks(whole):
    assert [report["world_size"] for report in whole] == ["2", "2"]
    assert [report["is_finished"] for report in whole] == [True, True]
    assert whole[0] == whole[1]


def test_module_and_a_machine_without_gpus_are_started_likewise(tmp_path, whole):
    command = ("-m", "distributed.launched_script")
    options = {"num_processes": 2, "use_cpu": None}
    env = {"CUDA_VISIBLE_DEVICES": ""}
    code, output = end(start(tmp_path / "a", command=command, env=env, **options))
    assert code == 0, output
    assert reports(tmp_path / "a") == whole


def test_rank_that_raises_ends_the_job_with_its_traceback(tmp_path):
    code, output = end(start(tmp_path, "raise", num_processes=3))
    assert code == 1, output
    assert "rank 1 failed" in output
    assert "ValueError: on purpose" in output
    assert "rank 1 failed first, with exit status 1" in output
    assert seconds_since_failure(tmp_path) < 15


def check_resumed(folder, code, output, **options):
    """Hold a run that went on in folder "a" against one that was not interrupted."""
    assert code == 0, output
    assert "resumed from net_epoch_1_iter_" in output
    found = reports(folder / "a")
    code, output = end(start(folder / "b", **options))
    assert code == 0, output
    assert found == reports(folder / "b")


def test_rank_that_is_killed_ends_the_job_and_the_same_command_goes_on(tmp_path):
    # The last checkpoint is whole before the step in which it is killed.
    options = {"num_processes": 3, "async_save": False}
    code, output = end(start(tmp_path / "a", "kill", **options))
    assert code == 128 + signal.SIGKILL, output
    assert "rank 1 failed first, with exit status -9" in output
    assert seconds_since_failure(tmp_path / "a") < 15
    code, output = end(start(tmp_path / "a", **options))
    check_resumed(tmp_path, code, output, **options)


def test_job_is_started_anew_as_often_as_is_asked(tmp_path):
    options = {"num_processes": 2, "async_save": False}
    code, output = end(start(tmp_path / "a", "kill once", max_restarts=1, **options))
    check_resumed(tmp_path, code, output, **options)
    code, output = end(start(tmp_path / "c", "kill", max_restarts=1, **options))
    assert code == 128 + signal.SIGKILL, output
    assert output.count("resumed from net_epoch_1_iter_3") == 1


def test_attempt_that_was_stopped_does_not_count_when_the_next_one_finishes(tmp_path):
    options = {"num_processes": 2, "exit_when_stopped": True}
    process = start(tmp_path / "a", "stop once", max_restarts=1, **options)
    check_resumed(tmp_path, *end(process), **options)


def test_hung_rank_ends_the_job_and_is_named_and_the_same_command_goes_on(tmp_path):
    options = {"num_processes": 3, "hang_timeout_s": 4, "async_save": False}
    code, output = end(start(tmp_path / "a", "hang", **options))
    assert code == 1, output
    assert seconds_since_failure(tmp_path / "a") < 4 + 15
    assert re.search(
        r"rank 0: NO BATCH HAS ENDED FOR 4 S; it is in train_step, ", output
    )
    assert re.search(r"rank 1: NO BATCH .* it is in wait_for_ever, .*\.py:\d+", output)
    for rank in (0, 2):
        assert re.search(rf"^rank {rank}: in train_step, .*, batch 3$", output, re.M)
    assert re.search(r"^rank 1: in wait_for_ever, .*, step 3, batch 3$", output, re.M)
    assert re.search(r"^behind: rank 1$", output, re.M)
    code, output = end(start(tmp_path / "a", **options))
    check_resumed(tmp_path, code, output, **options)


def test_rank_that_hangs_while_the_others_vote_is_named(tmp_path):
    options = {"num_processes": 3, "hang_timeout_s": 4}
    code, output = end(start(tmp_path / "a", "hang later", **options))
    assert code == 1, output
    assert len(re.findall(r"^rank \d: in .*, step 4, batch 4$", output, re.M)) == 3
    assert re.search(r"^behind: rank 1$", output, re.M), output


def test_ranks_do_not_outlive_who_started_them(tmp_path):
    process = start(tmp_path, "wait", num_processes=2, total_steps=1000)
    pids = pids_of_ranks(tmp_path)
    process.kill()
    until = time.monotonic() + TIMEOUT_S
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < until, alive
        time.sleep(0.05)
    end(process)


def is_alive(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except FileNotFoundError:
        return False
    return state.split()[0] != "Z"  # nobody may be there to reap it


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_reaches_the_ranks_which_save_and_go_on_later(tmp_path, whole, number):
    process = start(tmp_path, "wait", num_processes=2)
    pids_of_ranks(tmp_path)
    process.send_signal(number)
    code, output = end(process)
    assert code == 128 + number, output
    assert [report["is_finished"] for report in reports(tmp_path)] == [False, False]
    code, output = end(start(tmp_path, num_processes=2))
    assert code == 0, output
    assert "resumed from net_epoch_" in output
    assert reports(tmp_path) == whole


def test_ranks_that_a_signal_reaches_at_their_end_are_to_be_started_again(
    tmp_path, whole
):
    process = start(tmp_path, "end", num_processes=2)
    pids_of_ranks(tmp_path)
    process.send_signal(signal.SIGTERM)
    code, output = end(process)
    assert code == EXIT_STOPPED, output
    assert reports(tmp_path) == whole
    code, output = end(start(tmp_path, num_processes=2))
    assert code == 0, output
    assert reports(tmp_path) == whole


def test_request_to_save_reaches_the_ranks_which_go_on(tmp_path, whole):
    process = start(tmp_path, "wait", num_processes=2, chkpt_frequency=100)
    pids_of_ranks(tmp_path)
    process.send_signal(signal.SIGUSR2)
    code, output = end(process)
    assert code == 0, output
    assert reports(tmp_path) == whole
    saved = sorted(path.name for path in (tmp_path / "runs" / "net").iterdir())
    assert len(saved) == 2  # one more than that of the end


def test_tasks_of_slurm_are_the_ranks(tmp_path, whole):
    step = {"SLURM_STEP_NUM_TASKS": 2, "SLURM_JOB_ID": 100_000 + os.getpid() % 20_000}
    step["SLURM_STEP_NODELIST"] = "localhost"
    tasks = [{**step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in range(2)]
    processes = [
        start(tmp_path, env={k: str(v) for k, v in task.items()}) for task in tasks
    ]
    for process in processes:
        code, output = end(process)
        assert code == 0, output
    assert reports(tmp_path) == whole


def test_port_of_somebody_else_is_left_to_them(tmp_path, whole):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        code, output = end(start(tmp_path, env=env, num_processes=2))
    assert code == 0, output
    assert reports(tmp_path) == whole


def test_port_that_is_taken_is_an_error_on_ranks_that_others_have_started(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        code, output = end(start(tmp_path, env={**env, "RANK": "0", "LOCAL_RANK": "0"}))
    assert code == 1, output
    assert f"port: {port}" in output
    assert "EADDRINUSE" in output


MPIRUN = ("mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2")
needs_mpi = pytest.mark.skipif(not shutil.which("mpirun"), reason="there is no mpirun")


@needs_mpi
def test_processes_of_mpi_are_the_ranks(tmp_path, whole):
    code, output = end(start(tmp_path, under=MPIRUN))
    assert code == 0, output
    assert reports(tmp_path) == whole


@needs_mpi
def test_signal_to_mpi_reaches_its_ranks_which_save_and_go_on_later(tmp_path, whole):
    process = start(tmp_path, "wait", under=MPIRUN)
    pids_of_ranks(tmp_path)
    process.send_signal(signal.SIGUSR1)  # SIGTERM leaves them no time
    code, output = end(process)
    assert code == 0, output
    assert [report["is_finished"] for report in reports(tmp_path)] == [False, False]
    code, output = end(start(tmp_path, under=MPIRUN))
    assert code == 0, output
    assert "resumed from net_epoch_" in output
    assert reports(tmp_path) == whole


@pytest.mark.parametrize(
    "names",
    [
        [f"MV2_COMM_WORLD_{n}" for n in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")],
        ["PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"],
    ],
    ids=["mvapich", "intel"],
)
def test_processes_of_other_mpis_are_the_ranks(tmp_path, whole, names):
    """By what they set in the environment, without them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in ("0", "1"):
        env = dict(zip(names, ("2", rank, rank, "2"), strict=True))
        processes.append(start(tmp_path, env={**env, "MASTER_PORT": port}))
    for process in processes:
        code, output = end(process)
        assert code == 0, output
    assert reports(tmp_path) == whole


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("n[003-007,9],b", "n003"), ("x-1,x-2", "x-1"), ("n[5,7]", "n5")],
)
def test_first_node_of_a_list_is_the_main_one(nodes, first):
    code = "from helios import adopting; adopting.adopt_ranks(); import os; "
    code += "print(os.environ['MASTER_ADDR'])"
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7", "SLURM_PROCID": "1"}
    step |= {"SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": nodes}
    clean = {k: v for k, v in os.environ.items() if k != "WORLD_SIZE"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **step, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=TIMEOUT_S,
    )
    assert done.stdout.strip() == first
