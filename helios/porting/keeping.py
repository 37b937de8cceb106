"""Keeps the variables of a training loop in the notes of its Session."""

import ast
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from helios.porting.carried import Change, carried_by, dotted, names_in, own_nodes
from helios.porting.nodes import name_of
from helios.porting.objects import left_behind

_CONTAINERS = {"Counter", "OrderedDict", "defaultdict", "deque", "dict", "list", "set"}
_MAKERS = {
    *_CONTAINERS,
    "bool",
    "float",
    "full",
    "int",
    "ones",
    "str",
    "tensor",
    "zeros",
}
# What no checkpoint holds.
_LIVE = {"cycle", "deepcopy", "iter", "map", "open", "zip"}
_IS_INSIDE = "session.state.dataset_iter"


class Insertion(NamedTuple):
    """New lines of a script."""

    after: int  # a line of it
    text: str


class Keeper:
    """Finds what the two loops of a training carry on, and what keeps it at a resume.

    Variables of the loop over epochs are read from the notes before it, and written to
    them where they change. Those that each epoch sets anew, before its batches, are
    read where a resume enters the epoch. What changes before an epoch's batches, whose
    statements a resume runs again, and what nobody knows how to store, is told instead.
    """

    def __init__(
        self,
        lines: list[str],
        above: Mapping[ast.AST, ast.AST],
        scope: ast.AST,
        loops: tuple[ast.For, ast.For],
    ) -> None:
        self._lines, self._above, self._scope = lines, above, scope
        self._epoch, self._loop = loops
        arguments = list(ast.walk(getattr(scope, "args", ast.Pass())))
        self._given = {n.arg for n in arguments if isinstance(n, ast.arg)}
        self.insertions: list[Insertion] = []
        self.left: list[str] = []  # what is not kept
        self._handled = set[str]()  # names that are kept, or told of

    def keep(self) -> None:
        """Find it all."""
        nodes = list(own_nodes(self._scope))
        for node in nodes:
            if isinstance(node, ast.Global | ast.Nonlocal):
                self._given.update(node.names)
        within = list(ast.walk(self._epoch))
        over_epochs = carried_by(self._epoch, _read_behind(self._epoch, nodes))
        over_batches = carried_by(self._loop, _read_behind(self._loop, within))
        before = [n for n in nodes if getattr(n, "lineno", 0) < self._epoch.lineno]
        kept = list(self._kept(over_epochs, before))
        self._insert(
            self._epoch, [f'{n} = session.notes.get("{n}", {n})' for n in kept]
        )
        inside = [n for n in within if getattr(n, "lineno", 0) < self._loop.lineno]
        rest = {n: c for n, c in over_batches.items() if n not in over_epochs}
        anew = list(self._kept(rest, inside))
        if anew:
            lines = [f"if {_IS_INSIDE}:  # a resume has entered the epoch"]
            lines += [f'    {n} = session.notes.get("{n}", {n})' for n in anew]
            lines += [f'session.notes["{name}"] = {name}' for name in anew]
            self._insert(self._loop, lines)
        *_, tree = self._ancestors(self._loop)
        assert isinstance(tree, ast.Module)
        loops = self._epoch, self._loop
        self.left += left_behind(tree, self._scope, loops, self._handled)

    def _kept(
        self, carried: Mapping[str, list[Change]], before: list[ast.AST]
    ) -> Iterator[str]:
        """Write what can be kept to the notes where it changes, and give its name."""
        for name, changes in carried.items():
            first = self._first_values(name, before)
            is_given = name in self._given or "." in name
            is_given |= any(change.adds for change in changes)
            if all(change.value is None for change in changes):
                is_list = "." in name and _appends(changes)
                if not is_list and not any(map(_is_container, first.values())):
                    continue  # an object's own business
            elif not (first or is_given):
                continue  # the first turn sets it before it reads it
            self._handled.add(name)
            if self._is_simple(name, changes, first):
                for node in dict.fromkeys(change.node for change in changes):
                    text = f'{" " * node.col_offset}session.notes["{name}"] = {name}\n'
                    self.insertions.append(Insertion(node.end_lineno or 0, text))
                self._warn_of_ranks(name, changes)
                yield name
            else:
                self.left.append(
                    f"line {changes[0].node.lineno}: `{name}` begins anew at a resume: "
                    "see `session.state`, and `session.notes`"
                )

    def _warn_of_ranks(self, name: str, changes: list[Change]) -> None:
        """Tell of what each rank adds from its own batches: notes are one rank's."""
        for node in (change.node for change in changes):
            others = {n for n in names_in(node) if n.partition(".")[0] != name}
            is_shared = any("gather" in other or "reduce" in other for other in others)
            if self._loop in self._ancestors(node) and others and not is_shared:
                self.left.append(
                    f"line {node.lineno}: on several ranks `{name}` goes on as it is "
                    "on the main one, as all notes do: gather what is added to it"
                )
                return

    def _first_values(
        self, name: str, before: list[ast.AST]
    ) -> dict[ast.stmt, ast.expr]:
        """What it is set to before the loop, by statement."""
        found = dict[ast.stmt, ast.expr]()
        for node in before:
            if isinstance(node, ast.AnnAssign) and node.value is not None:
                if dotted(node.target) == name:
                    found[node] = node.value
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    pairs = [(target, node.value)]
                    if isinstance(target, ast.Tuple):
                        values = getattr(node.value, "elts", None)
                        values = values or [node.value] * len(target.elts)
                        pairs = list(zip(target.elts, values, strict=False))
                    for value in (v for part, v in pairs if dotted(part) == name):
                        found[node] = value
        return found

    def _is_simple(
        self, name: str, changes: list[Change], first: Mapping[ast.stmt, ast.expr]
    ) -> bool:
        above = set(self._ancestors(self._loop))
        sure = [v for node, v in first.items() if self._above[node] in above]
        values = [change.value for change in changes if change.value is not None]
        return (
            "." not in name
            and name not in self._given
            and bool(sure)
            and _is_plain(sure[-1])
            and not any(_is_live(node) for v in values for node in ast.walk(v))
            and all(change.node.lineno > self._loop.lineno for change in changes)
            and all(self._stands_alone(change.node) for change in changes)
        )

    def _ancestors(self, node: ast.AST) -> Iterator[ast.AST]:
        while (above := self._above.get(node)) is not None:
            yield above
            node = above

    def _stands_alone(self, node: ast.stmt) -> bool:
        """Whether a line can follow: it has no body, and its lines for itself."""
        if not isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Expr):
            return False
        before = self._lines[node.lineno - 1].encode()[: node.col_offset]
        behind = self._lines[(node.end_lineno or 0) - 1].encode()[node.end_col_offset :]
        return not before.strip() and behind.strip()[:1] in (b"", b"#")

    def _insert(self, before: ast.stmt, lines: list[str]) -> None:
        indent = " " * before.col_offset
        text = "".join(f"{indent}{line}\n" for line in lines)
        self.insertions.append(Insertion(before.lineno - 1, text))


