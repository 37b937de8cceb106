"""The main process's side of a stream: what workers are asked for, and the cursor."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from helios import rng
from helios.data.batches import Loaded, Plan
from helios.data.parts import Part, StreamAnswer, StreamRequest, StreamSettings
from helios.errors import ResumeError


class StreamRequests(Plan):
    """Asks for one turn after the other, and keeps the cursor of what has come.

    Its cursor is a dict of plain values. `seek` takes it in the epoch that it is of, or
    in the next one, which begins as the states say that the last one ended.
    """

    def __init__(self, settings: StreamSettings, *, seed: int, workers: int) -> None:
        self.settings, self.seed = settings, seed
        self.streams = settings.streams
        self._workers = max(1, workers)
        self._runs = itertools.count()
        self.kind: str | None = None
        self._is_sought = False
        self._begin(-1)

    @property
    def is_sharded(self) -> bool:  # type: ignore[override]  # known while it is read
        return self.kind != "whole" and self.settings.world_size > 1

    def describe(self, request: StreamRequest) -> str:
        return f"batch {request.turn} of the stream (epoch {request.epoch})"

    def seek(self, epoch: int, batch: int = 0, cursor: Any = None) -> None:
        if batch and (cursor is None or cursor["epoch"] != epoch):
            raise ValueError(f"batch {batch} of a stream needs its cursor")
        self._begin(epoch)
        self._is_sought = True
        if cursor is None:
            return
        parts = [Part(*values) for values in cursor["parts"]]
        if cursor["kind"] == "shards" and not self._is_shared_as(cursor):
            if batch or any("dataset" in (part.states or {}) for part in parts):
                then, now = cursor["world_size"], self.settings.world_size
                raise ResumeError(
                    f"the data set gave its shards to {then} rank(s) with {len(parts)} "
                    f"worker(s) each, and now to {now} with {self.streams}; what it "
                    f"has saved is of those shards: go on with {then} rank(s), or, if "
                    "it has no `state_dict`, at the start of an epoch"
                )
            return
        self.kind = cursor["kind"]
        if epoch != cursor["epoch"]:
            parts = [_next_epoch(part) for part in parts]
        else:
            self._turn, self._number = cursor["turn"], batch
        self._parts[: len(parts)] = parts

    def _is_shared_as(self, cursor: dict[str, Any]) -> bool:
        found = cursor["world_size"], len(cursor["parts"])
        return found == (self.settings.world_size, self.streams)

    def __iter__(self) -> Iterator[StreamRequest]:
        if not self._is_sought:
            self.seek(self.epoch + 1, 0, self._cursor() if self.epoch >= 0 else None)
        self._is_sought = False
        key, run = rng.derive_key(self.seed, self.epoch), next(self._runs)
        kind, streams = self.kind, self.settings.streams
        for asked, turn in enumerate(itertools.count(self._turn)):
            start = None
            if asked < max(streams, self._workers):
                start = self._parts[0 if kind == "whole" else turn % streams]
            yield StreamRequest(self.seed, key, self.epoch, turn, run, kind, start)

    def receive(
        self, answers: Iterator[tuple[StreamRequest, StreamAnswer]]
    ) -> Iterator[Loaded]:
        """Make batches of the answers, until all streams are at their end."""
        ended: set[int] = set()
        for _, answer in answers:
            self.kind = answer.kind
            stream = 0 if answer.kind == "whole" else self._turn % len(self._parts)
            self._parts[stream] = answer.part
            self._turn += 1
            if answer.rows:
                number, self._number = self._number, self._number + 1
                rows, ranks = answer.rows, self.settings.world_size
                is_full = ranks == 1 or answer.total == rows * ranks
                loaded = Loaded(answer.data, number, None, rows, answer.real, is_full)
                yield loaded._replace(cursor=self._cursor(), total=answer.total)
                continue
            ended.add(stream)
            if answer.kind == "whole" or len(ended) == len(self._parts):
                self._is_at_end = True
                return

    def next_epoch(self, cursor: Any = None) -> Any:
        return self._cursor() if self._is_at_end else cursor

    def _cursor(self) -> dict[str, Any]:
        """What `seek` needs to go on from here."""
        parts = self._parts[:1] if self.kind == "whole" else self._parts
        return {
            "epoch": self.epoch,
            "kind": self.kind,
            "turn": self._turn,
            "world_size": self.settings.world_size,
            "parts": [list(part) for part in parts],
        }

    def replayed(self) -> tuple[int, float]:
        found = [(p, p.states or {"start": None}) for p in self._parts]
        again = [p for p, states in found if not p.is_done and "start" in states]
        return sum(p.position for p in again), sum(p.seconds for p in again)

    def _begin(self, epoch: int) -> None:
        self.epoch, self.kind, self._turn, self._number = epoch, None, 0, 0
        self._is_at_end = False
        self._parts: list[Part] = [Part()] * self.settings.streams


def _next_epoch(part: Part) -> Part:
    """Where an epoch begins: as the data set's own state says, if it has one."""
    states = part.states or {}
    if part.is_done and "dataset" in states:
        return Part(states={"dataset": states["dataset"]})
    # Another rank has ended the epoch.
    state = states.get("unfinished", states.get("dataset"))
    return Part() if state is None else Part(states={"unfinished": state})
