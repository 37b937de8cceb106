"""Polite stops: who may ask for one, and where a run then is."""

import multiprocessing
import os
import pathlib
import re
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch
import yaml
from support import (
    ByHand,
    IdModel,
    IndexData,
    RandomData,
    RandomModel,
    StopAt,
    digest,
    train,
)
from support.children import TIMEOUT_S, child, receive, wait_until

import helios

OPTIONS = {"total_steps": 3, "valid_frequency": 1, "chkpt_frequency": 1}
QUIET = {"use_cpu": True, "print_banner": False, "enable_progress_bar": False}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The final state of a run without interruption."""
    model = RandomModel()
    train(model, RandomData(), tmp_path_factory.mktemp("whole"), **OPTIONS)
    return digest(model.state_dict())


def check_resumed(root, whole, **options):
    model = RandomModel()
    assert train(model, RandomData(), root, StopAt(), **{**OPTIONS, **options})[0]
    assert digest(model.state_dict()) == whole


# Who asks.


class Until(helios.Callback):
    """Waits, in a batch, for a stop that somebody asks for in the meantime."""

    def __init__(self, batch, ask=lambda: None):
        self.batch, self.ask = batch, ask

    def on_training_batch_end(self, session):
        if session.state.global_iteration == self.batch:
            self.ask()
            wait_until(lambda: session.stop_reason is not None)


def test_file_in_the_folder_of_the_run_stops_it_and_is_deleted(tmp_path, whole):
    file = tmp_path / "random" / "stop"

    def ask():
        file.parent.mkdir(exist_ok=True)  # which a first save makes behind the training
        file.touch()

    is_finished, _ = train(
        RandomModel(), RandomData(), tmp_path, Until(7, ask), **OPTIONS
    )
    assert not is_finished
    assert not file.exists()
    check_resumed(tmp_path, whole)


def test_file_that_came_too_late_does_not_stop_the_next_run(tmp_path):
    file = tmp_path / "random" / "stop"

    class Last(helios.Callback):
        def on_training_end(self, session):
            file.touch()

    assert train(RandomModel(), RandomData(), tmp_path, Last(), **OPTIONS)[0]
    assert not file.exists()


def test_file_that_is_made_beside_a_signal_does_not_stop_the_next_run(tmp_path, whole):
    file = tmp_path / "random" / "stop"

    def ask():
        file.parent.mkdir(exist_ok=True)
        file.touch()
        os.kill(os.getpid(), signal.SIGTERM)

    is_finished, _ = train(
        RandomModel(), RandomData(), tmp_path, Until(7, ask), **OPTIONS
    )
    assert not is_finished
    assert not file.exists()
    check_resumed(tmp_path, whole)


def test_time_limit_stops_a_run(tmp_path, whole, capsys):
    options = {**OPTIONS, "max_time_s": 0.5}
    is_finished, _ = train(RandomModel(), RandomData(), tmp_path, Until(7), **options)
    assert not is_finished
    assert "`max_time_s` is over, 0.5 s" in capsys.readouterr().err
    check_resumed(tmp_path, whole)


@pytest.mark.parametrize("name", ["hang_timeout_s", "max_time_s", "stop_grace_s"])
@pytest.mark.parametrize("value", [0, -1.0, "1", True])
def test_times_are_positive_numbers(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be > 0 or None"):
        helios.Trainer(total_steps=1, **{name: value})


def test_stopped_run_ends_with_a_status_of_its_own_where_that_is_asked_for(tmp_path):
    with pytest.raises(SystemExit) as caught:
        train(
            IdModel(),
            IndexData(),
            tmp_path,
            StopAt(2),
            total_steps=1,
            exit_when_stopped=True,
        )
    assert caught.value.code == helios.EXIT_STOPPED
    assert train(
        IdModel(), IndexData(), tmp_path, total_steps=1, exit_when_stopped=True
    )[0]


TWICE = """
import atexit, os, signal, sys

