"""Checks for users' own tests: of a data set, and of the resume of a whole training."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import random
import tempfile
import types
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch

from helios import rng
from helios.callbacks.base import Callback
from helios.checkpoint import find_last_checkpoint, read_checkpoint
from helios.data.batches import Loaded, listed, shorten
from helios.data.datamodule import DataModule, Params
from helios.data.loader import ResumableDataLoader, create_dataloader
from helios.data.packages import is_stream
from helios.data.params import DataLoaderParams
from helios.data.samplers import ResumableSamplerType, ResumableSubsetRandomSampler
from helios.differences import CONTAINERS, PLAIN, array_of, differences, members_of
from helios.errors import DataError
from helios.model.model import Model
from helios.session import Session
from helios.trainer import Trainer

_SHOWN = 8  # lines of a kind in a message
_PARTS = 8  # places at which a stream is entered
_NODES, _MEMBERS = 10_000, 100  # objects that are searched for state; members of each
_SMALL_BYTES = 1 << 20  # arrays up to here are searched for changes
_VALUES = (*PLAIN, *CONTAINERS, torch.Tensor, np.ndarray)
_THEN = "`{0}` was {1!r:.160}, and then {2!r:.160}"
_RESUMED = "`{0}` is {2!r:.160}, and {1!r:.160} without a stop"
_CURE = (
    "draw from `torch`, `random` and `numpy.random`, or from the generators of "
    "`helios.data.sample_rng()`; keep nothing from one sample to the next, but what "
    "`load_state_dict` of an iterable data set puts back"
)


def check_dataset(
    dataset: Any, params: Params = None, *, samples: int = 64, **overrides: Any
) -> None:
    """Find samples that are not a function of (seed, epoch, sample) alone.

    They are read as in training, and compared in bits: first in a worker, which has a
    copy of the data set; then here, after those of another epoch and in another order.
    An iterable data set is entered at several places, as after a stop. Nothing is drawn
    from the caller's random numbers. The data set may be changed: train on another one.

    Args:
        dataset: any that can be trained on.
        params: as for :func:`helios.data.create_dataloader`; `collate_fn` counts, too.
        samples: how many are read: evenly spread ones, where there is no `sampler`.
        **overrides: parameters that count more. With `num_workers=0` all is read here,
            and what the first reading leaves in the data set for good is not found.

    Raises:
        DataError: naming the samples that differ, and what may be the cause.
        Exception: what the data set raises, with a note that names the sample.
    """
    if not isinstance(samples, int) or samples < 1:
        raise ValueError(f"`samples` must be an int >= 1, got {samples!r}")
    given = params.to_dict() if isinstance(params, DataLoaderParams) else params or {}
    options = {**given, "num_workers": 1, **overrides}
    collate_fn, kind = options.get("collate_fn"), type(dataset).__name__
    owner = getattr(collate_fn, "__self__", collate_fn)  # of a method
    batches = -(-samples // options.setdefault("batch_size", 1))
    roots = {"dataset": dataset, "collate_fn": owner}
    fresh, used = _loaders(dataset, options, samples)
    before = _facts(roots)
    if not (expected := _read(fresh, 1, None, batches)):
        raise DataError(f"{kind} yields nothing")
    _read(used, 0, None, batches)
    if found := _differences(used, expected, batches):
        after = _facts(roots)
        changed = [p for p in before if after.get(p, before[p]) != before[p]]
        causes = [f"`{p}`: {before[p]}, then {after[p]}" for p in changed[:_SHOWN]]
        causes = causes or [
            "nothing that was found; is it the time, a class, a global?"
        ]
        raise DataError(
            f"{kind} gives other samples for the same random numbers, so that a resume "
            f"cannot repeat them (differences: {len(found)}):\n  "
            + "\n  ".join([*found[:_SHOWN], "what changed in it:", *causes, _CURE])
        )


def _loaders(
    dataset: Any, options: dict[str, Any], samples: int
) -> tuple[ResumableDataLoader, ResumableDataLoader]:
    """A loader with a worker, where there is to be one, and another without."""
    is_here = not options["num_workers"] or options.get("debug_mode")
    sampler = options.get("sampler")
    has_order = sampler is not None and not isinstance(sampler, ResumableSamplerType)
    options |= {
        "collate_fn": functools.partial(_collate, own=options.get("collate_fn")),
        "num_workers": 1,  # what is read does not depend on how many there are
        "persistent_workers": False,
        "pin_memory": False,
    }
    if not (has_order or is_stream(dataset)) and (length := len(dataset)):
        size = options["batch_size"]  # whole batches, in case short ones are dropped
        count = min(-(-samples // size) * size, length)
        spread = [i * (length - 1) // max(1, count - 1) for i in range(count)]
        options |= {"sampler": ResumableSubsetRandomSampler(spread), "shuffle": False}
    used, _ = create_dataloader(dataset, options, debug_mode=True)
    return used if is_here else create_dataloader(dataset, options)[0], used


def _collate(items: Any, *, own: Callable[[Any], Any] | None) -> tuple[Any, Any]:
    """The samples, and what the user's function makes of them."""
    copied = copy.deepcopy(items)  # they may be changed: by it, or for the next sample
    return copied, copied if own is None else own(items)


