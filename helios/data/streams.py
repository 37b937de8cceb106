"""Iterable data sets: their batches, and the cursor to go on from.

An iterable data set is read in one of two ways, as its first sample shows:

* "shards": it asked `get_worker_info()` who it is, and gives each asker a part. There
  are W times S streams for W ranks; S is the number of workers that the run began with,
  and stays, so that other workers read the same later.
* "whole": it did not, and gives all samples to each. Global batch b is its samples
  [b*W*B, (b+1)*W*B), and rank r has every W-th of them, from the r-th on, or block r;
  what belongs to other workers and ranks is read and dropped.

The random numbers of a sample depend on (seed, epoch, stream, position).
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from typing import Any

from torch.utils import data
from torch.utils.data._utils import worker as torch_worker

from helios.data.dealing import Deal
from helios.data.fetching import sendable, shape_of
from helios.data.packages import (
    computes_ahead,
    has_drawn,
    has_state,
    initial_states,
    is_of_datasets,
    is_part_of_rank,
    loses_samples,
    make_repeatable,
)
from helios.data.parts import Part, StreamAnswer, StreamRequest, StreamSettings
from helios.data.seeding import forget_key, seed_for
from helios.errors import DataError, ResumeError
from helios.rng import isolated_rng

_END: Any = object()
_OWNERS = {"dataset", "epoch", "unfinished", "start"}
_STARTS = ("origin", *_OWNERS)


class ShardInfo:
    """What `get_worker_info()` gives a data set; it takes note of who looks."""

    def __init__(self, number: int, count: int, seed: int, dataset: Any) -> None:
        self._number, self._count = number, count
        self.seed, self.dataset = seed, dataset
        self.was_read = False

    @property
    def id(self) -> int:
        self.was_read = True
        return self._number

    @property
    def num_workers(self) -> int:
        self.was_read = True
        return self._count


class StreamedDataset(data.Dataset[Any]):
    """An iterable data set that is asked for the batch of a turn.

    Each process that has it keeps the iterators of its streams, each over a data set of
    its own, as data sets keep states.
    """

    def __init__(
        self,
        dataset: Any,
        collate_fn: Callable[[Any], Any] | None,
        settings: StreamSettings,
    ) -> None:
        self.dataset, self.settings = dataset, settings
        self.collate_fn = data.default_collate if collate_fn is None else collate_fn
        self._datasets = [dataset]
        self._streams: dict[int, _Stream] = {}
        self._run: int | None = None
        self._initial: dict[str, Any] | None = None  # the states before anyone reads

    def __getitem__(self, index: Any) -> Any:
        raise TypeError("an iterable data set has no items by index")

    def __getitems__(self, request: StreamRequest) -> list[StreamAnswer]:
        """Return the batch of a turn, as the only item; errors name the sample."""
        before = torch_worker._worker_info
        try:
            if before is not None:
                return [self._answer(request)]
            with isolated_rng(request.key):
                return [self._answer(request)]
        except Exception as error:
            torch_worker._worker_info = before
            raise sendable(error) from error.__cause__
        finally:
            torch_worker._worker_info = before
            forget_key()

    def _answer(self, request: StreamRequest) -> StreamAnswer:
        if request.run != self._run:
            self._streams, self._run = {}, request.run
        if self._initial is None:
            make_repeatable(self.dataset, request.seed)
            self._copy()
            self._initial = initial_states(self.dataset)
        stream = self._stream_of(request, self._initial)
        return stream.batch(request, self.collate_fn)

    def _stream_of(self, request: StreamRequest, initial: dict[str, Any]) -> _Stream:
        for stream in self._streams.values():
            if stream.kind == "whole":
                return stream
        shard, count = request.turn % self.settings.streams, len(self._streams)
        if shard not in self._streams:
            assert request.start is not None, "the first request of a stream begins it"
            if count == len(self._datasets):
                name, streams = type(self.dataset).__name__, self.settings.streams
                raise ResumeError(
                    f"{name} cannot be copied, and the run began with {streams} "
                    f"workers, each with its own; go on with `num_workers={streams}`"
                )
            self._streams[shard] = _Stream(
                self._datasets[count], self.settings, request, shard, initial
            )
        return self._streams[shard]

    def _copy(self) -> None:
        """Make a data set for each further stream that is read in this process."""
        info = data.get_worker_info()
        further = self.settings.streams // (1 if info is None else info.num_workers) - 1
        with contextlib.suppress(Exception):  # "whole" needs none
            self._datasets += [copy.deepcopy(self.dataset) for _ in range(further)]


class _Stream:
    """One iterator over the data set, and how far it is."""

    def __init__(
        self,
        dataset: Any,
        settings: StreamSettings,
        request: StreamRequest,
        shard: int,
        initial: dict[str, Any],
    ) -> None:
        self._dataset, self._settings, self._initial = dataset, settings, initial
        self._key, self._epoch = request.key, request.epoch
        self._part = request.start or Part()
        self._iterator: Any = None
        self._start = None
        self._is_begun_twice = False
        self._is_watched = computes_ahead(dataset)
        self._number = shard * settings.world_size + settings.rank
        self._info: ShardInfo | None = None
        number, count = self._number, settings.streams * settings.world_size
        is_own = is_part_of_rank(dataset)
        if is_own:
            number, count = shard, settings.streams
        if count > 1 and request.kind != "whole":
            if _can_shard(dataset, settings):
                self._info = ShardInfo(number, count, request.key, dataset)
            elif request.kind == "shards":
                raise ResumeError(
                    f"the data set was read in {count} parts before the stop, and now "
                    f"has {dataset.num_shards} shards; give it the same data again"
                )
        self._is_replayed = loses_samples(dataset, is_shard=self._info is not None)
        self.kind = request.kind
        if self.kind is None and (is_own or self._info is None):
            self.kind = "shards" if is_own else "whole"

    def batch(
        self, request: StreamRequest, collate_fn: Callable[[Any], Any]
    ) -> StreamAnswer:
        """The batch of a turn, or the end."""
        if self._part.is_done:
            return StreamAnswer(None, 0, 0, None, self.kind or "whole", self._part)
        if self._iterator is None:
            self._begin(self._part)
        began_s = time.perf_counter()
        items, real, count = self._read(request.turn)
        collated = self._collate(items, request.turn, collate_fn) if items else None
        seconds = self._part.seconds + time.perf_counter() - began_s
        self._part = self._part._replace(seconds=seconds, states=self._saved())
        kind = self.kind or "whole"
        return StreamAnswer(collated, len(items), real, count, kind, self._part)

    def _begin(self, part: Part) -> None:
        """Make the iterator, and bring it to where the part is."""
        dataset, states = self._dataset, part.states or self._initial
        position = part.position if part.states else 0
        if "start" in states:
            states, position = {"start": states["start"]}, 0
        elif "unfinished" in states and hasattr(dataset, "set_epoch"):
            states = self._initial  # where it was in the order of another epoch
        began = (states[name] for name in _STARTS if name in states)
        self._start = next(began, None)
        torch_worker._worker_info = self._info  # type: ignore[assignment]
        self._seed(position)  # some read the first sample already
        # A new epoch has its own number, whatever an old state says.
        if position == 0:
            self._load(states)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(self._epoch)
        if position:
            self._load(states)
        self._iterator = iter(dataset)
        if getattr(self._iterator, "_cached_item", self) is None:
            # torchdata 0.11 would go on to give the state that an epoch ended with.
            self._iterator._cached_state_dict = None
        if position and "iterator" in states:
            self._iterator.load_state_dict(copy.deepcopy(states["iterator"]))
        self._watch(position)
        if position < part.position:
            self._replay(part)

    def _load(self, states: dict[str, Any]) -> None:
        for owner in states.keys() & _OWNERS:
            self._dataset.load_state_dict(copy.deepcopy(states[owner]))

    def _seed(self, position: int) -> None:
        # All streams begin with the same numbers: until its first sample has come,
        # nothing is known of a stream.
        stream = self._number if self.kind == "shards" and position else 0
        seed_for(self._key, stream, position, 1)

    def _replay(self, part: Part) -> None:
        self._part = Part(states=part.states)
        while self._part.position < part.position:
            if self._next() is _END:
                raise ResumeError(
                    f"the data set yields {self._part.position} samples in epoch "
                    f"{self._epoch}, and {part.position} of them had been read before "
                    "the stop; give it the same data again, or begin a new run"
                )
        self._part = part

    def _saved(self) -> dict[str, Any] | None:
        """The states of data set and iterator; None where they do not say all."""
        dataset, states = self._dataset, dict[str, Any]()
        if has_state(dataset):
            owner = "epoch" if is_of_datasets(dataset) else "dataset"
            states[owner] = copy.deepcopy(dataset.state_dict())
        if self._is_replayed:
            # The next epoch may depend on how this one came to its end.
            if "dataset" in states and self._part.is_done:
                return states
            if "dataset" not in states or self._start is None:
                return None
            return {"start": self._start, "unfinished": states["dataset"]}
        if self._is_watched and "dataset" in states:
            states["origin"] = self._start
        if has_state(self._iterator):
            states["iterator"] = copy.deepcopy(self._iterator.state_dict())
        return states or None

    def _collate(
        self, items: list[Any], turn: int, collate_fn: Callable[[Any], Any]
    ) -> Any:
        number = self._number if self.kind == "shards" else self._settings.rank
        seed_for(self._key, number, turn, 0, 0)
        try:
            return collate_fn(items)
        except Exception as error:
            end = self._part.position
            error.add_note(
                f"Helios: in collating samples of the stream, the last of them number "
                f"{end - 1}, with the shapes {[shape_of(item) for item in items[:8]]} "
                f"(epoch {self._epoch}, batch {turn})"
            )
            if isinstance(error, StopIteration):  # it would end the epoch in silence
                raise DataError("StopIteration in collating samples") from error
            raise

    def _read(self, turn: int) -> tuple[list[Any], int, int | None]:
        """The samples of a turn, with padding; how many are real; and of all ranks."""
        size, ranks = self._settings.batch_size, self._settings.world_size
        items: list[Any] = []
        first = self._next()  # it also shows the kind
        if first is _END:
            return [], 0, None
        if self.kind == "shards":
            items.append(first[0])
            while len(items) < size and (item := self._next()) is not _END:
                items.append(item[0])
            is_short = len(items) < size
            if is_short and self._settings.drop_last:
                return [], 0, None
            return items, len(items), None
        whole = size * ranks
        end, item, deal = (turn + 1) * whole, first, Deal(self._settings)
        while item is not _END:
            if self._part.position > turn * whole:
                deal.show(item[0])
            item = self._next() if self._part.position < end else _END
        count = deal.count
        if count < whole and (self._settings.drop_last or count == 0):
            return [], 0, None
        return *deal.end(), count

    def _next(self) -> Any:
        """The next sample, as a tuple of one, under its own random numbers."""
        if self._part.is_done:
            return _END
        position = self._part.position
        self._seed(position)
        torch_worker._worker_info = self._info  # type: ignore[assignment]
        try:
            item = next(self._iterator)
        except StopIteration:
            if position == 0 and self._part.states:
                # An earlier epoch left it at its end; some say so once, others always.
                if self._is_begun_twice:
                    self._part = Part()
                    self._begin(self._part)
                else:
                    self._is_begun_twice = True
                    self._iterator = iter(self._dataset)
                return self._next()
            self._learn_kind()
            self._part = self._part._replace(is_done=True)
            return _END
        except Exception as error:
            name = f"stream {self._number}" if self.kind == "shards" else "the stream"
            error.add_note(
                f"Helios: in sample {position} of {name} (epoch {self._epoch})"
            )
            raise
        self._watch(position)
        self._learn_kind()
        self._part = self._part._replace(position=position + 1)
        return (item,)

    def _watch(self, position: int) -> None:
        """Look whether samples that come later have drawn their numbers already."""
        if self._is_watched and has_drawn(lambda: self._seed(position)):
            self._is_watched, self._is_replayed = False, True

    def _learn_kind(self) -> None:
        if self.kind is None:
            assert self._info is not None
            self.kind = "shards" if self._info.was_read else "whole"
            if self.kind == "whole":
                self._info = None


def _can_shard(dataset: Any, settings: StreamSettings) -> bool:
    """Whether each rank and stream can get its share of the data set's own shards."""
    shards = getattr(dataset, "num_shards", None)
    if shards is None:
        return True
    sharers = 1 if is_part_of_rank(dataset) else settings.world_size
    return bool(settings.streams * sharers <= shards and shards % sharers == 0)
