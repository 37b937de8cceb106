"""A loop by hand, stopped anywhere and started again, ends with the same bits."""

import contextlib
import functools
import itertools
import json
import math
import pathlib
import signal
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from click.testing import CliRunner
from support import ByHand, IndexDataset, RecordingCallback, Stop, digest
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import helios
from helios.checkpoint import find_last_checkpoint, read_checkpoint
from helios.cli import main
from helios.errors import (
    CheckpointNotFoundError,
    DataError,
    HeliosError,
    ModelError,
    ResumeError,
)

pytestmark = pytest.mark.usefixtures("accelerator")
SCRIPT = pathlib.Path(__file__).with_name("session_script.py")
BATCHES = 18  # in three epochs of six


def check(root, chains, **settings):
    """Hold each chain of stops against a run of none."""
    whole = ByHand(root / "run" / "whole", **settings).chained()
    assert len(whole["ids"]) == BATCHES
    for number, chain in enumerate(chains):
        parts = ByHand(root / f"{number}" / "whole", **settings).chained(*chain)
        for name, value in whole.items():
            assert parts[name] == value, (name, chain)


@pytest.mark.parametrize("window", [1, 2, 4])
def test_stop_at_any_batch(tmp_path, window):
    check(tmp_path, [[Stop(batch=b)] for b in range(BATCHES)], window=window)


def test_stop_at_every_batch_one_after_the_other(tmp_path):
    check(tmp_path, [[Stop(batch=b) for b in range(BATCHES)]], window=2)


def test_stop_before_the_first_step_between_epochs_and_during_a_validation(tmp_path):
    start, *others = (
        [Stop(at_start=True)],
        [Stop(after_epoch=0)],
        [Stop(after_epoch=1)],
        [Stop(in_validation=1)],
        [Stop(in_validation=0), Stop(batch=8), Stop(in_validation=1)],
    )
    check(tmp_path, [start, [*start, Stop(batch=2)], *others], window=2)


def test_loader_with_workers_resumes_exactly(tmp_path):
    chain = [Stop(batch=3), Stop(batch=5), Stop(batch=13)]
    check(tmp_path, [chain], workers=2)


def test_number_of_workers_changes_nothing(tmp_path):
    alone = ByHand(tmp_path / "0" / "run").chained()
    assert ByHand(tmp_path / "2" / "run", workers=2).chained() == alone


def test_shuffle_without_a_seedable_sampler_resumes_exactly(tmp_path):
    check(tmp_path, [[Stop(batch=4), Stop(batch=9)]], is_seedable=False)


@pytest.mark.parametrize("window", [1, 2])
def test_objects_that_nobody_has_prepared_resume_exactly(tmp_path, window):
    chains = [[Stop(batch=3)], [Stop(batch=6), Stop(in_validation=1)]]
    check(tmp_path, chains, is_prepared=False, window=window)


def test_checkpoints_come_every_so_many_steps_and_at_the_end(tmp_path):
    loop = ByHand(tmp_path / "run", window=2, options={"save_every": 2})
    assert loop.run()
    assert loop.recorder.saved == [
        "run_epoch_0_iter_2",
        "run_epoch_1_iter_4",
        "run_epoch_1_iter_6",
        "run_epoch_2_iter_8",
        "run_epoch_3_iter_9",
    ]


def test_checkpoints_come_after_every_epoch(tmp_path):
    options = {"save_every": "epoch", "keep_last": 2}
    loop = ByHand(tmp_path / "run", options=options)
    assert loop.run()
    saved = [f"run_epoch_{n}_iter_{6 * n}" for n in (1, 2, 3)]
    assert loop.recorder.saved == saved
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "run.log",
        *saved[1:],
    ]


class Numbers(torch.utils.data.IterableDataset):
    """The numbers up to one, as a stream."""

    def __init__(self, length):
        self.length = length

    def __iter__(self):
        return iter(range(self.length))


