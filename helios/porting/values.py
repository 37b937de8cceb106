"""What the variables of a function hold, as far as its text says."""

import ast
import re
from collections.abc import Iterable, Iterator

from helios.porting.carried import Change, dotted, names_in, own_nodes
from helios.porting.nodes import name_of

_CONTAINERS = {"Counter", "OrderedDict", "defaultdict", "deque", "dict", "list", "set"}
_MAKERS = {"bool", "float", "full", "int", "ones", "str", "tensor", "zeros"}
_MAKERS |= _CONTAINERS
# What no checkpoint holds.
_READERS = {"cycle", "iter", "map", "open", "tqdm", "trange", "zip"}
_DRAWING = re.compile(
    r"rand\w*|normal\w*|uniform\w*|choices?|sample|shuffle|permutation|multinomial"
)
# What is asked of plain values, and tensors; of others, too.
_USES = {*dir(list), *dir(dict), *dir(set), *dir(float)} - {"update"}
_TENSORS = re.compile(
    "abs|argmax|backward|cpu|cuda|data|detach|device|dim|double|dtype|exp|float|item"
    "|log|long|max|mean|min|norm|numel|numpy|pow|reshape|shape|size|sqrt|square|std"
    "|sum|to|tolist|var|view"
)


class Values:
    """What the variables of one function, or of a script, are set to."""

    def __init__(self, scope: ast.AST, around: Iterable[ast.AST]) -> None:
        """`around` has what the function stands in, the innermost first."""
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.Module
        scopes = [scope, *(node for node in around if isinstance(node, kinds))]
        self._scopes = {
            one: (list(own_nodes(one)), _variables_of(one)) for one in scopes
        }
        self._scope, self._tree = scope, scopes[-1]
        self._nodes = self._scopes[scope][0]
        self._global = self._declared(ast.Global)
        #: What has a value from its beginning, or from elsewhere.
        self.given = self._declared(ast.Nonlocal) | self._global | _arguments_of(scope)
        # What loops and `with` give, but for numbers.
        self._entered = set[str]()
        for node in self._nodes:
            if isinstance(node, ast.For):
                self._entered |= names_in(node.target) - _counts(node)
            elif isinstance(node, ast.withitem) and node.optional_vars is not None:
                self._entered |= names_in(node.optional_vars)

    def _declared(self, kind: type[ast.Global | ast.Nonlocal]) -> set[str]:
        found = [node.names for node in self._nodes if isinstance(node, kind)]
        return set[str]().union(*found)

    def _owner(self, name: str) -> ast.AST:
        """The function whose variable it is, or else the script."""
        if name not in self._global:
            for scope, (_, variables) in self._scopes.items():
                if name.partition(".")[0] in variables:
                    return scope
        return self._tree

    def is_own(self, name: str) -> bool:
        """Whether it is a variable of the function, or of one around it."""
        return self._scope is self._tree or self._owner(name) is not self._tree

    def of(self, name: str) -> Iterator[tuple[int, ast.expr]]:
        """What it is set to, with the lines."""
        for node in dict.fromkeys([*self._scopes[self._owner(name)][0], *self._nodes]):
            if isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value:
                if dotted(node.target) == name:
                    yield node.lineno, node.value
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    pairs = [(target, node.value)]
                    if isinstance(target, ast.Tuple):
                        values = getattr(node.value, "elts", None)
                        values = values or [node.value] * len(target.elts)
                        pairs = list(zip(target.elts, values, strict=False))
                    for value in (v for part, v in pairs if dotted(part) == name):
                        yield node.lineno, value

    def are_plain(self, name: str) -> bool:
        """Whether it is set to something that is known to be plain."""
        return any(_is_plain(value) for _, value in self.of(name))

    def are_live(self, name: str) -> bool:
        """Whether it is set to what no checkpoint holds, as far as is known."""
        return any(_is_live(n) for _, value in self.of(name) for n in ast.walk(value))

    def are_read(self, name: str) -> bool:
        """Whether it is set to an iterator, a file, or the like."""
        return any(calls_in(value) & _READERS for _, value in self.of(name))

    def may_be_plain(self, name: str) -> bool:
        """Whether nothing that it is set to, or that is asked of it, says otherwise."""
        asked = {
            node.attr
            for node in self._nodes
            if isinstance(node, ast.Attribute) and dotted(node.value) == name
        }
        others = [use for use in asked - _USES if not _TENSORS.fullmatch(use)]
        is_other = "." in name or name in self._entered or bool(others)
        return not is_other and not self.are_live(name)


def calls_in(node: ast.AST) -> set[str]:
    """The last parts of the names of what is called in it."""
    return {name_of(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}


def is_drawn(value: ast.expr) -> bool:
    """Whether it takes random numbers."""
    return any(map(_DRAWING.fullmatch, calls_in(value)))


def appends(changes: list[Change]) -> bool:
    """Whether something is appended, as to a list."""
    calls = [c.node.func for c in changes if isinstance(c.node, ast.Call)]
    return any(name_of(call) in ("append", "extend") for call in calls)


def _is_plain(value: ast.expr) -> bool:
    match value:
        case ast.Call(function):
            return name_of(function) in _MAKERS
        case ast.UnaryOp(_, inner):
            return _is_plain(inner)
        case ast.BinOp(left, _, right):
            return _is_plain(left) and _is_plain(right)
        case ast.Attribute(_, name):
            return name == "inf"
    kinds = ast.Constant | ast.List | ast.Dict | ast.Set | ast.ListComp
    return isinstance(value, kinds)


def _is_live(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    name = name_of(node.func)
    if name == "deepcopy":  # of a network, or of its weights
        return not any(calls_in(value) & {"state_dict"} for value in node.args)
    is_class = name[:1].isupper() and name not in _CONTAINERS
    return is_class or name in _READERS


def _counts(loop: ast.For) -> set[str]:
    """The numbers that a loop gives."""
    name = name_of(loop.iter.func) if isinstance(loop.iter, ast.Call) else ""
    parts = getattr(loop.target, "elts", [])
    if name in ("range", "trange"):
        return names_in(loop.target)
    return names_in(parts[0]) if name == "enumerate" and parts else set()


def _arguments_of(scope: ast.AST) -> set[str]:
    arguments = ast.walk(getattr(scope, "args", ast.Pass()))
    return {node.arg for node in arguments if isinstance(node, ast.arg)}


def _variables_of(scope: ast.AST) -> set[str]:
    names = [node for node in own_nodes(scope) if isinstance(node, ast.Name)]
    stored = {name.id for name in names if isinstance(name.ctx, ast.Store)}
    return stored | _arguments_of(scope)
