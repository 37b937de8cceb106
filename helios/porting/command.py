"""``helios port``: what an Accelerate script uses, and where it goes in Helios."""

from __future__ import annotations

import dataclasses
import json
import textwrap
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from helios.porting.findings import Finding
from helios.porting.reading import read_script
from helios.porting.writing import write_port

_WIDTH = 80  # of a terminal


@click.command()
@click.argument("script", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="For other programs.")
@click.option("--write", is_flag=True, help="Write a port to a Session beside it.")
def port(script: Path, as_json: bool, write: bool) -> None:
    """Say what the Accelerate script SCRIPT uses, and which known traps it has.

    The script is read, not run. With --write, a first version of its port, on a
    Session, is written next to it, as SCRIPT_helios.py.

    Exit status: 0, or 1 where there are traps, or 2 where the script cannot be read,
    is no Python or does not import Accelerate.
    """
    try:
        with tokenize.open(script) as file:  # in the encoding that it declares
            text = file.read()
        found = read_script(text)
        if write:
            _write(script, text)
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        raise click.UsageError(f"{script} cannot be ported: {error}") from error
    uses, traps = ([f for f in found if f.kind == kind] for kind in ("use", "trap"))
    if as_json:
        rows = [dataclasses.asdict(finding) for finding in found]
        click.echo(json.dumps({"script": str(script), "findings": rows}))
    else:
        click.echo("\n".join(_report(script, uses, traps)))
    if traps:
        raise click.exceptions.Exit(1)


def _report(
    script: Path, uses: Sequence[Finding], traps: Sequence[Finding]
) -> Iterator[str]:
    """The lines of the report; what is used again refers to where it was first."""
    yield "What it uses, and what takes its place on a Session, and with the Trainer\n"
    first = dict[str, int]()
    for use in uses:
        line = first.setdefault(use.name, use.line)
        again = f": as in line {line}" if line != use.line else ""
        yield f"{script}:{use.line}: {use.name}{again}"
        yield from () if again else _both(use)
    yield "\nTraps\n" if traps else "\nTraps: none known"
    for trap in traps:
        doubt = "" if trap.is_certain else "may be: "
        yield f"{script}:{trap.line}: {trap.name}"
        yield _folded("  ", f"{doubt}{trap.why}")
        yield from _both(trap)
    n_sure = sum(trap.is_certain for trap in traps)
    count = f"{n_sure}, and {len(traps) - n_sure} may be"
    yield f"\n{len(first)} names used; traps: {count}"


def _both(finding: Finding) -> Iterator[str]:
    yield _folded("  Session: ", finding.session)
    yield _folded("  Trainer: ", finding.trainer)


def _folded(head: str, text: str) -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _write(script: Path, text: str) -> None:
    port = write_port(text, f"runs/{script.stem}")
    target = script.with_name(f"{script.stem}_helios.py")
    try:
        with open(target, "x", encoding="utf-8") as out:
            out.write(port.text)
    except FileExistsError as error:
        raise click.UsageError(f"{target} is there already") from error
    click.echo(
        f"{target} is written: {port.n_changed} lines are new or others", err=True
    )
    for line in port.left:
        click.echo(_folded("left to do: ", line), err=True)
