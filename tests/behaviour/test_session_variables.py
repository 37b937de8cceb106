"""Variables of a loop by hand go on at a resume, where they are and as they were."""

import collections
import contextlib
import io
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import helios
from helios.handwritten.variables import into

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


def with_results_of_functions(root, stop=None):
    """What is read on the way to the batches: left of a call, and for its argument."""
    session, loader, step = make(root)

    def one_epoch(before):
        found = []
        for (inputs,) in session.batches(loader):
            found.append(step(inputs).item())
            stopped_at(session, stop)
        return [before, *found]

    epochs = total = 0
    kept = ()
    with contextlib.suppress(helios.RunStopped), session:
        carried = ["epochs", "total", "kept", "found"]
        for _ in session.epochs(EPOCHS, carry=carried):
            epochs += 1
            kept += tuple(one_epoch(total))
            total = sum(kept)
        return epochs, total, kept
    return None


def with_batches_that_are_passed_on(root, stop=None):
    """A function gets them, in a bar, and knows nothing of the session."""
    session, loader, step = make(root)

    def one_epoch(batches):
        n = total = 0  # a bar has a variable `n`, too
        for (inputs,) in batches:
            total += step(inputs).item()
            n += 1
            stopped_at(session, stop)
        return total / len(batches), n

    found = []
    with contextlib.suppress(helios.RunStopped), session:
        for _ in session.epochs(EPOCHS, carry=["found", "n", "total"]):
            found.append(one_epoch(tqdm(session.batches(loader), file=io.StringIO())))
        return found
    return None


def with_lists_of_an_epoch_that_are_passed_on(root, stop=None):
    session, loader, step = make(root)

    def limited(batches, total):  # has a variable of a name that is carried
        for number, batch in enumerate(batches):
            if number < total:
                yield batch

    def one_epoch(batches, into, count):
        seen = 0
        for (inputs,) in batches:
            into.append(step(inputs).item())
            count += 1
            seen += len(inputs)
            stopped_at(session, stop)
        return seen

    found = []
    with contextlib.suppress(helios.RunStopped), session:
        for _ in session.epochs(EPOCHS, carry=["found", "losses", "total", "seen"]):
            losses, total = [], torch.zeros((), dtype=torch.int64)
            note = losses.append
            count = one_epoch(limited(session.batches(loader), 100), losses, total)
            note(0)
            found.append((len(losses), total.item(), count))
        return found, losses
    return None


def with_names_for_the_same_thing(root, stop=None):
    session, loader, step = make(root)
    zero = now = [0.0, 0.0]
    best = last = {}
    array, table, recent = np.zeros(2), torch.zeros(3), collections.deque(maxlen=2)

    def count(loss, into=table, seen=array, latest=recent):
        into[0] += 1
        seen[1] += loss
        latest.append(loss)

    with contextlib.suppress(helios.RunStopped), session:
        carried = ["now", "best", "last", "array", "table", "recent"]
        for _ in session.epochs(EPOCHS, carry=carried):
            for (inputs,) in session.batches(loader):
                loss = step(inputs).item()
                now = [loss, now[0]]
                last = {"loss": loss}
                if not best or loss < best["loss"]:
                    best = last
                count(loss)
                stopped_at(session, stop)
        return zero, now, best, last, array.tolist(), table.tolist(), list(recent)
    return None


LOOPS = [in_one_function, in_two_functions, in_a_closure]
LOOPS += [with_results_of_functions, with_batches_that_are_passed_on]
LOOPS += [with_lists_of_an_epoch_that_are_passed_on, with_names_for_the_same_thing]


@pytest.mark.parametrize("loop", LOOPS)
def test_variables_go_on_behind_a_stop_at_any_batch(tmp_path, loop):
    whole = loop(tmp_path / "whole")
    for batch in range(EPOCHS * BATCHES):
        assert loop(tmp_path / f"{batch}", stop=batch) is None
        assert loop(tmp_path / f"{batch}") == whole, batch


def test_variables_of_a_finished_run_are_there_when_it_is_started_again(tmp_path):
    whole = in_one_function(tmp_path / "run")
    session, loader, _ = make(tmp_path / "run")
    best, seen, lowest = None, [], None
    with session:
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
        (["best", "live"], TypeError, "'live', which holds what can't be saved.*live="),
        (["latent"], TypeError, "'latent', which asks for gradients"),
        ("state", TypeError, "'state', which is a part of a network.*clone it"),
        (3, TypeError, "`carry` must be names of variables, got 3"),
        ([3], TypeError, "`carry` must be names of variables"),
    ],
)
def test_what_is_no_variable_or_has_no_form_is_refused(tmp_path, carry, error, message):
    session, loader, _ = make(tmp_path / "run")

    def loop():
        best, live = 0.0, iter(())
        latent = [torch.zeros(2, requires_grad=True)]
        state = session.engine.accelerator._models[0].state_dict()
        for _ in session.epochs(1, carry=carry):
            list(session.batches(loader))
        return best, live, latent, state

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


