"""Bars on a terminal for what takes over a second: reading, and what cannot say."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

# Off (None) where standard error is no terminal; gone when they end.
_OPTIONS: Any = {"leave": False, "disable": None, "delay": 1}


@contextlib.contextmanager
def reading(paths: Sequence[Path], *, is_shown: bool = True) -> Iterator[Any]:
    """Show how far the reading of checkpoints is; gives what their bytes go to."""
    files = [f for path in paths for f in path.glob("*.safetensors")]
    total = sum(f.lstat().st_size for f in files)  # also of a link to nothing
    options = _OPTIONS if is_shown else {"disable": True}
    with tqdm(desc="reading", total=total, unit="B", unit_scale=True, **options) as bar:
        yield bar.update


@contextlib.contextmanager
def clock(what: str) -> Iterator[None]:
    """Show how long something takes that cannot say how far it is."""
    ended = threading.Event()

    def tick() -> None:
        with tqdm(desc=what, bar_format="{desc} {elapsed}", **_OPTIONS) as bar:
            while not ended.wait(0.2):
                bar.update()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
