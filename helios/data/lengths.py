"""Batches of samples of a similar length, for text."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from helios import rng
from helios.data.permutation import Permutation
from helios.data.samplers import SAMPLER_REGISTRY, ResumableSampler, checksum


@SAMPLER_REGISTRY.register
class ResumableLengthGroupedSampler(ResumableSampler):
    """A shuffled order in which the samples of a batch are of a similar length.

    The shuffled epoch is taken in windows of `window_batches` batches; a window's
    samples are sorted by length and cut into batches (of all ranks together), and these
    are shuffled. A short batch comes last, of samples of any length: else the longest
    would always be in it, and could be left out. Any position can be computed from its
    window alone.

    Args:
        lengths: of each sample, shape (N,), in any unit.
        window_batches: the more, the less padding, and the less random the batches.

    Raises:
        ValueError: no lengths, or no window.
    """

    def __init__(
        self, lengths: ArrayLike, *, window_batches: int = 50, **options: Any
    ) -> None:
        found = np.asarray(lengths)
        if found.ndim != 1 or found.size == 0 or found.dtype.kind not in "iuf":
            raise ValueError(
                f"`lengths` must be a list of numbers, not empty, got {lengths!r:.200}"
            )
        if type(window_batches) is not int or window_batches < 1:
            raise ValueError(
                f"`window_batches` must be an int >= 1, got {window_batches!r}"
            )
        super().__init__(found, **options)
        self.window_batches = window_batches
        self._window: tuple[Any, NDArray[np.int64]] | None = None

    def at(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        size = self.window_batches * self.batch_size
        found = np.empty_like(positions)
        windows = positions // size
        for number in np.unique(windows).tolist():
            chosen = windows == number
            order = self._order_of(epoch, number, size)
            found[chosen] = order[positions[chosen] - number * size]
        return found

    def identity(self) -> dict[str, Any]:
        facts = {"lengths": checksum(self.data_source), "window": self.window_batches}
        return {**super().identity(), **facts}

    def _order_of(self, epoch: int, number: int, size: int) -> NDArray[np.int64]:
        name = (self.seed, epoch, number, size, self.batch_size)
        if self._window is None or self._window[0] != name:
            key, count = rng.derive_key(self.seed, epoch), len(self)
            places = np.arange(number * size, min((number + 1) * size, count))
            drawn = Permutation(count, key).at(places)
            full = len(drawn) // self.batch_size
            drawn, rest = np.split(drawn, [full * self.batch_size])
            drawn = drawn[np.argsort(self.data_source[drawn], kind="stable")]
            order = Permutation(full, rng.derive_key(key, number, 1)).block(0, full)
            batches = drawn.reshape(full, self.batch_size)[order]
            self._window = name, np.concatenate([batches.ravel(), rest])
        return self._window[1]
