"""Comparing traces: the first difference of two runs, its likely cause, and a cure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

_SHOWN = 5
_RNGS = "rank.rng."


@dataclasses.dataclass
class Run:
    """What the trace of one rank says: its batches by number, what was logged."""

    batches: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    logged: dict[int, dict[str, str]] = dataclasses.field(default_factory=dict)
    has_ended: bool = False

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a trace; of a batch, or a log point, that is there twice the last."""
        run = cls()
        for line in path.read_text(encoding="utf-8").splitlines():
            found = json.loads(line)
            if "batch" in found:
                run.batches[found["batch"]] = found
            elif "logged" in found:
                run.logged.setdefault(found["step"], {}).update(found["logged"])
            else:
                run.has_ended = True
        return run


class Kind(NamedTuple):
    """A kind of difference: what it is called, why it comes to be, what to do."""

    name: str
    prefixes: tuple[str, ...]
    cause: str
    cure: str


# In the order in which one comes from the other within a batch.
_ORDER = Kind(
    "the samples of the batch",
    (),
    "a sampler, or the data set, has an order of its own, from a generator or a "
    "counter that is not saved",
    "let the loader shuffle; or compute the order from the epoch, as a "
    "`ResumableSampler` does; or give a stream `state_dict` and `load_state_dict`",
)
_DATA = Kind(
    "the values of the same samples",
    (),
    "the data set, a transform or the collate function draws from a generator of its "
    "own, or depends on what came before, on time or on the process",
    "draw from `torch`, `random` or `numpy.random`, which are seeded for each sample, "
    "or from `helios.data.sample_rng()`",
)
_RNG = Kind(
    "random numbers",
    ("rank.rng",),
    "the step, or a hook, has drawn more or fewer random numbers than before: it "
    "depends on something that is not saved",
    "save what it depends on: return it from `user_state_dict`, or put it in the notes "
    "of a session",
)
_UNSAVED = (
    "the step depends on something that is not saved, such as an attribute, a global "
    "or a count (that of `enumerate`, for instance) that training changes"
)
_SAVE = (
    "return it from `user_state_dict` (or put it in a session's notes), or give it "
    "`state_dict` and `load_state_dict` and make it an attribute of the model"
)
_LOSS = Kind("a loss or a score", ("rank.books",), _UNSAVED, _SAVE)
_WEIGHTS = Kind("weights", ("model.",), _UNSAVED, _SAVE)
_STATE = Kind("the state of the training", ("",), _UNSAVED, _SAVE)
_KINDS = (_RNG, _LOSS, _WEIGHTS, _STATE)
_LOGGED = Kind("what was logged", (), _UNSAVED, _SAVE)
_UNEQUAL = Kind("the number of batches", (), _UNSAVED, _SAVE)


@dataclasses.dataclass
class Difference:
    """The first difference of two runs of a rank."""

    kind: Kind
    rank: int
    batch: int | None
    where: str
    details: list[str] = dataclasses.field(default_factory=list)


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
            return Difference(_LOGGED, rank, None, f"step {step}", details)
    missing = sorted(one.batches.keys() ^ other.batches.keys())
    if missing or one.logged.keys() != other.logged.keys():
        counts = [f"{len(run.batches)} batches" for run in (one, other)]
        where = f"batch {missing[0]}" if missing else "the log"
        return Difference(
            _UNEQUAL, rank, missing[0] if missing else None, where, counts
        )
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
    if one["samples"] != other["samples"]:
        return _ORDER, [f"{one['samples']}", f"{other['samples']}"]
    if one["data"] != other["data"]:
        return _DATA, [f"samples {one['samples']}"] if one["samples"] else []
    values = [
        {k: v for k, v in d["values"].items() if _RNGS not in k or k.startswith(drawn)}
        for d in (one, other)
    ]
    for kind in _KINDS:
        mine = [
            {k: v for k, v in d.items() if k.startswith(kind.prefixes)} for d in values
        ]
        if details := list(_changed(*mine)):
            return kind, details
    return None


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


def explain(difference: Difference, is_repeatable: bool, is_cuda: bool) -> list[str]:
    """What to say of a difference; not repeatable: two runs without a stop differ."""
    cause, cure = difference.kind.cause, difference.kind.cure
    if not is_repeatable:
        if difference.kind in (_ORDER, _DATA):
            cause = "a generator without a seed, or what changes with time"
        elif is_cuda:
            cause = "kernels whose results depend on the order in which threads come"
            cure = "pass `enable_deterministic=True` to the Trainer"
        else:
            cause = "a generator without a seed, or what changes with time or threads"
            cure = "seed it, or make it an attribute of the model, which saves it"
    return [
        f"first difference: {difference.kind.name}, rank {difference.rank}, at "
        f"{difference.where}",
        *(f"  {line}" for line in difference.details),
        f"likely cause: {cause}",
        f"cure: {cure}",
    ]
