"""Saving: when beside the schedule a checkpoint is due, and how it is made."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from helios.background import BackgroundWriter, Files
from helios.callbacks.base import Callback, overridden
from helios.checkpoint import CheckpointStore
from helios.errors import CheckpointError
from helios.retention import SaveOptions
from helios.state import TrainingUnit, check_name

if TYPE_CHECKING:
    from helios.session import Session

#: A file of this name in the folder of the checkpoints asks for one.
TRIGGER = "save"
_LOOK_EVERY_S = 1.0

_Record: TypeAlias = Mapping[str, Any]


@dataclasses.dataclass
class _Begun:
    """A checkpoint whose parts the ranks are writing."""

    name: str
    size_bytes: int
    record: dict[str, Any] = dataclasses.field(default_factory=dict)
    folder: Path = Path()
    entries: dict[str, Any] = dataclasses.field(default_factory=dict)
    failure: str | None = None


class Saver:
    """Writes the checkpoints of a session to a store, in the background."""

    def __init__(
        self,
        session: Session,
        store: CheckpointStore,
        options: SaveOptions,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store, self._options = store, options
        self._session, self._clock = session, clock
        self._background = BackgroundWriter()
        self._begun: _Begun | None = None
        self._hook_error: BaseException | None = None
        # What the state does not come from: others' checkpoints, and damaged ones.
        self._passed_over = set[Path]()
        self._saved_at: tuple[int, int, int] | None = None
        self._is_requested = self._is_prepared = self._has_warned = False
        self._saved_s = self._looked_s = clock()

    def request(self) -> None:
        """Have the next step saved; any rank, any thread."""
        self._is_requested = True

    def wants(self) -> bool:
        """Whether this rank wants to save now, whatever the schedule says."""
        if not self._is_prepared:  # after the first step the optimizers have a state
            self._is_prepared = True
            if self._saved_at != self._position():
                self._background.prepare(self._session._encode()[0].files)
        now_s, interval_s = self._clock(), self._options.chkpt_interval_s
        if self._session.engine.is_main:
            if now_s - self._looked_s >= _LOOK_EVERY_S:
                self._looked_s = now_s
                self._look()
            if interval_s is not None and now_s - self._saved_s >= interval_s:
                return True
        return self._is_requested

    def _look(self) -> None:
        try:
            (self.store.root / TRIGGER).unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            self._session.logger.error("no checkpoint is made on demand: %s", error)
            return
        self._is_requested = True

    def mark(self) -> None:
        """Note that the state as it is has been saved, or come from a checkpoint."""
        self._saved_at = self._position()

    def answered(self) -> None:
        """Note that what was wanted has been dealt with."""
        self._is_requested, self._saved_s = False, self._clock()

    def save(self) -> None:
        """Save a checkpoint, unless this state is saved already; every rank must call.

        Returns when the live tensors have been copied; the rest is written behind. A
        checkpoint that cannot be written is reported, and training goes on.
        """
        self.complete()
        # One of the same state may be under way still, and fail.
        if self.has_failed() or self._position() == self._saved_at:
            self.finish()
        session = self._session
        engine, model, own = session.engine, session._model, session._own
        # Only the main rank knows whether the last write has failed.
        if not engine.agree(self._position() != self._saved_at):
            return
        self.finish()
        encoder, trees = session._encode()
        state = session.state
        at = f"epoch_{state.global_epoch}_iter_{state.current_iteration}"
        name = model.append_metadata_to_chkpt_name(f"{model.save_name}_{at}")
        check_name("append_metadata_to_chkpt_name", name)
        size = sum(t.nbytes for ts in encoder.files.values() for t in ts.values())
        begun = _Begun(name, sum(engine.gather_objects(size)))
        if engine.world_size > 1 and not self._open(begun):
            return
        files = parts = self._background.snapshot(encoder.files)
        if engine.world_size > 1:
            parts = self._share_out(begun.folder, files)
        begun.record = {
            "progress": state.dict(),
            "identity": session.identity,
            # JSON has no others: "nan", "inf" and "-inf" are what `float` takes back.
            "metrics": {
                name: value if math.isfinite(value) else str(value)
                for name, value in session.journal.metrics().items()
            },
            "trees": dict(engine.gather_objects((own, trees[own]))) | trees,
        }
        self.mark()
        self._background.submit(partial(self._write, begun, parts, encoder.aliases))
        if engine.world_size > 1:
            self._begun = begun
        if not self._options.async_save:
            self._background.wait()
            self.complete()

    def _open(self, begun: _Begun) -> bool:
        """Make the folder that all ranks write into; every rank must call."""
        failure = None
        if self._session.engine.is_main:
            try:
                begun.folder = self.store.begin(begun.name, begun.size_bytes)
            except OSError as error:
                failure = error
        found = begun.folder if failure is None else None
        found = self._session.engine.broadcast(found)
        if found is None:
            self._report(failure)
            return False
        begun.folder = found
        return True

    def _share_out(self, folder: Path, files: Files) -> Files:
        """What this rank is to write; every rank must call.

        The main rank writes for those that do not see the folder. One after the other
        they send what they have, as gradients may be among it.
        """
        engine, own = self._session.engine, self._session._own
        parts = files if engine.is_main else {own: files[own]}
        for rank, sees_it in enumerate(engine.gather_objects(os.path.isdir(folder))):
            if not sees_it:
                tensors = engine.broadcast(files.get(f"rank_{rank}"), rank)
                if engine.is_main:
                    parts = {**parts, f"rank_{rank}": tensors}
                elif engine.rank == rank:
                    parts = {}
        return parts

    def _write(self, begun: _Begun, parts: Files, aliases: Mapping[str, Any]) -> None:
        """Write this rank's parts; one that is alone completes the checkpoint, too."""
        is_alone = self._session.engine.world_size == 1
        try:
            if is_alone:  # as making the folder takes time, too
                begun.folder = self.store.begin(begun.name, begun.size_bytes)
            for group, tensors in parts.items():
                begun.entries |= self.store.write_group(
                    begun.folder, group, tensors, aliases.get(group)
                )
        except BaseException as error:
            if is_alone:
                self._drop(begun)
                raise
            begun.failure = f"{type(error).__name__}: {error}"
            self._hook_error = None if isinstance(error, OSError) else error
            return
        if is_alone:
            self._seal(begun)

    def is_writing(self) -> bool:
        """Whether this rank has not written its parts of a checkpoint yet."""
        return self._begun is not None and self._background.is_busy

    def complete(self) -> None:
        """Make one whole whose parts all ranks have written; every rank must call."""
        begun, self._begun = self._begun, None
        if begun is None:  # as on all others
            return
        self._background.wait()
        engine = self._session.engine
        ranks = engine.gather_objects((begun.entries, begun.failure))
        failures = [f"on rank {r}: {why}" for r, (_, why) in enumerate(ranks) if why]
        if failures:
            if engine.is_main:
                self._drop(begun)
            self._report(OSError(failures[0]))
        elif not engine.is_main:
            self._session.base = self.store.root / begun.name
        else:
            for entries, _ in ranks:
                begun.entries |= entries
            self._background.submit(partial(self._seal, begun))
            if not self._options.async_save:
                self._background.wait()

    def _seal(self, begun: _Begun) -> None:
        try:
            # Logs must not fall behind what is resumed from.
            self._session.journal.flush_writer()
            record = {**begun.record, "files": begun.entries}
            self._commit(begun.folder, begun.name, record)
        except BaseException:
            self._drop(begun)
            raise

    def _drop(self, begun: _Begun) -> None:
        """Remove what has been written: a full disk may need it."""
        if begun.folder.name:
            shutil.rmtree(begun.folder, ignore_errors=True)

    def _commit(self, folder: Path, name: str, record: dict[str, Any]) -> None:
        best, others = self._options.keep_best, self.store.records()
        replaced = others.pop(self.store.root / name, None)
        self._passed_over.discard(self.store.root / name)
        found = {self.store.root / name: record, **self._counted(others)}
        if passed_over := sorted(p.name for p in others.keys() - found.keys()):
            record["passed_over"] = passed_over
        if best is not None:
            self._check_metric(best.metric, record["metrics"])
            record["is_best"] = self.store.root / name in best.best(found)[:1]
        known = {**others, folder: replaced} if replaced else others
        path = self._session.base = self.store.commit(folder, name, record, known)
        self._settle(found)
        try:
            hooks = self._session.callbacks
            for hook in overridden(hooks, Callback.on_checkpoint_saved):
                hook(self._session, path)
        except BaseException as error:  # the user's, not the disk's
            self._hook_error = error

    def settle(self, path: Path | None) -> None:
        """Finish what a run that died has left undone, once its state is taken up.

        What the checkpoint at ``path`` does not come from does not count, and stays:
        all that is newer, and what was passed over before; without one, everything.
        """
        if self._session.engine.is_main:
            self.store.clean()
            found = self.store.records()
            real = None if path is None else path.resolve()
            newer = [*takewhile(lambda p: p.resolve() != real, found)]
            before = next((r for p, r in found.items() if p not in newer), {})
            names = before.get("passed_over", ())
            self._passed_over = {*newer, *(p for p in found if p.name in names)}
            self._settle(self._counted(found))

    def own(self) -> Mapping[Path, _Record]:
        """The records that count, newest first: this run's, and what it comes from."""
        return self._counted(self.store.records())

    def _counted(self, found: Mapping[Path, _Record]) -> dict[Path, _Record]:
        return {p: r for p, r in found.items() if p not in self._passed_over}

    def _settle(self, found: Mapping[Path, _Record]) -> None:
        """Mark the best of these, delete those that need not stay."""
        best = self._options.keep_best
        marked = [] if best is None else best.best(found)[:1]
        try:
            for path, record in found.items() if best is not None else ():
                if bool(record.get("is_best")) != (path in marked):
                    self.store.amend(path, is_best=path in marked)
            is_epochs = self._session.schedule.train_unit is TrainingUnit.EPOCH
            kept = self._options.kept(found, is_epochs)
            for path in found:
                if path not in kept:
                    self.store.remove(path)
        except (OSError, CheckpointError) as error:
            self._session.logger.error(
                "OLDER CHECKPOINTS COULD NOT BE MARKED OR DELETED: %s", error
            )

    def _check_metric(self, name: str, metrics: Mapping[str, Any]) -> None:
        if name in metrics or self._has_warned:
            return
        self._has_warned = True
        self._session.logger.warning(
            "`keep_best` goes by %r, which was not logged at this step, but %s: a "
            "checkpoint without it is never the best",
            *(name, sorted(metrics) or "nothing"),
        )

    def has_failed(self) -> bool:
        """Whether :meth:`finish` has something to say."""
        return self._background.has_failed or self._hook_error is not None

    def finish(self) -> None:
        """Wait for the write in flight; report its failure, raise that of a hook."""
        try:
            self._background.wait()
            self._background.check()
        except CheckpointError as error:
            self._report(error)
            if not isinstance(error.__cause__, OSError | CheckpointError | None):
                raise error.__cause__ from None  # it is not the disk's
        user_error, self._hook_error = self._hook_error, None
        if user_error is not None:
            raise user_error

    def check_saved(self) -> None:
        """Raise a CheckpointError where the state as it is could not be saved."""
        if self._saved_at is None:
            raise CheckpointError("the last checkpoint could not be written; see above")

    def _position(self) -> tuple[int, int, int]:
        state = self._session.state
        return state.global_iteration, state.global_epoch, state.validation_cycles

    def _report(self, error: BaseException | None) -> None:
        self._saved_at = None
        if error is not None:
            self._session.logger.error(
                "A CHECKPOINT COULD NOT BE WRITTEN, the last good one stands: %s", error
            )
