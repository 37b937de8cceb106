"""Variables of a loop by hand that nobody saves: which, and what to say of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from helios.verifying.causes import VARIABLE, Advice
from helios.verifying.comparing import Run

_SHOWN = 5


class Forgotten(NamedTuple):
    """A variable that is another behind a resume, and is not carried."""

    name: str
    function: str
    is_of_loop: bool  # it can be carried
    is_counted: bool  # by a `for`, which sets it
    was: str
    then: str

    def __str__(self) -> str:
        return f"`{self.name}` of {self.function}: {self.was}, then {self.then}"


def forgotten(
    one: Run, other: Run, *, stop: int, until: int | None = None, again: Run | None
) -> list[Forgotten]:
    """The variables that differ behind a resume, the likeliest first.

    Where there are some at the last batch that counts, those, and else those that have
    differed before it.

    Args:
        one: a run without a stop.
        other: the run with stops.
        stop: the first batch at which it stopped: what differs before changes anyway.
        until: the batch at which something else differs.
        again: another run without a stop.
    """
    shared = sorted(one.batches.keys() & other.batches.keys())
    shared = [n for n in shared if until is None or n <= until]
    first, last = dict[tuple[str, str], int](), dict[tuple[str, str], Forgotten]()
    for number in shared:
        now = _differing(one.batches[number], other.batches[number])
        for place, found in now.items():
            first.setdefault(place, number)
            if until is None:
                last.setdefault(place, found)
        if until is not None:
            last = now or last
    steady = [p for p in last if first[p] > stop and not _changes(one, again, p)]
    steady.sort(
        key=lambda p: (
            last[p].is_counted,
            first[p],
            not _has_been(one, p, last[p].then, first[p]),
        )
    )
    # What a function passes to another is named once, where it comes from.
    by_value = {(f.name, f.was, f.then): f for f in (last[p] for p in steady)}
    return [*by_value.values()]


def _differing(
    one: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[tuple[str, str], Forgotten]:
    """The variables that both have set, to other values."""
    found = {}
    for function, mine in one.get("variables", {}).items():
        its = other.get("variables", {}).get(function, {})
        for name in mine.keys() & its.keys():
            if mine[name] != its[name] and not _is_carried(name, one["values"]):
                counted = one["loops"].get(function)
                is_of_loop, is_counted = counted is not None, name in (counted or ())
                known = name, function, is_of_loop, is_counted
                found[function, name] = Forgotten(*known, mine[name], its[name])
    return found


def _is_carried(name: str, values: Iterable[str]) -> bool:
    path = re.compile(rf"{VARIABLE.paths}{re.escape(name)}(\.|$)")
    return any(map(path.match, values))


def _value(run: Run, number: int, place: tuple[str, str]) -> str | None:
    function, name = place
    found = run.batches[number].get("variables", {}).get(function, {}).get(name)
    return None if found is None else str(found)


def _changes(one: Run, again: Run | None, place: tuple[str, str]) -> bool:
    """It is another in each run, as times are."""
    if again is None:
        return False
    shared = one.batches.keys() & again.batches.keys()
    return any(_value(one, n, place) != _value(again, n, place) for n in shared)


def _has_been(run: Run, place: tuple[str, str], value: str, until: int) -> bool:
    """It has had the value before, which it has again: it began anew."""
    return any(_value(run, n, place) == value for n in run.batches if n < until)


def lines_of(found: list[Forgotten]) -> list[str]:
    """What to say of them at a difference, the first few."""
    lines = [f"not saved: {one}" for one in found[:_SHOWN]]
    return [*lines, *([f"and {len(found) - _SHOWN} more"] if found[_SHOWN:] else [])]


def cured(advice: Advice, found: list[Forgotten]) -> Advice:
    """The advice, with a cure that names them first."""
    found = found[:_SHOWN]
    counted = dict.fromkeys(f"`{f.name}`" for f in found if f.is_counted)
    free = [f for f in found if not f.is_counted]
    carried = dict.fromkeys(f'"{f.name}"' for f in free if f.is_of_loop)
    kept = dict.fromkeys(f"`{f.name}`" for f in free if not f.is_of_loop)
    cures = []
    if carried:
        it = "it" if len(carried) == 1 else "them"
        names = ", ".join(carried)
        cures.append(f"name {it} in `session.epochs(..., carry=[{names}])`")
    if kept:
        cures.append(f"keep {', '.join(kept)} in `session.notes`")
    if counted:
        cures.append(f"count by `session.state` what {', '.join(counted)} counts")
    if not cures:
        return advice
    return Advice(advice.cause, f"{'; '.join(cures)}; or else {advice.cure}")


def unset(advice: Advice, errors: Iterable[str]) -> Advice:
    """The advice, with the variable that an error says is not set."""
    found = re.search(r"(variable|name) '(\w+)' ", " ".join(errors))
    if found is None:
        return advice
    return Advice(advice.cause, advice.cure.replace("[...]", f'["{found[2]}"]'))


def note_of(found: Iterable[Forgotten]) -> str | None:
    """What to say of them where nothing else differs."""
    texts = dict.fromkeys(map(str, found))
    if not texts:
        return None
    shown = "; ".join([*texts][:_SHOWN])
    more = f"; and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return f"begins anew at a resume, which made no difference here: {shown}{more}"
