"""Variables of a loop by hand go on at a resume, where they are and as they were."""

import contextlib
import subprocess
import sys
import weakref

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import helios

pytestmark = pytest.mark.usefixtures("accelerator")
EPOCHS, BATCHES = 3, 4  # of an epoch


def make(root, **options):
    """A session, and one step of its loop, on a batch."""
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    set_seed(3)
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    data = TensorDataset(torch.randn(8, 2))
    loader = DataLoader(data, batch_size=2, shuffle=True)
    net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    session = helios.Session(accelerator, root, loaders=loader, **options)

    def step(inputs):
        loss = net(inputs).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return session, loader, step


def stopped_at(session, stop):
    if session.state.global_iteration == stop:
        session.request_stop("the test")


def in_one_function(root, stop=None):
    session, loader, step = make(root)
    best, seen, lowest = float("inf"), [], None
    alias = seen
    with contextlib.suppress(helios.RunStopped), session:
        carried = ["best", "seen", "lowest", "total", "count"]
        for epoch in session.epochs(EPOCHS, carry=carried):
            total, count = torch.zeros(()), 0
            for (inputs,) in session.batches(loader):
                loss = step(inputs)
                total += loss
                count += len(inputs)
                lowest = loss if lowest is None else torch.minimum(lowest, loss)
                stopped_at(session, stop)
            alias.append((epoch, total.item() / count))
            best = min(best, seen[-1][1])
        return best, seen, lowest, total, count
    return None


def in_two_functions(root, stop=None):
    session, loader, step = make(root)

    def one_epoch():
        total = 0.0
        for (inputs,) in session.batches(loader):
            total += step(inputs).item()
            stopped_at(session, stop)
        return total

    totals = []
    with contextlib.suppress(helios.RunStopped), session:
        for _ in session.epochs(EPOCHS, carry=["totals", "total"]):
            totals += [one_epoch()]
        return totals
    return None


def in_a_closure(root, stop=None):
    session, _, step = make(root)
    count, held = 0, []

    def add(loss):
        nonlocal count
        count += 1
        held.append(loss.item())

    with contextlib.suppress(helios.RunStopped), session:
        for _ in session.epochs(EPOCHS, carry=("count", "held")):
            for (inputs,) in session.batches():
                add(step(inputs))
                stopped_at(session, stop)
        return count, held
    return None


@pytest.mark.parametrize("loop", [in_one_function, in_two_functions, in_a_closure])
def test_variables_go_on_behind_a_stop_at_any_batch(tmp_path, loop):
    whole = loop(tmp_path / "whole")
    for batch in range(EPOCHS * BATCHES):
        assert loop(tmp_path / f"{batch}", stop=batch) is None
        assert loop(tmp_path / f"{batch}") == whole, batch


def test_variables_of_a_finished_run_are_there_when_it_is_started_again(tmp_path):
    whole = in_one_function(tmp_path / "run")
    session, loader, _ = make(tmp_path / "run")
    best, seen, lowest = None, [], None
    for _ in session.epochs(EPOCHS, carry=["best", "seen", "lowest"]):
        list(session.batches(loader))
    assert (best, seen, lowest) == whole[:3]


MODULE = """
import sys
sys.path.insert(0, sys.argv[1])
from test_session_variables import make, stopped_at
session, loader, step = make(sys.argv[2])
count, losses = 0, []
for epoch in session.epochs(3, carry=["count", "losses"]):
    for (inputs,) in session.batches(loader):
        losses += [step(inputs).item()]
        count += 1
        stopped_at(session, int(sys.argv[3]))
print(count, losses)
"""


def test_variables_of_a_script_without_a_function_go_on(tmp_path, request):
    (tmp_path / "loop.py").write_text(MODULE)
    tests = request.path.parents[1]

    def run(name, stop):
        command = [sys.executable, "loop.py", request.path.parent, name, str(stop)]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={"PYTHONPATH": f"{tests}:{tests.parent}"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode in (0, 75), done.stderr
        return done.stdout

    assert run("parts", 6) == ""
    whole = run("whole", -1)
    assert whole.startswith("12 [")
    assert run("parts", -1) == whole


@pytest.mark.parametrize(
    ("carry", "error", "message"),
    [
        ("bset", ValueError, r"`carry` names 'bset', which is no variable of loop \("),
        (["best", "net.bias"], ValueError, "names 'net.bias', which is no variable"),
        (["best", "live"], TypeError, "what can't be saved.*live"),
    ],
)
def test_what_is_no_variable_or_has_no_form_is_refused(tmp_path, carry, error, message):
    session, loader, _ = make(tmp_path / "run")

    def loop():
        best, live = 0.0, iter(())
        for _ in session.epochs(1, carry=carry):
            list(session.batches(loader))
        return best, live

    with session, pytest.raises(error, match=message):
        loop()
    assert not list(tmp_path.rglob("helios.json"))


def test_saving_keeps_alive_nothing_that_the_loop_has_let_go(tmp_path):
    class Owner:
        """Of something large."""

    session, loader, step = make(tmp_path / "run", save_every=1)

    def loop():
        marks, count = [], 0
        for _ in session.epochs(1, carry="count"):
            for (inputs,) in session.batches(loader):
                owner = Owner()
                marks.append(weakref.ref(owner))
                step(inputs)
                count += 1
        del owner
        return [mark() for mark in marks], count

    with session:
        assert loop() == ([None] * BATCHES, BATCHES)


def test_loaders_are_read_by_name_or_themselves(tmp_path):
    session, loader, _ = make(tmp_path / "run")
    accelerator = session.engine.accelerator
    other = accelerator.prepare(DataLoader(range(6), batch_size=2))
    with session:
        for _ in session.epochs(1):
            assert len(list(session.batches(loader))) == BATCHES
            for _ in range(2):
                assert [b.tolist() for b in session.batches(other)] == [
                    [0, 1],
                    [2, 3],
                    [4, 5],
                ]
        with pytest.raises(ValueError, match="or another that Accelerate has prepared"):
            session.batches(DataLoader(range(6)))


def test_loader_that_nobody_has_prepared_is_read_by_itself(tmp_path):
    net = nn.Linear(1, 1)
    train, valid = (DataLoader(torch.arange(4.0)[:, None], n) for n in (2, 4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loaders = {"train": train, "valid": valid}
    with helios.Session(
        Accelerator(cpu=True), tmp_path / "r", loaders=loaders, n=net, o=optimizer
    ) as session:
        for _ in session.epochs(1):
            assert len(list(session.batches(train))) == 2
            assert len(list(session.batches(valid))) == 1
