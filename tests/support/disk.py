"""A disk that fails at one operation, whichever: it stands for `open`, `os`, `shutil`.

`helios.checkpoint.store` has all that a save does to the disk.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPERATIONS = ("mkdir", "makedirs", "rename", "replace", "fsync", "open", "rmtree")


class Disk:
    """Fails at the operation of that number, from 1 on, by an error or an action."""

    def __init__(self, fail_at: int, error: BaseException | Callable[[], Any]) -> None:
        self.fail_at, self.error, self.log = fail_at, error, list[str]()

    def did(self, what: str) -> None:
        self.log.append(what)
        if len(self.log) == self.fail_at:
            if isinstance(self.error, BaseException):
                raise self.error
            self.error()

    def replace_that_of(self, module: Any) -> None:
        """Have the module use this disk, for good."""
        module.os = module.shutil = self
        module.open = self.open_file

    def __getattr__(self, name: str) -> Any:
        real = getattr(shutil if hasattr(shutil, name) else os, name)
        if name not in OPERATIONS:
            return real

        def operation(*args: Any, **kwargs: Any) -> Any:
            if name == "rmtree" and len(self.log) + 1 == self.fail_at:
                next(Path(args[0]).iterdir()).unlink()  # half of it is done
            self.did(name)
            return real(*args, **kwargs)

        return operation

    def open_file(self, path: Path, mode: str) -> Any:
        if mode == "rb":
            return open(path, mode)
        self.did(f"create {Path(path).name}")
        return DiskFile(self, open(path, mode), Path(path).name)


class DiskFile:
    def __init__(self, disk: Disk, file: Any, name: str) -> None:
        self.disk, self.file, self.name = disk, file, name

    def __enter__(self) -> "DiskFile":
        return self

    def __exit__(self, *args: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: Any) -> None:
        try:
            self.disk.did(f"write {self.name}")
        except BaseException:
            self.file.write(data[: len(data) // 2])
            raise
        self.file.write(data)