def ask_again():
    os.kill(os.getpid(), signal.SIGTERM)

if sys.argv[2] == "last":  # called last, as it is registered first
    atexit.register(ask_again)

from support import IdModel, IndexData, StopAt, train

if sys.argv[2] == "first":
    atexit.register(ask_again)
if not train(IdModel(), IndexData(), sys.argv[1], StopAt(2), total_steps=1)[0]:
    sys.exit(75)
"""


@pytest.mark.parametrize("when", ["first", "last"])
def test_second_signal_does_not_change_the_status_of_a_stop(tmp_path, when):
    done = subprocess.run(
        [sys.executable, "-c", TWICE, tmp_path, when],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == helios.EXIT_STOPPED


# Where the run is.


def forever():
    while True:
        time.sleep(1)


class Waits(IndexData):
    """Waits in its preparation for a signal, and tells what comes after."""

    def __init__(self, pipe, place, wait=forever):
        super().__init__()
        self.pipe, self.place, self.wait = pipe, place, wait

    def prepare_data(self):
        self.be_at("prepare_data")

    def setup(self):
        self.be_at("setup")
        super().setup()

    def be_at(self, place):
        if place == self.place:
            self.pipe.send(place)
            self.wait()

    def teardown(self):
        self.pipe.send("teardown")


def fit_and_wait(pipe, root, place, wait=forever):
    is_finished, _ = train(IdModel(), Waits(pipe, place, wait), root, **OPTIONS)
    pipe.send(is_finished)


@pytest.mark.parametrize("place", ["prepare_data", "setup"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_stop_ends_the_setup_where_it_is(tmp_path, place, number):
    with child(fit_and_wait, tmp_path, place) as (process, pipe):
        assert receive(pipe) == place
        os.kill(process.pid, number)
        assert receive(pipe) == "teardown"
        assert receive(pipe) is False
    assert list(tmp_path.glob("ids/*")) == []


def disguised():
    try:
        forever()
    except BaseException as error:
        raise RuntimeError("the download has failed") from error


def test_what_a_setup_makes_of_its_interruption_is_no_failure(tmp_path):
    with child(fit_and_wait, tmp_path, "setup", disguised) as (process, pipe):
        receive(pipe)
        os.kill(process.pid, signal.SIGTERM)
        assert receive(pipe) == "teardown"
        assert receive(pipe) is False


def in_a_pool():
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(abs, [-1, 2]) == [1, 2]
    pool.join()  # it was ended by SIGTERM


def ended_at_once():
    for _ in range(20):  # before their first line
        process = multiprocessing.get_context("fork").Process(target=forever)
        process.start()
        process.terminate()
        process.join(TIMEOUT_S)
        assert process.exitcode == -signal.SIGTERM
        process.close()


@pytest.mark.parametrize("part", [in_a_pool, ended_at_once])
def test_processes_that_a_setup_forks_do_not_hear_for_the_run(tmp_path, part):
    with child(fit_and_wait, tmp_path, "setup", part) as (_, pipe):
        assert receive(pipe) == "setup"
        assert receive(pipe) == "teardown"
        assert receive(pipe) is True


FORKING = """
import os, signal, sys, time

def ask():
    os.kill(os.getpid(), signal.SIGTERM)

os.register_at_fork(after_in_parent=ask)  # before Helios does: it is called before
from support import IdModel, IndexData, train

class Forks(IndexData):
    def setup(self):
        if os.fork() == 0:
            os._exit(0)
        time.sleep(600)

