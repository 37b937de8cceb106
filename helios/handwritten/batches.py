"""What a loop by hand reads in the place of its loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


class Batches:
    """Batches that can be read once, with the length of their loader.

    At a resume inside an epoch that is more than there are left: ``len`` is what a sum
    over the epoch is divided by, and the same in all of its parts.
    """

    def __init__(self, batches: Iterator[Any], length: Callable[[], int]) -> None:
        self._batches, self._length = batches, length

    def __iter__(self) -> Iterator[Any]:
        return self._batches

    def __next__(self) -> Any:
        return next(self._batches)

    def __len__(self) -> int:
        return self._length()
