"""`helios verify-resume`: proofs, and the first difference, of real scripts."""

import pathlib
import re
import sys

import pytest
import torch
from click.testing import CliRunner

from helios.cli import main
from helios.verifying.causes import (
    END,
    LOSS,
    RATE,
    RNG,
    UNEQUAL,
    VARIABLE,
    WEIGHTS,
    Advice,
    advice,
)
from helios.verifying.causes import KINDS as CAUSES
from helios.verifying.comparing import Run, first_difference, variable
from helios.verifying.forgotten import cured, forgotten, lines_of, note_of
from helios.verifying.frames import variables

SCRIPT = pathlib.Path(__file__).with_name("verified_script.py")
LOOP = SCRIPT.with_name("verified_loop.py")
RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def verify(monkeypatch, tmp_path, kind, *options, launcher=(), script=SCRIPT):
    """Exit status and output; the script finds `support`."""
    tests = SCRIPT.parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{tests.parent}:{tests}")
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, *launcher, str(script), kind]
    done = CliRunner().invoke(main, ["verify-resume", *options, *command])
    print(done.output)
    return done.exit_code, done.output


def test_run_that_resumes_exactly_is_called_identical(monkeypatch, tmp_path):
    options = ("--at", "4", "--at", "9", "--keep", "kept")
    status, output = verify(monkeypatch, tmp_path, "saving", *options)
    assert status == 0
    assert "without a stop: 15 batches, 1 rank" in output
    assert "stopped after batch 4, 9, and resumed" in output
    assert "IDENTICAL" in output
    logs = [tmp_path / "kept" / "parts" / f"{n}.log" for n in range(4)]
    resumed = ["resumed from" in log.read_text() for log in logs]
    assert resumed == [False, True, True, True]
    assert "started again when it was finished" in output
    assert {path.name for path in tmp_path.iterdir()} == {"kept"}


def test_all_runs_of_a_program_are_stopped_and_compared(monkeypatch, tmp_path):
    options = ("--at", "9", "--at", "21", "--keep", "kept")
    status, output = verify(monkeypatch, tmp_path, "twice", *options)
    assert (status, "30 batches in 2 runs, 1 rank" in output) == (0, True)
    logs = [(tmp_path / "kept" / "parts" / f"{n}.log").read_text() for n in range(3)]
    resumed = [
        re.findall(r"resumed from (\w+)_epoch_\d_iter_(\d+)", log) for log in logs
    ]
    assert resumed[1] == [("random", "9")]
    assert resumed[2] == [("random", "15"), ("second", "6")]


def test_attribute_that_is_not_saved_is_named(monkeypatch, tmp_path):
    status, output = verify(monkeypatch, tmp_path, "counting", "--at", "4")
    assert status == 1
    assert "first difference: a loss or a score, rank 0, at batch 5" in output
    assert "not saved: `self.seen`: 5, then 1" in output
    assert "likely cause: the step depends on something that is not saved" in output
    assert "also without a stop" not in output


def trace(*states):
    """Of a run with a generator that is in these states after its batches."""
    same = {"epoch": 0, "step": 1, "samples": None, "data": None, "attributes": {}}
    values = [{"rank.rng.python.0": "3", "rank.rng.python.1": s} for s in states]
    return Run({n: {**same, "values": v} for n, v in enumerate(values, 1)})


def test_generator_from_which_nobody_draws_is_of_no_matter():
    # Nobody has seeded it, so that its state is another one in each run.
    assert first_difference(trace("a", "a"), trace("b", "b"), 0) is None
    for other in trace("b", "c"), trace("b", "b"):
        found = first_difference(trace("a", "d"), other, 0)
        assert (found.kind.name, found.batch) == ("random numbers", 1)
    assert first_difference(trace("a", "a"), trace("a", "c"), 0).batch == 2


def test_rate_differs_before_the_weights_that_come_of_it():
    lr, weight = "training.model.optimizers.o.param_groups.0.lr", "model.weight"
    runs = [trace("a"), trace("a")]
    for run, value in zip(runs, "01", strict=True):
        run.batches[1]["values"] |= {weight: value, lr: value}
    assert first_difference(*runs, 0).kind is RATE
    runs[1].batches[1]["values"][lr] = "0"
    assert first_difference(*runs, 0).kind is WEIGHTS