def test_variable_that_becomes_a_part_of_a_network_is_told(tmp_path, capsys):
    session, loader, step = make(tmp_path / "run")

    def loop():
        best = None
        for _ in session.epochs(2, carry=["best"]):
            for (inputs,) in session.batches(loader):
                step(inputs)
            best = session.engine.accelerator._models[0].state_dict()
        return best

    with session:
        loop()
    assert "'best', which is a part of a network" in capsys.readouterr().err


def test_what_a_function_holds_of_its_own_variables_is_left_alone(tmp_path):
    session, loader, step = make(tmp_path / "run", save_every=1)

    def loop(epochs):
        count, settings = 0, locals()
        for _ in session.epochs(epochs, carry="count"):
            for (inputs,) in session.batches(loader):
                step(inputs)
                count += 1
        return settings["epochs"], count

    with session:
        assert loop(1) == (1, BATCHES)


@pytest.mark.parametrize("carry", [(), ["count"]])
def test_function_that_leaves_its_loop_is_not_kept_alive(tmp_path, carry):
    class Owner:
        """Of something large."""

    session, loader, _ = make(tmp_path / "run")

    def leave():
        owner, count = Owner(), 0
        for _ in session.batches(loader):
            break
        return weakref.ref(owner), count

    with session:
        for _ in session.epochs(2, carry=carry):
            mark, _ = leave()
            if carry:  # they may be read until the epoch ends
                session.close()
            assert mark() is None
            break


def test_other_names_at_a_resume_are_told(tmp_path, capsys):
    def loop(*carry, stop=None):
        session, loader, step = make(tmp_path / "run")
        old = new = 0
        with contextlib.suppress(helios.RunStopped), session:
            for _ in session.epochs(1, carry=carry):
                for (inputs,) in session.batches(loader):
                    step(inputs)
                    old, new = old + 1, new + 1
                    stopped_at(session, stop)
        return old, new

    loop("old", stop=1)
    assert loop("new") == (2, 2)
    said = capsys.readouterr().err
    assert "`carry`: 'new' was not saved, and begins anew" in said
    assert "`carry`: 'old' was saved, and is not named any more" in said


def test_second_run_in_a_folder_where_one_is_finished_is_told(tmp_path, capsys):
    for fold in range(2):
        session, loader, _ = make(tmp_path / "run")
        with session:
            read = [list(session.batches(loader)) for _ in session.epochs(1)]
        assert len(read) == (fold == 0)
    assert "give each run a folder of its own" in capsys.readouterr().err


def test_length_is_that_of_the_loader_at_a_resume_too(tmp_path):
    def run(stop=None):
        session, loader, step = make(tmp_path / "run")
        lengths = []
        with contextlib.suppress(helios.RunStopped), session:
            for _ in session.epochs(1):
                batches = session.batches(loader)
                lengths.append(len(batches))
                step(next(batches)[0])
                for (inputs,) in tqdm(batches, disable=True):
                    step(inputs)
                    stopped_at(session, stop)
        return lengths, session.state.current_iteration

    assert run(stop=1) == ([BATCHES], 2)
    assert run() == ([BATCHES], BATCHES)


def test_loader_of_two_names_is_refused(tmp_path):
    loader = DataLoader(range(4))
    with pytest.raises(ValueError, match="one loader as 'valid' and as 'train'"):
        helios.Session(
            Accelerator(cpu=True), tmp_path / "r", {"valid": loader, "train": loader}
        )


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


def test_counts_below_zero_and_what_cannot_be_written_come_back():
    counts = collections.Counter(a=0, b=-1)
    kept = collections.Counter(c=1)
    assert into(kept, counts) is kept
    assert dict(kept) == {"a": 0, "b": -1}
    value = torch.ones(2)
    with torch.inference_mode():
        made = torch.zeros(2)
    leaf = torch.zeros(2, requires_grad=True)
    for unwritable in (made, torch.zeros(1).expand(2), leaf):
        assert into(unwritable, value) is value
