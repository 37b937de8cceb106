"""Retention: how a run saves, and which of its checkpoints stay."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helios.checkpoint.store import MAX_SHARD_BYTES


@dataclasses.dataclass(frozen=True)
class KeepBest:
    """The checkpoints that have the best values of a metric, for `keep_best`.

    The value is the one that was logged under that name at the step of the checkpoint:
    validate as often as you save. NaN is never the best.
    """

    metric: str  #: the name under which it is logged
    mode: str = "max"  #: or "min"
    count: int = 1

    def __post_init__(self) -> None:
        if self.mode not in ("max", "min"):
            raise ValueError(f'`mode` must be "max" or "min", got {self.mode!r}')
        if type(self.count) is not int or self.count < 1:
            raise ValueError(f"`count` must be an int >= 1, got {self.count!r}")

    def best(self, found: Mapping[Path, Mapping[str, Any]]) -> list[Path]:
        """The best of some checkpoints, by their records; the newer of equal ones."""
        values = {path: self._value(record) for path, record in found.items()}
        with_one = [path for path in found if not math.isnan(values[path])]
        sign = 1 if self.mode == "min" else -1
        return sorted(with_one, key=lambda path: sign * values[path])[: self.count]

    def _value(self, record: Mapping[str, Any]) -> float:
        value = record.get("metrics", {}).get(self.metric)
        return math.nan if value is None else float(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """How a run saves, as the Trainer's arguments of these names say.

    Raises:
        TypeError, ValueError: wrong values, naming the argument.
    """

    chkpt_interval_s: float | None = None
    keep_last: int | None = None
    keep_every: int | None = None
    keep_best: KeepBest | None = None
    async_save: bool = True
    max_shard_bytes: int = MAX_SHARD_BYTES

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_every", "max_shard_bytes"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"`{name}` must be an int >= 1 or None, got {value!r}")
        interval = self.chkpt_interval_s
        is_number = isinstance(interval, int | float) and type(interval) is not bool
        if interval is not None and not (is_number and interval > 0):
            raise ValueError(
                f"`chkpt_interval_s` must be > 0 seconds or None, got {interval!r}"
            )
        if not isinstance(self.keep_best, KeepBest | None):
            raise TypeError(
                f"`keep_best` must be a helios.KeepBest, got {self.keep_best!r}"
            )
        for name in ("keep_every", "keep_best"):
            if getattr(self, name) is not None and self.keep_last is None:
                raise ValueError(
                    f"`{name}` needs `keep_last`: without it all checkpoints are kept"
                )

    def kept(
        self, found: Mapping[Path, Mapping[str, Any]], is_epochs: bool
    ) -> set[Path]:
        """Those that stay, of these, the newest first; `is_epochs` is the unit."""
        if self.keep_last is None:
            return set(found)
        kept = set(list(found)[: self.keep_last])
        if self.keep_best is not None:
            kept |= set(self.keep_best.best(found))
        unit = "global_epoch" if is_epochs else "current_iteration"
        for path, record in found.items() if self.keep_every is not None else ():
            progress = record["progress"]
            is_whole = not is_epochs or progress.get("dataset_iter") == 0
            if is_whole and progress.get(unit, 0) % self.keep_every == 0:
                kept.add(path)
        return kept
