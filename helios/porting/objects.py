"""Objects of a script that change in its loops, and that no checkpoint has."""

import ast
import re
from collections.abc import Collection, Iterable, Iterator

from helios.porting.carried import dotted, names_in, own_nodes
from helios.porting.findings import kinds_of
from helios.porting.nodes import name_of
from helios.porting.placing import origins_of, path_of, saved_by

# Classes whose objects are saved, write logs, or begin each epoch anew.
_KNOWN = {"Dataset", "GeneralTracker", "IterableDataset", "Sampler"}
_TRAINED = {"Module", "Optimizer"}  # saved if they are prepared
_CHANGING = re.compile(
    r"(?!add_noise|push_to_hub)"
    r"(accumulate|add|append|clear|count|extend|increment|insert|observe|pop|push|put"
    r"|record|remove|step|update)(left|_\w+)?|load_state_dict|\w*[a-z\d]_"
)
# Where what is no part of the training comes from, or what is saved comes again.
_LIVE = re.compile(
    r"(.*\.)?accelerat.*|diffusers\..*Scheduler.*"
    r"|.*(tqdm|trange|progress|bar\(|logg|track|writer|wandb|mlflow|profil|unwrap).*",
    re.IGNORECASE,
)
_STOPS = re.compile(r".*(stop|patience)[^.]*\(\)", re.IGNORECASE)
_HANDLED = {"loader", "scheduler", "stateful"}


def left_behind(
    tree: ast.Module,
    scope: ast.AST,
    loops: tuple[ast.For, ast.For],
    handled: Collection[str],
) -> Iterator[tuple[str, int, str]]:
    """Objects that a resume makes anew, with their lines, and what is to be done.

    Of those that are plain enough to be carried, that is "".

    Args:
        tree: the script.
        scope: the function, or the script, in which the loops are.
        loops: over epochs, and over batches.
        handled: names of which all is said.
    """
    epoch, loop = loops
    finder = _Finder(tree, loop, epoch)
    own = list(own_nodes(scope))
    before = [n for n in own if getattr(n, "lineno", 0) < epoch.lineno]
    arguments = ast.walk(getattr(scope, "args", ast.Pass()))
    local = {n.arg for n in arguments if isinstance(n, ast.arg)}
    local |= {n.id for n in own if _is_stored(n) and isinstance(n, ast.Name)}
    made = dict[str, tuple[ast.stmt, ast.expr]]()
    if scope is not tree:  # what the script makes, for its functions as well
        made |= {n: m for n, m in _made(own_nodes(tree)) if n not in local}
    made |= dict(_made(before))
    inside = [n for n in own_nodes(epoch) if getattr(n, "lineno", 0) < loop.lineno]
    anew = dict(_made(inside))
    set_again = {dotted(n) for n in ast.walk(loop) if _is_stored(n)}
    for name, (node, value) in {**made, **anew}.items():
        if name not in {*handled, *finder.saved, *set_again}:
            told = finder.judge(name, value, is_anew=name in anew)
            if told is not None:
                yield name, node.lineno, told


