"""Faults of loops by hand: numbers gone bad, limits of time, exceptions, bundles."""

import gc
import math
import os
import re
import signal
import subprocess
import sys
import weakref

import pytest
import torch
from support import ByHand, Stop

import helios
from helios.checkpoint import find_last_checkpoint, read_checkpoint
from helios.errors import BadNumbersError
from helios.stopping.ranks import STARTER, STARTER_FOLDER, STOPPED
from helios.stopping.status import EXIT_STOPPED

pytestmark = pytest.mark.usefixtures("accelerator")
TIMEOUT_S = 60


def loop(root, policy, *spoiled, **settings):
    options = {"bad_numbers": policy, "save_every": 1}
    return ByHand(root / "run", spoiled=spoiled, options=options, **settings)


def test_bad_numbers_are_told_with_rank_step_and_samples(tmp_path, capsys):
    trained = loop(tmp_path, "warn", 3)
    assert trained.run()
    said = capsys.readouterr().err
    samples = re.escape(str(trained.ids[3]))
    words = r"rank 0: .*loss is nan.* at step 4 \(epoch 0, batch 3\), samples "
    assert re.search(f"NUMBERS HAVE GONE BAD: {words}{samples}", said)


def test_bad_numbers_are_told_before_the_failure_that_comes_of_them(tmp_path, capsys):
    class Failing(ByHand):
        def validate(self, session, stops):
            raise ValueError("on purpose")

    trained = Failing(tmp_path / "run", spoiled=[3], options={"bad_numbers": "warn"})
    with pytest.raises(ValueError, match="on purpose"):
        trained.run()
    told, _, _ = capsys.readouterr().err.partition("ValueError: on purpose")
    assert "NUMBERS HAVE GONE BAD: rank 0: " in told


@pytest.mark.parametrize("policy", ["warn", "stop", "skip"])
def test_good_numbers_are_left_alone_by_every_policy(tmp_path, capsys, policy):
    plain = loop(tmp_path / "plain", None).chained()
    assert loop(tmp_path / policy, policy).chained() == plain
    assert "BAD" not in capsys.readouterr().err


@pytest.mark.parametrize("window", [1, 2])
def test_stop_ends_the_loop_before_anything_more_is_saved(tmp_path, window):
    for _ in range(2):  # the same command comes to the same
        trained = loop(tmp_path, "stop", 7, window=window)
        with pytest.raises(BadNumbersError, match=r"\(epoch 1, batch 1\), samples"):
            trained.run()
        last = find_last_checkpoint(tmp_path)
        record = read_checkpoint(last)
        assert record.record["progress"]["global_iteration"] in (6, 7)
        assert all(w.isfinite().all() for w in record.tree("model")["net"].values())


def skipping(root, window, spoils):
    return loop(root, "skip", 2, 9, window=window, length=24, spoils=spoils)


def without_logs(outcome):
    """What is logged of bad numbers is bad, and equals nothing."""
    return {name: value for name, value in outcome.items() if name != "logged"}


# Of a loss alone nothing is left in the gradients of the window.
@pytest.mark.parametrize(("window", "spoils"), [(1, "inputs"), (2, "loss")])
def test_loop_with_skipped_steps_resumes_anywhere(tmp_path, window, spoils, capsys):
    whole = skipping(tmp_path / "whole", window, spoils)
    outcome = without_logs(whole.chained())
    assert all(weight.isfinite().all() for weight in whole.net.state_dict().values())
    assert "2 so far" in capsys.readouterr().err
    for batch in range(17):
        parts = skipping(tmp_path / f"{batch}", window, spoils)
        assert without_logs(parts.chained(Stop(batch=batch))) == outcome, batch


class Leaving(ByHand):
    """Leaves each epoch by `break`, behind its third batch."""

    def train(self, session, stop_at):
        for number, (ids, inputs, targets) in enumerate(session.batches("train")):
            self.ids.append(ids.tolist())
            is_spoiled = session.state.global_iteration in self.spoiled
            loss = self.loss(inputs * (math.nan if is_spoiled else 1), targets)
            self.accelerator.backward(loss)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if number == 2:
                break
        return loss.item()


