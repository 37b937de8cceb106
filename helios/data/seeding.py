"""The random numbers of a sample: keys, and the generators that they seed."""

from __future__ import annotations

import operator
import threading
import zlib
from typing import Any, NamedTuple

import numpy as np
import torch

from helios.rng import derive_key, seed_globals


class SampleRng(NamedTuple):
    """The generators of a sample; what they draw depends on (seed, epoch, sample)."""

    numpy: np.random.Generator
    torch: torch.Generator


class _Current(threading.local):
    key: int | None = None
    made: SampleRng | None = None


_current = _Current()


def seed_for(*parts: int) -> None:
    """Seed the global generators, and `sample_rng`, with a key of these numbers."""
    _current.key = key = derive_key(*parts)
    _current.made = None
    seed_globals(key)


def forget_key() -> None:
    """Have `sample_rng` know that no sample is being loaded any more."""
    _current.key = _current.made = None


def sample_rng() -> SampleRng:
    """Return generators of the sample, or batch, that is being loaded.

    For `__getitem__`, `__iter__`, transforms and collate functions that want their own
    generators rather than the global ones, which are seeded as well. Within a sample
    every call returns the same two. Elsewhere, as where a data set is tried by hand,
    the key is drawn from torch's global generator.
    """
    if _current.made is not None:
        return _current.made
    key = _current.key
    if key is None:
        drawn = int(torch.randint(2**62, ()).item())
        return _make(drawn)
    _current.made = made = _make(key)
    return made


def number_of(index: Any) -> int:
    """The number of an index that a user's sampler may have made of anything."""
    try:
        return operator.index(index)
    except TypeError:
        return zlib.crc32(repr(index).encode())


def _make(key: int) -> SampleRng:
    # Not the numbers of the global generators, which have the key itself.
    own = derive_key(key, 1)
    generator = torch.Generator()
    generator.manual_seed(own)
    return SampleRng(np.random.Generator(np.random.PCG64(own)), generator)
