"""Writes a first version of a script's port to a Session: its own text, edited."""

import ast
import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

_TRAINING = 'session.batches("train")'
_READERS = {"enumerate", "tqdm", "skip_first_batches", "trange"}
_REPLACED = {"save_state", "load_state", "register_for_checkpointing"}
_SUFFIXES = ("_dataloader", "_data_loader", "_loader", "_dl", "dataloader", "loader")


class _Edit(NamedTuple):
    """Text that takes the place of what is between two offsets."""

    start: int
    end: int
    text: str


@dataclass
class Port:
    """A script's port."""

    text: str  #: of the port
    n_changed: int  #: lines that are new or others
    left: list[str] = field(default_factory=list)  #: what is left to do, by line


def write_port(text: str, folder: str) -> Port:
    """Return the text of a script with a Session in it, below `folder`.

    Raises:
        SyntaxError: it is no Python.
        ValueError: it has no training loop over a prepared loader that is known.
    """
    return _Writer(text, folder).write()


def _loader_of(node: ast.expr) -> ast.expr | None:
    """The loader that a loop reads: itself, or in `enumerate` and the like."""
    if isinstance(node, ast.Name | ast.Attribute):
        return node
    if isinstance(node, ast.Call) and node.args and _name(node.func) in _READERS:
        return _loader_of(node.args[0])
    return None


