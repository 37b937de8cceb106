"""What is found in a script, and the table of what Helios has instead."""

import functools
import re
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

_TABLE: dict[str, Any] = tomllib.loads(
    files("helios.porting").joinpath("table.toml").read_text(encoding="utf-8")
)
#: By a name of Accelerate, what takes its place: "session" and "trainer".
USES: dict[str, dict[str, str]] = {
    name: {"session": row["session"], "trainer": row["trainer"]}
    for row in _TABLE["uses"]
    for name in row["names"].split()
}
#: By a trap's name, "why" it is one, and the remedies: "session" and "trainer".
TRAPS: dict[str, dict[str, str]] = _TABLE["traps"]
_UNKNOWN = {
    "session": "stays, if it changes nothing that has to be saved",
    "trainer": "no counterpart is known; self.accelerator is Accelerate's own",
}
_KINDS = {kind: re.compile(pattern) for kind, pattern in _TABLE["kinds"].items()}


@dataclass(frozen=True, order=True)
class Finding:
    """One use of Accelerate, or one trap."""

    line: int  #: counted from 1
    kind: Literal["use", "trap"]
    name: str
    session: str  #: the counterpart, or the remedy, in a loop on a Session
    trainer: str  #: that with Trainer, Model and DataModule
    why: str = ""  #: it is a trap
    is_certain: bool = True  #: False: whether it is one, the script does not tell


def use(name: str, line: int) -> Finding:
    """Make the finding of a use."""
    row = USES.get(name, _UNKNOWN)
    return Finding(line, "use", name, row["session"], row["trainer"])


def trap(name: str, line: int, is_certain: bool = True) -> Finding:
    """Make the finding of a trap."""
    row = TRAPS[name]
    both = row["session"], row["trainer"]
    return Finding(line, "trap", name, *both, row["why"], is_certain)


@functools.cache
def kinds_of(name: str) -> frozenset[str]:
    """What a value is that comes from there: the table's kinds."""
    return frozenset(kind for kind, p in _KINDS.items() if p.fullmatch(name))
