"""Registries: classes and functions by name, for runs that are built from a file."""

import difflib
import importlib
import os
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["Registry", "update_all_registries"]

T = TypeVar("T", bound=Callable[..., Any])


class Registry(dict[str, Callable[..., Any]]):
    """Things to be made by name; ``kind`` says what they are, for messages."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, thing: T) -> T:
        """Add a class or function under its own name; usable as a decorator."""
        if thing.__name__ in self:
            raise ValueError(f"a {self.kind} {thing.__name__!r} is registered already")
        self[thing.__name__] = thing
        return thing

    def create(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call the thing of that name; a KeyError names the nearest where none is."""
        if name not in self:
            near = difflib.get_close_matches(name, self, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise KeyError(f"no {self.kind} named {name!r} is registered{hint}")
        return self[name](*args, **kwargs)


def update_all_registries(
    root: str | os.PathLike[str], *, recurse: bool = True, import_prefix: str = ""
) -> None:
    """Import every module below the folder ``root``, so that it registers things.

    ``import_prefix`` is the package that the folder is, such as ``"project.src"``.
    """
    if not os.path.isdir(root):
        raise ValueError(f"`src_root` must be an existing folder, got {root!r}")
    prefix = f"{import_prefix}." if import_prefix else ""
    for module in pkgutil.iter_modules([os.fspath(root)], prefix):
        importlib.import_module(module.name)
        if module.ispkg and recurse:
            folder = os.path.join(root, module.name.rpartition(".")[2])
            update_all_registries(folder, import_prefix=module.name)