def _name(node: ast.AST) -> str:
    """The last part of a name."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _calls(node: ast.AST, name: str) -> Iterator[ast.Call]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call) and _name(inner.func) == name:
            yield inner


class _Writer:
    def __init__(self, text: str, folder: str) -> None:
        self._text, self._folder = text, folder
        self._lines = text.splitlines(keepends=True)
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line))
        self._tree = ast.parse(text)
        self._edits: list[_Edit] = []
        self._left: list[str] = []
        self._above: dict[ast.AST, ast.AST] = {
            child: node
            for node in ast.walk(self._tree)
            for child in ast.iter_child_nodes(node)
        }

    def write(self) -> Port:
        prepared = self._prepared()
        loops = [
            (node, found)
            for node in ast.walk(self._tree)
            if isinstance(node, ast.For)
            and (found := _loader_of(node.iter)) is not None
            and ast.unparse(found) in prepared
        ]
        training = [(n, f) for n, f in loops if any(_calls(n, "backward"))]
        epochs = [self._parent(n, ast.For) for n, _ in training]
        if len(training) != 1 or epochs[0] is None:
            raise ValueError(
                f"{len(training)} loops train on batches of a loader that was prepared "
                "in this file, inside a loop over epochs; a first version is written "
                "where there is one: see `helios.Session`"
            )
        (loop, loader), epoch = training[0], epochs[0]
        names = self._names(ast.unparse(loader), [ast.unparse(f) for _, f in loops])
        self._insert_session(prepared[ast.unparse(loader)], loop, names)
        self._edit_epochs(epoch)
        for node, found in loops:
            self._edit_loop(node, f'session.batches("{names[ast.unparse(found)]}")')
        for name in sorted(_REPLACED):
            for call in _calls(self._tree, name):
                self._drop(call)
        self._insert_import()
        return self._port()

    def _prepared(self) -> dict[str, ast.stmt]:
        """By each prepared name, the statement that prepares it."""
        found = dict[str, ast.stmt]()
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                if _name(node.value.func) in ("prepare", "prepare_data_loader"):
                    for target in node.targets:
                        parts = getattr(target, "elts", [target])
                        found |= {ast.unparse(part): node for part in parts}
        return found

    def _parent(self, node: ast.AST, *kinds: type[ast.AST]) -> ast.For | None:
        above = self._above.get(node)
        while above is not None and not isinstance(above, kinds):
            if isinstance(above, ast.FunctionDef | ast.AsyncFunctionDef):
                return None
            above = self._above.get(above)
        return above if isinstance(above, ast.For) else None

    def _function(self, node: ast.AST) -> ast.AST | None:
        above = self._above.get(node)
        while above is not None and not isinstance(above, ast.FunctionDef):
            above = self._above.get(above)
        return above

    def _names(self, training: str, others: list[str]) -> dict[str, str]:
        """What the session is to call each loader."""
        names = {training: "train"}
        for loader in others:
            short = loader.rpartition(".")[2]
            for suffix in _SUFFIXES:
                short = short.removesuffix(suffix)
            if loader not in names:
                taken = short in ("", *names.values())
                names[loader] = f"loader_{len(names)}" if taken else short
        return names

    def _insert_session(
        self, prepare: ast.stmt, loop: ast.For, names: dict[str, str]
    ) -> None:
        if self._function(prepare) is not self._function(loop):
            self._left.append(
                f"line {loop.lineno}: the loop is in another function than `prepare`: "
                "pass `session` to it"
            )
        assert isinstance(prepare, ast.Assign)
        assert isinstance(prepare.value, ast.Call)
        caller = prepare.value.func
        owner = ast.unparse(caller.value) if isinstance(caller, ast.Attribute) else ""
        pairs = ", ".join(f'"{name}": {loader}' for loader, name in names.items())
        indent = " " * prepare.col_offset
        # Behind the last `prepare` of them all: the session takes what is prepared.
        all_of = [self._prepared()[loader] for loader in names]
        beside = [s for s in self._prepared().values() if self._is_beside(s, prepare)]
        last = max([*all_of, *beside], key=lambda s: s.end_lineno or 0)
        at = self._starts[last.end_lineno or 0]
        self._edits.append(
            _Edit(
                at,
                at,
                f"{indent}loaders = {{{pairs}}}\n"
                f"{indent}session = helios.Session(\n"
                f'{indent}    {owner}, "{self._folder}", loaders=loaders, '
                "save_every=500\n"
                f"{indent})\n",
            )
        )

    def _is_beside(self, one: ast.stmt, other: ast.stmt) -> bool:
        return self._above.get(one) is self._above.get(other)

    def _edit_epochs(self, epoch: ast.For) -> None:
        over, total = epoch.iter, None
        if isinstance(over, ast.Call) and _name(over.func) in ("range", "trange"):
            total = next(iter(over.args[1:2] or over.args), None)
        if total is None:
            self._left.append(
                f"line {epoch.lineno}: the loop over epochs must be one over "
                "`session.epochs(number)`"
            )
            return
        self._replace(over, f"session.epochs({self._source(total)})")

    def _edit_loop(self, node: ast.For, batches: str) -> None:
        over = node.iter
        found = self._skipped(over) or _loader_of(over)
        assert found is not None
        self._replace(found, batches)
        if isinstance(over, ast.Call) and _name(over.func) == "enumerate":
            if batches == _TRAINING and len(over.args) + len(over.keywords) == 1:
                last = over.args[0]
                end = self._offset(last.end_lineno or 0, last.end_col_offset or 0)
                self._edits.append(_Edit(end, end, ", session.state.dataset_iter"))

    def _skipped(self, node: ast.expr) -> ast.expr | None:
        """A call of `skip_first_batches`, which has nothing to skip any more."""
        return next(iter(_calls(node, "skip_first_batches")), None)

    def _drop(self, call: ast.Call) -> None:
        """Leave out a call that the session makes needless, if it stands alone."""
        statement = self._above.get(call)
        name = _name(call.func)
        if isinstance(statement, ast.Expr):
            self._replace(statement, f"pass  # {name}: the session does it")
        else:
            self._left.append(f"line {call.lineno}: leave `{name}` out")

    def _insert_import(self) -> None:
        imports = [
            node
            for node in self._tree.body
            if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        line = max((node.end_lineno or 0 for node in imports), default=0)
        at = self._starts[line]
        self._edits.append(_Edit(at, at, "\nimport helios\n"))

    def _offset(self, line: int, column: int) -> int:
        # Columns are counted in bytes.
        before = self._lines[line - 1].encode()[:column].decode()
        return self._starts[line - 1] + len(before)

    def _source(self, node: ast.expr) -> str:
        return ast.get_source_segment(self._text, node) or ast.unparse(node)

    def _replace(self, node: ast.expr | ast.stmt, text: str) -> None:
        start = self._offset(node.lineno, node.col_offset)
        end = self._offset(node.end_lineno or 0, node.end_col_offset or 0)
        self._edits.append(_Edit(start, end, text))

    def _port(self) -> Port:
        text = self._text
        for start, end, new in sorted(self._edits, reverse=True):
            text = text[:start] + new + text[end:]
        ast.parse(text)
        rows = difflib.ndiff(self._text.splitlines(), text.splitlines())
        return Port(text, sum(row.startswith("+ ") for row in rows), self._left)
