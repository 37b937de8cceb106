"""Random numbers: keys of integers; the global CPU generators: seeds and states."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from helios.errors import ResumeError

_MASK = 0xFFFF_FFFF_FFFF_FFFF
#: What draws random numbers, and has a state of its own.
GENERATORS = (
    torch.Generator,
    np.random.Generator,
    np.random.RandomState,
    random.Random,
)
_spare = np.random.MT19937(0)  # stands in for numpy's generator; 80 µs to make one


def _mix(z: int) -> int:
    """Step and finalizer of splitmix64 (Steele, Lea, Flood 2014): a bijection."""
    z = (z + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def derive_key(*parts: int) -> int:
    """Mix integers of any size and sign into a key in [0, 2**64); order counts."""
    key = len(parts)
    for part in parts:
        if part < 0:
            key, part = _mix(key) ^ _MASK, ~part
        while part > _MASK:
            key, part = _mix(key ^ (part & _MASK)), part >> 64
        key = _mix(key ^ part)
    return key


def uniforms(key: int, positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return a uniform number in [0, 1) for each position of the sequence of `key`.

    The sequence is that of splitmix64, which can be entered anywhere.
    """
    z = (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def get_default_seed() -> int:
    """Return the seed of runs that set none."""
    return 1729


def get_default_numpy_rng() -> np.random.Generator:
    """Return a new generator, seeded with the default seed."""
    return np.random.default_rng(get_default_seed())


def generator_state(generator: Any) -> Any:
    """The state of one of `GENERATORS`, as a plain tree."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.getstate()


def set_generator_state(generator: Any, state: Any) -> None:
    """Set what `generator_state` returned."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def seed_generator(generator: Any, key: int) -> None:
    """Seed one of `GENERATORS` with a key in [0, 2**64)."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(key)
    elif isinstance(generator, np.random.Generator):
        state = type(generator.bit_generator)(key).state
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState):
        generator.seed(key & 0xFFFF_FFFF)
    else:
        generator.seed(key)


def seed_rngs(seed: int) -> None:
    """Seed the global generators and those of all accelerators."""
    seed_globals(seed)
    torch.manual_seed(seed)


def seed_globals(key: int) -> None:
    """Seed the global generators, and no others, with a key in [0, 2**64): 7 µs."""
    random.seed(key)
    np.random.seed(key & 0xFFFF_FFFF)
    torch.default_generator.manual_seed(key)


def capture_rng(device: torch.device | None = None) -> dict[str, Any]:
    """Return the global generators' state, and an accelerator's, as a plain tree."""
    version, words, gauss_next = random.getstate()
    python = (version, np.array(words, dtype=np.uint32), gauss_next)
    numpy = np.random.get_state(legacy=False)
    tree = {"python": python, "numpy": numpy, "torch": torch.get_rng_state()}
    if device is not None and device.type != "cpu":
        tree[device.type] = torch.get_device_module(device).get_rng_state(device)
    return tree


def restore_rng(
    tree: dict[str, Any],
    device: torch.device | None = None,
    *,
    is_partial: bool = False,
) -> None:
    """Set what `capture_rng` returned; ResumeError where that has other parts.

    `is_partial`: the device's state may be missing, or be of another kind of device.
    """
    kinds = {"numpy", "python", "torch", "cpu" if device is None else device.type}
    if tree.keys() != kinds - {"cpu"} and not is_partial:
        raise ResumeError(f"random state of {sorted(tree)}, needed for {sorted(kinds)}")
    np.random.set_state(tree["numpy"])
    version, words, gauss_next = tree["python"]
    random.setstate((version, tuple(words.tolist()), gauss_next))
    torch.set_rng_state(tree["torch"])
    if device is not None and device.type in tree:
        torch.get_device_module(device).set_rng_state(tree[device.type], device)


@contextlib.contextmanager
def isolated_rng(key: int = 0) -> Iterator[None]:
    """Seed the global generators with `key`; put their states back at the end."""
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    # To exchange the bit generator is quick, but drops the second of a normal pair.
    numpy_state = np.random.get_state(legacy=False)
    original = np.random.mtrand.get_bit_generator()
    np.random.mtrand.set_bit_generator(_spare)
    try:
        seed_globals(key)
        yield
    finally:
        np.random.mtrand.set_bit_generator(original)
        if numpy_state["has_gauss"] or original is _spare:  # in another isolation
            np.random.set_state(numpy_state)
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
