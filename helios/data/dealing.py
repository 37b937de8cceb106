"""How the samples of a stream's global batch are dealt out to the ranks."""

from __future__ import annotations

from typing import Any

from helios.data.parts import StreamSettings


class Deal:
    """One rank's part of a global batch, of which it is shown all samples, in order.

    Helios deals them out one by one, and keeps this rank's alone. Accelerate cuts a
    batch into blocks, whose length is known at its end: then all are kept till there.
    """

    def __init__(self, settings: StreamSettings) -> None:
        self._settings, self._items, self._last = settings, list[Any](), None
        self.count = 0  #: samples shown

    def show(self, item: Any) -> None:
        """Take the next sample, if it may be this rank's."""
        settings, place = self._settings, self.count
        if settings.in_blocks or place % settings.world_size == settings.rank:
            self._items.append(item)
        self._last, self.count = item, place + 1

    def end(self) -> tuple[list[Any], int]:
        """This rank's samples, as many as each rank has; how many are no padding."""
        rank, rows = self._settings.rank, -(-self.count // self._settings.world_size)
        items = self._items
        if self._settings.in_blocks:
            items = items[rank * rows : (rank + 1) * rows]
        real = len(items)
        return items + [self._last] * (rows - real), real
