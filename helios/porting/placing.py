"""Where in a script its Session is made, and what it has to be told of."""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping

from helios.porting.carried import assigned_by, dotted, names_in
from helios.porting.findings import kinds_of
from helios.porting.nodes import calls_of

_SAVING = (
    "prepare",
    "prepare_data_loader",
    "prepare_model",
    "prepare_optimizer",
    "prepare_scheduler",
    "register_for_checkpointing",
)
# The names of a Session's arguments, and of what it adds to its objects.
_TAKEN = re.compile(
    "self|accelerator|path|loaders|save_every|log_every|resume|random_seed|keep_last"
    "|keep_every|keep_best|chkpt_interval_s|async_save|allow_inexact|hang_timeout_s"
    "|bad_numbers|crash_bundle|max_time_s|stop_grace_s|enable_tensorboard|callbacks"
    "|models|optimizers|schedulers|registered"
)


class Places:
    """What stands around what in a script that trains in one loop."""

    def __init__(
        self, tree: ast.Module, above: Mapping[ast.AST, ast.AST], loop: ast.For
    ) -> None:
        self._tree, self._above = tree, above
        self._around = {loop, *self._ancestors(loop)}
        self._line, self._scope = loop.lineno, self.scope(loop)

    def _ancestors(self, node: ast.AST) -> Iterator[ast.AST]:
        while (above := self._above.get(node)) is not None:
            yield above
            node = above

    def scope(self, node: ast.AST) -> ast.AST:
        """The function, or else the module, in which it stands."""
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.Module
        return next(one for one in self._ancestors(node) if isinstance(one, kinds))

    def outermost(self, node: ast.stmt) -> ast.stmt:
        """The statement behind which it has been run, whichever branch it stands in.

        In the function of the loop, the one that stands beside the loop, or what is
        around it. Elsewhere, an `if` whose branches both prepare something.
        """
        is_near = self.scope(node) is self._scope
        while isinstance(above := self._above[node], ast.stmt):
            is_done = above in self._around
            if not is_near:
                branches = getattr(above, "body", []), getattr(above, "orelse", [])
                is_done = not all(any(map(_prepares, part)) for part in branches)
            if is_done:
                break
            node = above
        return node

    def last(self, own: ast.stmt, others: Iterable[ast.stmt]) -> ast.stmt:
        """The last of these before the loop that stand in the same block."""
        found = [own]
        for one in map(self.outermost, others):
            is_before = self.scope(one) is not self._scope or one.lineno < self._line
            if self._above[one] is self._above[own] and is_before:
                found.append(one)
        return max(found, key=lambda node: node.end_lineno or 0)

    def unsaved(self) -> dict[str, list[ast.Assign]]:
        """Schedulers and the like that nobody saves, by name, and where made."""
        origins = dict(origins_of(self._tree))
        made = dict[str, list[ast.Assign]]()
        saved = saved_by(self._tree)
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                kinds = kinds_of(path_of(node.value, origins))
                if kinds & {"scheduler", "stateful"}:
                    for target in node.targets:
                        name = dotted(target) or ast.unparse(target)
                        made.setdefault(name, []).append(node)
                if "scheduler" in kinds:  # which saves those that it steps
                    saved |= _given(node.value)
        return {name: found for name, found in made.items() if name not in saved}

    def is_always_made(self, name: str, made: list[ast.Assign]) -> bool:
        """Whether it is there before the loop, and a scheduler, whatever is run."""
        scope = self.scope(made[0])
        assigned = [n for n in ast.walk(scope) if isinstance(n, ast.Assign)]
        others = [n for n in assigned if name in map(dotted, n.targets)]
        outer = self.outermost(made[0])
        return others == made and name in (assigned_by(outer) or ())


def keyword_for(name: str, words: Iterable[str]) -> str:
    """Under which name a Session gets an object, beside what is written already."""
    written = {word.partition("=")[0] for word in words}
    keyword = re.sub(r"\W+", "_", name.rpartition(".")[2]).strip("_") or "part"
    while keyword in written or _TAKEN.fullmatch(keyword):
        keyword += "_"
    return keyword


def _prepares(node: ast.AST) -> bool:
    return any(calls_of(node, "prepare"))


def _given(call: ast.Call) -> set[str]:
    parts = [*call.args, *call.keywords]
    return {name for part in parts for name in names_in(part)}


def saved_by(tree: ast.Module) -> set[str]:
    """The names of what is prepared, or registered, and so saved."""
    calls = [call for name in _SAVING for call in calls_of(tree, name)]
    return set[str]().union(*map(_given, calls))


def path_of(value: ast.expr, origins: Mapping[str, str]) -> str:
    """Where what is called comes from, with "()" behind it; "" for what is no call."""
    if not isinstance(value, ast.Call):
        return ""
    function = value.func
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Call):
        return f"{path_of(function.value, origins)}.{function.attr}()"
    base, _, rest = dotted(function).partition(".")
    return f"{origins.get(base, base)}{'.' if rest else ''}{rest}()"


def origins_of(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Where the names that are imported come from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname:
                    yield alias.asname, alias.name
