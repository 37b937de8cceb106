"""``helios verify-resume``: the command."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from helios.verifying.causes import FINISHED, LONGER, UNEQUAL, Advice, Kind, advice
from helios.verifying.comparing import Difference, describe, first_difference
from helios.verifying.forgotten import cured, forgotten, lines_of, note_of, unset
from helios.verifying.starts import Place, Starts, Traces

# As in `trace`, which must be imported by the runs alone: it needs torch.
_FOLDER, _STOP, _LAST = "HELIOS_VERIFY", "HELIOS_VERIFY_STOP", "HELIOS_VERIFY_LAST"
_SHOWN_LINES = 30
_ERROR = re.compile(r"\b\w+(Error|Exception): \S.*")


class _Failed(Exception):
    """A start has failed that ought to have come to its end, as that before it."""

    def __init__(self, difference: Difference) -> None:
        super().__init__(difference.where)
        self.difference = difference


class _Runner:
    """Runs the command as often as it takes; each run has a folder of its own."""

    def __init__(
        self, command: Sequence[str], root: Path, last: int | None, timeout_s: float
    ) -> None:
        self._command, self._root = command, root
        self._last, self._timeout_s = last, timeout_s
        self._good = {0}  # statuses with which the command ends

    def run(self, name: str, stops: Sequence[Place] = ()) -> Traces:
        """The traces of the command, stopped at these batches.

        Raises:
            _Failed: what is resumed fails behind the training.
        """
        folder = self._root / name
        folder.mkdir()
        starts = Starts(folder)
        for number, stop in enumerate([*stops, None]):
            log = folder / f"{number}.log"
            status = self._start(folder, log, stop)
            traces = starts.read()
            resumed = _resumed(traces, stops[number - 1]) if number else ""
            if why := self._missing(traces, stop, status):
                self._fail(log, f"was {resumed}, and {why}" if resumed else why)
            if why := starts.wrong_with(stop):
                self._fail(folder / f"{number - 1}.log", why)
        if not stops:
            self._good.add(status)
        elif self._last is None and status not in self._good:
            kind = FINISHED._replace(name=f"the run that was {resumed}")
            raise self._failed(kind, log, status)
        return traces

    def _missing(self, traces: Traces, stop: Place | None, status: int) -> str | None:
        """What a start has not trained that it ought to have."""
        # One that was stopped may say so by its exit status.
        wanted = [r for k, r in traces.items() if stop is None or k[0] == stop[0]]
        until = self._last if stop is None else stop[1]
        is_over = stop is None and status == 0  # by `break`, for instance
        if wanted and all(
            run.has_ended or is_over or until in run.batches for run in wanted
        ):
            return None
        where = "to its end" if until is None else f"to batch {until}"
        return f"has not trained {where} with Helios; exit status {status}"

    def rerun(self, name: str, before: Traces) -> Traces | None:
        """The traces after one more start of what is finished.

        None where runs are not trained to their end.

        Raises:
            _Failed: it does not end at once.
        """
        if self._last is not None:
            return None
        folder = self._root / name
        log = folder / f"{len([*folder.glob('*.log')])}.log"
        status = self._start(folder, log, None)
        if status not in self._good:
            raise self._failed(FINISHED, log, status)
        traces = Starts(folder).read()
        for (which, rank), run in traces.items():
            old = before.get((which, rank))
            if old is None or (old.has_ended and run.n_trained > old.n_trained):
                last = f"batch {max(run.batches, default=0)} of `{which}`"
                details = ["it is finished, and has trained again"]
                raise _Failed(Difference(LONGER, rank, None, last, details))
        return traces

    def _failed(self, kind: Kind, log: Path, status: int) -> _Failed:
        text = self._show(log)
        errors = [found[0] for line in text if (found := _ERROR.search(line))]
        where = f"exit status {status}"
        return _Failed(Difference(kind, None, None, where, errors[-1:]))

    def _start(self, folder: Path, log: Path, stop: Place | None) -> int:
        env = {**os.environ, _FOLDER: str(folder.resolve())}
        env |= {} if stop is None else {_STOP: f"{stop[0]}:{stop[1]}"}
        env |= {} if self._last is None else {_LAST: str(self._last)}
        with open(log, "wb") as out:
            process = subprocess.Popen(
                self._command,
                env=env,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            return process.wait(self._timeout_s)
        except BaseException as error:  # also an impatient interrupt
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                why = f"has not ended within {self._timeout_s:g} s; see `--timeout-s`"
                self._fail(log, why)
            raise

    def _fail(self, log: Path, why: str) -> NoReturn:
        self._show(log)
        raise click.UsageError(f"the command {why}")

    def _show(self, log: Path) -> list[str]:
        text = log.read_text(encoding="utf-8", errors="replace").splitlines()
        click.echo("\n".join(text[-_SHOWN_LINES:]), err=True)
        return text


def _resumed(traces: Traces, stop: Place) -> str:
    which = f" of `{stop[0]}`" if len({name for name, _ in traces}) > 1 else ""
    return f"resumed after batch {stop[1]}{which}"


def _choose(at: Sequence[int], count: int, seed: int, total: int) -> list[int]:
    if not at:
        among = range(1, max(total, 2))
        return sorted(random.Random(seed).sample(among, min(count, len(among))))
    if late := [n for n in at if not 1 <= n <= total]:
        raise click.UsageError(
            f"`--at` must be from 1 to {total} batches, got {late[0]}"
        )
    return sorted({*at})


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@click.option("--at", multiple=True, type=int, help="Batch to stop after; repeatable.")
@click.option(
    "--stops", default=2, show_default=True, help="Random stops without --at."
)
@click.option("--seed", default=0, show_default=True, help="Of the random stops.")
@click.option("--batches", type=click.IntRange(2), help="Train no more than these.")
@click.option("--timeout-s", default=3600.0, show_default=True, help="Of each run.")
@click.option("--keep", type=click.Path(path_type=Path), help="New folder for traces.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def verify_resume(
    at: tuple[int, ...],
    stops: int,
    seed: int,
    batches: int | None,
    timeout_s: float,
    keep: Path | None,
    command: tuple[str, ...],
) -> None:
    """Prove that COMMAND, a training with Helios, ends the same wherever it is stopped.

    It is run without a stop, and then with stops after some batches, each time until it
    stops, and from where it stopped; then again when it is finished. After each batch
    the samples, their values, random numbers, losses, weights and optimizers are
    compared; the first difference is named, with its likely cause. Checkpoints and logs
    go to a temporary folder.

    Exit status: 0 where the runs are identical, 1 where they are not, 2 where the
    command cannot be verified.
    """
    if keep is not None and keep.exists() and any(keep.iterdir()):
        raise click.UsageError(f"`--keep` must be a new folder, {keep} has files")
    with contextlib.ExitStack() as stack:
        root = keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root.mkdir(parents=True, exist_ok=True)
        status = _verify(_Runner(command, root, batches, timeout_s), at, stops, seed)
    sys.exit(status)


def _verify(runner: _Runner, at: Sequence[int], stops: int, seed: int) -> int:
    whole = runner.run("whole")
    places = [(k[0], n) for k, run in whole.items() if k[1] == 0 for n in run.batches]
    total, ranks = len(places), len({rank for _, rank in whole})
    runs = f" in {len(whole) // ranks} runs" if len(whole) > ranks else ""
    plural = "s" if ranks > 1 else ""
    click.echo(f"without a stop: {total} batches{runs}, {ranks} rank{plural}")
    chosen = _choose(at, stops, seed, total)
    stopped = [places[n - 1] for n in chosen]
    first_stops = dict(reversed(stopped))
    batch = next(iter(whole[min(whole)].batches.values()))
    try:
        parts = runner.run("parts", stopped)
        click.echo(f"stopped after batch {', '.join(map(str, chosen))}, and resumed")
        if (found := _compare(whole, parts)) is not None:
            return _explain(runner, whole, parts, found, first_stops)
        if (again := runner.rerun("parts", parts)) is not None:
            click.echo("started again when it was finished")
            found = _compare(whole, again)
            # Who has asked a Trainer to stop early has more to train.
            if found and (batch["is_loop"] or found.kind is not UNEQUAL):
                found.details.append("in the finished run, started again")
                raise _Failed(found)
    except _Failed as failed:
        found = failed.difference
        said = advice(found.kind, **_facts(batch), is_repeatable=True)
        return _tell(found, unset(said, found.details))
    click.echo(
        f"IDENTICAL: samples, random numbers, losses and {len(batch['values'])} values "
        f"of the state, after each of {total} batches"
    )
    missed = [
        variable
        for k, run in whole.items()
        for variable in forgotten(
            run, parts[k], stop=first_stops.get(k[0], 0), again=None
        )
    ]
    if (note := note_of(missed)) is not None:
        click.echo(note)
    return 0


def _explain(
    runner: _Runner,
    whole: Traces,
    parts: Traces,
    found: Difference,
    first_stops: Mapping[str, int],
) -> int:
    """Tell what not saved has made the difference, or that nothing can be repeated."""
    traces = runner.run("again")
    again = _compare(whole, traces)
    first, is_repeatable = again or found, again is None
    batch = next(iter(whole[min(whole)].batches.values()))
    said = advice(first.kind, **_facts(batch), is_repeatable=is_repeatable)
    if is_repeatable and first.rank is not None:
        key, stop = (first.run, first.rank), first_stops.get(first.run, 0)
        missed = forgotten(
            whole[key], parts[key], stop=stop, until=first.batch, again=traces[key]
        )
        first.details += lines_of(missed)
        said = cured(said, missed)
    return _tell(first, said, "" if is_repeatable else ", also without a stop")


def _facts(batch: Mapping[str, Any]) -> dict[str, bool]:
    is_cuda = any(name.startswith("rank.rng.cuda") for name in batch["values"])
    return {"is_cuda": is_cuda, "is_loop": batch["is_loop"]}


def _tell(difference: Difference, said: Advice, more: str = "") -> int:
    click.echo("\n".join([f"DIFFERENT{more}", *describe(difference, said)]))
    return 1


def _compare(one: Traces, other: Traces) -> Difference | None:
    """The first difference of any rank, in the first run that has one."""
    if one.keys() != other.keys():
        kinds = f"{len(one)} ranks, and then {len(other)}"
        raise click.UsageError(f"the command has started {kinds}")
    for name in dict.fromkeys(name for name, _ in one):
        pairs = [(one[k], other[k], k[1]) for k in one if k[0] == name]
        found = [d for pair in pairs if (d := first_difference(*pair)) is not None]
        if found:
            first = min(found, key=lambda d: (d.batch is None, d.batch))
            return dataclasses.replace(first, run=name)
    return None