def test_variable_that_is_carried_is_named_before_what_may_come_of_it():
    lr, loss = "training.model.optimizers.o.param_groups.0.lr", "rank.books.losses.loss"
    ema = "rank.books.variables.epochs.values.history.ema.0"
    runs = [trace("a"), trace("a")]
    for run, value in zip(runs, "01", strict=True):
        run.batches[1]["values"] |= {lr: value, ema: value}
    found = first_difference(*runs, 0)
    assert (found.kind, found.details) == (VARIABLE, ["`history['ema'][0]`: 0, then 1"])
    for run, value in zip(runs, "01", strict=True):
        run.batches[1]["values"][loss] = value
    assert first_difference(*runs, 0).kind is LOSS


def test_path_of_a_variable_is_written_as_in_a_program():
    start = "training.model.user.variables.batches.values.best"
    assert variable(start, {}) == "best"
    assert variable(f"{start}.0.a b", {}) == "best[0]['a b']"
    pairs = {f"{start}.kept": "'dict'", f"{start}.kept.1.0": "3"}
    assert variable(f"{start}.kept.1.1.2", pairs) == "best['kept'][3][2]"


def held(*values, function="main()", carried=(), **others):
    """A run of batches after which a variable, `best`, has these values."""
    run = trace(*["a"] * len(values))
    for batch, value in zip(run.batches.values(), values, strict=True):
        batch |= {
            "variables": {function: {"best": value, **others}},
            "loops": {"main()": ["step"]},
        }
        start = "rank.books.variables.epochs.values"
        batch["values"] |= {f"{start}.{name}": "1" for name in carried}
    return run


def test_variable_that_nobody_saves_is_named_with_its_function():
    one, other = held("1", "2", "3", epoch="0"), held("1", "0", "0", epoch="0")
    found = forgotten(one, other, stop=1, until=3, again=one)
    assert lines_of(found) == ["not saved: `best` of main(): 3, then 0"]
    assert note_of(forgotten(one, other, stop=1, again=None)) == (
        "begins anew at a resume, which made no difference here: `best` of main(): 2, "
        "then 0"
    )
    cure = cured(Advice("", "pass it"), found).cure
    assert cure == 'name it in `session.epochs(..., carry=["best"])`; or else pass it'


def test_variable_that_a_for_sets_is_counted_otherwise():
    one, other = held("1", "1", step="1"), held("1", "1", step="1")
    other.batches[2]["variables"] = {"main()": {"step": "0", "best": "0"}}
    found = forgotten(one, other, stop=1, until=2, again=one)
    assert [variable.name for variable in found] == ["best", "step"]
    assert cured(Advice("", "pass it"), found).cure == (
        'name it in `session.epochs(..., carry=["best"])`; count by `session.state` '
        "what `step` counts; or else pass it"
    )


def test_variable_that_is_passed_on_is_named_where_it_comes_from():
    one, other = held("1", "2"), held("1", "0")
    for run in (one, other):
        held_by_main = run.batches[2]["variables"]["main()"]
        run.batches[2]["variables"] = {"step()": held_by_main, "main()": held_by_main}
    found = forgotten(one, other, stop=1, until=2, again=one)
    assert [(f.name, f.function) for f in found] == [("best", "main()")]


def test_variable_of_another_function_goes_into_the_notes():
    one, other = (
        held("1", "2", function="the module"),
        held("1", "0", function="the module"),
    )
    found = forgotten(one, other, stop=1, again=None)
    assert cured(Advice("", "pass it"), found).cure == (
        "keep `best` in `session.notes`; or else pass it"
    )


@pytest.mark.parametrize(
    ("other", "again", "carried"),
    [
        (held("1", "0", carried=["best"]), None, ["best"]),
        (held("0", "0"), None, []),
        (held("1", "0"), held("1", "5"), []),
        (held("1", "0", function="other()"), None, []),
    ],
    ids=["carried", "before_the_stop", "without_a_stop", "not_set"],
)
def test_variable_that_a_resume_does_not_change_is_not_named(other, again, carried):
    one = held("1", "2", carried=carried)
    assert forgotten(one, other, stop=1, again=again) == []
    assert note_of([]) is None


