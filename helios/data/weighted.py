"""Sampling by weight, with and without replacement."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from helios import rng
from helios.data.samplers import SAMPLER_REGISTRY, ResumableSampler, checksum


@SAMPLER_REGISTRY.register
class ResumableWeightedRandomSampler(ResumableSampler):
    """Samples that are drawn with probabilities in proportion to their weights.

    With replacement, the draw at a position is a function of (seed, epoch, position):
    a uniform number, looked up in the weights' cumulated sums, in O(log N). Without,
    it is the order of Exp(1) / weight (Efraimidis and Spirakis, Weighted random
    sampling with a reservoir, 2006), which is sorted once an epoch, in O(N) memory.

    Args:
        weights: one for each sample, shape (N,), finite, >= 0, not all 0.
        num_samples: draws an epoch; None: N, or without replacement as many as have a
            weight.
        replacement: whether a sample can be drawn again.

    Raises:
        ValueError: wrong weights, or more draws than samples with a weight.
    """

    def __init__(
        self,
        weights: ArrayLike,
        num_samples: int | None = None,
        replacement: bool = True,
        **options: Any,
    ) -> None:
        found = np.asarray(weights, dtype=np.float64)
        is_right = found.ndim == 1 and np.isfinite(found).all() and (found >= 0).all()
        if not is_right or not found.any():
            raise ValueError(
                "`weights` must be a list of finite numbers >= 0, not all of them 0, "
                f"got {weights!r:.200}"
            )
        found = found / found.max()  # so that sums neither overflow nor vanish
        usable = int((found > 0).sum())
        most = None if replacement else usable
        count = num_samples
        if count is None:
            count = found.size if replacement else usable
        if type(count) is not int or count < 1 or (most and count > most):
            limit = "" if most is None else f" and <= {most}, as without replacement"
            raise ValueError(f"`num_samples` must be >= 1{limit}, got {num_samples!r}")
        super().__init__(found, **options)
        self.replacement, self.num_samples = replacement, count
        self._sums = np.cumsum(found) if replacement else None
        self._drawn: tuple[tuple[int, int], NDArray[np.int64]] | None = None

    def at(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        if self._sums is None:
            return self._without(epoch)[positions]
        uniform = rng.uniforms(rng.derive_key(self.seed, epoch), positions)
        found: NDArray[np.int64]
        found = np.searchsorted(self._sums, uniform * self._sums[-1], side="right")
        return found

    def identity(self) -> dict[str, Any]:
        facts = {"weights": checksum(self.data_source), "replacement": self.replacement}
        return {**super().identity(), **facts}

    def _without(self, epoch: int) -> NDArray[np.int64]:
        name = (self.seed, epoch)
        if self._drawn is None or self._drawn[0] != name:
            usable = np.flatnonzero(self.data_source)
            key = rng.derive_key(self.seed, epoch)
            uniform = rng.uniforms(key, np.arange(usable.size))
            # Logarithms: a quotient by a very small weight would be infinite.
            waits = np.log(-np.log1p(-uniform)) - np.log(self.data_source[usable])
            order = np.argsort(waits, kind="stable")[: self.num_samples]
            self._drawn = name, usable[order]
        return self._drawn[1]

    def __len__(self) -> int:
        return self.num_samples