sys.exit(10 + train(IdModel(), Forks(), sys.argv[1], total_steps=1)[0])
"""


def test_signal_that_comes_while_a_setup_forks_ends_it(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FORKING, tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 10


@pytest.mark.parametrize("unit", ["epoch", "iteration"])
@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("validation", [0, 1, 2])
def test_interrupted_validation_changes_nothing(tmp_path, unit, step, validation):
    options = {"total_steps": 3, "valid_frequency": 1, "chkpt_frequency": 1}
    options |= {"train_unit": unit, "early_stop_cycles": 3}
    free, parts, again = RandomModel(), RandomModel(), RandomModel()
    _, logged = train(free, RandomData(), tmp_path / "free", StopAt(), **options)
    stop = StopAt(validation=validation, valid_step=step)
    is_finished, first = train(parts, RandomData(), tmp_path / "a", stop, **options)
    assert not is_finished
    is_finished, second = train(
        again, RandomData(), tmp_path / "a", StopAt(), **options
    )
    assert is_finished
    assert digest(again.state_dict()) == digest(free.state_dict())
    assert first.logged + second.logged == logged.logged
    saved = [recorder.saved for recorder in (first, second, logged)]
    assert sorted({*saved[0], *saved[1]}) == saved[2]


class Counting(RandomModel):
    """Counts in its validations, in place, what is saved."""

    def setup(self, for_inference=False):
        super().setup(for_inference)
        self.seen = torch.zeros(())

    def valid_step(self, batch, step):
        super().valid_step(batch, step)
        self.seen += 1

    def user_state_dict(self):
        return {**super().user_state_dict(), "seen": self.seen}

    def load_user_state_dict(self, state, for_inference):
        super().load_user_state_dict(state, for_inference)
        self.seen = state["seen"]


def test_what_an_interrupted_validation_has_counted_is_not_saved(tmp_path):
    parts, again = Counting(), Counting()
    stop = StopAt(validation=1)
    assert not train(parts, RandomData(), tmp_path, stop, **OPTIONS)[0]
    assert parts.seen.item() == 3
    assert train(again, RandomData(), tmp_path, StopAt(), **OPTIONS)[0]
    assert again.seen.item() == 6


class Averaging(RandomModel):
    """Validates a moving average of its weights."""

    def setup(self, for_inference=False):
        super().setup(for_inference)
        self.average = [torch.zeros_like(p) for p in self.net.parameters()]

    def exchange(self):
        with torch.no_grad():
            for weight, average in zip(
                self.net.parameters(), self.average, strict=True
            ):
                kept = weight.clone()
                weight.data.copy_(average)
                average.copy_(kept)

    def on_training_batch_end(self, state, should_log=False):
        super().on_training_batch_end(state, should_log)
        with torch.no_grad():
            for weight, average in zip(
                self.net.parameters(), self.average, strict=True
            ):
                average.lerp_(weight, 0.1)

    def on_validation_start(self, validation_cycle):
        super().on_validation_start(validation_cycle)
        self.exchange()

    def on_validation_end(self, validation_cycle):
        self.exchange()
        super().on_validation_end(validation_cycle)

    def user_state_dict(self):
        return {**super().user_state_dict(), "average": self.average}

    def load_user_state_dict(self, state, for_inference):
        super().load_user_state_dict(state, for_inference)
        self.average = list(state["average"])


def test_stop_waits_for_a_validation_of_other_weights(tmp_path):
    free, parts, again = Averaging(), Averaging(), Averaging()
    train(free, RandomData(), tmp_path / "free", StopAt(), **OPTIONS)
    stop = StopAt(validation=1)
    assert not train(parts, RandomData(), tmp_path / "a", stop, **OPTIONS)[0]
    assert len(parts.history) == 2
    assert train(again, RandomData(), tmp_path / "a", StopAt(), **OPTIONS)[0]
    assert digest(again.state_dict()) == digest(free.state_dict())


def test_validation_alone_ends_at_a_stop():
    class Stopping(IdModel):
        def valid_step(self, batch, step):
            super().valid_step(batch, step)
            self.trainer.request_stop()

    model = Stopping()
    assert not helios.Trainer(**QUIET).validate(model, IndexData())
    assert len(model.validated) == 1


# By when.


class Hangs(helios.Callback):
    """Does not come to an end in a batch."""

    def __init__(self, pipe):
        self.pipe = pipe

    def on_training_batch_end(self, session):
        if session.state.global_iteration == 7:
            self.pipe.send("ready")
            forever()


def fit_and_hang(pipe, root, environment):
    os.environ.update(environment)
    workers = {"num_workers": 2, "persistent_workers": True}
    options = {**OPTIONS, "stop_grace_s": 0.3, "async_save": False}
    train(RandomModel(), RandomData(**workers), root, Hangs(pipe), **options)


def pids_below(pid):
    tasks = pathlib.Path(f"/proc/{pid}/task").glob("*/children")
    return [int(word) for path in tasks for word in path.read_text().split()]


def test_run_that_does_not_end_in_time_is_ended_and_its_last_checkpoint_stands(
    tmp_path, whole
):
    with child(fit_and_hang, tmp_path, {}) as (process, pipe):
        assert receive(pipe) == "ready"
        workers = pids_below(process.pid)
        assert len(workers) == 2
        os.kill(process.pid, signal.SIGTERM)
        process.join(TIMEOUT_S)
        assert process.exitcode == helios.EXIT_STOPPED
        wait_until(lambda: not any(os.path.exists(f"/proc/{w}") for w in workers))
    assert [p.name for p in tmp_path.glob("*/random*")] == ["random_epoch_1_iter_5"]
    check_resumed(tmp_path, whole)


# The recipes of the page.


def recipes(language):
    page = pathlib.Path(__file__).resolve().parents[2] / "docs" / "stops.md"
    pattern = rf"^```{language}\n(.*?)^```$"
    return re.findall(pattern, page.read_text(), re.DOTALL | re.MULTILINE)


def program(folder, name, text):
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("text", recipes("bash"))
def test_recipes_are_in_the_language_of_the_shell(text):
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=TIMEOUT_S)


def test_shell_of_a_batch_script_passes_the_signal_on(tmp_path):
    (text,) = [text for text in recipes("bash") if "B:USR1" in text]
    wait = "trap 'exit 75' USR1; touch ready; while :; do sleep 0.05; done"
    program(tmp_path, "python", wait)
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen(["bash", "-c", text], cwd=tmp_path, env=env)
    wait_until((tmp_path / "ready").exists)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(TIMEOUT_S) == 75


def test_loop_beside_the_training_makes_the_file_when_the_instance_is_to_end(tmp_path):
    (text,) = [text for text in recipes("bash") if "spot" in text]
    # It says no the first time.
    program(tmp_path, "curl", "test -e asked || { touch asked; exit 22; }")
    program(tmp_path, "sleep", "true")
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(
        ["bash", "-c", text], cwd=tmp_path, env=env, check=True, timeout=TIMEOUT_S
    )
    assert (tmp_path / "runs" / "digits" / "stop").exists()


def test_job_of_kubernetes_starts_again_what_was_stopped():
    (text,) = recipes("yaml")
    job = yaml.safe_load(text)["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [helios.EXIT_STOPPED]
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # the policy demands it


# SLURM.


@pytest.fixture
def job(tmp_path):
    """The environment of a job, and the file in which `scontrol` writes its orders."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "SLURM_JOB_ID": "1234"}, folder / "asked"


