"""Deadlines, interrupts, votes, exit statuses, and the way back into SLURM's queue."""

import os
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch
from support import IdModel, IndexData, train

import helios
from helios.stopping.clocks import _SAME_S, Alarms, Interrupts
from helios.stopping.ranks import STARTER, STARTER_FOLDER, STOPPED
from helios.stopping.requests import Stops
from helios.stopping.slurm import requeue
from helios.stopping.status import EXIT_STOPPED, exit_status
from helios.stopping.validation import Frozen, Votes


class Clock:
    """Stands still, until a test moves it."""

    now_s = 100.0

    def __call__(self):
        return self.now_s


def test_alarms_are_due_once_and_in_their_time():
    clock = Clock()
    alarms = Alarms(clock)
    assert alarms.left_s() is None
    alarms.arm("never", None)
    alarms.arm("later", 5.0)
    alarms.arm("soon", 2.0)
    assert (alarms.left_s(), alarms.due()) == (2.0, [])
    clock.now_s += 2.0
    assert (alarms.left_s(), alarms.due()) == (0.0, ["soon"])
    assert (alarms.left_s(), alarms.due()) == (3.0, [])
    clock.now_s += 10.0
    assert (alarms.left_s(), alarms.due()) == (0.0, ["later"])
    assert (alarms.left_s(), alarms.due()) == (None, [])


