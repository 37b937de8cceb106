"""The Session of a loop that its user has written."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import FrameType, TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader

from helios import session
from helios.arguments import check_writable
from helios.callbacks.base import Callback, overridden
from helios.checkpoint import CheckpointStore, Encoder
from helios.data.feed import Feed
from helios.engine import Accelerator
from helios.errors import DataError, ModelError
from helios.evaluation import to_the_end_of_all
from helios.failures.bundle import Wish
from helios.failures.replay import replayed
from helios.handwritten.arguments import Attributes, check_arguments, settings_of
from helios.handwritten.batches import Batches
from helios.handwritten.faults import failures_told, passed_on
from helios.handwritten.late import Latecomers
from helios.handwritten.parts import TRAIN, Held, Loaders, check_ranks, engine_for
from helios.handwritten.stopped import finish_run, stopped_run, warn_if_finished_here
from helios.handwritten.variables import names_in
from helios.health.watch import Health
from helios.loggers.tensorboard import open_writer
from helios.loggers.text import text_logging
from helios.loop import Run
from helios.retention import KeepBest
from helios.state import Boundary, EpochStage
from helios.stopping.ranks import end_with_launcher
from helios.stopping.requests import Stops
from helios.verifying.trace import traces
from helios.watchdog import watched


class Session(session.Session):
    """What a loop that you have written runs on, in the place of a Trainer.

    It loads the newest checkpoint below ``path``, if there is one; :meth:`epochs` and
    :meth:`batches` then go on where that was saved, to the same bits. Every rank must
    make one, and use it alike. As a context manager it also logs what a failed loop has
    raised. ``loaders`` are the one that is trained on, or a dict with it as "train".

    ``objects`` are what training changes, under names of your choice: networks,
    optimizers, schedulers, generators, and anything else with ``state_dict`` and
    ``load_state_dict``; lists, tuples and dicts of these, too. An object with neither
    is saved by its attributes. Without an optimizer among them, what Accelerate has
    prepared is added. What was registered with its
    ``register_for_checkpointing`` is added. If you pass some, and none of them was
    prepared, the session does so, and ``session["model"]`` is what to use.

    Variables of the loop begin anew at a resume, but for those that :meth:`epochs` is
    told to ``carry``. ``notes`` is a dict for other plain values and tensors.

    Raises:
        TypeError, ValueError: wrong arguments, naming them.
        DataError, ModelError, LaunchError: what could not be resumed exactly.
        ResumeError: the run is not the one that was saved.
        CheckpointError: there can be no checkpoints, or that one cannot be used.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        path: str | os.PathLike[str],
        loaders: DataLoader[Any] | Mapping[str, DataLoader[Any]],
        *,
        save_every: int | str | None = None,
        log_every: int | None = 1,
        resume: str | os.PathLike[str] = "auto",
        random_seed: int | None = None,
        keep_last: int | None = None,
        keep_every: int | None = None,
        keep_best: KeepBest | None = None,
        chkpt_interval_s: float | None = None,
        async_save: bool = True,
        allow_inexact: bool = False,
        hang_timeout_s: float | None = None,
        bad_numbers: str | None = "warn",
        crash_bundle: str | None = "samples",
        max_time_s: float | None = None,
        stop_grace_s: float | None = None,
        enable_tensorboard: bool = False,
        callbacks: Sequence[Callback] = (),
        **objects: Any,
    ) -> None:
        if isinstance(loaders, DataLoader):
            loaders = {TRAIN: loaders}
        objects, is_named = check_arguments(given := vars() | objects, objects)
        schedule, options = settings_of(given)
        end_with_launcher()
        root, traced = traces(os.path.abspath(path), is_loop=True)
        callbacks = [Latecomers(is_named), *callbacks, *traced]
        resume = "auto" if traced else resume
        if (replay := replayed(root.name, root.name)) is not None:
            callbacks, resume = [*callbacks, replay.callback], replay.resume
            hang_timeout_s = max_time_s = stop_grace_s = None
            enable_tensorboard = False
        check_writable(root)
        model = Held(root.name, objects, accelerator)
        engine = model._engine = engine_for(model._holdings(), accelerator)
        self._to_take = model.prepare()
        own_seed = torch.initial_seed() if random_seed is None else random_seed
        self._loaders = Loaders(loaders, engine, engine.broadcast(own_seed))
        identity = {**self._loaders.identities(), **engine.identity()}
        identity["deterministic"] = torch.are_deterministic_algorithms_enabled()
        stateful = [c for c in callbacks if overridden([c], Callback.state_dict)]
        parts = {f"callback_{i}": c for i, c in enumerate(stateful)}
        super().__init__(
            engine,
            model=model,
            parts={"data": self._loaders, **parts},
            schedule=schedule,
            identity=identity,
            store=None if replay else CheckpointStore(root),
            options=options,
            callbacks=callbacks,
            stops=Stops(max_time_s=max_time_s, grace_s=stop_grace_s),
        )
        model._session = self
        self.notes, self._variables = model.notes, model.variables
        self._held, self._folder = model, None if replay else root
        self.stops.request_save = self.request_save
        self._save_every = save_every if isinstance(save_every, int) else None
        self._hang_timeout_s = hang_timeout_s
        self._run: Run | None = None
        self._events: Iterator[Boundary] = iter(())
        self._train: Any = None  # the iteration over training batches that is open
        self._open: list[str] = []  # the other iterations that are
        self._guards = contextlib.ExitStack()  # around the loop
        check_ranks(self)
        self._surroundings = contextlib.ExitStack()
        log = None if replay else root / f"{root.name}.log"
        self._surroundings.enter_context(text_logging(log, engine.rank))
        wish = Wish(crash_bundle, root.parent, root.name)
        self._tell = self._surroundings.enter_context(failures_told(self, wish))
        self._health = Health(self, bad_numbers, accelerator)
        self._surroundings.callback(self._health.detach)
        atexit.register(self.close)
        try:
            self._was_resumed = self.restore(resume, allow_inexact=allow_inexact)
            self._loaders.adopt_streams(self.reading.get("streams", {}))
            if enable_tensorboard and engine.is_main:
                step = self.state.current_iteration
                self.journal.writer = open_writer(
                    root / "tensorboard", purge_step=step + 1 if step else 0
                )
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> Any:
        """An object as Accelerate has prepared it, by the name under which it came."""
        self._to_take.discard(name)
        found = self._held.objects[name]
        return found.owner if isinstance(found, Attributes) else found

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is not None and not isinstance(error, SystemExit):
                self._tell(error)
        finally:
            self._train = None  # which ends it now, and not with the interpreter
            self.close()

    def _encode(self) -> tuple[Encoder, dict[str, Any]]:
        encoded = super()._encode()
        self._variables.own.clear()  # what the loop lets go is not to be kept alive
        return encoded

    def _books(self) -> dict[str, dict[str, Any]]:
        return {**super()._books(), "variables": self._held.variables.read()}

    def epochs(
        self, total: int | None = None, *, carry: str | Sequence[str] = ()
    ) -> Iterator[int]:
        """The epochs that are left of ``total`` (None: for ever), counted from 0.

        ``carry`` names variables of the function that calls this, and of the one that
        calls :meth:`batches`: ``carry=["best", "patience"]``. Each rank's are saved,
        and set again when the loop has come to where it was. They hold plain values,
        tensors, and lists and dicts of these.

        Each has to read the batches that are trained on once. When they are done, the
        run is saved as finished: started again, it has none left. A loop that is left
        by ``break`` isn't: started again, it goes on from its last checkpoint, and
        comes to the same ``break``. Every rank must call.

        Raises:
            ValueError, TypeError: with the first batch: ``carry`` names what there is
                not, or what can't be saved.
            RunStopped: it was asked to stop, and is saved.
        """
        if total is not None and (type(total) is not int or total < 1):
            raise ValueError(f"`total` must be an int >= 1 or None, got {total!r}")
        if self._to_take:
            name = min(self._to_take)
            raise ModelError(
                f"`{name}` was not prepared; Helios has had Accelerate do it, and what "
                f'you have passed is no longer what to train: set `{name} = session["'
                f'{name}"]` before the loop, or pass what `prepare` returns'
            )
        most = math.inf if total is None else total
        self.schedule = dataclasses.replace(self.schedule, total_steps=most)
        self._run = Run(self, self._model, self._loaders, self._was_resumed)
        self._events = self._run.boundaries()
        self._variables.names = names_in(carry)
        return passed_on(self._epochs(self._run, self._variables.caller()), self._tell)

    def _epochs(self, run: Run, caller: FrameType | None) -> Iterator[int]:
        guards, state = self._guards, self.state
        guards.enter_context(self.stops.joined(self.engine, self._folder))
        guards.enter_context(watched(self, self._hang_timeout_s))
        self._health.begin()
        with guards, self._variables.inside("epochs", caller):
            del caller
            self._variables.put_back(is_there=False)
            if run._is_over():
                warn_if_finished_here(self, self._folder)
            if state.epoch_stage == EpochStage.CLOSED:
                self._meet(self._next())
            while not run._is_over():
                yield state.global_epoch
                self._end_epoch()
            for _ in self._events:
                pass
            self.wait_for_checkpoint()
        finish_run(self, self._folder)

    def _end_epoch(self) -> None:
        if self._train is None:
            raise DataError(
                f"epoch {self.state.global_epoch} has read no training batches; read "
                "`session.batches()` in each turn of the loop over `epochs`, of the "
                'loader that was passed, or of "train"'
            )
        self._train.close()
        self._train = None
        if self.state.epoch_stage != EpochStage.COMPLETE:
            # The loop has left the epoch by `break`, behind a batch that counts.
            self._health.after_batch()
            self.state.epoch_stage = EpochStage.COMPLETE
            self._next()
            self._end_training()
        self._meet(self._next())

    def _next(self) -> Boundary:
        """Go on to the next boundary; to the first one with the loop's variables."""
        is_first = self._restored is not None
        boundary = next(self._events)
        if is_first:
            self._variables.put_back(is_there=True)
        return boundary

    def batches(self, loader: str | DataLoader[Any] = TRAIN) -> Batches:
        """The batches of a loader, placed on the device, with its ``len``.

        ``loader`` is a name in ``loaders``, or itself one of them, or any other that
        Accelerate has prepared. Of ``"train"`` those that are left of the epoch:
        between two of them the run is saved, and stopped. Any other loader is read from
        its start, whole or in part, and between two training batches. Every rank must
        call.

        Accelerate's ``accumulate``, ``sync_gradients`` and ``gather_for_metrics`` work
        as with loaders that it has prepared.

        Raises:
            ValueError: it is no name in ``loaders``, and no loader that is known.
            DataError: where the loader stands cannot be saved, or it yields nothing.
            RunStopped: the run was asked to stop, and is saved.
        """
        name = self._loaders.name_of(loader)
        length = partial(self._loaders.length, name)
        if name != TRAIN:
            return Batches(passed_on(self._other_batches(name), self._tell), length)
        if self._run is None or self._train is not None:
            raise DataError(
                "the batches to train on must be read once in each turn of a loop over "
                "`session.epochs(...)`; make as many epochs as you want to read"
            )
        self._train = passed_on(self._train_batches(self._run), self._tell)
        return Batches(self._train, length)

    def _train_batches(self, run: Run) -> Iterator[Any]:
        loader, state = self._loaders.open(TRAIN), self.state
        accelerator, window = self.engine.accelerator, self.schedule.accumulation_steps
        health = self._health
        variables = self._variables
        with loader.reported(), variables.inside("batches", variables.reader()):
            variables.check(self._held._holdings().all_parameters())
            while True:
                boundary = self._next()
                if boundary is Boundary.READY:
                    done = state.dataset_iter
                    is_step = window == 1 or accelerator.sync_gradients
                    ends_window = (done + 1) % window == 0
                    in_work: Any = self.engine.loaded, run._feed
                    loader.mark(*in_work)
                    # For `accelerate.accumulate`, which is then of the same opinion.
                    loader.end_of_dataloader |= is_step and not ends_window
                    accelerator.step = done % window
                    health.before_batch()
                    yield run.batch
                    health.after_batch()
                    continue
                self._meet(boundary)
                if state.epoch_stage == EpochStage.COMPLETE:
                    break
        self._end_training()

    def _end_training(self) -> None:
        """What is logged from here to the next epoch is written at once."""
        if self.schedule.print_frequency is None:
            self.journal.flush()
        self.journal.keep(None)

    def _other_batches(self, name: str) -> Iterator[Any]:
        loader, engine = self._loaders.open(name), self.engine
        in_work = engine.loaded
        loader.seek(self._loaders.count(name))
        feed = Feed(loader, engine.place)
        self._open.append(name)
        try:
            with loader.reported():
                for loaded in to_the_end_of_all(engine, loader, feed):
                    loader.mark(loaded, feed)
                    engine.loaded = loaded
                    self.beats += 1
                    yield loaded.data
        finally:
            self._open.remove(name)
            engine.loaded = in_work

    def accumulate(self) -> contextlib.AbstractContextManager[None]:
        """The accumulation window of the batch in work.

        It is open already: the loop may as well keep ``accelerator.accumulate``, or do
        without. Gradients are summed up over the ranks with the last batch of a window,
        and prepared optimizers and schedulers then step.
        """
        return contextlib.nullcontext()

    def gather_for_metrics(self, values: Any) -> Any:
        """As the accelerator's, for data of any kind: each sample counts once.

        Every rank must call. See :meth:`helios.Model.gather_for_metrics`.
        """
        return self.engine.gather_for_metrics(values)

    def close(self) -> None:
        """End the log and the writers, after what they have in hand; once is enough."""
        atexit.unregister(self.close)
        self._variables.leave("epochs", "batches")
        with self._surroundings, self._guards:
            if self.saver is not None:
                self.saver.finish()
            self._copies.close()
            self.journal.close()
            self.engine.accelerator.sync_gradients = True
        self.stops.tell_late()

    def _meet(self, boundary: Boundary) -> None:
        """Do what is due at a boundary; RunStopped, if it is to stop."""
        assert self._run is not None
        if self._open:
            raise DataError(
                f"`session.batches({self._open[0]!r})` is still being read while a "
                "batch, or an epoch, of training ends, and where it stands is not "
                "saved; read it between two training batches, or put both into one "
                "data set"
            )
        every = self._save_every if boundary is Boundary.STEP else None
        if every is not None and self.state.current_iteration % every == 0:
            self.request_save()
        if self._run.meet(boundary):
            self.wait_for_checkpoint()
            self.stops.leave(self.engine)
            stopped = stopped_run(self)
            self.close()
            raise stopped