def test_variables_that_begin_anew_come_first_and_no_more_than_five():
    one = held("1", "2", **{f"n{i}": "1" for i in range(6)})
    other = held("1", "1", **{f"n{i}": "1" for i in range(6)})
    for i in range(6):
        other.batches[2]["variables"]["main()"][f"n{i}"] = "7"
    lines = lines_of(forgotten(one, other, stop=1, until=2, again=one))
    assert lines[0] == "not saved: `best` of main(): 2, then 1"
    assert (len(lines), lines[-1]) == (6, "and 2 more")


def test_plain_variables_are_read_and_left_alone():
    best, _hidden, history = 0.5, 1, {"a": [1]}
    loss, score = torch.ones((), requires_grad=True), torch.tensor(2.0)
    long = list(range(2000))
    mine = locals()
    mine["added"] = 1

    def inner():
        for i, _ in enumerate([1]):
            for n in [2]:
                total = i + n
                found = variables()
        return found if total else None

    found, loops = inner()
    assert mine["added"] == 1
    names = [n for n in found if n.startswith(("inner", "test_plain"))]
    assert names == ["inner()", "test_plain_variables_are_read_and_left_alone()"]
    texts = {n: t for n, t in found[names[1]].items() if n != "added"}
    assert texts == {"best": "0.5", "score": "2.0", "long": "2000 members"}
    assert next(iter(loops)) == "inner()"
    assert loops["inner()"] == ["i", "_", "n"]
    assert found["inner()"] == {"i": "0", "n": "2", "total": "2"}


def test_epochs_that_end_elsewhere_are_told_from_samples_in_another_order():
    one, other = trace("a", "a"), trace("a", "a")
    one.batches[2] |= {"epoch": 1, "samples": [0]}
    other.batches[2] |= {"epoch": 0, "samples": [1]}
    found = first_difference(one, other, 0)
    assert found.kind.name == "the epoch of the batch"
    assert (found.batch, found.details) == (2, ["epoch 1, then 0"])
    other.batches[2]["epoch"] = 1
    assert first_difference(one, other, 0).kind.name == "the samples of the batch"


def test_what_is_said_fits_who_has_written_the_loop():
    for kind in (*CAUSES, UNEQUAL):
        for is_repeatable, is_cuda in (True, True), (False, True), (False, False):
            facts = {"is_repeatable": is_repeatable, "is_cuda": is_cuda}
            own = " ".join(advice(kind, **facts, is_loop=True))
            other = " ".join(advice(kind, **facts, is_loop=False))
            assert "session" in own or "CUBLAS" in own
            assert "session" not in other
            for word in "user_state_dict", "attribute", "Trainer", "hook":
                assert word not in own, own


@pytest.mark.parametrize("kind", [RNG, LOSS, WEIGHTS, END, UNEQUAL])
def test_who_has_a_loop_is_told_of_objects_as_well(kind):
    cure = advice(kind, is_repeatable=True, is_cuda=False, is_loop=True).cure
    texts = "`session.notes`", "`state_dict`", "`accelerator.register_for_check"
    for text in ("carry=[...]", *texts):
        assert text in cure
    is_drawn = kind in (RNG, LOSS, WEIGHTS)
    assert ("keep `generator.get_state()`" in cure) == is_drawn


