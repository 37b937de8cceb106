"""What the commands print: tables, JSON, errors."""

from __future__ import annotations

import json
import math
from typing import Any

import click


class errors:  # noqa: N801  # used as a function is
    """Turns what is wrong with a checkpoint, or a path, into exit status 2."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        from helios.errors import CheckpointError

        if isinstance(error, CheckpointError | OSError | ValueError):
            raise click.UsageError(str(error)) from error


def print_json(value: Any) -> None:
    """Print it as JSON, which has no NaN and no infinity: null is in their place."""
    click.echo(json.dumps(_finite(value)))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_finite(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def size(count: float) -> str:
    """Write a number of bytes short."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def table(rows: Any) -> None:
    """Print rows, each a dict with the same columns; nothing without any."""
    lines = [{k: str(v) for k, v in row.items()} for row in rows]
    for column in list(lines[0]) if lines else []:
        wide = max(len(column), *(len(line[column]) for line in lines))
        for line in lines:
            line[column] = line[column].ljust(wide)
    if lines:
        heads = (name.ljust(len(text)) for name, text in lines[0].items())
        click.echo("  ".join(heads).rstrip())
    for line in lines:
        click.echo("  ".join(line.values()).rstrip())