def fit_in_job(pipe, root, environment):
    os.environ.update(environment)

    def ask():
        pipe.send("ready")

    is_finished, _ = train(RandomModel(), RandomData(), root, Until(7, ask), **OPTIONS)
    pipe.send(is_finished)


@pytest.mark.parametrize(
    ("number", "asked"), [(signal.SIGUSR1, "requeue 1234\n"), (signal.SIGTERM, None)]
)
def test_job_that_is_to_make_room_saves_and_queues_itself_again(
    tmp_path, whole, job, number, asked
):
    environment, file = job
    with child(fit_in_job, tmp_path / "runs", environment) as (process, pipe):
        assert receive(pipe) == "ready"
        os.kill(process.pid, number)
        assert receive(pipe) is False
    assert (file.read_text() if file.exists() else None) == asked
    check_resumed(tmp_path / "runs", whole)


def test_job_that_cannot_save_in_time_is_queued_again_all_the_same(tmp_path, job):
    environment, file = job
    with child(fit_and_hang, tmp_path / "runs", environment) as (process, pipe):
        assert receive(pipe) == "ready"
        os.kill(process.pid, signal.SIGUSR1)
        process.join(TIMEOUT_S)
        assert process.exitcode == helios.EXIT_STOPPED
    assert file.read_text() == "requeue 1234\n"