LOOPS = [
    ("variable", ["a loss or a score", "begins anew", "name a variable in `session.e"]),
    ("computing", ["a variable of the loop", "`history['ema'][0]`: ", "is carried"]),
    ("rate", ["a learning rate", "0.lr`: 0.0125, then 0.1", "`session.state.current"]),
    ("drawing", ["random numbers", "the loop has drawn", "name a variable in `ses"]),
    ("leaving", ["the epoch of the batch", "by `break`", "or count by `session.state"]),
    ("summing", ["what was logged", "batches", "begins anew"]),
    ("patience", ["the number of batches", "a patience", "  15 batches\n  20 batches"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "expected"), LOOPS, ids=[k for k, _ in LOOPS])
def test_cause_and_cure_fit_a_loop_on_a_session(monkeypatch, tmp_path, kind, expected):
    status, output = verify(monkeypatch, tmp_path, kind, "--at", "7", script=LOOP)
    assert status == 1
    assert "not saved: `self." not in output
    assert "  not saved: `n` of the module: " in output
    assert re.search(r'carry=\[[^]]*"n"', output)
    for text in expected:
        assert text in output


@pytest.mark.slow
def test_variable_that_makes_no_difference_is_told_of(monkeypatch, tmp_path):
    status, output = verify(monkeypatch, tmp_path, "counting", "--at", "7", script=LOOP)
    assert (status, "IDENTICAL" in output) == (0, True)
    assert output.splitlines()[-1] == (
        "begins anew at a resume, which made no difference here: `n` of the module: 8, "
        "then 1"
    )


FAILS = [
    ("last", "7", "the finished run, started again: exit status 1", "only the loop"),
    ("last", "20", "the run that was resumed after batch 20: exit", "only the loop"),
    ("longer", "7", "the finished run, started again, rank 0, at batch 25", "total"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "at", "what", "why"), FAILS, ids=["finished", "at_the_end", "longer"]
)
def test_end_that_cannot_be_started_again_is_a_difference(
    monkeypatch, tmp_path, kind, at, what, why
):
    options = ("--at", at, "--keep", "kept")
    status, output = verify(monkeypatch, tmp_path, kind, *options, script=LOOP)
    assert status == 1
    assert f"first difference: {what}" in output
    assert why in output
    is_named = "  NameError: name 'last' is not defined" in output
    assert is_named == ('`session.epochs(..., carry=["last"])`' in output)
    assert is_named == (kind == "last")
    logs = [path.name for path in (tmp_path / "kept" / "parts").glob("*.log")]
    assert sorted(logs) == ["0.log", "1.log", "2.log"][: 2 if at == "20" else 3]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kept_last", "early"])
def test_end_that_can_be_started_again_is_none(monkeypatch, tmp_path, kind):
    # A loop that was left by `break` trains again, to the same end.
    status, output = verify(monkeypatch, tmp_path, kind, "--at", "7", script=LOOP)
    assert (status, "IDENTICAL" in output) == (0, True)
    assert "started again when it was finished" in output


@pytest.mark.slow
def test_finished_training_that_cannot_be_started_again_is_a_difference(
    monkeypatch, tmp_path
):
    status, output = verify(monkeypatch, tmp_path, "reporting", "--at", "4")
    assert status == 1
    assert "the finished run, started again: exit status 1" in output
    assert "what stands behind the training needs what only training sets" in output


@pytest.mark.slow
def test_resumed_run_that_fails_is_named(monkeypatch, tmp_path):
    options = ("--at", "4", "--at", "9")
    status, output = verify(monkeypatch, tmp_path, "failing", *options, script=LOOP)
    assert status == 2
    assert "ValueError: it does not resume" in output
    assert "was resumed after batch 4, and has not trained to batch 9" in output


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kept", "carried"])
def test_variable_that_is_kept_is_the_cure(monkeypatch, tmp_path, kind):
    status, output = verify(monkeypatch, tmp_path, kind, "--at", "7", script=LOOP)
    assert (status, "IDENTICAL" in output) == (0, True)


KINDS = [
    ("drawing", ["random numbers", "`rank.rng.torch`", "drawn more or fewer"]),
    ("unseeded", ["also without a stop", "a generator without a seed", "batch 1 "]),
    ("own_generator", ["the values of the same samples", "sample_rng"]),
    ("own_order", ["the samples of the batch", "without a seed"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "expected"), KINDS, ids=[k for k, _ in KINDS])
def test_cause_of_a_difference_is_named(monkeypatch, tmp_path, kind, expected):
    status, output = verify(monkeypatch, tmp_path, kind, "--at", "7")
    assert status == 1
    assert "DIFFERENT" in output
    for text in expected:
        assert text in output


@pytest.mark.slow
def test_ranks_are_compared_each_by_itself(monkeypatch, tmp_path):
    options = ("--stops", "1", "--batches", "6")
    status, output = verify(monkeypatch, tmp_path, "ids", *options, launcher=RANKS)
    assert status == 0
    assert "without a stop: 6 batches, 2 ranks" in output


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("failing", (), ["ValueError: it fails", "exit status 1"]),
        ("idle", (), ["the command has not trained to its end with Helios"]),
        ("good", ("--at", "16"), ["`--at` must be from 1 to 15 batches, got 16"]),
        ("good", ("--timeout-s", "0.1"), ["has not ended within 0.1 s"]),
    ],
    ids=["failing", "idle", "too_late", "too_slow"],
)
def test_command_that_cannot_be_verified_is_an_error(
    monkeypatch, tmp_path, kind, options, expected
):
    status, output = verify(monkeypatch, tmp_path, kind, *options)
    assert status == 2
    for text in expected:
        assert text in output
