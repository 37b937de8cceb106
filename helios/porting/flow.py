"""Follows the statements of a script: what its names are, and where it calls what.

Calls of the script's own functions are followed where they stand, so that a seed, a
loop or a condition is known in the functions below it.
"""

import ast
import re
from collections import ChainMap
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from helios.porting.findings import Finding, kinds_of, use

ACCELERATOR = "accelerate.Accelerator()"
LENGTHS = frozenset({"ranks", "length", "own length"})
_MAX_CALLS = 500  # followed ones, which can be a power of their number
_CONTEXTS = {"rank", "no grad", "accumulate"}
# Of conditions: they say nothing of what is made from them.
_CONTROL = {"rank", "perhaps rank", "sync", "periodic", "compared", "flag"}
Function = ast.FunctionDef | ast.AsyncFunctionDef
Marks = frozenset[str]


class Value(NamedTuple):
    """Where a value comes from, such as "torch.Generator()", and what went into it."""

    name: str = "?"
    marks: Marks = frozenset()
    parts: tuple["Value", ...] = ()  # of a tuple
    line: int = 0  # of the call that made it


def union(values: Iterable[Value]) -> Marks:
    """Return the marks of all of them."""
    return frozenset[str]().union(*(value.marks for value in values))


def _is_accelerator(note: ast.expr | None) -> bool:
    return note is not None and bool(re.search(r"\bAccelerator\b", ast.unparse(note)))


@dataclass
class Loop:
    """A loop of the script, while it is followed."""

    evaluates: bool = False  # over a prepared loader, without gradients
    trains: bool = False
    names: set[str] = field(default_factory=set)  # that are set in it
    has_training: bool = False  # has a loop in it that does
    reads: set[Finding] = field(default_factory=set)  # traps if it trains
    steps: set[int] = field(default_factory=set)  # of schedulers, which are if not
    counts: list[tuple[int, bool]] = field(default_factory=list)  # line, is padded


class Call(NamedTuple):
    """A call of what is not the script's own, and what it gives as far as is known."""

    node: ast.Call
    function: Value
    given: list[Value]
    named: dict[str | None, Value]
    result: Value


