"""One iteration over a loader, as the loops want it: it can look one batch ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from helios.data.batches import Loaded
from helios.data.loader import ResumableDataLoader


class Feed:
    """The batches of one iteration, placed; made where the loader was sought to.

    An exception of the data set is kept until its batch is wanted: the batch before it
    is finished first, and saved.
    """

    def __init__(
        self, loader: ResumableDataLoader, place: Callable[[Any], Any]
    ) -> None:
        self._batches = loader.fetch()
        self._place = place
        self._count = loader.batches_per_epoch
        self._next: Loaded | None = None
        self._is_at_end = False
        self.error: Exception | None = None

    def peek(self) -> bool:
        """Whether there is a next batch; it is read, and its copy to the device begun.

        False at the end, and where reading fails: `error` tells which.
        """
        if self._next is None and not self._is_at_end and self.error is None:
            try:
                loaded = next(self._batches, None)
                if loaded is None:
                    self._is_at_end = True
                else:
                    self._next = loaded._replace(data=self._place(loaded.data))
            except Exception as error:
                self.error = error
        return self._next is not None

    def take(self) -> Loaded:
        """The next batch; it is there, as `peek` has said."""
        found, self._next = self._next, None
        assert found is not None
        return found

    def ends_with(self, loaded: Loaded) -> bool:
        """Whether it is the last batch; looks ahead only where no length is known."""
        if self._count is not None:
            return loaded.number + 1 == self._count
        return not self.peek() and self.error is None

    def check(self) -> None:
        """Raise what reading raised, if anything."""
        if self.error is not None:
            raise self.error
