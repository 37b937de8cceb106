"""Comparing traces: the first difference of two runs."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from helios.verifying.causes import (
    DATA,
    END,
    KINDS,
    LOGGED,
    ORDER,
    UNEQUAL,
    VARIABLE,
    Advice,
    Kind,
)

_SHOWN = 5
_RNGS = "rank.rng."
_PAIRED = ("'dict'", "'OrderedDict'", "'Counter'")  # saved as lists of pairs


@dataclasses.dataclass
class Run:
    """What the trace of one rank says: its batches by number, what was logged."""

    batches: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    logged: dict[int, dict[str, str]] = dataclasses.field(default_factory=dict)
    has_ended: bool = False
    n_trained: int = 0  # batches, also those that are there twice

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a trace; of a batch, or a log point, that is there twice the last."""
        run = cls()
        for line in path.read_text(encoding="utf-8").splitlines():
            found = json.loads(line)
            if "batch" in found:
                run.batches[found["batch"]] = found
                run.n_trained += 1
            elif "logged" in found:
                run.logged.setdefault(found["step"], {}).update(found["logged"])
            else:
                run.has_ended = True
        return run


@dataclasses.dataclass
class Difference:
    """The first difference of two runs of a rank."""

    kind: Kind
    rank: int | None  # None: of the command
    batch: int | None
    where: str
    details: list[str] = dataclasses.field(default_factory=list)
    run: str = ""


def first_difference(one: Run, other: Run, rank: int) -> Difference | None:
    """The first difference of two traces of a rank, if there is one."""
    drawn = (*_drawn_from(one), *_drawn_from(other))
    for number in sorted(one.batches.keys() & other.batches.keys()):
        pair = one.batches[number], other.batches[number]
        at = f"batch {number} (epoch {pair[0]['epoch']}, step {pair[0]['step']})"
        if (found := _of_batches(*pair, drawn)) is not None:
            kind, details = found
            details += _attributes(*pair)
            return Difference(kind, rank, number, at, details)
    for step in sorted(one.logged.keys() & other.logged.keys()):
        details = list(_changed(one.logged[step], other.logged[step]))
        if details:
            return Difference(LOGGED, rank, None, f"step {step}", details)
    missing = sorted(one.batches.keys() ^ other.batches.keys())
    if missing or one.logged.keys() != other.logged.keys():
        counts = [f"{len(run.batches)} batches" for run in (one, other)]
        where = f"batch {missing[0]}" if missing else "the log"
        return Difference(UNEQUAL, rank, missing[0] if missing else None, where, counts)
    return None


def _drawn_from(run: Run) -> set[str]:
    """The generators whose state changes in a run: that of others is of no matter."""
    drawn, first = set[str](), dict[str, str]()
    for batch in run.batches.values():
        for name, state in batch["values"].items():
            if name.startswith(_RNGS) and first.setdefault(name, state) != state:
                drawn.add(".".join(name.split(".")[:3]))
    return drawn


def _of_batches(
    one: Mapping[str, Any], other: Mapping[str, Any], drawn: tuple[str, ...]
) -> tuple[Kind, list[str]] | None:
    if one["epoch"] != other["epoch"]:
        return END, [f"epoch {one['epoch']}, then {other['epoch']}"]
    if one["samples"] != other["samples"]:
        return ORDER, [f"{one['samples']}", f"{other['samples']}"]
    if one["data"] != other["data"]:
        return DATA, [f"samples {one['samples']}"] if one["samples"] else []
    values = [
        {k: v for k, v in d["values"].items() if _RNGS not in k or k.startswith(drawn)}
        for d in (one, other)
    ]
    for kind in KINDS:
        mine = [{k: v for k, v in d.items() if re.match(kind.paths, k)} for d in values]
        if kind is VARIABLE:
            mine = [{variable(path, d): d[path] for path in d} for d in mine]
        if details := list(_changed(*mine)):
            return kind, details
    return None


def variable(path: str, values: Mapping[str, str]) -> str:
    """The path of a carried variable as its user writes it: ``history['ema'][0]``."""
    found = re.match(VARIABLE.paths, path)
    assert found is not None
    start, _, rest = path[found.end() :].partition(".")
    path, name, parts = path[: found.end()] + start, start, rest.split(".")
    while parts and parts[0]:
        part, key = parts.pop(0), None
        if values.get(path) in _PAIRED and part.isdecimal():
            path, key = f"{path}.{part}", values.get(f"{path}.{part}.0")
            part = parts.pop(0) if parts else part
        path = f"{path}.{part}"
        name += f"[{key or (part if part.isdecimal() else repr(part))}]"
    return name


def _attributes(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Attributes of the model that are not saved, and were others at that batch."""
    found = _changed(one["attributes"], other["attributes"])
    return [f"not saved: `self.{line}" for line in (f.lstrip("`") for f in found)]


def _changed(one: Mapping[str, str], other: Mapping[str, str]) -> Iterator[str]:
    """What differs, in words, the first few of it."""
    names = [n for n in {**one, **other} if one.get(n) != other.get(n)]
    for name in names[:_SHOWN]:
        yield f"`{name}`: {one.get(name, 'nothing')}, then {other.get(name, 'nothing')}"
    if len(names) > _SHOWN:
        yield f"and {len(names) - _SHOWN} more"


def describe(difference: Difference, advice: Advice) -> list[str]:
    """What to say of a difference, line by line."""
    rank, where = difference.rank, difference.where
    at = f": {where}" if rank is None else f", rank {rank}, at {where}"
    return [
        f"first difference: {difference.kind.name}{at}",
        *(f"  {line}" for line in difference.details),
        f"likely cause: {advice.cause}",
        f"cure: {advice.cure}",
    ]