class _Finder:
    def __init__(self, tree: ast.Module, loop: ast.For, epoch: ast.For) -> None:
        self._loop, self._epoch = loop, epoch
        self._origins = dict(origins_of(tree))
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
        self._classes = {node.name: node for node in nodes}
        self.saved = saved_by(tree)

    def judge(self, name: str, value: ast.expr, *, is_anew: bool) -> str | None:
        """What is to be done for it; "" to carry it, None if nothing is."""
        around = self._loop if is_anew else self._epoch
        path = path_of(value, self._origins)
        kinds = kinds_of(path)
        node = self._classes.get(path.removesuffix("()"))
        if node is None and (_LIVE.fullmatch(path) or kinds & _HANDLED):
            return None
        if node is not None and not (self._bases(node) & _TRAINED):
            if self._bases(node) & _KNOWN:
                return None
            if _changes_itself(node):
                return _pass(name) if name in names_in(around) else None
            if not node.bases:
                return None
        if "generator" in kinds:
            return _pass(name) if self._draws(name, around) else None
        stops = node is None and _STOPS.fullmatch(path) and name in names_in(around)
        if name not in changed_in(around) and not stops:
            return None
        if name not in changed_in(self._loop) and self._is_reset(name):
            return None
        if path.startswith("torch.optim."):
            return "prepare it with the others"
        if re.fullmatch(r"(.*\.)?[A-Z]\w*\(\)", path):
            return _pass(name)
        if "." not in name and re.fullmatch(r"((torch|numpy)\..*)?", path):
            return ""  # an array, or a list of some
        return f"{_pass(name)}, or name it in `carry`"

    def _draws(self, name: str, around: ast.For) -> bool:
        """Whether a generator is drawn from, and not seeded again."""
        calls = [n for n in ast.walk(around) if isinstance(n, ast.Call)]
        given = [k.value for c in calls for k in c.keywords if k.arg == "generator"]
        owners = [c.func for c in calls if isinstance(c.func, ast.Attribute)]
        of_it = {owner.attr for owner in owners if dotted(owner.value) == name}
        return name in map(dotted, given) or bool(of_it - {"manual_seed", "set_state"})

    def _is_reset(self, name: str) -> bool:
        """Whether each epoch empties it, behind or before an evaluation."""
        used = names_in(self._epoch)
        return bool({f"{name}.compute", f"{name}.reset"} & used)

    def _bases(self, node: ast.ClassDef) -> set[str]:
        """The classes below it, also those of the script's own ones."""
        names = {name_of(base) for base in node.bases}
        own = (self._classes[n] for n in names if n in self._classes and n != node.name)
        return names.union(*map(self._bases, own))


def _pass(name: str) -> str:
    last = name.rpartition(".")[2]
    return f"pass it to the session, as `{last}={name}`"


def changed_in(node: ast.AST) -> set[str]:
    """The names of which a part is set, or a method called that may change them."""
    found = set[str]()
    for one in ast.walk(node):
        match one:
            case ast.Subscript(ctx=ast.Store()):
                found.add(_whole(one))
            case ast.Call(ast.Attribute(owner, name)) if _CHANGING.fullmatch(name):
                found.add(_whole(owner))
    return found


def _changes_itself(node: ast.ClassDef) -> bool:
    """Whether a class has a state, as that of a patience, that changes."""
    methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
    others = [m for m in methods if m.name != "__init__"]
    stored = {dotted(n) for m in others for n in ast.walk(m) if _is_stored(n)}
    stored = stored.union(*map(changed_in, others))
    calls = [n for m in others for n in ast.walk(m) if isinstance(n, ast.Call)]
    in_place = any(re.fullmatch(r"[a-z]\w*[a-z\d]_", name_of(c.func)) for c in calls)
    return in_place or any(name.startswith("self.") for name in stored)


def _made(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, tuple[ast.stmt, ast.expr]]]:
    """What is made by a call, or one by one, by name."""
    for node in nodes:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                parts = getattr(target, "elts", [target])
                values = getattr(node.value, "elts", [node.value] * len(parts))
                for part, value in zip(parts, values, strict=False):
                    kinds = ast.Call | ast.DictComp | ast.ListComp | ast.SetComp
                    if (name := dotted(part)) and isinstance(value, kinds):
                        yield name, (node, value)


def _is_stored(node: ast.AST) -> bool:
    return isinstance(node, ast.Name | ast.Attribute) and isinstance(
        node.ctx, ast.Store
    )


def _whole(node: ast.expr) -> str:
    """The name of what this is a part of, or was made of in place."""
    match node:
        case ast.Subscript(inner) | ast.Attribute(inner, "data"):
            return _whole(inner)
        case ast.Call(ast.Attribute(inner, name)) if name.endswith("_"):
            return _whole(inner)
    return dotted(node)