class Flow:
    """Reads statements in the order in which they run."""

    def __init__(self) -> None:
        self._functions: dict[str, Function] = {}  # methods as "Class.method"
        self._accelerators = {"accelerator"}  # what variables with one are called
        self._options: dict[str | None, Value] = {}  # arguments of Accelerate's classes
        self._stack: list[Function] = []
        self._loops: list[Loop] = []
        self._ctx: Marks = frozenset()  # the conditions and contexts around
        self._returned = Value()
        self._is_eval = False  # whether the networks are, in `eval`
        self._reset()

    def _reset(self) -> None:
        """Forget what was found, and keep what was learnt of names."""
        self.found: set[Finding] = set()
        self._walked: set[Function] = set()
        self._variables: ChainMap[str, Value] = ChainMap()
        self._n_calls = 0

    def _called(self, call: Call) -> Value:
        """Return the value of a call, and judge it."""
        return call.result

    def _left(self, loop: Loop) -> None:
        """Judge a loop that is done."""

    def _added(self, to: ast.expr, line: int, marks: Marks) -> None:
        """Judge that something with these marks is added up."""

    # Statements.

    def _body(self, statements: Iterable[ast.stmt]) -> None:
        before = self._ctx
        for statement in statements:
            self._statement(statement)
        self._ctx = before

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Import(names):
                for alias in names:
                    name = alias.asname or alias.name.partition(".")[0]
                    self._variables[name] = Value(alias.name if alias.asname else name)
            case ast.ImportFrom(module, names, level):
                for alias in names:
                    name = f"{'.' * level}{module or ''}.{alias.name}"
                    self._variables[alias.asname or alias.name] = Value(name)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                other = self._functions.get(node.name, node)
                self._functions[f"{node.name} {other.lineno}"] = other
                self._functions[node.name] = node
            case ast.ClassDef(name, _, _, body):
                for member in body:
                    if isinstance(member, Function):
                        self._functions[f"{name}.{member.name}"] = member
                    else:
                        self._statement(member)
            case ast.Return(value):
                self._returned = self._value(value)
            case ast.Assign(targets, value):
                made = self._value(value)
                for target in targets:
                    self._bind(target, made)
                    if isinstance(value, ast.Dict):
                        for key, item in zip(value.keys, value.values, strict=True):
                            name = f"{self._key(target)}[{key and ast.unparse(key)}]"
                            self._set(name, self._value(item))
            case ast.AnnAssign(target, note, value):
                is_one = value is None and _is_accelerator(note)
                self._bind(target, Value(ACCELERATOR) if is_one else self._value(value))
            case ast.AugAssign(target, op, value):
                made, before = self._value(value), self._value(target)
                if isinstance(op, ast.Add):
                    self._added(target, node.lineno, made.marks)
                self._set(self._key(target), Value("?", made.marks | before.marks))
            case ast.If():
                self._if(node)
            case ast.For(_, over) | ast.AsyncFor(_, over) | ast.While(over):
                self._loop(node, "prepared" in self._value(over).marks)
                self._body(node.orelse)
            case ast.With(items, body) | ast.AsyncWith(items, body):
                before_it = self._ctx
                for with_item in items:
                    entered = self._value(with_item.context_expr)
                    self._ctx |= entered.marks & _CONTEXTS
                    if with_item.optional_vars:
                        self._bind(with_item.optional_vars, entered)
                self._body(body)
                self._ctx = before_it
            case _:
                for child in ast.iter_child_nodes(node):
                    if isinstance(child, ast.stmt):
                        self._statement(child)
                    elif isinstance(child, ast.ExceptHandler | ast.match_case):
                        self._body(child.body)
                    else:
                        self._value(child)

    def _if(self, node: ast.If) -> None:
        before, marks = self._ctx, self._value(node.test).marks
        both = marks & {"rank", "perhaps rank", "periodic"}
        kinds = marks & _CONTROL or {"flag"}
        inside = both | kinds & {"compared", "flag"}
        is_not = isinstance(node.test, ast.UnaryOp)
        synced = marks & {"sync"}, frozenset[str]()
        self._ctx = before | inside | synced[is_not]
        self._body(node.body)
        self._ctx = before | inside | synced[not is_not]
        self._body(node.orelse)
        self._ctx = before
        if isinstance(node.body[-1], ast.Return | ast.Continue | ast.Break):
            self._ctx = before | both | synced[not is_not]

    def _loop(self, node: ast.For | ast.AsyncFor | ast.While, is_data: bool) -> None:
        before = self._ctx
        is_eval = self._is_eval or "no grad" in before
        self._ctx -= {"flag", "compared", "periodic"}  # which are of the whole loop
        loop = Loop(evaluates=is_data and is_eval)
        self._loops.append(loop)
        if not isinstance(node, ast.While):
            self._bind(node.target, Value("?", frozenset({"batch"})))
        self._body(node.body)
        self._loops.pop()
        self._ctx = before
        self._left(loop)

    def _bind(self, target: ast.expr, value: Value) -> None:
        match target:
            case ast.Tuple(elements) | ast.List(elements):
                is_whole = len(value.parts) == len(elements)
                spread = [Value("?", value.marks)] * len(elements)
                parts = value.parts if is_whole else spread
                for element, part in zip(elements, parts, strict=True):
                    self._bind(element, part)
            case ast.Starred(inner):
                self._bind(inner, value)
            case _:
                if "sample" not in self._ctx and "generator" in value.marks:
                    value = value._replace(marks=value.marks | {"shared"})
                key = self._key(target)
                self._set(key, value)
                if value.name == ACCELERATOR:
                    self._accelerators.add(key.rpartition(".")[2])
                if self._loops:
                    self._loops[-1].names.add(key)

    def _set(self, key: str, value: Value) -> None:
        """Set a variable; attributes of objects are known in all functions."""
        self._variables.maps[-1 if "()." in key else 0][key] = value

    def _key(self, node: ast.expr, base: Value | None = None) -> str:
        if isinstance(node, ast.Attribute):
            base = base or self._value(node.value)
            if base.name.endswith("()"):
                return f"{base.name}.{node.attr}"
        return ast.unparse(node)

    def _follow(
        self, name: str, given: list[Value], named: dict[str | None, Value]
    ) -> Value:
        """Read a function of the script as if it stood where it is called."""
        function, owner = self._functions[name], name.rpartition(".")[0]
        self._n_calls += 1
        if function in self._stack or self._n_calls > _MAX_CALLS:
            return Value()
        self._walked.add(function)
        before = self._ctx, self._returned, self._variables
        for decorator in function.decorator_list:
            self._ctx |= self._value(decorator).marks & _CONTEXTS
        all_of = function.args
        parameters = [*all_of.posonlyargs, *all_of.args, *all_of.kwonlyargs]
        got = [Value(f"{owner}()"), *given] if owner else given
        scope = {p.arg: named.get(p.arg, Value()) for p in parameters}
        scope |= {p.arg: v for p, v in zip(parameters, got, strict=False)}
        for p in parameters:
            is_one = p.arg in self._accelerators or _is_accelerator(p.annotation)
            if is_one and scope[p.arg].name == "?":
                scope[p.arg] = Value(ACCELERATOR)
        self._returned, self._variables = Value(), self._variables.new_child(scope)
        self._stack.append(function)
        self._body(function.body)
        self._stack.pop()
        result = self._returned
        self._ctx, self._returned, self._variables = before
        return result

    # Expressions.

    def _value(self, node: ast.AST | None) -> Value:
        match node:
            case None:
                return Value()
            case ast.Constant(value):
                return Value(repr(value))
            case ast.Name(name):
                return self._known(name, name)
            case ast.Attribute(inner, attr):
                base = self._value(inner)
                name = f"{base.name}.{attr}"
                if base.name == ACCELERATOR:
                    self.found.add(use(attr, node.lineno))
                return self._known(self._key(node, base), name, base.marks)
            case ast.Call():
                return self._call(node)
            case ast.NamedExpr(target, inner):
                made = self._value(inner)
                self._bind(target, made)
                return made
            case ast.Starred(inner):
                return self._value(inner)
        parts = [self._value(child) for child in ast.iter_child_nodes(node)]
        marks = union(parts)
        match node:
            case ast.Subscript():
                return self._variables.get(ast.unparse(node), Value("?", marks))
            case ast.Tuple() | ast.List():
                return Value("?", marks, tuple(parts[:-1]))  # the last is ast.Load
            case ast.BinOp(left, ast.Mod()) if not isinstance(left, ast.Constant):
                marks |= {"periodic"}
            case ast.Compare(_, [op, *_]) if not isinstance(op, ast.Is | ast.IsNot):
                marks |= {"compared"}
            case ast.BoolOp(op):
                is_all_known = all(part.marks & _CONTROL for part in parts[1:])
                marks |= set() if is_all_known else {"flag"}
                if isinstance(op, ast.Or) and "rank" in marks:
                    marks = marks - {"rank"} | {"perhaps rank"}
        names = {part.name for part in parts}
        if isinstance(node, ast.BoolOp | ast.IfExp) and ACCELERATOR in names:
            return Value(ACCELERATOR, marks)
        return Value("?", marks)

    def _known(self, key: str, name: str, marks: Marks = frozenset()) -> Value:
        last = name.rpartition(".")[2]
        if key in self._variables:
            value = self._variables[key]
        elif last in self._accelerators:
            return Value(ACCELERATOR)
        else:
            value = Value(name, marks)
        marks = value.marks | kinds_of(name) | kinds_of(value.name)
        if "number" in kinds_of(name):  # of samples, not a result
            marks -= {"batch"}
        return value._replace(marks=marks)

    def _call(self, node: ast.Call) -> Value:
        called = self._value(node.func)
        given = [self._value(argument) for argument in node.args]
        named = {k.arg: self._value(k.value) for k in node.keywords}
        name = called.name
        if name.startswith("accelerate.") and "()" not in name:
            self.found.add(use(name.rpartition(".")[2], node.lineno))
            self._options |= named
            if "accelerator" in called.marks:
                with_names = [k for k in node.keywords if k.arg]
                self.found |= {use(f"{k.arg}=", k.value.lineno) for k in with_names}
                return Value(ACCELERATOR)
        own = re.sub(r"^(\w+)\(\)\.", r"\1.", name)
        if own in self._functions and self._functions[own] not in self._stack:
            made = self._follow(own, given, named)
            lengths = union([*given, *named.values()]) & LENGTHS
            return made._replace(marks=made.marks | lengths)
        if f"{name}.__init__" in self._functions:
            self._follow(f"{name}.__init__", given, named)
        marks = union([called, *given, *named.values()]) - _CONTROL
        result = Value(f"{name}()", marks | kinds_of(f"{name}()"), (), node.lineno)
        return self._called(Call(node, called, given, named, result))