def _read(
    loader: ResumableDataLoader, epoch: int, before: Loaded | None, count: int
) -> list[Loaded]:
    """So many batches of an epoch, behind one that was read earlier."""
    cursor = None if before is None else copy.deepcopy(before.cursor)
    loader.seek(epoch, 0 if before is None else before.number + 1, cursor)
    # Copies: each tensor in a worker's shared memory keeps a file open.
    return [copy.deepcopy(loaded) for loaded in islice(loader.fetch(), count)]


def _differences(
    loader: ResumableDataLoader, expected: list[Loaded], batches: int
) -> list[str]:
    """Read the batches again, the last ones first; what differs, in words."""
    total, found = len(expected), list[str]()
    parts = total if loader.batches_per_epoch else min(total, _PARTS)
    for part in reversed(range(parts)):
        first, end = total * part // parts, total * (part + 1) // parts
        # A stream may have got longer.
        count = (batches if end == total else end) - first
        again = _read(loader, 1, expected[first - 1] if first else None, count)
        pairs = zip(expected[first:end], again, strict=False)
        here = [line for pair in pairs for line in _compared(*pair, expected[0].rows)]
        if len(again) != end - first:
            here.append(f"there were {end} batches, and then {first + len(again)}")
        found = here + found
    return found


def _compared(one: Loaded, two: Loaded, size: int) -> Iterator[str]:
    """What differs in two readings of a batch; `size` is that of a stream's others."""
    start, is_same = one.number * size, True
    indices = listed(one.indices) or list(range(start, start + one.rows))
    for index, *pair in zip(indices, one.data[0], two.data[0], strict=False):
        if difference := _first(pair[0], pair[1], "item"):
            is_same = False
            yield f"sample {index!r}: {_THEN.format(*difference)}"
    if is_same and (difference := _first(one.data[1], two.data[1], "batch")):
        yield f"samples {shorten(indices)}: {_THEN.format(*difference)}"


def assert_resumes_anywhere(
    make_model: Callable[[], Model],
    make_datamodule: Callable[[], DataModule],
    *,
    stops: Iterable[int] | None = None,
    crash: bool = False,
    **trainer: Any,
) -> None:
    """Assert that a training that is stopped again and again ends with the same bits.

    It is trained once without a stop, and once with stops, after each of which a new
    model, DataModule and Trainer go on. In the end weights, optimizers, all else that
    is saved, random numbers, counters and logged values must be the same. All is done
    in this process, whose random numbers are put back, and in a temporary folder.

    Args:
        make_model: called for each run, such as the Model's class.
        make_datamodule: called for each run.
        stops: after how many batches to stop. None: before the first and after each.
        crash: whether to fail there, rather than to stop: what came after the last
            checkpoint is lost, and done again. `chkpt_frequency` is 1 by default then.
        **trainer: further arguments of :class:`helios.Trainer`; `callbacks` are copied.

    Raises:
        AssertionError: naming the first values that differ, and what may be the cause.
        ValueError: the training has no such batches as `stops` names.
        Exception: what a run raises.
    """
    places = None if stops is None else sorted(set(stops))
    options = {"chkpt_frequency": 1 if crash else None, **trainer}
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(tempfile.TemporaryDirectory())
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.INFO)
        whole, parts, fresh = (
            _Training(make_model, make_datamodule, options, f"{root}/{name}")
            for name in ("whole", "parts", "fresh")
        )
        whole.run()
        every = list(range(whole.batches + 1))
        places = every if places is None else places
        if not set(places) <= set(every):
            raise ValueError(f"`stops` must be in 0 to {every[-1]}, got {places}")
        for place in places:
            parts.run(place, crash)
        parts.run()
        if found := _told(whole.outcome(), parts.outcome()):
            fresh.run(0, crash=True)
            causes = _told(whole.attributes(), parts.attributes())
            causes = [*causes, *fresh.data_faults()] or ["nothing that was found"]
            raise AssertionError(
                f"a training that {'crashed' if crash else 'was stopped'} after the "
                f"batches {shorten(places)} does not end as without:\n  "
                + "\n  ".join([*found, "what may be the cause:", *causes])
            )


def _told(whole: Mapping[str, Any], parts: Mapping[str, Any]) -> list[str]:
    """The first difference of each of the values that both have, in words."""
    names = [name for name in whole if name in parts]
    found = (_first(whole[name], parts[name], name) for name in names)
    return [_RESUMED.format(*difference) for difference in filter(None, found)][:_SHOWN]