class Simple:
    """A loop of two epochs of five batches, of which a test varies one thing."""

    def __init__(self, root, **options):
        set_seed(1)
        self.accelerator = options.pop("accelerator", None) or Accelerator(cpu=True)
        self.net = nn.Sequential(nn.Linear(1, 3), nn.Dropout(0.5), nn.Linear(3, 1))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01)
        self.net, self.optimizer = self.accelerator.prepare(self.net, self.optimizer)
        self.recorder, self.ids = RecordingCallback(), []
        loader = DataLoader(IndexDataset(20), batch_size=4, shuffle=True)
        arguments = {
            "loaders": {"train": loader, "valid": DataLoader(IndexDataset(3))},
            "net": self.net,
            "optimizer": self.optimizer,
            "callbacks": [self.recorder, *options.pop("callbacks", ())],
        }
        self.session = helios.Session(self.accelerator, root, **(arguments | options))

    def step(self, batch):
        self.ids.append(batch.tolist())
        loss = (self.net(batch[:, None] / 20) - 1).square().mean()
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.session.log({"loss": loss})

    def run(self, total=2):
        with self.session as session:
            for _ in session.epochs(total):
                for batch in session.batches():
                    self.step(batch)
        return digest(self.net.state_dict())


def test_finished_run_has_no_epochs_left_until_it_is_made_longer(tmp_path):
    first = Simple(tmp_path / "run")
    weights = first.run()
    again = Simple(tmp_path / "run")
    assert (again.run(), again.ids) == (weights, [])
    longer = Simple(tmp_path / "run")
    weights = longer.run(3)
    whole = Simple(tmp_path / "other" / "run")
    assert whole.run(3) == weights
    assert first.ids + longer.ids == whole.ids


def test_loop_without_an_end_goes_on_until_it_is_left(tmp_path):
    loop = Simple(tmp_path / "run", save_every=1)
    with loop.session as session:
        for epoch in session.epochs():
            for batch in session.batches():
                loop.step(batch)
            if epoch == 3:
                break
    assert len(loop.ids) == 20


def until(loop, most, root):
    """Leave both loops at a step, as examples of Accelerate do."""
    with loop.session as session:
        for epoch in session.epochs(9):
            for batch in session.batches():
                loop.step(batch)
                if session.state.dataset_iter == 2 and epoch == 1:
                    break  # leaves one epoch early
                if session.state.current_iteration + 1 == most:
                    return digest(loop.net.state_dict())
            list(session.batches("valid"))
    raise AssertionError("no end")


def test_loop_that_leaves_epochs_by_break_resumes_exactly(tmp_path):
    whole = Simple(tmp_path / "whole" / "run", save_every=3)
    weights = until(whole, 13, tmp_path)
    assert len(whole.ids) == 13
    for at in (4, 7, 8, 9):
        root = tmp_path / f"{at}" / "run"
        first = Simple(root, save_every=3, callbacks=[StopBehind(at)])
        with pytest.raises(helios.RunStopped):
            until(first, 13, tmp_path)
        second = Simple(root, save_every=3)
        assert until(second, 13, tmp_path) == weights, at
        assert first.ids + second.ids == whole.ids
        assert first.recorder.logged + second.recorder.logged == whole.recorder.logged


class StopBehind(helios.Callback):
    """Asks to stop when so many batches are done."""

    def __init__(self, batch):
        self.batch = batch

    def on_log(self, session, values):
        if session.state.global_iteration == self.batch and "loss" in values:
            session.request_stop("the test")


def test_failed_loop_leaves_whole_checkpoints_and_goes_on_from_the_last(tmp_path):
    weights = Simple(tmp_path / "whole" / "run").run()
    for at in range(1, 10):
        root = tmp_path / f"{at}" / "run"
        first = Simple(root, save_every=2)

        def fail(batch, loop=first, at=at):
            if len(loop.ids) == at:
                raise RuntimeError("of the loop")
            Simple.step(loop, batch)

        first.step = fail
        with pytest.raises(RuntimeError, match="of the loop"):
            first.run()
        names = {path.name for path in root.iterdir()}
        assert len(names) == 1 + at // 2
        assert not any(name.startswith(".") for name in names)
        assert "Traceback" in (root / "run.log").read_text()
        assert Simple(root, save_every=2).run() == weights, at


