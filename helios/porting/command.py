"""``helios port``: what an Accelerate script uses, and where it goes in Helios."""

from __future__ import annotations

import dataclasses
import json
import tokenize
from pathlib import Path

import click

from helios.porting.reading import read_script
from helios.porting.writing import write_port


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
        click.echo("What it uses, and what Helios has in its place")
        for use in uses:
            click.echo(f"{script}:{use.line}: {use.name}: {use.message}")
        click.echo("\nTraps" if traps else "\nTraps: none known")
        for trap in traps:
            doubt = "" if trap.is_certain else "may be: "
            click.echo(f"{script}:{trap.line}: {trap.name}: {doubt}{trap.message}")
            click.echo(f"  in Helios: {trap.remedy}")
        n_sure = sum(trap.is_certain for trap in traps)
        n_names = len({use.name for use in uses})
        count = f"{n_sure}, and {len(traps) - n_sure} may be"
        click.echo(f"\n{n_names} names used; traps: {count}")
    if traps:
        raise click.exceptions.Exit(1)


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
        click.echo(f"left to do: {line}", err=True)