def test_interrupts_of_one_moment_are_one(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    clock = Clock()
    heard = Interrupts(clock)
    assert not heard.is_second(signal.SIGTERM)
    assert not heard.is_second(signal.SIGINT)
    clock.now_s += 0.1
    assert not heard.is_second(signal.SIGINT)
    clock.now_s += 0.2
    assert not heard.is_second(signal.SIGTERM)
    assert heard.is_second(signal.SIGINT)


def test_launcher_of_torch_says_a_second_time_that_it_was_interrupted(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    clock = Clock()
    heard = Interrupts(clock)
    assert not heard.is_second(signal.SIGTERM)
    clock.now_s += 1.0
    assert not heard.is_second(signal.SIGTERM)
    assert not heard.is_second(signal.SIGINT)
    clock.now_s += 1.0
    assert heard.is_second(signal.SIGTERM)


def votes_of(batch_s, wishes, ranks=2):
    """The batches after which ranks vote that take so long for each, and the end."""
    clocks = [Clock() for _ in range(ranks)]
    answers, voted = [], []

    def agree_each(*flags):
        answers.append(flags)
        return [any(flag) for flag in zip(*answers[-ranks:], strict=False)]

    all_votes = [Votes(agree_each, clock) for clock in clocks]
    for batch, wish in enumerate(wishes):
        before = len(answers)
        for clock in clocks:
            clock.now_s += batch_s
        ends = [votes.ask(wish) for votes in all_votes]
        assert (len(answers) - before) in (0, ranks)
        if len(answers) > before:
            voted.append(batch)
        if ends[-1]:
            return voted, batch
    return voted, None


def test_ranks_vote_after_the_same_batches_and_seldom_where_these_are_short():
    assert votes_of(0.001, [False] * 80) == ([0, 2, 6, 14, 30, 46, 62, 78], None)
    assert votes_of(1.0, [False] * 4) == ([0, 1, 2, 3], None)


def test_wish_to_stop_is_heard_at_the_next_vote():
    assert votes_of(0.001, [False] * 7 + [True] * 20) == ([0, 2, 6, 14], 14)


@pytest.mark.parametrize(
    ("restarts", "is_started", "status"),
    [
        (None, False, EXIT_STOPPED),
        ("0", False, EXIT_STOPPED),
        ("3", False, 0),
        ("0", True, 0),
    ],
)
def test_status_of_a_stop_is_one_that_nobody_takes_for_a_failure(
    monkeypatch, tmp_path, restarts, is_started, status
):
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS", raising=False)
    if restarts is not None:
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    if is_started:
        monkeypatch.setenv(STARTER, str(os.getppid()))
        monkeypatch.setenv(STARTER_FOLDER, str(tmp_path))
    assert exit_status() == status
    assert (tmp_path / STOPPED).exists() is is_started
    assert helios.EXIT_STOPPED == os.EX_TEMPFAIL


def test_signal_behind_the_end_of_a_run_stops_the_next_one(monkeypatch):
    first, second, third, fourth = Stops(), Stops(), Stops(), Stops()
    put_back = first._put_handlers_back

    def ask_and_put_back():
        os.kill(os.getpid(), signal.SIGTERM)
        put_back()

    monkeypatch.setattr(first, "_put_handlers_back", ask_and_put_back)
    with first.listening():
        pass
    with second.listening():
        assert second.reason == "received SIGTERM"
        second.fail()  # which is no answer to it

    def interrupt_twice():
        with third.listening():
            assert third.reason == "received SIGTERM"
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1.5 * _SAME_S)

    with pytest.raises(KeyboardInterrupt):  # which is one
        interrupt_twice()
    with fourth.listening():
        assert fourth.reason is None


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """A job of SLURM, whose `scontrol` writes its arguments to a file."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "1234")

    def install(end=""):
        program = tmp_path / "scontrol"
        program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n{end}\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return tmp_path / "asked"

    return install


def test_job_queues_itself_again(slurm):
    asked = slurm()
    requeue()
    assert asked.read_text() == "requeue 1234\n"


def test_nobody_is_asked_outside_of_slurm(slurm, monkeypatch):
    asked = slurm()
    monkeypatch.delenv("SLURM_JOB_ID")
    requeue()
    assert not asked.exists()


def test_job_that_may_not_be_queued_again_says_so(slurm, caplog):
    slurm("echo 'Requested operation is presently disabled' >&2; exit 1")
    requeue()
    assert "THE JOB 1234 COULD NOT BE QUEUED AGAIN" in caplog.text
    assert "presently disabled" in caplog.text


def test_missing_scontrol_is_told(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    requeue()
    assert "COULD NOT BE QUEUED AGAIN" in caplog.text


class Averaging(IdModel):
    """Validates other weights, in one of the ways in which that is done."""

    def __init__(self, way):
        super().__init__()
        self.way, self.found = way, []

    def on_validation_start(self, validation_cycle):
        super().on_validation_start(validation_cycle)
        frozen = Frozen(self.trainer._session)
        self.found.append(frozen.is_true())
        weight, other = self.net.weight, torch.full_like(self.net.weight, 7.0)
        with torch.no_grad():
            if self.way == "copied":
                weight.data.copy_(other)
            elif self.way == "exchanged":
                weight.data = other
        self.found.append(frozen.is_true())
        name = "weight"
        self.found.append(frozen.encoded[0].files["model"][name].item() == 7.0)


@pytest.mark.parametrize(
    ("way", "found"),
    [
        ("none", [True, True, False]),
        ("copied", [True, False, True]),
        ("exchanged", [True, True, False]),  # what is to be saved is still there
    ],
)
def test_frozen_state_is_true_as_long_as_it_has_the_weights_of_then(
    tmp_path, way, found
):
    model = Averaging(way)
    train(model, IndexData(2), tmp_path, total_steps=1, valid_frequency=1)
    assert model.found == found


TOLD = """
import ctypes
from helios.stopping.ranks import end_with_launcher
end_with_launcher()
number = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
print(number.value)
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells of a parent's end"
)
def test_program_whose_shell_has_accelerates_variables_outlives_it():
    done = subprocess.run(
        [sys.executable, "-c", TOLD],
        env={**os.environ, "ACCELERATE_MIXED_PRECISION": "no"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "0\n", done.stderr


# Dies as soon as its child is there, which has imported Helios by then or has not.
DIES = """
import os, subprocess, sys

when, child = sys.argv[1], sys.argv[2]
os.environ |= {"HELIOS_STARTER": str(os.getpid())} if when.startswith("own") else {}
reading, writing = os.pipe()
process = subprocess.Popen(
    [sys.executable, "-c", child, when, str(writing)], pass_fds=[writing]
)
os.close(writing)
os.read(reading, 1)
os._exit(0)
"""
ORPHAN = """
import os, signal, sys, time

when, writing = sys.argv[1], int(sys.argv[2])

def is_told(number, frame):
    print("told by", signal.Signals(number).name, flush=True)
    os._exit(0)

signal.signal(signal.SIGINT, is_told)
signal.signal(signal.SIGTERM, is_told)
parent = os.getppid()
if "before" not in when:
    import helios
os.write(writing, b"1")
while os.getppid() == parent:
    time.sleep(0.01)
from helios.stopping.ranks import end_with_launcher
end_with_launcher()
time.sleep(0.2)
print("goes on", flush=True)
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells of a parent's end"
)
@pytest.mark.parametrize(
    ("when", "variables", "told"),
    [
        ("own", {}, ""),  # SIGKILL
        ("own, before it imports Helios", {}, ""),
        ("own that came to its end", {STARTER_FOLDER: "deleted"}, "goes on"),
        ("torchrun", {"TORCHELASTIC_RUN_ID": "1"}, "told by SIGINT"),
        ("none", {}, "goes on"),
        ("a shell", {"ACCELERATE_MIXED_PRECISION": "no"}, "goes on"),
    ],
)
def test_launcher_that_has_died_before_the_run_began_is_told_of(
    tmp_path, when, variables, told
):
    if when == "own that came to its end":
        when += ", before"
    done = subprocess.run(
        [sys.executable, "-c", DIES, when, ORPHAN],
        env={**os.environ, STARTER_FOLDER: str(tmp_path), **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == told, done.stderr