@pytest.mark.parametrize("policy", ["warn", "stop", "skip"])
def test_batch_behind_which_the_loop_leaves_is_watched(tmp_path, capsys, policy):
    options = {"bad_numbers": policy, "save_every": "epoch"}
    leaving = Leaving(
        tmp_path / "run", spoiled=(2, 5), carried=("best", "totals"), options=options
    )
    if policy == "stop":
        with pytest.raises(BadNumbersError, match=r"step 3 \(epoch 0, batch 2\)"):
            leaving.run()
        assert find_last_checkpoint(tmp_path) is None
        return
    assert leaving.run()
    said = capsys.readouterr().err
    if policy == "warn":
        assert "at step 3 (epoch 0, batch 2)" in said
        return
    assert "2 so far" in said
    weights = leaving.net.state_dict().values()
    assert all(weight.isfinite().all() for weight in weights)


def test_what_is_trained_outside_of_batches_is_left_alone(tmp_path):
    class Outside(ByHand):
        def validate(self, session, stops):
            self.session = session
            weight = torch.ones(1, requires_grad=True)
            for _ in range(50):
                self.accelerator.backward(weight * math.nan)
            return super().validate(session, stops)

    outside = Outside(tmp_path / "run", options={"bad_numbers": "stop"})
    assert outside.run()
    assert outside.session._health._values == []


def test_failure_is_told_whatever_fails_then_and_leaves_no_memory(tmp_path, capsys):
    class Failing(helios.Callback):
        def on_exception(self, session, error):
            raise RuntimeError("of the hook")

    trained, alive = ByHand(tmp_path / "run", options={"callbacks": []}), []
    hook = sys.excepthook  # torch's own, where a test before has made a group

    def fail(inputs, targets):
        activations = inputs * 2
        alive.append(weakref.ref(activations))
        raise ValueError("on purpose")

    def run():
        trained.make()
        session = helios.Session(
            trained.accelerator,
            tmp_path / "failing",
            loaders=trained.train_loader,
            callbacks=[Failing()],
        )
        with session:
            for _ in session.epochs(1):
                for _, inputs, targets in session.batches():
                    fail(inputs, targets)

    with pytest.raises(ValueError, match="on purpose"):
        run()
    said = capsys.readouterr().err
    assert said.index("ValueError: on purpose") < said.index(
        "RuntimeError: of the hook"
    )
    assert sys.excepthook is hook
    assert trained.accelerator.backward.__qualname__ == "Accelerator.backward"
    gc.collect()
    assert alive[0]() is None


def test_objects_are_left_as_they_were_when_the_session_ends(tmp_path):
    hook = sys.excepthook
    for policy in ("skip", "warn"):
        trained = loop(tmp_path / policy, policy)
        assert trained.run()
        assert trained.accelerator.backward.__qualname__ == "Accelerator.backward"
        for optimizer in trained.optimizers:
            assert not optimizer.optimizer._optimizer_step_pre_hooks
            assert optimizer.step.__qualname__ == "AcceleratedOptimizer.step"
        assert sys.excepthook is hook


SCRIPT = """
import os, sys, time
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import helios

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
set_seed(3)
net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
loader = DataLoader(TensorDataset(torch.randn(20, 3)), batch_size=4, shuffle=True)
net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
options = eval(os.environ.get("OPTIONS", "{}"))
session = helios.Session(accelerator, "runs/first", loaders=loader, **options)
for _epoch in session.epochs(4):
    for (inputs,) in session.batches():
        if f"{session.state.global_iteration}" == os.environ.get("AT"):
            print("the batch:", inputs.sum().item().hex(), flush=True)
            exec(os.environ["DO"])
        loss = net(inputs).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
print("trained:", sum(p.sum() for p in net.parameters()).item().hex())
"""


