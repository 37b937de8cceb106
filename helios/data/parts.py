"""What the two sides of a stream tell each other: requests, answers, how far it is."""

from __future__ import annotations

from typing import Any, NamedTuple


class Part(NamedTuple):
    """How far a stream has been read."""

    position: int = 0  # samples
    #: Of the "dataset" and the "iterator"; "epoch": of a data set whose next epoch does
    #: not depend on it; "unfinished": of the data set in an epoch that another rank has
    #: ended; "start": of the data set when the epoch began. With that, and with None,
    #: all is read again to get there; "origin": the same, where that may come to be so.
    states: dict[str, Any] | None = None
    is_done: bool = False
    seconds: float = 0.0  # that reading took


class StreamRequest(NamedTuple):
    """What a loader's workers are sent; turn t is that of stream t % S, or batch t."""

    seed: int
    key: int  # of (seed, epoch): the same on all ranks
    epoch: int
    turn: int
    run: int  # which iteration asks
    kind: str | None  # "shards", "whole", None: not known yet
    start: Part | None  # for the first ones of an iteration


class StreamAnswer(NamedTuple):
    """What a worker makes of a request: a batch, or the end of the stream."""

    data: Any
    rows: int  # 0: the end
    real: int  # how many rows are no padding
    total: int | None  # samples of all ranks, where one knows
    kind: str
    part: Part


class StreamSettings(NamedTuple):
    """How the batches of a stream are cut; the same in all processes but for `rank`."""

    batch_size: int  # of each rank
    drop_last: bool
    streams: int  # of each rank, if it is read in shards
    rank: int
    world_size: int
    in_blocks: bool = False  # how ranks share batches of the whole: see `Deal`
