"""``helios verify-resume``: the command."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import click

from helios.verifying.causes import advice
from helios.verifying.comparing import Difference, describe, first_difference
from helios.verifying.starts import Place, Starts, Traces

# As in `trace`, which must be imported by the runs alone: it needs torch.
_FOLDER, _STOP, _LAST = "HELIOS_VERIFY", "HELIOS_VERIFY_STOP", "HELIOS_VERIFY_LAST"
_SHOWN_LINES = 30


class _Runner:
    """Runs the command as often as it takes; each run has a folder of its own."""

    def __init__(
        self, command: Sequence[str], root: Path, last: int | None, timeout_s: float
    ) -> None:
        self._command, self._root = command, root
        self._last, self._timeout_s = last, timeout_s

    def run(self, name: str, stops: Sequence[Place] = ()) -> Traces:
        """The traces of the command, stopped at these batches."""
        folder = self._root / name
        folder.mkdir()
        starts = Starts(folder)
        for number, stop in enumerate([*stops, None]):
            log = folder / f"{number}.log"
            status = self._start(folder, log, stop)
            traces = starts.read()
            # One that was stopped may say so by its exit status.
            wanted = [r for k, r in traces.items() if stop is None or k[0] == stop[0]]
            until = self._last if stop is None else stop[1]
            is_over = stop is None and status == 0  # by `break`, for instance
            has_come = wanted and all(
                run.has_ended or is_over or until in run.batches for run in wanted
            )
            if not has_come:
                where = "to its end" if until is None else f"to batch {until}"
                end = f"has not trained {where} with Helios; exit status {status}"
                self._fail(log, end)
            if why := starts.wrong_with(stop):
                self._fail(folder / f"{number - 1}.log", why)
        return traces

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
        text = log.read_text(encoding="utf-8", errors="replace").splitlines()
        click.echo("\n".join(text[-_SHOWN_LINES:]), err=True)
        raise click.UsageError(f"the command {why}")


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
    stops, and from where it stopped. After each batch the samples, their values, random
    numbers, losses, weights and optimizers are compared; the first difference is named,
    with its likely cause. Checkpoints and logs go to a temporary folder.

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
    parts = runner.run("parts", [places[n - 1] for n in chosen])
    click.echo(f"stopped after batch {', '.join(map(str, chosen))}, and resumed")
    if (found := _compare(whole, parts)) is None:
        values = next(iter(whole[min(whole)].batches.values()))["values"]
        click.echo(
            f"IDENTICAL: samples, random numbers, losses and {len(values)} values of "
            f"the state, after each of {total} batches"
        )
        return 0
    again = _compare(whole, runner.run("again"))
    click.echo("DIFFERENT" if again is None else "DIFFERENT, also without a stop")
    batch = next(iter(whole[min(whole)].batches.values()))
    first = again or found
    said = advice(
        first.kind,
        is_repeatable=again is None,
        is_cuda=any(name.startswith("rank.rng.cuda") for name in batch["values"]),
        is_loop=batch["is_loop"],
    )
    click.echo("\n".join(describe(first, said)))
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
            return min(found, key=lambda d: (d.batch is None, d.batch))
    return None