def fit_in_slow_job(pipe, root, environment):
    os.environ.update(environment)
    ask = Until(7, lambda: pipe.send("ready"))
    train(RandomModel(), RandomData(), root, ask, **OPTIONS, stop_grace_s=3)


def test_job_is_queued_again_once_where_that_takes_longer_than_there_is(tmp_path, job):
    environment, file = job
    with (tmp_path / "bin" / "scontrol").open("a") as program:
        program.write("sleep 6\n")
    with child(fit_in_slow_job, tmp_path / "runs", environment) as (process, pipe):
        assert receive(pipe) == "ready"
        os.kill(process.pid, signal.SIGUSR1)
        process.join(TIMEOUT_S)
        assert process.exitcode == helios.EXIT_STOPPED
    assert file.read_text() == "requeue 1234\n"


def finish_in_job(pipe, root, environment):
    os.environ.update(environment)

    class Last(helios.Callback):
        def on_training_end(self, session):
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_until(lambda: session.stop_reason is not None)

    pipe.send(train(RandomModel(), RandomData(), root, Last(), **OPTIONS)[0])


def test_job_that_has_come_to_its_end_is_not_queued_again(tmp_path, job):
    environment, file = job
    with child(finish_in_job, tmp_path / "runs", environment) as (_, pipe):
        assert receive(pipe) is True
    assert not file.exists()


class Late(helios.Callback):
    """Sends a signal when the training is over."""

    def __init__(self, number):
        self.number = number

    def on_training_end(self, session):
        os.kill(os.getpid(), self.number)
        wait_until(lambda: session.stop_reason is not None)


def finish_and_test(pipe, root, environment, number):
    os.environ.update(environment)
    options = {**QUIET, "chkpt_root": root, "total_steps": 1}
    trainer = helios.Trainer(callbacks=[Late(number)], **options)
    model, data = IdModel(), IndexData(valid=8)
    pipe.send([trainer.fit(model, data), trainer.test(model, data)])
    pipe.send([trainer.fit(model, data), trainer.test(model, data)])
    pipe.send([trainer.fit(model, data), helios.Trainer(**options).test(model, data)])
    pipe.send([trainer.fit(model, data), ByHand(root / "by_hand").run()])


@pytest.mark.parametrize(
    ("number", "asked"), [(signal.SIGUSR1, "requeue 1234\n"), (signal.SIGTERM, None)]
)
def test_signal_that_comes_too_late_for_the_training_stops_what_follows(
    tmp_path, job, number, asked
):
    environment, file = job
    with child(finish_and_test, tmp_path / "runs", environment, number) as (_, pipe):
        assert receive(pipe) == [True, False]
        assert (file.read_text() if file.exists() else None) == asked
        for _ in range(3):
            assert receive(pipe) == [True, False]


class Lingering(IndexData):
    """Does not come to the end of its last duty."""

    def teardown(self):
        forever()


def finish_and_linger(pipe, root):
    late = Late(signal.SIGTERM)
    train(IdModel(), Lingering(), root, late, total_steps=1, stop_grace_s=1)


def test_signal_behind_the_last_step_has_its_limit_of_time_too(tmp_path):
    with child(finish_and_linger, tmp_path) as (process, _):
        process.join(TIMEOUT_S)
        assert process.exitcode == helios.EXIT_STOPPED
