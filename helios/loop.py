"""The training loop, as a generator of boundaries and its consumer.

The order of everything in a run::

    on_training_start
    for each epoch:
        on_training_epoch_start
        for each batch:
            on_training_batch_start                                      READY
            train_step, on_training_batch_end                            BATCH or STEP
        on_training_epoch_end                                            EPOCH
    on_training_end

and at each boundary but READY: validate, decide on an early stop, save, stop. A
validation that a stop interrupts is run again, from its start, at the resume. Callbacks
run after the model's hook of the same name. At a resume the start hooks run again, and
what they change in the saved state is put back.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator

from helios.callbacks.base import Callback, overridden
from helios.data.batches import Loaded
from helios.data.datamodule import DataModule, loader_of
from helios.data.feed import Feed
from helios.errors import DataError
from helios.evaluation import batch_preparer, evaluate, may_differ
from helios.model.model import BatchPhase, Model
from helios.session import Session
from helios.state import Boundary, EpochStage
from helios.stopping import validation

OF_ANOTHER = "another rank asks to stop"
_ALONE = contextlib.nullcontext()  # of a batch that is a step by itself


class Run:
    """A training run: :meth:`fit`, or a loop by hand, consumes its :meth:`boundaries`.

    The model is set up and prepared, the DataModule set up, and the session restored,
    if there was a checkpoint (``was_resumed``).
    """

    def __init__(
        self, session: Session, model: Model, datamodule: DataModule, was_resumed: bool
    ) -> None:
        self.session, self.model, self.datamodule = session, model, datamodule
        self.schedule, self.state = session.schedule, session.state
        self._was_resumed = was_resumed
        #: The model's, or what is put around it.
        self.train_step: Callable[..., None] = model.train_step
        for _ in range(self.state.dataset_phase):
            datamodule.advance_train_phase()
        datamodule.adopt_streams(session.reading.get("streams", {}))
        self._open_train_loader()
        self._valid = valid = loader_of(datamodule.valid_dataloader(), "validation")
        session.valid_batches = None if valid is None else valid.batches_per_epoch
        session.reading["streams"] = datamodule.streams()
        self._feed: Feed | None = None
        self._may_differ = False
        # Where a copy can run beside the step, and where a rank that cannot read its
        # next batch has to tell the others before they wait for it.
        engine = session.engine
        self._reads_ahead = engine.device.type != "cpu" or engine.world_size > 1
        self._prepare_batch = batch_preparer(model, BatchPhase.TRAIN)
        self._batch_hooks = overridden(
            session.callbacks, Callback.on_training_batch_end
        )
        # What nobody overrides is not asked at every batch.
        base = Model.should_training_stop
        self._asks_to_stop = type(model).should_training_stop is not base
        self._logged_at_s = time.perf_counter()

    def fit(self) -> bool:
        """Train until the schedule is finished (True) or something asks to stop."""
        for boundary in self.boundaries():
            if boundary is Boundary.READY:
                self.train_step(self.batch, self.state)
            elif self.meet(boundary):
                return False
        return True

    def meet(self, boundary: Boundary) -> bool:
        """Do what is due, and say whether to stop; every rank must call."""
        session, saver = self.session, self.session.saver
        frequency = self.schedule.chkpt_frequency
        boundary = validation.owed(session, boundary)
        is_done = self._validate(boundary)
        if is_done and self.schedule.is_due(frequency, boundary, self.state):
            self._save()
        stops, saves, writes = session.engine.agree_each(
            self._wants_stop(boundary),
            self._wants_save(boundary),
            saver is not None and saver.is_writing(),
        )
        if saver is not None and not writes:
            saver.complete()
        if saves:
            self._save()
        if stops:
            session.request_stop(OF_ANOTHER)
            session._save()
            self._raise_unread()
        return stops

    def boundaries(self) -> Iterator[Boundary]:
        """The run: yields at each boundary, first where it joins; READY has `batch`."""
        session, model, state = self.session, self.model, self.state
        is_inside = state.epoch_stage != EpochStage.CLOSED
        model.train()
        model.on_training_start()
        self._call(Callback.on_training_start)
        if not is_inside or (validation.is_owed(session) and self._is_over()):
            session.put_back()
            yield Boundary.START
        while not self._is_over():
            epoch = state.global_epoch
            session.journal.keep(None)
            model.on_training_epoch_start(epoch)
            self._call(Callback.on_training_epoch_start)
            session.journal.keep("latest")
            feed = self._feed = self._read(epoch)
            if is_inside:
                is_inside = False
                session.put_back()
                yield Boundary.START
            else:
                state.epoch_stage = EpochStage.OPEN
            for loaded in self._batches(feed):
                yield from self._step(feed, loaded)
                if self._is_over():
                    break
            else:
                session.engine.loaded = None
                if state.dataset_iter == 0:
                    raise DataError(f"the training loader yielded nothing in {epoch=}")
                state.global_epoch += 1
                state.dataset_iter, state.epoch_stage = 0, EpochStage.CLOSED
                cursor = session.reading.get("cursor")
                session.reading["cursor"] = self._train.plan.next_epoch(cursor)
                if self.schedule.print_frequency is None:
                    session.journal.flush()
                session.journal.keep(None)
                model.on_training_epoch_end(epoch)
                self._call(Callback.on_training_epoch_end)
                if model.should_advance_dataset_phase():
                    self._advance_phase()
                yield Boundary.EPOCH
        session.put_back()
        session.journal.keep("latest")  # a stop may have come after the last step
        if self.schedule.print_frequency is None:
            session.journal.flush()
        session.journal.keep(None)
        session._save()
        model.on_training_end()
        self._call(Callback.on_training_end)

    def _read(self, epoch: int) -> Feed:
        """Begin to read an epoch, where training stands."""
        session, train = self.session, self._train
        train.seek(epoch, self.state.dataset_iter, session.reading.get("cursor"))
        count, seconds = train.plan.replayed()
        if count:
            session.logger.warning(
                "the data set cannot say where it is: %d samples are read again to get "
                "there, which took about %.0f s; give it `state_dict` and "
                "`load_state_dict` to spare that",
                count,
                seconds,
            )
        feed = Feed(train, session.engine.place)
        self._may_differ = may_differ(session.engine, train, feed)
        if self._may_differ and self.state.dataset_iter == 0:
            is_empty = not feed.peek() and feed.error is None
            if session.engine.agree(is_empty):
                raise DataError(
                    "a rank has no samples to train on: the data set has fewer "
                    "shards, or samples, than there are ranks"
                )
        return feed

    def _batches(self, feed: Feed) -> Iterator[Loaded]:
        """The batches of a feed, until the epoch is complete.

        What reading raises is raised with all that came before it finished and saved.
        """
        # A stream that was saved at its end has not told yet how that came.
        if self._reads_ahead or self.state.epoch_stage == EpochStage.COMPLETE:
            feed.peek()
            self._raise_unread()
        while self.state.epoch_stage != EpochStage.COMPLETE and feed.peek():
            yield feed.take()
        self._raise_unread()

    def _raise_unread(self) -> None:
        """Raise what kept a rank from reading its next batch; every rank must call."""
        feed = self._feed
        if self.session.engine.agree(feed is not None and feed.error is not None):
            self.session._save()
            if self.session.saver is not None:
                self.session.saver.complete()
            if feed is not None:
                feed.check()
            raise DataError("another rank could not read its next batch; see its log")

    def _step(self, feed: Feed, loaded: Loaded) -> Iterator[Boundary]:
        """Have a batch trained on. This is all that it costs beside ``train_step``."""
        model, state, engine = self.model, self.state, self.session.engine
        done, window = state.dataset_iter, self.schedule.accumulation_steps
        log_every = self.schedule.print_frequency or math.inf
        is_last = feed.ends_with(loaded)
        if self._may_differ:  # the rank that ends first ends the epoch of all
            is_last = engine.agree(is_last)
        engine.loaded = loaded
        is_first, is_step = done % window == 0, (done + 1) % window == 0 or is_last
        with engine.batch(is_first=is_first, is_step=is_step) if window > 1 else _ALONE:
            model.on_training_batch_start(state)
            self.batch = self._prepare_batch(loaded.data)
            yield Boundary.READY
        self.session.reading["cursor"] = loaded.cursor
        state.global_iteration += 1
        state.dataset_iter += 1
        state.running_iter += 1
        if is_last:
            state.epoch_stage = EpochStage.COMPLETE
        should_log = False
        if is_step:
            state.current_iteration += 1
            should_log = state.current_iteration % log_every == 0
        if self._reads_ahead and not self._is_over():
            feed.peek()
        if should_log:
            before_s, self._logged_at_s = self._logged_at_s, time.perf_counter()
            elapsed_s = self._logged_at_s - before_s
            state.average_iter_time = elapsed_s / log_every
        model.on_training_batch_end(state, should_log)
        for hook in self._batch_hooks:
            hook(self.session)
        if should_log:
            self.session.journal.flush()
        yield Boundary.STEP if is_step else Boundary.BATCH

    def _validate(self, boundary: Boundary) -> bool:
        """Do the validation that is due, if any; whether it was not interrupted."""
        session, model, state = self.session, self.model, self.state
        frequency, cycle = self.schedule.valid_frequency, state.validation_cycles
        if self._valid is None or not self.schedule.is_due(frequency, boundary, state):
            return True
        validation.begin(session, boundary)
        if not evaluate(session, model, self._valid, BatchPhase.VALID, cycle):
            return False
        validation.end(session)
        has_improved = model.have_metrics_improved()
        state.early_stop_count = 0 if has_improved else state.early_stop_count + 1
        model.train()
        session.journal.keep("latest")
        return True

    def _wants_stop(self, boundary: Boundary) -> bool:
        is_asked = boundary is not Boundary.START or self._was_resumed
        if self._asks_to_stop and is_asked and self.model.should_training_stop():
            self.session.request_stop("the model asks to stop")
        is_unread = self._feed is not None and self._feed.error is not None
        is_unread = is_unread and not self._is_over()
        return self.session.stop_reason is not None or is_unread

    def _save(self) -> None:
        """Save, unless the model declines."""
        if self.session.saver is not None:
            self.session.saver.answered()
        if self.model.should_save_checkpoint():
            self.session._save()

    def _wants_save(self, boundary: Boundary) -> bool:
        saver = self.session.saver
        if saver is None:
            return False
        if saver.has_failed():
            saver.finish()
        return boundary in (Boundary.STEP, Boundary.EPOCH) and saver.wants()

    def _is_over(self) -> bool:
        """Whether nothing is left to do: an epoch whose batches are done is ended."""
        is_complete = self.state.epoch_stage == EpochStage.COMPLETE
        return self.schedule.is_over(self.state) and not is_complete

    def _open_train_loader(self) -> None:
        self._train = self.datamodule._open_train_loader()
        self.session.batches_per_epoch = self._train.batches_per_epoch
        self.session.reading["streams"] = self.datamodule.streams()

    def _advance_phase(self) -> None:
        if self.datamodule.advance_train_phase():
            self.state.dataset_phase += 1
            self.session.reading["cursor"] = None
            self._open_train_loader()
        else:
            self.session.logger.warning("there is no further training phase")

    def _call(self, hook: Callable[..., None]) -> None:
        for bound in overridden(self.session.callbacks, hook):
            bound(self.session)
