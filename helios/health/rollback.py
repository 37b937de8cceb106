"""A training that goes back to a checkpoint where its numbers have gone bad."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from helios.checkpoint import find_damage
from helios.checkpoint.records import read_record
from helios.data.datamodule import DataModule
from helios.errors import BadNumbersError, CheckpointError
from helios.health.watch import LEFT_OUT, Health, RollBack
from helios.loop import OF_ANOTHER, Run
from helios.model.model import Model
from helios.session import Session

if TYPE_CHECKING:
    from helios.trainer import Trainer

_MOST = 10  # steps in a row that are left out


def fit(
    trainer: Trainer,
    session: Session,
    model: Model,
    datamodule: DataModule,
    was_resumed: bool,
) -> bool:
    """Train, as :meth:`helios.loop.Run.fit` does, and go back where that is asked for.

    What the checkpoint holds is put back as by a start of the same command, after the
    DataModule's ``setup``; the model's is not called again. Every rank must call.

    Raises:
        BadNumbersError: there is no checkpoint to go back to, or going back does not
            help.
    """
    health = Health(session, trainer.bad_numbers)
    in_a_row, last, taken_up = 0, -1, session.base
    while True:
        run = Run(session, model, datamodule, was_resumed)
        run.train_step = health.around(model.train_step)
        try:
            is_finished = run.fit()
        except RollBack as wish:
            del run  # and its loader's workers
            session.stops.withdraw(OF_ANOTHER)  # who asks for a stop, asks again
            session.frozen = None  # a validation of what is not to be
            in_a_row = in_a_row + 1 if wish.step == last + 1 else 1
            last = wish.step
            if in_a_row > _MOST:
                raise BadNumbersError(
                    f"{wish}. It is the {in_a_row}th step in a row: leaving out does "
                    "not help"
                ) from None
            path = _find(session, wish, taken_up)
            _go_back(trainer, session, datamodule, path, wish)
            was_resumed = True
        else:
            health.detach()
            return is_finished


def _find(session: Session, wish: RollBack, taken_up: Path | None) -> Path:
    """The run's newest whole checkpoint from before the step; every rank must call.

    One that was imported is none: what it lacks would stay as the bad step has left it.
    """
    saver = session.saver
    found: Path | None = None
    if saver is not None:
        saver.complete()
        saver.finish()
    if session.engine.is_main:
        known = {} if saver is None else {**saver.own()}
        if taken_up is not None:  # which may lie in another folder
            with contextlib.suppress(CheckpointError):
                known.setdefault(taken_up, read_record(taken_up))
        before = [
            path
            for path, record in known.items()
            if record["progress"]["global_iteration"] <= wish.batch
            and "imported" not in record
        ]
        found = next((path for path in before if not find_damage(path)), None)
    path: Path | None = session.engine.broadcast(found)
    if path is None:
        raise BadNumbersError(
            f"{wish}. There is no checkpoint from before that to go back to: save more "
            'often, or pass `bad_numbers="skip"`'
        ) from None
    return path


def _go_back(
    trainer: Trainer,
    session: Session,
    datamodule: DataModule,
    path: Path,
    wish: RollBack,
) -> None:
    session.logger.warning(
        "NUMBERS HAVE GONE BAD: %s; the run goes back to %s, and leaves that step out",
        *(wish, path.name),
    )
    left_out = {*session.reading.get(LEFT_OUT, ()), wish.step}
    trainer._bar.close()
    with contextlib.suppress(OSError):
        session.journal.writer.close()  # and begun again behind the checkpoint
    datamodule._end()
    datamodule.teardown()
    trainer._set_up_data(session.engine, datamodule)
    session.restore(path, allow_inexact=trainer.allow_inexact)
    session.reading[LEFT_OUT] = sorted(left_out)
    trainer._open_logs(session, purge_step=session.state.current_iteration + 1)
