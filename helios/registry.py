"""Registries: classes and functions by name, for runs that are built from a file."""

import difflib
import importlib
import os
import re
from collections.abc import Callable, Iterator, KeysView
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T", bound=Callable[..., Any])


class Registry:
    """Classes and functions by name; iteration gives pairs of name and object.

    `name` says in messages what they are. `@REGISTRY.register` is the usual way in.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._objects: dict[str, Any] = {}

    def register(self, obj: T, suffix: str | None = None) -> T:
        """Add a class or function as `__name__`, or `__name___suffix`; return it.

        Raises:
            ValueError: another one has that name.
        """
        name = obj.__name__ if suffix is None else f"{obj.__name__}_{suffix}"
        if name in self._objects:
            raise ValueError(
                f"two objects named {name!r} in the {self._name!r} registry: of module "
                f"{self._objects[name].__module__}, and of {obj.__module__}; rename one"
            )
        self._objects[name] = obj
        return obj

    def get(self, name: str, suffix: str | None = None) -> Any:
        """Return the object of a name, else that of `name_suffix`; KeyError if none."""
        for key in (name, f"{name}_{suffix}"):
            if key in self._objects:
                return self._objects[key]
        near = difflib.get_close_matches(name, self._objects, n=1, cutoff=0.0)
        hint = f"the nearest is {near[0]!r}" if near else "it is empty"
        raise KeyError(f"no {name!r} in the {self._name!r} registry; {hint}")

    def keys(self) -> KeysView[str]:
        return self._objects.keys()

    def __getitem__(self, name: str) -> Any:
        return self.get(name)

    def __contains__(self, name: object) -> bool:
        return name in self._objects

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self._objects.items())

    def __len__(self) -> int:
        return len(self._objects)

    def __str__(self) -> str:
        return self._name


def update_all_registries(
    root: str | os.PathLike[str], recurse: bool = True, import_prefix: str = ""
) -> None:
    """Import the modules in a folder that register anything, in the order of paths.

    The others are left alone: a folder may hold scripts, and what needs packages that
    aren't there. A module registers if its text has `.register`. The folder's own name
    begins that of its modules, after `import_prefix`, and must be importable so.

    Args:
        root: the folder of a package.
        recurse: whether folders in it count; hidden ones, and others whose names
            cannot be those of packages, never do.
        import_prefix: the package that the folder is in, such as `"project.src"`.

    Raises:
        ValueError: `root` is not a folder.
        ImportError: of a module, with a note that names its file.
    """
    folder = Path(os.path.abspath(root))  # a link's own name counts
    if not folder.is_dir():
        raise ValueError(f"`root` must be an existing folder, got {os.fspath(root)!r}")
    package = f"{import_prefix}.{folder.name}" if import_prefix else folder.name
    for path in sorted(folder.glob("**/*.py" if recurse else "*.py")):
        names = path.relative_to(folder).with_suffix("").parts
        if not all(map(str.isidentifier, names)) or "__pycache__" in names:
            continue
        if not re.search(rb"\.register\b", path.read_bytes()):
            continue
        inner = names[:-1] if names[-1] == "__init__" else names
        name = ".".join([package, *inner])
        try:
            importlib.import_module(name)
        except ImportError as error:
            error.add_note(
                f"Helios: imported for the registries as {name}, from {path}; "
                "`import_prefix` must name the package that `root` is in"
            )
            raise
