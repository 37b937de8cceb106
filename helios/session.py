"""The Session: one resumable execution, with its progress, checkpoints and logs."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from helios import fingerprint, rng
from helios.callbacks.base import Callback, overridden
from helios.checkpoint import (
    BackgroundWriter,
    Checkpoint,
    CheckpointStore,
    Encoder,
    read_checkpoint,
)
from helios.engine import Engine
from helios.errors import CheckpointError, CheckpointNotFoundError, ResumeError
from helios.loggers.tensorboard import NullWriter
from helios.loggers.text import get_root_logger
from helios.state import Boundary, Schedule, TrainingState

if TYPE_CHECKING:
    from helios.model.model import Model

__all__ = ["Part", "Session"]


class Part(Protocol):
    """Something whose state is saved with the run, as a tree."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Session:
    """One resumable execution. Hooks get it; the trainer makes it.

    Args:
        model: whose state is saved, with its running losses and pending gradients.
        parts: what else is saved, by name.
        identity: what exactness depends on (see :mod:`helios.fingerprint`).
        store: where checkpoints go; None: nowhere.

    Attributes:
        state: how far training has come.
        schedule: when it validates, saves, logs and ends.
        stop_reason: why the run is asked to stop; None: it is not.
        unsettled: the boundary whose validation is still due, after a resume.
        writer: TensorBoard's, or a null object.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        model: Model,
        parts: Mapping[str, Part],
        schedule: Schedule,
        identity: Mapping[str, Any],
        store: CheckpointStore | None = None,
        keep_last: int | None = None,
        async_save: bool = True,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.engine = engine
        self.schedule = schedule
        self.state = TrainingState()
        self.stop_reason: str | None = None
        self.unsettled: Boundary | None = None
        self.writer: Any = NullWriter()
        self.logger = get_root_logger()
        self.callbacks = list(callbacks)
        self.batches_per_epoch: int | None = None
        self.valid_batches: int | None = None
        self._model = model
        self._parts: dict[str, Part] = {"model": model, "scaler": engine, **parts}
        self._identity = {
            **identity,
            "world_size": engine.world_size,
            "versions": fingerprint.versions(),
        }
        self._store, self._keep_last, self._async = store, keep_last, async_save
        self._background = BackgroundWriter()
        self._restored: dict[str, Any] | None = None
        self._mark: dict[str, Any] | None = None
        self._saved_at: tuple[Any, ...] | None = None
        self._keeps: str | None = None
        self._latest: dict[str, Any] = {}
        self._sums: dict[str, tuple[Any, int]] = {}
        self._books = {**model._books(), "latest": self._latest}
        self._log_hooks = overridden(self.callbacks, Callback.on_log)
        self._own = f"rank_{engine.rank}"

    def request_stop(self, reason: str) -> None:
        """Ask the run to save and stop at the next batch; any rank, any thread."""
        if self.stop_reason is None:
            self.stop_reason = reason

    # Saving.

    def save(self, boundary: Boundary, *, settled: bool = True) -> None:
        """Save a checkpoint of this boundary; every rank must call.

        Returns when the live tensors have been copied; the rest is written behind. A
        checkpoint that cannot be written is reported, and training goes on.

        Args:
            boundary: where the run is.
            settled: whether what is due there (a validation) has been done.
        """
        if self._store is None or self._position(settled) == self._saved_at:
            return
        try:
            self._background.wait()
            self._background.check()
        except CheckpointError as error:
            self._report(error)
        encoder, trees, mine = self._encode()
        at = {"boundary": boundary.value, "settled": settled}
        record = {"progress": {**self.state.dict(), **at}, "identity": self._identity}
        try:
            self._write(encoder, trees, mine, record)
        except OSError as error:
            self._report(error)
        else:
            self._saved_at = self._position(settled)

    def _encode(self) -> tuple[Encoder, dict[str, Any], Any]:
        """This rank's state: the tensors, the trees of the job, the tree of the rank."""
        encoder, trees = Encoder(), dict[str, Any]()
        if self.engine.is_main:
            networks: Any = self._model._holdings().weights(self._model.unwrap)
            if len(networks) == 1:
                (networks,) = networks.values()
            trees["model"] = encoder.encode(networks, file="model")
            marked = self._mark["parts"] if self._mark is not None else {}
            parts = {
                name: {**part.state_dict(), **marked.get(name, {})}
                for name, part in self._parts.items()
            }
            trees["training"] = encoder.encode(parts, file="training")
        rank_tree = self._mark["rank"] if self._mark is not None else self._rank_tree()
        return encoder, trees, encoder.encode(rank_tree, file=self._own)

    def _write(
        self, encoder: Encoder, trees: dict[str, Any], mine: Any, record: dict[str, Any]
    ) -> None:
        engine, store, state = self.engine, self._store, self.state
        assert store is not None
        name = f"{self._model.save_name}_epoch_{state.global_epoch}"
        name = self._model.append_metadata_to_chkpt_name(
            f"{name}_iter_{state.current_iteration}"
        )
        files = self._background.snapshot(encoder.files)
        folder = store.begin(name) if engine.is_main else None
        folder = engine.gather_objects(folder)[0]
        # The other ranks' files are small: they are written at once, so that the main
        # rank can finish alone, in the background.
        written = None
        if not engine.is_main:
            written = store.write_file(folder, self._own, files[self._own])
        ranks = engine.gather_objects((self._own, mine, written))

        def finish() -> None:
            done = {rank: entry for rank, _, entry in ranks if entry is not None}
            for file, tensors in files.items():
                aliases = encoder.aliases[file]
                done[file] = store.write_file(folder, file, tensors, aliases)
            all_trees = {**trees, **{rank: tree for rank, tree, _ in ranks}}
            content = {**record, "trees": all_trees, "files": done}
            path = store.commit(folder, name, content)
            if self._keep_last is not None:
                store.prune(self._keep_last)
            for hook in overridden(self.callbacks, Callback.on_checkpoint_saved):
                hook(self, path)

        if engine.is_main:
            self._background.submit(finish)
            if not self._async:
                self._background.wait()

    def _position(self, settled: bool) -> tuple[Any, ...]:
        return self.state.global_iteration, self.state.global_epoch, settled

    def _rank_tree(self) -> dict[str, Any]:
        gradients = [p.grad for p in self._model._holdings().trainable()]
        return {
            "rng": rng.capture_rng(self.engine.device),
            "books": {name: dict(book) for name, book in self._books.items()},
            "gradients": gradients if any(g is not None for g in gradients) else None,
        }

    def _report(self, error: BaseException) -> None:
        self._saved_at = None
        self.logger.error(
            "A CHECKPOINT COULD NOT BE WRITTEN (%s); training goes on, and the last "
            "good checkpoint stands",
            error,
        )

    def mark(self) -> None:
        """Remember what a validation may change, should it be interrupted."""
        parts = {k: v.state_dict() for k, v in self._parts.items() if k != "model"}
        parts["model"] = self._model._light_state()
        self._mark = copy.deepcopy({"rank": self._rank_tree(), "parts": parts})

    def unmark(self) -> None:
        """Forget it: the validation is finished."""
        self._mark = None

    # Resuming.

    def restore(self, resume: Any, *, allow_inexact: bool) -> bool:
        """Take up a checkpoint, all but the random numbers; every rank must call.

        Args:
            resume: ``"auto"`` (the newest whole one, if any), ``"must"`` (one must be
                there), ``"never"``, or the path of one.
            allow_inexact: go on where the run is not the one that was saved.

        Returns:
            Whether there was one.

        Raises:
            CheckpointError: it cannot be used.
            ResumeError: the run is not the one that was saved.
            UnstorableError: the state holds something that has no stored form.
        """
        if self._store is not None:
            self._encode()  # to find out now, and not when the first save is due
        path = self._choose(resume)
        if path is None:
            return False
        checkpoint = read_checkpoint(path)
        self._check_identity(checkpoint, allow_inexact)
        progress = dict(checkpoint.record["progress"])
        boundary, settled = Boundary(progress.pop("boundary")), progress.pop("settled")
        self.unsettled = None if settled else boundary
        self.state.load(progress)
        self._saved_at = self._position(settled)
        self._restored = {"parts": checkpoint.tree("training"), "rank": None}
        if self._own in checkpoint.record["trees"]:
            self._restored["rank"] = checkpoint.tree(self._own)
        # Hooks that run before training goes on see the restored state, and what they
        # change in it is put back by put_back(): so they get copies.
        self._load(copy.deepcopy(self._restored))
        state = self.state
        at = f"epoch {state.global_epoch}, step {state.current_iteration}"
        self.logger.info("resumed from %s: %s", path.name, at)
        return True

    def put_back(self) -> None:
        """Complete :meth:`restore`: state once more, then gradients and RNG, last.

        Called when all hooks that run at a resume have run and the loader's iterator
        has been made, so that nothing that these did outlives it.
        """
        if self._restored is None:
            return
        restored, self._restored = self._restored, None
        self._load(restored)
        rank = restored["rank"]
        if rank is None:
            self.logger.warning("the checkpoint has no random numbers of %s", self._own)
            return
        if rank["gradients"] is not None:
            trainable = self._model._holdings().trainable()
            for parameter, grad in zip(trainable, rank["gradients"], strict=True):
                parameter.grad = None if grad is None else grad.to(parameter.device)
        rng.restore_rng(rank["rng"], self.engine.device)

    def _choose(self, resume: Any) -> pathlib.Path | None:
        if resume == "never":
            return None
        if resume not in ("auto", "must"):
            return pathlib.Path(resume)
        found = None
        if self._store is not None and self.engine.is_main:
            found = self._store.find_last(self.logger.warning)
        found = self.engine.gather_objects(found)[0]
        if found is None and resume == "must":
            raise CheckpointNotFoundError(
                '`resume` is "must", and `chkpt_root` has no whole checkpoint of '
                f'{self._model.save_name!r}; "auto" starts afresh where there is none'
            )
        return found

    def _check_identity(self, checkpoint: Checkpoint, allow_inexact: bool) -> None:
        found = fingerprint.compare(checkpoint.record["identity"], self._identity)
        if not allow_inexact and any(difference.is_inexact for difference in found):
            lines = "\n  ".join(map(str, found))
            raise ResumeError(
                f"the run is not the one that was saved in {checkpoint.path.name}:\n"
                f"  {lines}\nput it back as it was, pass `allow_inexact=True` to go on "
                'all the same, or start afresh with `resume="never"` or another '
                "`chkpt_root`"
            )
        for difference in found:
            self.logger.warning("not as it was saved: %s", difference)

    def _load(self, restored: Mapping[str, Any]) -> None:
        parts, rank = restored["parts"], restored["rank"]
        if set(parts) != set(self._parts):
            raise ResumeError(
                f"the checkpoint holds the state of {sorted(parts)}, and the run "
                f"consists of {sorted(self._parts)}; use as many `callbacks` as then"
            )
        for name, part in self._parts.items():
            part.load_state_dict(parts[name])
        for name, book in self._books.items():
            book.clear()
            for key, value in rank["books"][name].items() if rank is not None else ():
                is_tensor = isinstance(value, torch.Tensor)
                book[key] = value.to(self.engine.device) if is_tensor else value

    # Logging.

    def keep(self, what: str | None) -> None:
        """From here on, of logged values keep the ``"latest"``, the ``"means"``, or
        nothing (``None``): write them at once. :meth:`flush` writes what is kept.
        """
        self._keeps = what
        self._sums = {}

    def flush(self) -> None:
        """Write what was kept; every rank must call."""
        if self._keeps == "means" and self._sums:
            sums, self._sums = self._sums, {}
            means = {name: total / count for name, (total, count) in sums.items()}
            self._emit(self.engine.reduce_mean(means))
        elif self._keeps == "latest" and self._latest:
            self._emit(self._latest)
            self._latest.clear()

    def log(self, values: Mapping[str, Any]) -> None:
        """Log numbers, or tensors of one element, under the current step."""
        if self._keeps is None:
            self._emit(values)
            return
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                value = value.detach()
            if self._keeps == "latest":
                self._latest[name] = value
            else:
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + value, count + 1)

    def _emit(self, values: Mapping[str, Any]) -> None:
        if not self.engine.is_main:
            return
        numbers = {name: float(value) for name, value in values.items()}
        step = self.state.current_iteration
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)
        if self.engine.accelerator.trackers:
            self.engine.accelerator.log(numbers, step=step)
        shown = "  ".join(f"{name} {number:.4g}" for name, number in numbers.items())
        self.logger.info("epoch %d  step %d  %s", self.state.global_epoch, step, shown)
        for hook in self._log_hooks:
            hook(self, numbers)

    # The end.

    def wait_for_checkpoint(self) -> None:
        """Wait until the last checkpoint is on the disk; every rank must call.

        Raises:
            CheckpointError: it could not be written.
        """
        self._background.wait()
        self._background.check()
        self.engine.barrier()

    def close(self) -> None:
        """End the writers, after what they have in hand."""
        try:
            self._background.close()
        except CheckpointError as error:
            self._report(error)
        self.writer.close()
        self.engine.close()
