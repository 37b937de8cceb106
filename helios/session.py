"""The Session: one resumable execution, with its progress, checkpoints and logs."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from helios import fingerprint, rng
from helios.callbacks.base import Callback, overridden
from helios.checkpoint import (
    BackgroundWriter,
    CheckpointStore,
    Encoder,
    read_checkpoint,
)
from helios.engine import Engine
from helios.errors import CheckpointError, CheckpointNotFoundError, ResumeError
from helios.loggers.tensorboard import NullWriter
from helios.loggers.text import get_root_logger
from helios.model.model import Model
from helios.state import Schedule, TrainingState, check_name


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
        keep_last: int | None = None,
        async_save: bool = True,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.engine, self.schedule, self.state = engine, schedule, TrainingState()
        self.stop_reason: str | None = None
        self.writer: Any = NullWriter()
        self.logger = get_root_logger()
        self.callbacks = list(callbacks)
        self.batches_per_epoch: int | None = None
        self.valid_batches: int | None = None
        self._model = model
        self._parts: dict[str, Any] = {"model": model, "scaler": engine, **parts}
        self._identity = {**identity, "versions": fingerprint.versions()}
        self._store, self._keep_last, self._async = store, keep_last, async_save
        self._background = BackgroundWriter()
        self._restored: dict[str, Any] | None = None
        self._saved_at: tuple[int, int] | None = None
        self._hook_error: BaseException | None = None
        self._keeps: str | None = None
        self._latest: dict[str, Any] = {}
        self._sums: dict[str, tuple[Any, int]] = {}
        self._log_hooks = overridden(self.callbacks, Callback.on_log)
        self._own = f"rank_{engine.rank}"

    def request_stop(self, reason: str) -> None:
        """Ask the run to save and stop at the next batch; any rank, any thread."""
        self.stop_reason = self.stop_reason or reason

    def _save(self) -> None:
        """Save a checkpoint, unless this state is saved already; every rank must call.

        Returns when the live tensors have been copied; the rest is written behind. A
        checkpoint that cannot be written is reported, and training goes on.
        """
        if self._store is None or self._position() == self._saved_at:
            return
        self._finish_write()
        encoder, trees = self._encode()
        files = self._background.snapshot(encoder.files)
        at = f"epoch_{self.state.global_epoch}_iter_{self.state.current_iteration}"
        name = f"{self._model.save_name}_{at}"
        name = self._model.append_metadata_to_chkpt_name(name)
        check_name("append_metadata_to_chkpt_name", name)
        self._write(self._store, name, encoder.aliases, trees, files)

    def _encode(self) -> tuple[Encoder, dict[str, Any]]:
        encoder, trees = Encoder(), dict[str, Any]()
        if self.engine.is_main:
            networks: Any = Model.trained_state_dict(self._model)
            if len(networks) == 1:  # under their own names, as others expect them
                (networks,) = networks.values()
            trees["model"] = encoder.encode(networks, file="model")
            parts = {name: part.state_dict() for name, part in self._parts.items()}
            trees["training"] = encoder.encode(parts, file="training")
        parameters = self._model._holdings().all_parameters()
        own = {
            "rng": rng.capture_rng(self.engine.device),
            "books": self._books(),
            "gradients": [[p.requires_grad, p.grad] for p in parameters],
        }
        trees[self._own] = encoder.encode(own, file=self._own)
        return encoder, trees

    def _write(
        self, store: CheckpointStore, name: str, aliases: Any, trees: Any, files: Any
    ) -> None:
        engine = self.engine
        record = {"progress": self.state.dict(), "identity": self._identity}

        def finish() -> None:
            done = {rank: entry for rank, _, entry in ranks if entry is not None}
            for file, tensors in files.items():
                done[file] = store.write_file(folder, file, tensors, aliases[file])
            all_trees = {rank: tree for rank, tree, _ in ranks} | trees
            # Logs must not fall behind what is resumed from.
            self._write_logs(lambda: self.writer.flush())
            content = {**record, "trees": all_trees, "files": done}
            path = store.commit(folder, name, content)
            if self._keep_last is not None:
                store.prune(self._keep_last)
            try:
                for hook in overridden(self.callbacks, Callback.on_checkpoint_saved):
                    hook(self, path)
            except BaseException as error:  # the user's, not the disk's
                self._hook_error = error

        try:
            folder = engine.gather_objects(engine.is_main and store.begin(name))[0]
            # The other ranks' files are small: they are written at once, so that the
            # main rank can finish alone, in the background.
            entry = None
            if not engine.is_main:
                entry = store.write_file(folder, self._own, files[self._own])
            ranks = engine.gather_objects((self._own, trees[self._own], entry))
        except OSError as error:
            if engine.world_size > 1:
                raise  # the other ranks would wait for this one for ever
            self._report(error)
            return
        self._saved_at = self._position()
        if engine.is_main:
            self._background.submit(finish)
            if not self._async:
                self._background.wait()

    def _finish_write(self) -> None:
        try:
            self._background.wait()
            self._background.check()
        except CheckpointError as error:
            self._report(error)
        user_error, self._hook_error = self._hook_error, None
        if user_error is not None:
            raise user_error

    def _position(self) -> tuple[int, int]:
        return self.state.global_iteration, self.state.global_epoch

    def _books(self) -> dict[str, dict[str, Any]]:
        return {**self._model._books(), "latest": self._latest}

    def _report(self, error: BaseException) -> None:
        self._saved_at = None
        self.logger.error(
            "A CHECKPOINT COULD NOT BE WRITTEN, the last good one stands: %s", error
        )

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
            return False
        checkpoint = read_checkpoint(path)
        self._check_identity(path.name, checkpoint.record["identity"], allow_inexact)
        self.state.load(checkpoint.record["progress"])
        self._saved_at = self._position()
        self._restored = {"parts": checkpoint.tree("training"), "rank": None}
        if self._own in checkpoint.record["trees"]:
            self._restored["rank"] = checkpoint.tree(self._own)
        # Hooks that run before training goes on see the restored state, and what they
        # change in it is put back by put_back(): so they get copies.
        self._load(copy.deepcopy(self._restored))
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
        checkpoint = read_checkpoint(path)
        self.state.load(checkpoint.record["progress"])
        weights = checkpoint.tree("training")["model"]
        self._model._call_for_inference(self._model.load_state_dict, True, weights)

    def put_back(self) -> None:
        """Complete :meth:`restore`: state once more, then gradients and RNG, last.

        Nothing that hooks at a resume, or making the iterator, did outlives it.
        """
        if self._restored is None:
            return
        restored, self._restored = self._restored, None
        self._load(restored)
        rank = restored["rank"]
        if rank is None:
            self.logger.warning("the checkpoint has no random numbers of %s", self._own)
            return
        parameters = self._model._holdings().all_parameters()
        for parameter, (asks, grad) in zip(parameters, rank["gradients"], strict=True):
            parameter.requires_grad_(asks)
            parameter.grad = None if grad is None else grad.to(parameter.device)
        rng.restore_rng(rank["rng"], self.engine.device)

    def _choose(self, resume: Any) -> Any:
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

    def _check_identity(self, name: str, saved: Any, allow_inexact: bool) -> None:
        found = fingerprint.compare(saved, self._identity)
        if not allow_inexact and any(found.values()):
            lines = "\n  ".join(found)
            raise ResumeError(
                f"the run is not the one that was saved in {name}:\n  {lines}\nput it "
                "back as it was, pass `allow_inexact=True` to go on all the same, or "
                'start afresh with `resume="never"` or another `chkpt_root`'
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
        for name, book in self._books().items():
            book.clear()
            for key, value in rank["books"][name].items() if rank is not None else ():
                is_tensor = isinstance(value, torch.Tensor)
                book[key] = value.to(self.engine.device) if is_tensor else value

    def keep(self, what: str | None) -> None:
        """Keep the "latest" or the "means" for :meth:`flush`; None: write at once."""
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
        numbers = {}
        for name, value in values.items():
            try:
                numbers[name] = float(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(
                    f"`{name}` is logged, and is no number: {error}"
                ) from error
        step = self.state.current_iteration
        for name, number in numbers.items():
            self._write_logs(partial(self.writer.add_scalar, name, number, step))
        if self.engine.accelerator.trackers:
            self.engine.accelerator.log(numbers, step=step)
        shown = "  ".join(f"{name} {number:.4g}" for name, number in numbers.items())
        epoch = self.state.global_epoch + (self.state.dataset_iter > 0)
        self.logger.info("epoch %d  step %d  %s", epoch, step, shown)
        for hook in self._log_hooks:
            hook(self, numbers)

    def wait_for_checkpoint(self) -> None:
        """Wait until the last checkpoint is on the disk; every rank must call.

        Raises:
            CheckpointError: it could not be written.
        """
        self._finish_write()
        if self._store is not None and self._saved_at is None:
            raise CheckpointError("the last checkpoint could not be written; see above")
        self.engine.barrier()

    def close(self) -> None:
        """End the writers, after what they have in hand."""
        self._finish_write()
        self._write_logs(lambda: self.writer.close())
        self.engine.close()

    def _write_logs(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self.logger.error("TensorBoard's log ends here: %s", error)
            self.writer = NullWriter()
