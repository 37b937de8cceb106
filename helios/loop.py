"""The loops: training, as a generator of boundaries and its consumer; evaluation.

The order of everything in a run::

    on_training_start
    for each epoch:
        on_training_epoch_start
        for each batch:
            on_training_batch_start, train_step, on_training_batch_end   BATCH or STEP
        on_training_epoch_end                                            EPOCH
    on_training_end

and at each boundary: validate, decide on an early stop, save, stop. Callbacks run after
the model's hook of the same name. At a resume the start hooks run again, and what they
change in the saved state is put back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from helios.callbacks.base import Callback, overridden
from helios.data.datamodule import DataModule
from helios.errors import DataError
from helios.model.model import BatchPhase, Model
from helios.session import Session
from helios.state import Boundary


class Run:
    """A training run: :meth:`fit` consumes what :meth:`_boundaries` yields.

    The model is set up and prepared, the DataModule set up, and the session restored,
    if there was a checkpoint (``was_resumed``).
    """

    def __init__(
        self, session: Session, model: Model, datamodule: DataModule, was_resumed: bool
    ) -> None:
        self.session, self.model, self.datamodule = session, model, datamodule
        self.schedule, self.state = session.schedule, session.state
        self._was_resumed = was_resumed
        for _ in range(self.state.dataset_phase):
            datamodule.advance_train_phase()
        self._open_train_loader()
        valid = datamodule.valid_dataloader()
        self._valid = None if valid is None else valid[0]
        session.valid_batches = None if valid is None else valid[0].batches_per_epoch
        self._prepare_batch = _batch_preparer(session, model, BatchPhase.TRAIN)
        self._batch_hooks = overridden(
            session.callbacks, Callback.on_training_batch_end
        )
        # What nobody overrides is not asked at every batch.
        base = Model.should_training_stop
        self._asks_to_stop = type(model).should_training_stop is not base
        self._logged_at_s = time.perf_counter()

    def fit(self) -> bool:
        """Train until the schedule is finished (True) or something asks to stop."""
        session, model = self.session, self.model
        frequency = self.schedule.chkpt_frequency
        model.train()
        model.on_training_start()
        self._call(Callback.on_training_start)
        for boundary in self._boundaries():
            self._validate(boundary)
            if self.schedule.is_due(frequency, boundary, self.state):
                if model.should_save_checkpoint():
                    session._save()
            if session.engine.agree(self._wants_stop(boundary)):
                session._save()
                return False
        session.put_back()
        if self.schedule.print_frequency is None:
            session.flush()
        session.keep(None)
        session._save()
        model.on_training_end()
        self._call(Callback.on_training_end)
        return True

    def _boundaries(self) -> Iterator[Boundary]:
        """Train, and yield after each batch and each epoch; first where it joins."""
        session, model, state = self.session, self.model, self.state
        is_inside = state.dataset_iter > 0
        if not is_inside:
            session.put_back()
            yield Boundary.START
        while not self._is_over():
            epoch = state.global_epoch
            session.keep(None)
            model.on_training_epoch_start(epoch)
            self._call(Callback.on_training_epoch_start)
            session.keep("latest")
            self._train.seek(epoch, state.dataset_iter)
            batches = iter(self._train)
            if is_inside:
                is_inside = False
                session.put_back()
                yield Boundary.START
            for batch in batches:
                yield self._step(batch)
                if self._is_over():
                    return
            if state.dataset_iter == 0:
                raise DataError(f"the training loader yielded nothing in epoch {epoch}")
            state.global_epoch += 1
            state.dataset_iter = 0
            if self.schedule.print_frequency is None:
                session.flush()
            session.keep(None)
            model.on_training_epoch_end(epoch)
            self._call(Callback.on_training_epoch_end)
            if model.should_advance_dataset_phase():
                self._advance_phase()
            yield Boundary.EPOCH

    def _step(self, batch: Any) -> Boundary:
        """Train on one batch. This is all that a batch costs beside ``train_step``."""
        model, state = self.model, self.state
        is_step, window = True, self.schedule.accumulation_steps
        log_every = self.schedule.print_frequency or math.inf
        if window == 1:
            model.on_training_batch_start(state)
            model.train_step(self._prepare_batch(batch), state)
        else:
            done = state.dataset_iter
            is_step = (done + 1) % window == 0 or done + 1 == self._train_batches
            first = done % window == 0
            with self.session.engine.batch(is_first=first, is_step=is_step):
                model.on_training_batch_start(state)
                model.train_step(self._prepare_batch(batch), state)
        state.global_iteration += 1
        state.dataset_iter += 1
        state.running_iter += 1
        should_log = False
        if is_step:
            state.current_iteration += 1
            should_log = state.current_iteration % log_every == 0
        if should_log:
            before_s, self._logged_at_s = self._logged_at_s, time.perf_counter()
            elapsed_s = self._logged_at_s - before_s
            state.average_iter_time = elapsed_s / log_every
        model.on_training_batch_end(state, should_log)
        for hook in self._batch_hooks:
            hook(self.session)
        if should_log:
            self.session.flush()
        return Boundary.STEP if is_step else Boundary.BATCH

    def _validate(self, boundary: Boundary) -> None:
        """Do the validation that is due, if any."""
        session, model, state = self.session, self.model, self.state
        frequency, cycle = self.schedule.valid_frequency, state.validation_cycles
        if self._valid is None or not self.schedule.is_due(frequency, boundary, state):
            return
        evaluate(session, model, self._valid, BatchPhase.VALID, cycle)
        has_improved = model.have_metrics_improved()
        state.early_stop_count = 0 if has_improved else state.early_stop_count + 1
        model.train()
        session.keep("latest")

    def _wants_stop(self, boundary: Boundary) -> bool:
        is_asked = boundary is not Boundary.START or self._was_resumed
        if self._asks_to_stop and is_asked and self.model.should_training_stop():
            self.session.request_stop("the model asks to stop")
        return self.session.stop_reason is not None

    def _is_over(self) -> bool:
        """Whether nothing is left to do: an epoch whose batches are done is ended."""
        is_complete = 0 < self.state.dataset_iter == self._train_batches
        return self.schedule.is_over(self.state) and not is_complete

    def _open_train_loader(self) -> None:
        found = self.datamodule.train_dataloader()
        if found is None:
            raise DataError("no training data: call `self._add_train_phase` in `setup`")
        self._train = found[0]
        self._train_batches = found[0].batches_per_epoch
        self.session.batches_per_epoch = self._train_batches

    def _advance_phase(self) -> None:
        if self.datamodule.advance_train_phase():
            self.state.dataset_phase += 1
            self._open_train_loader()
        else:
            self.session.logger.warning("there is no further training phase")

    def _call(self, hook: Callable[..., None]) -> None:
        for bound in overridden(self.session.callbacks, hook):
            bound(self.session)


def _batch_preparer(
    session: Session, model: Model, phase: BatchPhase
) -> Callable[[Any], Any]:
    """What brings a batch to the device, and no more than that."""
    place = session.engine.place
    if type(model).batch_to_device is Model.batch_to_device:
        return place
    return lambda batch: model.batch_to_device(place(batch), phase)


def evaluate(
    session: Session, model: Model, loader: Any, phase: BatchPhase, cycle: int = 0
) -> bool:
    """Run a validation, or a test, without gradients; every rank must call.

    A stop that is asked for ends a test (False), and waits for the end of a validation.
    """
    is_test, callbacks = phase is BatchPhase.TEST, session.callbacks
    if is_test:
        start, end = model.on_testing_start, model.on_testing_end
        before, step = model.on_testing_batch_start, model.test_step
        after, callbacks = model.on_testing_batch_end, []
    else:
        start = partial(model.on_validation_start, cycle)
        before, step = model.on_validation_batch_start, model.valid_step
        after = model.on_validation_batch_end
        end = partial(model.on_validation_end, cycle)
    prepare, number = _batch_preparer(session, model, phase), -1
    hooks = overridden(callbacks, Callback.on_validation_batch_end)
    session.keep(None)
    model.eval()
    start()
    for hook in overridden(callbacks, Callback.on_validation_start):
        hook(session)
    loader.seek(cycle)
    session.keep("means")
    with torch.no_grad():
        for number, batch in enumerate(loader):
            before(number)
            step(prepare(batch), number)
            after(number)
            for hook in hooks:
                hook(session, number)
            if is_test and session.engine.agree(session.stop_reason is not None):
                return False
    if number < 0:
        raise DataError(f"the {phase.value} loader yielded nothing; lower `batch_size`")
    session.flush()
    session.keep(None)
    end()
    if not is_test:
        session.state.validation_cycles += 1
        session.state.running_iter = 0
    for hook in overridden(callbacks, Callback.on_validation_end):
        hook(session)
    return True
