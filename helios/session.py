"""The Session: one resumable execution, with its progress, checkpoints and logs."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from helios import fingerprint, rng
from helios.bars import reading
from helios.callbacks.base import Callback
from helios.checkpoint import Checkpoint, CheckpointStore, Encoder, read_checkpoint
from helios.checkpoint.records import RECORD, read_record
from helios.engine import Engine
from helios.errors import CheckpointError, CheckpointNotFoundError, ResumeError
from helios.fingerprint import Cost
from helios.journal import Journal
from helios.loggers.text import get_root_logger
from helios.model.model import Model
from helios.retention import SaveOptions
from helios.saving import Saver
from helios.sharding import layout_of, like
from helios.state import Schedule, TrainingState
from helios.stopping.requests import Stops
from helios.stopping.validation import Frozen

_PIECE_BYTES = 1 << 26


class Session:
    """One resumable execution. Hooks get it; the trainer makes it.

    ``state`` says how far training has come, ``schedule`` when it validates, saves,
    logs and ends, ``stop_reason`` why it is to stop. The state of ``model`` and of the
    other ``parts`` is saved to ``store``; ``identity`` is what exactness depends on.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        model: Model,
        parts: Mapping[str, Any],
        schedule: Schedule,
        identity: Mapping[str, Any],
        store: CheckpointStore | None = None,
        options: SaveOptions | None = None,
        callbacks: Sequence[Callback] = (),
        shows_progress: bool = False,
        stops: Stops | None = None,
    ) -> None:
        self.engine, self.schedule, self.state = engine, schedule, TrainingState()
        self.stops = stops or Stops()
        self.logger = get_root_logger()
        self.callbacks = list(callbacks)
        self.batches_per_epoch: int | None = None
        self.valid_batches: int | None = None
        self.beats = 0  #: batches of evaluations so far: a sign of life
        #: Where this rank's loaders stand; saved and restored as it is.
        self.reading: dict[str, Any] = {}
        self._model = model
        self._parts: dict[str, Any] = {"model": model, "scaler": engine, **parts}
        self.identity = {
            **identity,
            "versions": fingerprint.versions(),
            "hardware": fingerprint.hardware(engine.device),
            "code": fingerprint.git_commit(),
        }
        self._store = store
        self.saver: Saver | None = None
        if store is not None:
            self.saver = Saver(self, store, options or SaveOptions())
        #: During a validation: the state before it.
        self.frozen: Frozen | None = None
        self._restored: pathlib.Path | None = None
        #: The checkpoint that the run has made or taken up last.
        self.base: pathlib.Path | None = None
        self._copies = contextlib.ExitStack()
        self.journal = Journal(self)
        #: Called on all ranks; what it raises keeps them from saving.
        self.before_save: Callable[[], None] = lambda: None
        #: Called where the run has failed: tells what was seen, and not told yet.
        self.tell_unread: Callable[[BaseException], None] = lambda error: None
        self._own = f"rank_{engine.rank}"
        self._reading = partial(reading, is_shown=shows_progress and engine.is_main)

    @property
    def stop_reason(self) -> str | None:
        return self.stops.reason

    def request_stop(self, reason: str) -> None:
        """Ask the run to save and stop at the next batch; any rank, any thread."""
        self.stops.request(reason)

    def request_save(self) -> None:
        """Ask for a checkpoint after the step in work; any rank, any thread."""
        if self.saver is not None:
            self.saver.request()

    def _save(self) -> None:
        self.before_save()
        if self.saver is not None:
            self.saver.save()

    def _encode(self) -> tuple[Encoder, dict[str, Any]]:
        if self.frozen is not None:
            return self.frozen.encoded
        encoder, trees = Encoder(), dict[str, Any]()
        if self.engine.is_main or self.engine.is_sharded:  # each rank has its pieces
            networks: Any = Model.trained_state_dict(self._model)
            if len(networks) == 1:  # under their own names, as others expect them
                (networks,) = networks.values()
            trees["model"] = encoder.encode(networks, file="model")
            parts = {name: part.state_dict() for name, part in self._parts.items()}
            trees["training"] = encoder.encode(parts, file="training")
        if not self.engine.is_main:  # the files so far are the main rank's
            encoder = Encoder(encoder.pieces)
        holdings = self._model._holdings()
        parameters = holdings.all_parameters()
        own = {
            "rng": rng.capture_rng(self.engine.device),
            "books": self._books(),
            "reading": self.reading,
            # Not all wrappers keep them the same on the ranks, as DDP does.
            "buffers": holdings.buffers() if self.engine.world_size > 1 else {},
            "gradients": [[p.requires_grad, p.grad] for p in parameters],
            "shards": encoder.pieces,  # those of the gradients too: it comes last
        }
        trees[self._own] = encoder.encode(own, file=self._own)
        return encoder, trees

    def _books(self) -> dict[str, dict[str, Any]]:
        own = {"latest": self.journal.latest, "reductions": self.journal.reductions}
        return {**self._model._books(), **own}

    def restore(self, resume: Any, *, allow_inexact: bool) -> bool:
        """Take up a checkpoint, if there is one; every rank must call.

        Raises:
            CheckpointError: it cannot be used, or the state has no stored form.
            ResumeError: the run is not the one that was saved.
        """
        if self._store is not None:
            self._encode()  # to find out now, and not when the first save is due
        path = self._choose(resume)
        if path is None:
            if self.saver is not None:
                self.saver.settle(None)
            return False
        checkpoint = self._read(path, resume)
        if (imported := checkpoint.record.get("imported")) is None:
            saved = checkpoint.record["identity"]
            self._check_identity(path.name, saved, allow_inexact)
        else:
            for line in imported["unknown"]:
                self.logger.warning("imported from %s: %s", imported["from"], line)
        self.state.load(checkpoint.record["progress"])
        self.journal.restore_metrics(checkpoint.record["metrics"])
        if self.saver is not None:
            self.saver.mark()
        own = self._own if self._own in checkpoint.record["trees"] else "rank_0"
        self.reading = dict(checkpoint.tree(own)["reading"])
        # Hooks that run before training goes on see the restored state. What they
        # change in it is put back by put_back().
        self._load(checkpoint)
        self._restored = self.base = path
        at = f"epoch {self.state.global_epoch}, step {self.state.current_iteration}"
        self.logger.info("resumed from %s: %s", path.name, at)
        return True

    def restore_for_inference(self, resume: Any) -> None:
        """Load weights from a checkpoint, or as the model says where there is none."""
        path = self._choose("auto" if resume == "never" else resume)
        if path is None:
            self._model.load_for_testing()
            return
        self.logger.info("loaded %s", path.name)
        checkpoint = self._read(path, resume)
        self.state.load(checkpoint.record["progress"])
        weights = self._tree(checkpoint, "training")["model"]
        self._model._call_for_inference(self._model.load_state_dict, True, weights)

    def put_back(self) -> None:
        """Complete :meth:`restore`: state once more, then gradients and RNG, last.

        Nothing that hooks at a resume, or making the iterator, did outlives it.
        """
        if self._restored is None:
            return
        path, self._restored = self._restored, None
        checkpoint = read_checkpoint(path, verify=False)
        rank = self._load(checkpoint, own=True)
        self._put_back_gradients(checkpoint, rank)
        self.engine.barrier()  # the other ranks of this host have read the copy, too
        self._copies.close()
        if self.saver is not None:
            self.saver.settle(path)
        if rank is None:
            self.logger.warning("the checkpoint has no random numbers of %s", self._own)
            return
        buffers, saved = self._model._holdings().buffers(), rank.get("buffers", {})
        for name in buffers.keys() & saved.keys():
            buffers[name].copy_(saved[name])
        if rank["rng"] is not None:
            device = checkpoint.record["identity"].get("device_type")
            is_partial = device != self.engine.device.type  # or nothing is known
            rng.restore_rng(rank["rng"], self.engine.device, is_partial=is_partial)

    def _put_back_gradients(self, checkpoint: Checkpoint, rank: Any) -> None:
        """Put back which parameters ask for one, and those of an open window.

        Of another number of ranks each gets the mean, to which theirs would have come.
        """
        groups = [g for g in checkpoint.record["trees"] if g.startswith("rank_")]
        found = [] if rank is None else [rank["gradients"]]
        if len(groups) != self.engine.world_size:
            found = [self._tree(checkpoint, g)["gradients"] for g in groups]
        if not found or None in found:  # it is from elsewhere
            return
        parameters = self._model._holdings().all_parameters()
        for parameter, *pairs in zip(parameters, *found, strict=True):
            parameter.requires_grad_(pairs[0][0])
            grads = [grad.to(parameter.device) for _, grad in pairs if grad is not None]
            parameter.grad = None
            if grads:
                whole = grads[0] if len(pairs) == 1 else sum(grads) / len(pairs)
                parameter.grad = like(parameter, whole)

    def _choose(self, resume: Any) -> Any:
        if resume == "never":
            return None
        if resume not in ("auto", "must"):
            return self._reach(pathlib.Path(resume))
        found = None
        if self._store is not None and self.engine.is_main:
            found = self._store.find_last(self.logger.warning, self._reading)
        found = self.engine.broadcast(found)  # the main rank has verified it
        if found is None and resume == "must":
            raise CheckpointNotFoundError(
                '`resume` is "must", and `chkpt_root` has no whole checkpoint of '
                f'{self._model.save_name!r}; "auto" starts afresh where there is none'
            )
        return None if found is None else self._reach(found)

    def _reach(self, path: pathlib.Path) -> pathlib.Path:
        """The checkpoint; on a host that has not the main rank's, a copy of that."""
        engine, record, copy = self.engine, dict[str, Any](), None
        with contextlib.suppress(CheckpointError):  # raised again where it is read
            record = read_record(path)
        marks = engine.gather_objects(record.get("created"))
        if marks[0] is None or set(marks) == {marks[0]}:
            return path
        names, failure = list[str](), None
        if engine.is_main:
            try:  # what it says has to be true before anybody writes files by it
                found = read_checkpoint(path, verify=False)
                names = [*found.record["files"], RECORD]
            except CheckpointError as error:
                failure = error
        names, failure = engine.broadcast((names, failure))
        if failure is not None:
            raise failure
        has_it = record.get("created") == marks[0]
        if not has_it and engine.local_rank == 0:
            folder = tempfile.TemporaryDirectory(prefix=f"{path.name}-")
            copy = pathlib.Path(self._copies.enter_context(folder))
        for name in names:
            source = path / name if engine.is_main else os.devnull
            target = os.devnull if copy is None else copy / name
            with open(source, "rb") as read, open(target, "wb") as written:
                while piece := engine.broadcast(read.read(_PIECE_BYTES)):
                    written.write(piece)
        copies = [path if has_it else None, *engine.gather_objects(copy)]
        return next((one for one in copies if one is not None and one.exists()), path)

    def _read(self, path: pathlib.Path, resume: Any) -> Checkpoint:
        """Open what :meth:`_choose` gave: what it found, the main rank has verified."""
        is_named = resume not in ("auto", "must")
        with self._reading([path]) as advance:
            return read_checkpoint(path, verify=is_named, advance=advance)

    def _check_identity(self, name: str, saved: Any, allow_inexact: bool) -> None:
        found = fingerprint.compare(saved, self.identity)
        if not allow_inexact and Cost.EXACTNESS in found.values():
            lines = "\n  ".join(found)
            raise ResumeError(
                f"the run is not the one that was saved in {name}:\n  {lines}\nput it "
                "back as it was, pass `allow_inexact=True` to go on all the same, or "
                'start afresh with `resume="never"` or another `chkpt_root`'
            )
        for difference, cost in found.items():
            level = logging.INFO if cost is Cost.NOTHING else logging.WARNING
            self.logger.log(level, "not as it was saved: %s", difference)

    def _load(self, checkpoint: Checkpoint, *, own: bool = False) -> Any:
        """Load all state but gradients and RNG; return the rank's tree, if any.

        `own`: in memory of its own, rather than in a map of the checkpoint's files.
        """
        parts, rank = self._tree(checkpoint, "training", own=own), None
        if self._own in checkpoint.record["trees"]:
            rank = self._tree(checkpoint, self._own, own=own)
        is_from_elsewhere = "imported" in checkpoint.record
        if set(parts) != set(self._parts) and not is_from_elsewhere:
            raise ResumeError(
                f"the checkpoint holds the state of {sorted(parts)}, and the run "
                f"consists of {sorted(self._parts)}; use as many `callbacks` as then"
            )
        for name, part in self._parts.items():
            if name in parts:
                part.load_state_dict(parts[name])
        for name, book in self._books().items():
            book.clear()
            saved = {} if rank is None else rank["books"].get(name, {})
            for key, value in saved.items():
                is_tensor = isinstance(value, torch.Tensor)
                book[key] = value.to(self.engine.device) if is_tensor else value
        return rank

    def _tree(self, checkpoint: Checkpoint, group: str, *, own: bool = True) -> Any:
        def copied(path: Sequence[str | int]) -> bool:
            """Whether it is a network's, which copies it: all but its extra state."""
            is_network = group == "training" and path[:2] == ("model", "networks")
            is_extra = any(str(key).endswith("_extra_state") for key in path)
            return is_network and not is_extra

        parameters = self._model._holdings().all_parameters()
        return checkpoint.tree(
            group,
            own=own,
            device=self.engine.device,
            copied=copied,
            layout=layout_of(parameters),
        )

    def log(self, values: Mapping[str, Any], reduce: str | None = None) -> None:
        """Log numbers, or tensors of one element; see :meth:`helios.Model.log_dict`."""
        self.journal.log(values, reduce)

    def wait_for_checkpoint(self) -> None:
        """Wait until the last checkpoint is on the disk; every rank must call.

        Raises:
            CheckpointError: it could not be written.
        """
        failure = None
        try:
            if self.saver is not None:
                self.saver.complete()
                self.saver.finish()
                self.saver.check_saved()
        except Exception as error:  # the others wait to hear of it
            failure = error
        if self.engine.agree(failure is not None):
            raise failure or CheckpointError(
                "the last checkpoint could not be written; see the main rank's log"
            )

    def close(self) -> None:
        """End the writers, after what they have in hand."""
        with contextlib.ExitStack() as stack:  # the last one first, whatever fails
            for part in (self.engine, self.journal, self._copies):
                stack.callback(part.close)
            if self.saver is not None:
                stack.callback(self.saver.finish)