def _read_behind(loop: ast.For, among: list[ast.AST]) -> set[str]:
    """The names that are read behind a loop."""
    nodes = [n for n in among if isinstance(n, ast.Name | ast.Attribute)]
    nodes = [n for n in nodes if n.lineno > (loop.end_lineno or 0)]
    return {dotted(n) for n in nodes if isinstance(n.ctx, ast.Load)}


def _is_container(value: ast.expr) -> bool:
    is_literal = isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp)
    return is_literal or (
        isinstance(value, ast.Call) and name_of(value.func) in _CONTAINERS
    )


def _is_plain(value: ast.expr) -> bool:
    """Whether a checkpoint can hold it, and what it becomes if its type stays."""
    match value:
        case ast.Call(function):
            return name_of(function) in _MAKERS
        case ast.UnaryOp(_, inner):
            return _is_plain(inner)
        case ast.BinOp(left, _, right):
            return _is_plain(left) and _is_plain(right)
        case ast.Attribute(_, name):
            return name == "inf"
    return isinstance(value, ast.Constant) or _is_container(value)


def _is_live(node: ast.AST) -> bool:
    """Whether it makes an object that no checkpoint holds, as far as is known."""
    name = name_of(node.func) if isinstance(node, ast.Call) else ""
    return name in _LIVE or (name[:1].isupper() and name not in _CONTAINERS)


def _appends(changes: list[Change]) -> bool:
    nodes = (change.node for change in changes)
    calls = [getattr(getattr(node, "value", None), "func", None) for node in nodes]
    return any(call and name_of(call) in ("append", "extend") for call in calls)
