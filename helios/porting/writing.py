"""Writes a first version of a script's port to a Session: its own text, edited."""

import ast
import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from helios.porting.keeping import Keeper
from helios.porting.nodes import SKIP, calls_of, loader_of, name_of
from helios.porting.placing import Places, keyword_for

_WIDTHS = 88, 120  # of a line; where the script has longer ones, as these
_REPLACED = {"save_state", "load_state"}


class _Edit(NamedTuple):
    """Text that takes the place of what is between two offsets."""

    start: int
    end: int
    text: str


class _Loop(NamedTuple):
    """A loop over a prepared loader."""

    node: ast.For
    loader: str
    read: ast.expr  # what is to become the session's batches


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


class _Writer:
    def __init__(self, text: str, folder: str) -> None:
        self._text, self._folder = text, folder
        self._lines = text.splitlines(keepends=True)
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line))
        self._width = min(max(_WIDTHS[0], *map(len, text.splitlines())), _WIDTHS[1])
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
        loops = list(self._loops(prepared))
        training = [loop for loop in loops if any(calls_of(loop.node, "backward"))]
        epochs = [self._parent(loop.node) for loop in training]
        if len(training) != 1 or epochs[0] is None:
            trains = "loop trains" if len(training) == 1 else "loops train"
            raise ValueError(
                f"{len(training)} {trains} on batches of a loader that was prepared in "
                "this file; a first version is written where there is one, inside a "
                "loop over epochs, in the same function: see `helios.Session`"
            )
        loop, epoch = training[0], epochs[0]
        passed = self._insert_session(prepared[loop.loader], loop)
        scope = self._function(loop.node) or self._tree
        keeper = Keeper(self._above, scope, (epoch, loop.node), passed)
        self._edit_epochs(epoch, keeper.keep())
        self._left += keeper.left
        for other in loops:
            if other is not loop:
                self._tell_of_reach(prepared[loop.loader], other.node)
            self._replace(other.read, f"session.batches({other.loader})")
        self._edit_counts(loop.node)
        for name in sorted(_REPLACED):
            for call in calls_of(self._tree, name):
                self._drop(call)
        self._insert_import()
        return self._port()

    def _loops(self, prepared: dict[str, ast.stmt]) -> Iterator[_Loop]:
        """The loops over prepared loaders, also under another name in a function."""
        others = dict[tuple[ast.AST | None, str], str]()
        bars = dict[tuple[ast.AST | None, str], ast.expr]()
        nodes = [n for n in ast.walk(self._tree) if isinstance(n, ast.Assign | ast.For)]
        for node in sorted(nodes, key=lambda node: node.lineno):
            value = node.iter if isinstance(node, ast.For) else node.value
            if (found := loader_of(value)) is None:
                continue
            scope, name = self._function(node), ast.unparse(found)
            loader = others.get((scope, name), name)
            if loader not in prepared:
                continue
            if isinstance(node, ast.For):
                # There is nothing to skip any more.
                read = bars.get((scope, name)) or next(calls_of(value, SKIP), found)
                yield _Loop(node, loader, read)
                continue
            key = scope, ast.unparse(node.targets[0])
            others[key] = loader
            if isinstance(value, ast.Call) and name_of(value.func) != SKIP:
                bars[key] = found

    def _prepared(self) -> dict[str, ast.stmt]:
        """By each prepared name, the statement that prepares it."""
        found = dict[str, ast.stmt]()
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                if name_of(node.value.func) in ("prepare", "prepare_data_loader"):
                    for target in node.targets:
                        parts = getattr(target, "elts", [target])
                        found |= {ast.unparse(part): node for part in parts}
        return found

    def _parent(self, node: ast.AST) -> ast.For | None:
        above = self._above.get(node)
        while above is not None and not isinstance(above, ast.For):
            if isinstance(above, ast.FunctionDef | ast.AsyncFunctionDef):
                return None
            above = self._above.get(above)
        return above if isinstance(above, ast.For) else None

    def _function(self, node: ast.AST) -> ast.AST | None:
        above = self._above.get(node)
        while above is not None and not isinstance(above, ast.FunctionDef):
            above = self._above.get(above)
        return above

    def _insert_session(self, prepare: ast.stmt, loop: _Loop) -> set[str]:
        """Make it, and return the names of what it is passed."""
        if self._function(prepare) is not self._function(loop.node):
            self._left.append(
                f"line {loop.node.lineno}: the loop is in another function than "
                "`prepare`: pass `session` to it"
            )
        if self._parent(prepare) is not None:
            self._left.append(
                f"line {prepare.lineno}: sessions are made in a loop: give each a "
                "folder of its own"
            )
        assert isinstance(prepare, ast.Assign)
        assert isinstance(prepare.value, ast.Call)
        caller = prepare.value.func
        owner = ast.unparse(caller.value) if isinstance(caller, ast.Attribute) else ""
        # Behind them all: the session takes what is prepared, and registered.
        places = Places(self._tree, self._above, loop.node)
        calls = calls_of(self._tree, "register_for_checkpointing")
        others = [*self._prepared().values(), *(self._above[c] for c in calls)]
        before = [node for node in others if isinstance(node, ast.stmt)]
        words = [owner, f'"{self._folder}"', loop.loader, "save_every=500"]
        passed = set[str]()
        for name, made in places.unsaved().items():
            word = f"{keyword_for(name, words)}={name}"
            is_near = places.scope(made[0]) is places.scope(prepare)
            if is_near and places.is_always_made(name, made):
                words.append(word)
                passed.add(name)
                before += made
            else:
                self._left.append(
                    f"line {made[0].lineno}: `{name}` would not be saved: make it "
                    f"before the session, and pass it, as `{word}`"
                )
        own = places.outermost(prepare)
        at = self._starts[places.last(own, before).end_lineno or 0]
        indent = " " * own.col_offset
        line = self._folded(f"{indent}session = helios.Session", words)
        self._edits.append(_Edit(at, at, f"{line}\n"))
        return passed

    def _tell_of_reach(self, prepare: ast.stmt, loop: ast.For) -> None:
        """Tell of a loop in a function that does not see the session."""
        scope, own = self._function(prepare), self._function(loop)
        while own is not None and own is not scope:
            own = self._function(own)
        if own is not scope:
            name = getattr(self._function(loop), "name", "the script")
            self._left.append(f"line {loop.lineno}: pass `session` to `{name}`")

    def _edit_epochs(self, epoch: ast.For, carried: list[str]) -> None:
        """Have the loop be one over the session's epochs, which carry variables on."""
        over, total = epoch.iter, None
        names = ", ".join(f'"{name}"' for name in carried)
        added = [f"carry=[{names}]"] if carried else []
        if isinstance(over, ast.Call) and name_of(over.func) in ("range", "trange"):
            total = next(iter(over.args[1:2] or over.args), None)
        if total is None:
            given = ", ".join(["number", *added])
            self._left.append(
                f"line {epoch.lineno}: the loop over epochs must be one over "
                f"`session.epochs({given})`"
            )
            return
        words = [str(ast.get_source_segment(self._text, total)), *added]
        start = self._offset(over.lineno, over.col_offset)
        head = self._text[self._starts[over.lineno - 1] : start]
        text = self._folded(f"{head}session.epochs", words, end=":")
        self._replace(over, text[len(head) :])

    def _folded(self, head: str, words: list[str], end: str = "") -> str:
        """A call, in as many lines as it needs; its last word may be a list."""
        indent = " " * (len(head) - len(head.lstrip()))
        text = f"{head}({', '.join(words)})"
        if len(text + end) <= self._width:
            return text
        inner = f"{indent}    {', '.join(words)}"
        if len(inner) <= self._width:
            return f"{head}(\n{inner}\n{indent})"
        lines = list[str]()
        for word in words:
            if len(word) + len(indent) + 5 > self._width and word.endswith("]"):
                name, _, rest = word.partition("[")
                items = rest.removesuffix("]").split(", ")
                word = "\n        ".join([f"{name}[", *(f"{item}," for item in items)])
                word = f"{word}\n    ]"
            lines += f"    {word},".split("\n")
        body = "".join(f"{indent}{line}\n" for line in lines)
        return f"{head}(\n{body}{indent})"

    def _edit_counts(self, loop: ast.For) -> None:
        """Have the numbers of batches go on at a resume."""
        done = "session.state.dataset_iter"
        match loop.iter:
            case ast.Call(name, [one], []) if name_of(name) == "enumerate":
                end = self._offset(one.end_lineno or 0, one.end_col_offset or 0)
                self._edits.append(_Edit(end, end, f", {done}"))
            case ast.Call(name, [_, start], []) | ast.Call(
                name, [_], [ast.keyword("start", start)]
            ) if name_of(name) == "enumerate":
                first = ast.get_source_segment(self._text, start)
                if not isinstance(start, ast.Constant | ast.Name | ast.Attribute):
                    first = f"({first})"
                self._replace(start, done if first == "0" else f"{done} + {first}")

    def _drop(self, call: ast.Call) -> None:
        """Leave out a call that the session makes needless, if it stands alone."""
        statement = self._above.get(call)
        name = name_of(call.func)
        if isinstance(statement, ast.Expr):
            self._replace(statement, f"pass  # {name}: the session does it")
            if name == "load_state":
                self._tell_of_loading(call.lineno)
        else:
            self._left.append(f"line {call.lineno}: leave `{name}` out")

    def _tell_of_loading(self, line: int) -> None:
        """What the script did to go on is of no effect any more."""
        rest = sorted(call.lineno for call in calls_of(self._tree, SKIP))
        skips = f", `{SKIP}` in line {', '.join(map(str, rest))}" if rest else ""
        self._left.append(
            f"line {line}: `load_state` is gone, and a path that is given to the port "
            "goes unheard: it goes on by itself. Take out the option, the epoch to "
            f"start with, and what else stands for it{skips}; for old folders "
            "there is `helios checkpoint import`"
        )

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

    def _replace(self, node: ast.expr | ast.stmt, text: str) -> None:
        start = self._offset(node.lineno, node.col_offset)
        end = self._offset(node.end_lineno or 0, node.end_col_offset or 0)
        self._edits.append(_Edit(start, end, text))

    def _port(self) -> Port:
        text = self._text
        # What is inserted at the same place comes in the order in which it was added.
        edits = sorted(self._edits, key=lambda edit: (edit.start, edit.end))
        for start, end, new in reversed(edits):
            text = text[:start] + new + text[end:]
        ast.parse(text)
        rows = difflib.ndiff(self._text.splitlines(), text.splitlines())
        added = [row for row in rows if row.startswith("+ ") and row[2:].strip()]
        left = sorted(self._left, key=lambda line: int(line.split()[1].rstrip(":")))
        return Port(text, len(added), left)