def start(folder, *args, under=()):
    command = [sys.executable, *under, SCRIPT, folder, *map(str, args)]
    return subprocess.Popen(
        command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def end(process, *, answer="\n"):
    with process:
        try:
            process.communicate(answer, timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return process.returncode


@pytest.fixture(scope="module")
def final(tmp_path_factory):
    folder = tmp_path_factory.mktemp("final")
    assert end(start(folder)) == 0
    return digest(torch.load(folder / "final.pt"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_naive_loop_ends_with_its_status_after_a_signal_and_goes_on_later(
    tmp_path, final, number
):
    process = start(tmp_path, 7)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert end(process) == 75
    assert not (tmp_path / "final.pt").exists()
    record = read_checkpoint(find_last_checkpoint(tmp_path)).record
    assert record["progress"]["global_iteration"] == 8
    assert end(start(tmp_path)) == 0
    assert digest(torch.load(tmp_path / "final.pt")) == final


def test_naive_loop_that_fails_ends_as_any_program(tmp_path, final):
    assert end(start(tmp_path, 7, "raise")) == 1
    assert end(start(tmp_path)) == 0
    assert digest(torch.load(tmp_path / "final.pt")) == final


def test_verification_of_a_loop_tells_one_that_resumes_from_one_that_does_not(tmp_path):
    common = ["verify-resume", "--at", "3", "--at", "9", "--", sys.executable, SCRIPT]
    done = CliRunner().invoke(main, [*map(str, common), str(tmp_path)])
    assert (done.exit_code, "IDENTICAL" in done.output) == (0, True), done.output
    done = CliRunner().invoke(main, [*map(str, common), str(tmp_path), "forgets"])
    assert done.exit_code == 1, done.output
    # A stop after which nothing was taken up proves nothing.
    done = CliRunner().invoke(main, [*map(str, common), str(tmp_path), "loses"])
    assert done.exit_code == 2, done.output
    assert "was stopped after batch 3, and has gone on with batch 1" in done.output
    done = CliRunner().invoke(main, [*map(str, common), str(tmp_path), "breaks"])
    assert (done.exit_code, "15 batches" in done.output) == (0, True), done.output
    assert not (tmp_path / "run").exists()


def test_signal_can_ask_for_a_checkpoint(tmp_path):
    process = start(tmp_path, 7)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR2)
    assert end(process) == 0
    folders = [path.parent.name for path in tmp_path.rglob("helios.json")]
    assert sorted(folders) == ["run_epoch_1_iter_8", "run_epoch_4_iter_20"]


def test_loop_saves_and_ends_when_its_launcher_is_ended_that_passes_nothing_on(
    tmp_path, final
):
    under = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")
    process = start(tmp_path, 7, under=under)
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    process.wait(timeout=60)
    end(process)  # of the loop, which holds the pipe
    (folder,) = [path.parent.name for path in tmp_path.rglob("helios.json")]
    assert folder == "run_epoch_1_iter_8"
    assert not (tmp_path / "final.pt").exists()
    assert end(start(tmp_path, under=under)) == 0
    assert digest(torch.load(tmp_path / "final.pt")) == final


def test_loop_ends_whose_launcher_was_ended_before_it_began(tmp_path):
    under = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")
    process = start(tmp_path, "early", under=under)
    assert process.stdout.readline() == "early\n"
    process.terminate()
    process.wait(timeout=60)
    end(process)  # of the loop, which holds the pipe
    assert not [*tmp_path.iterdir()]


def test_whoever_wants_to_go_on_behind_a_stop_catches_it(tmp_path):
    loop = Simple(tmp_path / "run")
    loop.session.request_stop("time is up")
    with pytest.raises(helios.RunStopped, match="time is up: stopped") as raised:
        loop.run()
    assert (raised.value.code, raised.value.reason) == (75, "time is up")
    assert loop.ids == []


def test_accelerators_own_accumulate_and_counting_go_on_working(tmp_path):
    outcomes = []
    for is_own in (False, True):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        loop = Simple(tmp_path / f"{is_own}" / "run", accelerator=accelerator)
        synced, ends = [], []
        with loop.session as session:
            for _ in session.epochs(2):
                for batch in session.batches():
                    make = accelerator.accumulate if is_own else session.accumulate
                    with make(*([loop.net] if is_own else [])):
                        loop.step(batch)
                        synced.append(accelerator.sync_gradients)
                        ends.append(accelerator.gradient_state.end_of_dataloader)
        outcomes.append((digest(loop.net.state_dict()), loop.recorder.logged))
        assert synced == [False, True, False, True, True] * 2
        assert ends == [False, False, False, False, True] * 2
        assert not accelerator.gradient_state.in_dataloader
        accelerator.state._reset_state(reset_partial_state=False)
        accelerator.gradient_state._reset_state()
    assert outcomes[0] == outcomes[1]


def test_accelerators_own_accumulate_resumes_inside_a_window(tmp_path):
    def run(root, stop_at=None):
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
        loop = Simple(root, accelerator=accelerator)
        with contextlib.suppress(helios.RunStopped), loop.session as session:
            for _ in session.epochs(2):
                for batch in session.batches():
                    with accelerator.accumulate(loop.net):
                        loop.step(batch)
                    if len(loop.ids) == stop_at:
                        session.request_stop("the test")
        return loop

    weights = digest(run(tmp_path / "whole" / "run").net.state_dict())
    for at in (1, 2, 4, 6):
        run(tmp_path / f"{at}" / "run", at)
        loop = run(tmp_path / f"{at}" / "run")
        assert len(loop.ids) == 10 - at
        assert digest(loop.net.state_dict()) == weights, at


class Counter:
    """An object of a script's own, with a state."""

    def __init__(self):
        self.value = 0

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


class Warmup(Counter):
    """One that saves a scheduler with its own state."""

    def __init__(self, scheduler):
        super().__init__()
        self.parts = {"after": [scheduler]}


def test_notes_and_registered_objects_are_saved(tmp_path):
    def make(registered, passed):
        accelerator = Accelerator(cpu=True)
        accelerator._custom_objects.clear()
        accelerator.register_for_checkpointing(registered)
        return Simple(tmp_path / "run", accelerator=accelerator, counters=[passed])

    first = make(Counter(), Counter())
    with contextlib.suppress(helios.RunStopped), first.session as session:
        registered = first.accelerator._custom_objects[0]
        for epoch in session.epochs(2):
            for batch in session.batches():
                first.step(batch)
                registered.value += 1
                session["counters"][0].value += 2
                session.notes["seen"] = (epoch, torch.tensor(len(first.ids)))
                if len(first.ids) == 3:
                    session.request_stop("the test")
    registered, passed = Counter(), Counter()
    second = make(registered, passed).session
    with second:
        assert (registered.value, passed.value) == (3, 6)
        assert second.notes == {"seen": (0, torch.tensor(3))}
        assert second.state.dataset_iter == 3


class Patience:
    """Counts, without any method that saves it."""

    def __init__(self):
        self.best, self.worse, self.seen = math.inf, 0, []


def test_objects_without_an_optimizer_are_saved_beside_what_was_prepared(tmp_path):
    def make():
        loop = ByHand(tmp_path / "run")
        loop.make()
        made = torch.optim.lr_scheduler.StepLR(loop.optimizers[1], 3)
        average, patience = AveragedModel(loop.net), Patience()
        return (
            loop,
            patience,
            average,
            helios.Session(
                loop.accelerator,
                tmp_path / "run",
                loaders=loop.train_loader,
                **{"patience": patience, "average": average, "made": made},
            ),
        )

    loop, patience, average, session = make()
    assert session["patience"] is patience
    with contextlib.suppress(helios.RunStopped), session:
        for _ in session.epochs(1):
            for _ in session.batches():
                patience.best, patience.worse = 0.5, patience.worse + 1
                patience.seen.append(patience.worse)
                average.update_parameters(loop.net)
                session.request_stop("the test")
    _, patience, average, session = make()
    with session:
        assert (patience.best, patience.worse, patience.seen) == (0.5, 1, [1])
        assert average.n_averaged == 1


def test_note_that_grows_in_place_goes_on_growing(tmp_path):
    def history(stop_at=None):
        loop, found = Simple(tmp_path / "run"), []
        with contextlib.suppress(helios.RunStopped), loop.session as session:
            seen = session.notes.setdefault("seen", [])
            by_epoch = session.notes.setdefault("by epoch", {})
            for epoch in session.epochs(2):
                for _ in session.batches():
                    seen.append(len(seen))
                    by_epoch[epoch] = len(seen)
                    if len(seen) == stop_at:
                        session.request_stop("the test")
            found = [list(seen), dict(by_epoch), session.notes]
        return found

    history(3)
    history(7)
    seen, by_epoch, notes = history()
    assert seen == list(range(len(seen)))
    assert len(seen) > 7
    assert by_epoch == {0: len(seen) // 2, 1: len(seen)}
    assert notes == {"seen": seen, "by epoch": by_epoch}


@pytest.mark.parametrize("late", ["a scheduler", "a registered object"])
def test_what_is_made_after_the_session_would_not_be_saved_and_is_refused(
    tmp_path, late
):
    loop = ByHand(tmp_path / "run")
    loop.make()
    loaders, accelerator = loop.train_loader, loop.accelerator
    with helios.Session(accelerator, tmp_path / "run", loaders=loaders) as session:
        made = torch.optim.lr_scheduler.StepLR(loop.optimizers[0], 3)
        if late == "a scheduler":
            accelerator.prepare(made)
        else:
            accelerator.register_for_checkpointing(made)
        epochs = session.epochs(1)
        with pytest.raises(ModelError, match="after the session was made, which does"):
            next(epochs)


def test_scheduler_that_would_not_be_saved_is_refused(tmp_path):
    def check(message, **objects):
        loop = ByHand(tmp_path / "run")
        loop.make()
        made = torch.optim.lr_scheduler.StepLR(loop.optimizers[1], 3)
        if objects.pop("registers", False):
            loop.accelerator.register_for_checkpointing(made)
        if objects.pop("registers_another", False):
            loop.accelerator.register_for_checkpointing(Counter())
        if objects.pop("wraps", False):
            loop.accelerator.register_for_checkpointing(Warmup(made))
        if objects:
            objects = {"net": loop.net, "head": loop.head, "opts": loop.optimizers}
            objects |= {"schedulers": [loop.scheduler]} if message is None else {}
            objects |= {"made": made} if message is None else {}
        with helios.Session(
            loop.accelerator, tmp_path / "run", loaders=loop.train_loader, **objects
        ) as session:
            if message is None:
                assert next(session.epochs(1)) == 0
                return
            with pytest.raises(ModelError, match=message):
                next(session.epochs(1))

    check("a scheduler was made for `optimizers.1`, and is not among")
    check("a scheduler was made for `opts.0`, and is not among", names=True)
    check("a scheduler was made for `optimizers.1`", registers_another=True)
    check(None, registers=True)
    check(None, wraps=True)
    check(None, names=True)


def test_network_that_is_not_trained_need_not_be_named(tmp_path):
    loop = ByHand(tmp_path / "run")
    loop.make()
    loop.accelerator.prepare(nn.Linear(2, 2))  # a teacher
    named = {"models": [loop.net, loop.head], "optimizers": loop.optimizers}
    named |= {"schedulers": [loop.scheduler]}
    with helios.Session(
        loop.accelerator, tmp_path / "run", loaders=loop.train_loader, **named
    ) as session:
        assert next(session.epochs(1)) == 0


def test_what_the_loop_does_before_it_reads_on_is_put_back_at_a_resume(tmp_path):
    def run(loop, stop_at=None):
        with loop.session as session:
            for _ in session.epochs(2):
                torch.rand(3)
                loop.optimizer.param_groups[0]["lr"] *= 0.5
                session.notes["count"] = session.notes.get("count", 0) + 1
                list(session.batches("valid"))
                for batch in session.batches():
                    loop.step(batch)
                    if len(loop.ids) == stop_at:
                        session.request_stop("the test")
        return digest([loop.net.state_dict(), loop.optimizer.state_dict()])

    weights = run(Simple(tmp_path / "whole" / "run"))
    for at in (2, 5, 7):
        with pytest.raises(helios.RunStopped):
            run(Simple(tmp_path / f"{at}" / "run"), at)
        loop = Simple(tmp_path / f"{at}" / "run")
        assert run(loop) == weights
        assert loop.session.notes == {"count": 2}


def test_values_are_written_at_log_points_or_at_the_end_of_an_epoch(tmp_path):
    for every, steps in ((1, range(1, 11)), (4, (4, 8)), (None, (5, 10))):
        loop = Simple(tmp_path / f"{every}" / "run", log_every=every)
        loop.run()
        assert [step for step, _, _ in loop.recorder.logged] == list(steps)


def test_what_is_logged_behind_the_batches_is_written_at_once(tmp_path):
    loop = Simple(tmp_path / "run", log_every=4)
    with loop.session as session:
        for epoch in session.epochs(2):
            for batch in session.batches():
                loop.step(batch)
            session.log({"score": epoch})
            assert loop.recorder.logged[-1] == (
                5 * (epoch + 1),
                "score",
                float(epoch).hex(),
            )


def test_log_and_tensorboard_are_continued(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"enable_tensorboard": True, "save_every": 3}
    first = Simple(tmp_path / "run", callbacks=[StopBehind(4)], **options)
    with pytest.raises(helios.RunStopped):
        first.run()
    second = Simple(tmp_path / "run", **options)
    second.run()
    second.session.close()  # once more does nothing
    text = (tmp_path / "run" / "run.log").read_text()
    assert text.count("loss") == 10
    assert "resumed from run_epoch_0_iter_" in text
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [*range(1, 11)]


def test_batches_that_are_read_elsewhere_while_training_goes_on_are_refused(tmp_path):
    def loop(session):
        for _ in session.epochs(1):
            yield from zip(session.batches(), session.batches("valid"), strict=False)

    session, said = Simple(tmp_path / "run").session, "'valid'.*` is still being read"
    with session, pytest.raises(DataError, match=said):
        list(loop(session))


def test_part_of_a_validation_may_be_read_between_two_batches(tmp_path):
    def run(loop, stop_at=None):
        seen = []
        with loop.session as session, contextlib.suppress(helios.RunStopped):
            for _ in session.epochs(2):
                for batch in session.batches():
                    loop.step(batch)
                    found = itertools.islice(session.batches("valid"), 2)
                    seen.append([one.tolist() for one in found])
                    if len(loop.ids) == stop_at:
                        session.request_stop("the test")
        return seen, digest(loop.net.state_dict())

    def shuffled():
        loaders = {
            "train": DataLoader(IndexDataset(20), batch_size=4),
            "valid": DataLoader(IndexDataset(9), shuffle=True),
        }
        return {"loaders": loaders}

    seen, weights = run(Simple(tmp_path / "whole" / "run", **shuffled()))
    assert len({str(one) for one in seen}) > 3
    first, _ = run(Simple(tmp_path / "run", **shuffled()), 4)
    second, found = run(Simple(tmp_path / "run", **shuffled()))
    assert (first + second, found) == (seen, weights)


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        (lambda s: list(s.batches()), "must be read once in each turn"),
        (lambda s: [list(s.batches()) for _ in range(2)], "must be read once"),
        (lambda s: [0 for _ in s.epochs(1)], "epoch 0 has read no training batches"),
        (
            lambda s: [list(s.batches()) + list(s.batches()) for _ in s.epochs(1)],
            "must be read once in each turn",
        ),
    ],
)
def test_loops_that_could_not_be_resumed_are_refused(tmp_path, loop, message):
    session = Simple(tmp_path / "run").session
    with session, pytest.raises(DataError, match=message):
        loop(session)


def test_other_loader_or_epochs_that_are_none_are_refused(tmp_path):
    with Simple(tmp_path / "run").session as session:
        with pytest.raises(ValueError, match=r"in \['train', 'valid'\], one.*got 't'"):
            session.batches("t")
        with pytest.raises(ValueError, match="`total` must be an int >= 1"):
            session.epochs(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accelerator": "cpu"}, "`accelerator` must be an Accelerator, got 'cpu'"),
        ({"path": 3}, "`path` must be a path, got 3"),
        ({"path": "runs/.hidden"}, "`path` must be a plain file name, got '.hidden'"),
        ({"resume": 3}, "`resume` must be a path, got 3"),
        ({"loaders": [1]}, r"`loaders` must be a DataLoader.*got \[1\]"),
        ({"loaders": {"valid": 1}}, r"with \"train\".*got \['valid'\]"),
        ({"loaders": {"train": [1]}}, r"`loaders\['train'\]` must be a torch"),
        ({"save_every": 0}, '`save_every` must be an int >= 1, in steps, or "epoch"'),
        ({"save_every": "step"}, "`save_every` must be .*, got 'step'"),
        ({"save_every": True}, "`save_every` must be .*, got True"),
        ({"log_every": "epoch"}, "`log_every` must be .*, got 'epoch'"),
        ({"random_seed": 1.5}, "`random_seed` must be an int or None, got 1.5"),
        ({"hang_timeout_s": 0}, "`hang_timeout_s` must be > 0 or None, got 0"),
        ({"max_time_s": True}, "`max_time_s` must be > 0 or None, got True"),
        ({"stop_grace_s": -1}, "`stop_grace_s` must be > 0 or None, got -1"),
        ({"bad_numbers": "rollback"}, "`bad_numbers` must be one of .*'skip', None"),
        ({"crash_bundle": True}, "`crash_bundle` must be one of .*, got True"),
        ({"callbacks": [print]}, "`callbacks` must be helios.Callback objects"),
        ({"keep_last": 0}, "`keep_last` must be an int >= 1 or None, got 0"),
        ({"save_evry": 3}, "`save_evry` is no argument of the Session"),
        ({"optimizer": None}, "`optimizer` is no argument .* got None"),
        ({"patience": Patience}, "`patience` is no argument .*"),
        ({"optimizer": Patience()}, "no optimizer was passed"),
        ({"registered": 1}, "`registered` names what Accelerate knows"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_made(
    tmp_path, monkeypatch, accelerator, options, message
):
    monkeypatch.chdir(tmp_path)
    net = nn.Linear(1, 1)
    given = {
        "accelerator": accelerator,
        "path": "run",
        "loaders": DataLoader(IndexDataset(4)),
        "net": net,
        "optimizer": torch.optim.SGD(net.parameters(), lr=0.1),
        **options,
    }
    accelerator, path = given.pop("accelerator"), given.pop("path")
    with pytest.raises((TypeError, ValueError), match=message):
        helios.Session(accelerator, path, **given)
    assert list(tmp_path.iterdir()) == []


def test_session_without_an_optimizer_or_a_network_of_one_is_refused(
    tmp_path, accelerator
):
    net, loader = nn.Linear(1, 1), DataLoader(IndexDataset(4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    make = functools.partial(helios.Session, accelerator, tmp_path, loaders=loader)
    with pytest.raises(ValueError, match="no optimizer was passed"):
        make(net=net)
    with pytest.raises(ModelError, match="in none of the networks that were passed"):
        make(net=nn.Linear(1, 1), optimizer=optimizer)


def test_objects_that_must_be_prepared_cannot_be_used_as_they_are(tmp_path):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = nn.Linear(1, 1)
    session = helios.Session(
        accelerator,
        tmp_path / "run",
        loaders=DataLoader(IndexDataset(4)),
        net=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
    )
    with session:
        with pytest.raises(ModelError, match=r"`optimizer = session\[\"optimizer\"\]`"):
            session.epochs(1)
        assert session["net"] is net
        assert session["optimizer"].optimizer.param_groups
        session.epochs(1)


def test_half_precision_that_accelerate_does_not_train_in_is_refused(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    with pytest.raises(ValueError, match='`accelerator` has `mixed_precision="fp16"`'):
        Simple(tmp_path / "run", accelerator=accelerator)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"random_seed": 4}, "'seed of phase 0'"),
        ({"loaders": DataLoader(IndexDataset(21), batch_size=4)}, "'samples of"),
        ({"loaders": DataLoader(IndexDataset(20), batch_size=5)}, "'global batch of"),
        ({"others": nn.Linear(1, 1)}, r"holds the networks \['net', 'others'\]"),
    ],
)
def test_run_that_is_not_the_one_that_was_saved_is_refused(tmp_path, options, message):
    Simple(tmp_path / "run").run(1)
    with pytest.raises(ResumeError, match=message):
        Simple(tmp_path / "run", **options)


def test_resume_says_from_what(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match='`resume` is "must"'):
        Simple(tmp_path / "run", resume="must")
    first = Simple(tmp_path / "run", save_every=3)
    weights = first.run()
    path = tmp_path / "run" / "run_epoch_1_iter_6"
    again = Simple(tmp_path / "run", resume=path)
    assert again.run() == weights
    assert len(again.ids) == 4
    afresh = Simple(tmp_path / "run", resume="never")
    assert afresh.run() == weights
    assert afresh.ids == first.ids


def test_record_says_what_the_run_was(tmp_path):
    Simple(tmp_path / "run").run()
    path = find_last_checkpoint(tmp_path)
    record = read_checkpoint(path).record
    assert record["identity"]["train_data"]["samples of phase 0"] == 20
    assert json.dumps(record["progress"])
    networks = read_checkpoint(path).tree("model")
    assert list(networks) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_any_failure_that_is_helios_own_is_one_of_its_errors():
    assert issubclass(DataError, HeliosError)
    assert not issubclass(helios.RunStopped, Exception)


def test_iterable_data_set_resumes_exactly(tmp_path):
    def make(root, *callbacks):
        loader = DataLoader(Numbers(18), batch_size=4)
        return Simple(root, loaders=loader, callbacks=callbacks)

    whole = make(tmp_path / "whole" / "run")
    weights = whole.run()
    assert [len(ids) for ids in whole.ids] == [4, 4, 4, 4, 2] * 2
    for at in (1, 4, 5, 7):
        first = make(tmp_path / f"{at}" / "run", StopBehind(at))
        with pytest.raises(helios.RunStopped):
            first.run()
        second = make(tmp_path / f"{at}" / "run")
        assert second.run() == weights
        assert first.ids + second.ids == whole.ids


@pytest.mark.parametrize("data", [IndexDataset(18), Numbers(18)])
def test_loader_that_was_made_resumable_before_is_taken_as_it_is(tmp_path, data):
    def make(root, *callbacks):
        loader = helios.data.make_resumable(DataLoader(data, batch_size=4), seed=3)
        accelerator = Accelerator(cpu=True)
        accelerator._custom_objects.clear()
        accelerator.register_for_checkpointing(loader)
        return Simple(
            root, accelerator=accelerator, loaders=loader, callbacks=callbacks
        )

    whole = make(tmp_path / "whole" / "run")
    weights = whole.run()
    first = make(tmp_path / "run", StopBehind(7))
    with pytest.raises(helios.RunStopped):
        first.run()
    second = make(tmp_path / "run")
    assert second.run() == weights
    assert first.ids + second.ids == whole.ids


def test_loader_of_tensors_is_what_the_network_gets(tmp_path):
    data = TensorDataset(torch.arange(20.0)[:, None], torch.arange(20))
    loop = Simple(tmp_path / "run", loaders=DataLoader(data, batch_size=4))
    with loop.session as session:
        for _ in session.epochs(1):
            rows = [labels.tolist() for _, labels in session.batches()]
    assert list(itertools.chain(*rows)) == list(range(20))
