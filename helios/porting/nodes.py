"""Names, calls and loaders in a syntax tree."""

import ast
from collections.abc import Iterator

SKIP = "skip_first_batches"
READERS = {"enumerate", "tqdm", SKIP, "trange"}


def loader_of(node: ast.expr) -> ast.expr | None:
    """The loader that a loop reads: itself, or in `enumerate` and the like."""
    if isinstance(node, ast.Name | ast.Attribute):
        return node
    if isinstance(node, ast.Call) and node.args and name_of(node.func) in READERS:
        return loader_of(node.args[0])
    return None


def name_of(node: ast.AST) -> str:
    """The last part of a name."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def calls_of(node: ast.AST, name: str) -> Iterator[ast.Call]:
    """The calls in it of what is so called, whatever it belongs to."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call) and name_of(inner.func) == name:
            yield inner
