"""``helios replay``: a step that has failed, once more.

The run's command is started again, from the checkpoint before the step, and trains to
that step: what comes before it is trained again, as after any stop. Nothing is saved.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from helios import rng
from helios.callbacks.base import Callback
from helios.differences import differences
from helios.failures.bundle import REPLAYS, read_bundle
from helios.health.watch import LEFT_OUT
from helios.loggers.text import get_root_logger
from helios.model.model import Model
from helios.session import Session

if TYPE_CHECKING:
    from helios.trainer import Trainer


class Replayed(SystemExit):
    """Ends a replay whose step has not failed, with 0; with 1, if there is no step."""


class _UpTo(Callback):
    """Ends the run after the step, and says whether it is the one that had failed."""

    def __init__(self, bundle: dict[str, Any]) -> None:
        self._bundle = bundle
        self._batch = bundle["batch"]["of_the_run"]
        self._has_told = False
        self.left_out: list[int] = bundle.get("left_out", [])

    def on_training_batch_end(self, session: Session) -> None:
        if session.state.global_iteration > self._batch:
            session.logger.warning("REPLAYED: the step has not failed this time")
            self._has_told = True
            raise Replayed(0)

    def on_training_end(self, session: Session) -> None:
        refuse_end([self], "training has ended")

    def on_exception(self, session: Session, error: BaseException) -> None:
        if isinstance(error, Replayed):
            return
        if session.state.global_iteration < self._batch:
            self.tell_unreplayed("the run has failed")
        self._has_told = True
        if session.state.global_iteration != self._batch:
            return
        values, engine = self._bundle["values"], session.engine
        if engine.rank != self._bundle["rank"]:
            return
        now = {"rng": rng.capture_rng(engine.device)}
        if "batch" in values and engine.loaded is not None:
            now["batch"] = engine.loaded.data
        then = {name: values[name] for name in now if name in values}
        found = next(differences(then, {name: now[name] for name in then}, ""), None)
        said = "to the bit" if found is None else f"but `{found[0]}` is another one"
        session.logger.warning("REPLAYED: the step has failed again, %s", said)

    def tell_unreplayed(self, what: str) -> bool:
        """Say that there was no such step, unless that, or how it went, was said.

        Whether it was said now.
        """
        if self._has_told:
            return False
        self._has_told = True
        which = f"that of batch {self._batch} of the run"
        words = "NOT REPLAYED: %s before the step, which is %s"
        get_root_logger().critical(words, what, which)
        return True


class Replay(NamedTuple):
    """How to run a step again."""

    resume: str | Path  # from where
    callback: Callback
    parts: int  # of each batch of the data


def replayed(run_name: str, save_name: str) -> Replay | None:
    """The replay that a run of a model is to be, if the environment says so."""
    if (place := os.environ.get(REPLAYS)) is None:
        return None
    bundle = read_bundle(Path(place))
    if (bundle["run_name"], bundle["save_name"]) != (run_name, save_name):
        return None
    last = bundle["checkpoint"]
    resume = "never" if last is None else Path(place) / last
    return Replay(resume, _UpTo(bundle), bundle["parts_of_batches"])


def prepare_replay(trainer: Trainer, model: Model) -> None:
    """Have a run be a replay, if the environment says so; another one is left alone."""
    save_name = getattr(model, "save_name", "")  # what is no Model is refused later
    if (replay := replayed(trainer.run_name, save_name)) is None:
        return
    trainer.resume = replay.resume
    trainer.batch_size, trainer._parts = None, replay.parts
    trainer.max_time_s = trainer.stop_grace_s = None
    trainer.chkpt_root = trainer.log_root = trainer.log_path = trainer.run_path = None
    trainer.enable_file_logging = trainer.enable_tensorboard = False
    trainer.log_with = trainer.hang_timeout_s = None
    trainer._hooks = [*trainer._hooks, replay.callback]
    trainer.train_exceptions = [*trainer.train_exceptions, Replayed]


def tell_unreplayed(callbacks: Iterable[Callback], what: str = "it has ended") -> bool:
    """Say of a replay that has ended, if nothing was said of it, that it is none.

    Whether there is one of which that was said.
    """
    replays = [callback for callback in callbacks if isinstance(callback, _UpTo)]
    told = [replay.tell_unreplayed(what) for replay in replays]
    return any(told)


def refuse_end(callbacks: Iterable[Callback], what: str) -> None:
    """End a replay of which nothing was said yet; another run is left alone.

    Raises:
        Replayed: it is one.
    """
    if tell_unreplayed(callbacks, what):
        raise Replayed(1)


def restore(session: Session, resume: Any, *, allow_inexact: bool) -> bool:
    """:meth:`Session.restore`; a replay also leaves out what the run had left out.

    It may have done so since its checkpoint, to which it has gone back.
    """
    was_resumed = session.restore(resume, allow_inexact=allow_inexact)
    for callback in session.callbacks:
        if isinstance(callback, _UpTo):
            session.reading[LEFT_OUT] = callback.left_out
    return was_resumed


def start(folder: Path) -> int:
    """Start the command of a bundle again, as a replay; its exit status.

    On as many ranks as then, all of them on this machine.

    Raises:
        CheckpointError: it is no bundle.
    """
    bundle = read_bundle(folder)
    environment = bundle["environment"]
    command = [environment["executable"], *environment["arguments"]]
    variables = {**os.environ, **environment["variables"]}
    variables[REPLAYS] = str(folder.resolve())
    ranks = bundle["world_size"]
    if ranks > 1:
        launch = ("-m", "torch.distributed.run", "--standalone", "--no-python")
        count = ("--nproc-per-node", str(ranks))
        command = [environment["executable"], *launch, *count, *command]
    folder = environment["folder"]
    return subprocess.run(command, env=variables, cwd=folder, check=False).returncode
