"""What a loop carries from one turn to the next: it reads, and then changes it."""

import ast
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_CHANGING = {"add", "append", "appendleft", "clear", "discard", "extend", "insert"}
_CHANGING |= {"pop", "popitem", "popleft", "remove", "setdefault", "update"}
_SCOPES = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
Known = set[str] | None  # None: nothing runs here


class Change(NamedTuple):
    """What changes a variable."""

    node: ast.stmt | ast.expr
    value: ast.expr | None  # what it is set to; None: a part of it is changed
    adds: bool = False  # to what it was before


class Turn(NamedTuple):
    """What one turn of a loop does with names, which may have dots."""

    exposed: set[str]  # read before they are set
    changes: dict[str, list[Change]]
    known: set[str]  # set in each turn that comes to its end


def turn_of(loop: ast.For) -> Turn:
    """What a turn does. A loop inside is taken to have a turn at least."""
    turn = _Turn()
    known = turn.assign(loop, [loop.target], loop.iter, set())
    return Turn(turn.exposed, turn.changes, turn.run(loop.body, known) or set())


def exposed_by(statements: Iterable[ast.stmt]) -> set[str]:
    """The names that statements, in their order, read before they set them."""
    turn = _Turn()
    turn.run(statements, set())
    return turn.exposed


def assigned_by(node: ast.stmt) -> Known:
    """The names that are set behind a statement, whatever is run of it."""
    return _Turn().run([node], set())


def names_in(node: ast.AST) -> set[str]:
    """All names in it, with dots or without."""
    return {name for inner in ast.walk(node) if (name := dotted(inner))}


def own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes below, but for those of functions and classes in it."""
    for child in ast.iter_child_nodes(scope):
        yield child
        if not isinstance(child, _SCOPES):
            yield from own_nodes(child)


def dotted(node: ast.AST) -> str:
    """A name, with dots or without; "" for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{base}.{node.attr}" if (base := dotted(node.value)) else ""
    return node.id if isinstance(node, ast.Name) else ""


def _stored(target: ast.AST) -> Iterator[str]:
    """The names that a target sets; of what has parts, none."""
    if isinstance(target, ast.Tuple | ast.List):
        for element in target.elts:
            yield from _stored(element)
    elif isinstance(target, ast.Starred):
        yield from _stored(target.value)
    elif name := dotted(target):
        yield name


def _whole(node: ast.expr) -> str:
    """The name of what this is a part of."""
    return _whole(node.value) if isinstance(node, ast.Subscript) else dotted(node)


class _Turn:
    """One turn of a loop, followed in the order in which it runs."""

    def __init__(self) -> None:
        self.exposed = set[str]()  # read before they are set
        self.changes = dict[str, list[Change]]()

    def run(self, statements: Iterable[ast.stmt], known: Known) -> Known:
        """What is set behind the statements, of which `known` is set before."""
        for statement in statements:
            if known is not None:
                known = self._statement(statement, known)
        return known

    def _statement(self, node: ast.stmt, known: set[str]) -> Known:
        match node:
            case ast.Assign(targets, value):
                self._read(value, known)
                return self.assign(node, targets, value, known)
            case ast.AnnAssign(target, _, value) if value is not None:
                self._read(value, known)
                return self.assign(node, [target], value, known)
            case ast.AugAssign(target, _, value):
                self._read(value, known)
                self._expose(_whole(target), known)
                return self.assign(node, [target], value, known, adds=True)
            case ast.For(target, over, body) | ast.AsyncFor(target, over, body):
                self._read(over, known)
                within = self.assign(node, [target], over, known)
                known = within | (self.run(body, within) or set())
                return self.run(node.orelse, known)
            case ast.While(test, body, orelse):
                known = self._read(test, known)
                self.run(body, known)
                return self.run(orelse, known)
            case ast.If(test, body, orelse):
                known = self._read(test, known)
                return _either(self.run(part, known) for part in (body, orelse))
            case ast.With(items, body) | ast.AsyncWith(items, body):
                for item in items:
                    self._read(item.context_expr, known)
                    if (entered := item.optional_vars) is not None:
                        known = self.assign(node, [entered], entered, known)
                return self.run(body, known)
            case ast.Try(body, handlers, orelse, finalbody):
                ways = [self.run(orelse, self.run(body, known))]
                ways += [self.run(handler.body, known) for handler in handlers]
                return self.run(finalbody, _either(ways))
            case ast.Match(subject, cases):
                self._read(subject, known)
                return _either([known, *(self.run(c.body, known) for c in cases)])
            case ast.Return() | ast.Raise() | ast.Break() | ast.Continue():
                self._read(node, known)
                return None
        return self._read(node, known)

    def assign(
        self,
        node: ast.stmt,
        targets: Iterable[ast.expr],
        value: ast.expr,
        known: set[str],
        *,
        adds: bool = False,
    ) -> set[str]:
        """Note what targets set; what is set behind them."""
        for target in targets:
            for name in _stored(target):
                change = Change(node, value, adds)
                self.changes.setdefault(name, []).append(change)
                known = known | {name}
            if isinstance(target, ast.Subscript):
                self._read(target, known)
                self.changes.setdefault(_whole(target), []).append(Change(node, None))
        return known

    def _read(self, node: ast.AST, known: set[str]) -> set[str]:
        """Note what is read; what `:=` sets is known behind it."""
        inner = list(ast.walk(node))
        named = {n.target.id for n in inner if isinstance(n, ast.NamedExpr)}
        names = [n for n in inner if isinstance(n, ast.Name)]
        own = {n.id for n in names if isinstance(n.ctx, ast.Store)}
        own |= {n.arg for n in inner if isinstance(n, ast.arg)}
        for one in inner:
            match one:
                case ast.Name(ctx=ast.Load()) | ast.Attribute(ctx=ast.Load()):
                    self._expose(dotted(one), known | own)
                case ast.NamedExpr(ast.Name(name), value):
                    for used in names_in(value):
                        self._expose(used, known | own - named)
                    self.changes.setdefault(name, []).append(Change(one, value))
                case ast.Call(ast.Attribute(owner, name)) if name in _CHANGING:
                    if whole := _whole(owner):
                        self.changes.setdefault(whole, []).append(Change(one, None))
        return known | named

    def _expose(self, name: str, known: set[str]) -> None:
        if name and name not in known:
            self.exposed.add(name)


def _either(ways: Iterable[Known]) -> Known:
    """What is set whichever of these ways was gone."""
    found = [way for way in ways if way is not None]
    return set.intersection(*found) if found else None