def run(*command, cwd, **env):
    (cwd / "script.py").write_text(SCRIPT)
    return subprocess.run(
        [sys.executable, *map(str, command or ["script.py"])],
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


EXITING = SCRIPT.replace(
    "options = ",
    """
class Exiting(helios.Callback):
    def on_training_batch_end(self, session):
        if os.environ["FROM"] == "callback" and session.state.global_iteration == 7:
            sys.exit(0)

class Rows(TensorDataset):
    def __getitem__(self, index):
        if os.environ["FROM"] == "data set" and index == 7:
            sys.exit()
        return super().__getitem__(index)

rows = Rows(torch.randn(20, 3))
loader = accelerator.prepare(DataLoader(rows, batch_size=4, shuffle=True))
options = {"callbacks": [Exiting()]} if os.environ["FROM"] == "callback" else """,
)


@pytest.mark.parametrize(
    ("place", "is_inside", "code"),
    [("callback", False, 1), ("data set", True, 1), ("loop", True, 0)],
)
def test_exit_from_within_a_session_does_not_pass_for_its_end(
    tmp_path, place, is_inside, code
):
    script = EXITING
    if is_inside:  # a `with` around the loop
        head, loop, body = script.partition("for _epoch")
        body = (loop + body).replace("\n", "\n    ")
        script = f"{head}with session:\n    {body}\n"
    does = {"AT": "7", "DO": "sys.exit(0)"} if place == "loop" else {}
    (tmp_path / "exiting.py").write_text(script)
    done = run("exiting.py", cwd=tmp_path, FROM=place, **does)
    assert done.returncode == code, done.stderr
    assert "trained:" not in done.stdout
    note = "the run is not finished, so the exit status is 1, not 0"
    assert done.stderr.count(note) == code
    assert done.stderr.count("rank 0 failed") == code
    assert "finished after" not in done.stderr


def trained(done):
    assert done.returncode == 0, done.stderr
    return re.search("trained: .*", done.stdout)[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return trained(run(cwd=tmp_path_factory.mktemp("whole")))


def test_limit_of_time_stops_a_loop_that_goes_on_later(tmp_path, whole):
    # It waits until the time is over; the batch in work is finished.
    wait = {"AT": "7", "DO": "while session.stop_reason is None: time.sleep(0.01)"}
    done = run(cwd=tmp_path, OPTIONS="{'max_time_s': 0.2}", **wait)
    assert done.returncode == EXIT_STOPPED, done.stderr
    assert "`max_time_s` is over, 0.2 s: stopped, to go on" in done.stderr
    assert trained(run(cwd=tmp_path)) == whole


def test_loop_that_does_not_come_to_its_end_in_time_is_ended(tmp_path, whole):
    hang = {"AT": "7", "DO": "session.request_stop('the test'); time.sleep(600)"}
    options = "{'stop_grace_s': 0.2, 'save_every': 2, 'async_save': False}"
    done = run(cwd=tmp_path, OPTIONS=options, **hang)
    assert done.returncode == EXIT_STOPPED, done.stderr
    assert "NO END WITHIN `stop_grace_s`" in done.stderr
    last = read_checkpoint(find_last_checkpoint(tmp_path / "runs")).record
    assert last["progress"]["global_iteration"] == 6
    assert trained(run(cwd=tmp_path)) == whole


FAILS = {"AT": "7", "DO": "raise ValueError('on purpose')"}


def test_failure_is_told_with_its_place_and_kept(tmp_path, whole):
    done = run(cwd=tmp_path, **FAILS)
    assert done.returncode == 1
    log = (tmp_path / "runs" / "first" / "first.log").read_text()
    for text in (done.stderr, log):
        told = r"rank 0 failed in step 8 \(epoch 1, batch 2\), samples \[\d+, \d+"
        assert re.search(told, text), text
        assert "ValueError: on purpose" in text
    (bundle,) = tmp_path.glob("runs/first_crash_*")
    assert f"helios replay {bundle}" in log
    assert trained(run(cwd=tmp_path)) == whole


def test_interrupt_is_told_and_leaves_no_bundle(tmp_path):
    done = run(cwd=tmp_path, AT="7", DO="raise KeyboardInterrupt")
    assert done.returncode == -signal.SIGINT
    assert "rank 0 failed in step 8" in done.stderr
    assert not [*tmp_path.glob("runs/*crash*")]


def test_memory_that_is_too_small_is_told_with_shapes_and_advice(tmp_path):
    done = run(
        cwd=tmp_path, AT="7", DO="raise MemoryError", OPTIONS="{'crash_bundle': None}"
    )
    assert "the batch has the shapes" in done.stderr
    assert not [*tmp_path.glob("runs/*crash*")]


def files_of(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("batch", [3, 8])
def test_replay_runs_the_step_again_and_writes_nothing(tmp_path, batch):
    options = "{'save_every': 5, 'crash_bundle': 'batch', 'enable_tensorboard': True}"
    first = run(cwd=tmp_path, **{**FAILS, "AT": f"{batch}"}, OPTIONS=options)
    (bundle,) = tmp_path.glob("runs/first_crash_*")
    assert (bundle / "checkpoint").exists() == (batch == 8)
    before = files_of(tmp_path / "runs")
    replay = ("-c", "from helios.cli import main; main()", "replay", bundle)
    variables = {"OPTIONS": options, "AT": f"{batch}"}
    again = run(*replay, cwd=tmp_path, **variables, DO=FAILS["DO"])
    assert again.returncode == 1, again.stderr
    assert first.stdout == again.stdout
    assert "REPLAYED: the step has failed again, to the bit" in again.stderr
    cured = run(*replay, cwd=tmp_path, **variables, DO="")
    assert cured.returncode == 0, cured.stderr
    assert "REPLAYED: the step has not failed this time" in cured.stderr
    assert files_of(tmp_path / "runs") == before


@pytest.mark.parametrize(
    ("does", "said", "code"),
    [
        # No limit of time ends what saves nothing.
        ("session.request_stop('the test'); time.sleep(1)", "training was stopped", 1),
        # Who leaves his loop says himself how the program ends.
        ("sys.exit(0)", "it has ended", 0),
    ],
)
def test_replay_that_does_not_come_to_the_step_says_so(tmp_path, does, said, code):
    options = "{'stop_grace_s': 0.5}"
    run(cwd=tmp_path, **FAILS, OPTIONS=options)
    (bundle,) = tmp_path.glob("runs/first_crash_*")
    replay = ("-c", "from helios.cli import main; main()", "replay", bundle)
    again = run(*replay, cwd=tmp_path, AT="3", DO=does, OPTIONS=options)
    assert again.returncode == code, again.stderr
    assert again.stderr.count(f"NOT REPLAYED: {said} before the step") == 1


MAKE = """
import os, signal, sys, time
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
import helios

def make(path):
    accelerator = Accelerator(cpu=True)
    net = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    loader = DataLoader(TensorDataset(torch.ones(4)), batch_size=2)
    return helios.Session(accelerator, path, loader, net=net, optimizer=optimizer)
"""
LATE = f"""{MAKE}
ends, is_kept = sys.argv[1], sys.argv[2] == "kept"
with make("runs") as session:
    kept = session.epochs(2) if is_kept else None
    for _epoch in kept or session.epochs(2):
        for _ in session.batches():
            pass
        os.kill(os.getpid(), signal.SIGTERM if ends != "interrupts" else signal.SIGINT)
        if ends == "interrupts":
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(600)
        if ends == "fails":
            raise ValueError("on purpose")
        break
"""


@pytest.mark.parametrize("reference", ["kept", "dropped"])
@pytest.mark.parametrize(
    ("ends", "code"), [("breaks", 0), ("fails", 1), ("interrupts", -signal.SIGINT)]
)
def test_starter_is_told_of_a_late_signal_unless_the_loop_has_failed(
    tmp_path, reference, ends, code
):
    (tmp_path / "late.py").write_text(LATE)
    variables = {STARTER: str(os.getpid()), STARTER_FOLDER: str(tmp_path)}
    done = run("late.py", ends, reference, cwd=tmp_path, **variables)
    assert done.returncode == code, done.stderr
    assert (tmp_path / STOPPED).exists() == (ends == "breaks")


SURVIVES = f"""{MAKE}
def train(path, fails, is_kept):
    with make(path) as session:
        kept = session.epochs(2) if is_kept else None
        for _epoch in kept or session.epochs(2):
            for _ in session.batches():
                if fails:
                    os.kill(os.getpid(), signal.SIGTERM)
                    raise ValueError("on purpose")

try:
    train("first", True, sys.argv[1] == "kept")
except ValueError:
    print("it has failed", flush=True)
train("second", False, False)
"""


@pytest.mark.parametrize("reference", ["kept", "dropped"])
def test_signal_for_a_loop_that_fails_stops_the_next_one(tmp_path, reference):
    (tmp_path / "survives.py").write_text(SURVIVES)
    done = run("survives.py", reference, cwd=tmp_path)
    assert "it has failed" in done.stdout
    assert done.returncode == EXIT_STOPPED, done.stderr


def test_exception_inside_with_is_told_once(tmp_path, capsys):
    trained = ByHand(tmp_path / "run")

    def fail(*_):
        raise ValueError("on purpose")

    trained.loss = fail
    with pytest.raises(ValueError, match="on purpose"):
        trained.run()
    assert capsys.readouterr().err.count("rank 0 failed in step 1") == 1