def _first(one: Any, two: Any, path: str) -> tuple[str, Any, Any] | None:
    return next(differences(one, two, path), None)


class _CrashError(Exception):
    """What a run fails with where it is to."""


@dataclasses.dataclass(eq=False)
class _Training(Callback):
    """One training, in one run or in several, which it ends at places and watches."""

    make_model: Callable[[], Model]
    make_datamodule: Callable[[], DataModule]
    options: Mapping[str, Any]
    root: str
    runs: int = 0
    batches: int = 0
    logged: dict[str, float] = dataclasses.field(default_factory=dict)

    def run(self, place: int | None = None, crash: bool = False) -> None:
        """Train from where the run before has ended, up to a place or the end."""
        defaults = {"enable_progress_bar": False, "print_banner": False, "keep_last": 1}
        options = {**defaults, **self.options, "chkpt_root": self.root}
        callbacks = copy.deepcopy(list(options.get("callbacks", ())))
        silent = options.get("train_exceptions", ())
        options |= {"train_exceptions": [*silent, _CrashError], "resume": "auto"}
        self.place, self.crash = place, crash
        # Each run in other random numbers, as another process would.
        with rng.isolated_rng(self.runs), contextlib.suppress(_CrashError):
            self.runs += 1
            self.model, self.datamodule = self.make_model(), self.make_datamodule()
            trainer = Trainer(**{**options, "callbacks": [*callbacks, self]})
            trainer.fit(self.model, self.datamodule)

    def on_training_start(self, session: Session) -> None:
        self.batches = session.state.global_iteration
        if self.batches == self.place and self.crash:
            raise _CrashError
        if self.batches == self.place:
            session.request_stop("a test of the resume")

    on_training_batch_end = on_training_start

    def on_log(self, session: Session, values: dict[str, float]) -> None:
        step = session.state.current_iteration
        self.logged |= {f"{name} of step {step}": v for name, v in values.items()}

    def outcome(self) -> dict[str, Any]:
        """All that must be the same in the end."""
        path = find_last_checkpoint(self.root)
        assert path is not None, "every run that ends saves a checkpoint"
        checkpoint = read_checkpoint(path)
        rank, progress = checkpoint.tree("rank_0"), checkpoint.record["progress"]
        return {
            # The base's: an older project's own may leave something out.
            "model": Model.state_dict(self.model),
            "saved": checkpoint.tree("training"),
            **{name: rank[name] for name in ("rng", "books", "gradients")},
            "state": {k: v for k, v in progress.items() if "time" not in k},
            "log": self.logged,
        }

    def attributes(self) -> dict[str, Any]:
        """What is not saved by itself, and may be the cause of a difference."""
        kinds = vars(self.model._holdings()).values()
        saved = {path.partition(".")[0] for kind in kinds for path in kind}
        own = {k: v for k, v in vars(self.model).items() if k not in saved}
        return {
            f"{holder}.{name}": value
            for holder, values in [
                ("model", own),
                ("datamodule", vars(self.datamodule)),
            ]
            for name, value in values.items()
            if isinstance(value, _VALUES) and not name.startswith("_")
        }

    def data_faults(self) -> list[str]:
        """What `check_dataset` says of the training data."""
        try:
            phase = self.datamodule._current()
            assert phase is not None, "it was trained on"
            check_dataset(phase.dataset, phase.params)
        except Exception as error:  # the differences are to be told
            return [f"{type(error).__name__}: {error}"]
        return []


def _facts(roots: Mapping[str, Any]) -> dict[str, str]:
    """Descriptions, by path, of all that may be state and is reached from the roots."""
    facts, seen, queue = dict[str, str](), dict[int, Any](), deque(roots.items())
    while queue and len(facts) < _NODES:
        path, value = queue.popleft()
        if id(value) in seen or isinstance(value, types.ModuleType | type):
            continue
        if not isinstance(value, PLAIN):
            seen[id(value)] = value
        with contextlib.suppress(Exception):  # the samples are what counts
            facts[path] = _fact(value)
            members = members_of(value, _MEMBERS) or {}
            queue.extend((path + name, member) for name, member in members.items())
    return facts


def _fact(value: Any) -> str:
    """A description of a value's own state."""
    if isinstance(value, PLAIN):
        return f"{value!r:.80}"
    if isinstance(value, CONTAINERS):
        return f"{len(value)} entries"
    state: Any = list(members_of(value) or ())
    if isinstance(value, torch.Tensor | np.ndarray):
        state = array_of(value).tobytes() if value.nbytes < _SMALL_BYTES else None
    elif isinstance(value, torch.Generator):
        state = value.get_state().tolist()
    elif isinstance(value, np.random.Generator):
        state = value.bit_generator.state
    elif isinstance(value, np.random.RandomState | random.Random):
        state = value.__reduce__()
    checksum = zlib.crc32(repr(state).encode())
    return f"a {type(value).__name__} in the state {checksum:08x}"
