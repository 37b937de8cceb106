"""The Trainer: configuration, checked when it is made, and turned into runs."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import os
import pathlib
import pkgutil
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from helios import fingerprint, rng
from helios.adopting import adopt_ranks
from helios.arguments import check_arguments, check_possible, check_writable
from helios.callbacks.base import Callback, overridden
from helios.callbacks.progress import ProgressBar
from helios.checkpoint import CheckpointStore
from helios.checkpoint.store import MAX_SHARD_BYTES
from helios.data.datamodule import DataModule, loader_of
from helios.determinism import torch_flags
from helios.engine import Engine
from helios.errors import DataError, LaunchError, ModelError
from helios.evaluation import evaluate
from helios.failures.ending import ending
from helios.failures.replay import prepare_replay, restore
from helios.health.rollback import fit
from helios.launching import start_ranks_if_asked
from helios.loggers.tensorboard import open_writer
from helios.loggers.text import get_root_logger, text_logging
from helios.model.model import BatchPhase, Model
from helios.retention import KeepBest, SaveOptions
from helios.session import Session
from helios.sizing import find_parts
from helios.state import Schedule, TrainingState, TrainingUnit
from helios.stopping.requests import Stopped, Stops
from helios.stopping.status import exit_status
from helios.trials import check_anew
from helios.verifying.trace import prepare_verification
from helios.watchdog import watched

if TYPE_CHECKING:
    from accelerate import Accelerator

    PathLike = str | os.PathLike[str]


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Trainer:
    """Trains, validates and tests a Model on the data of a DataModule.

    Started again with the same arguments after a stop of any kind, a run with a
    ``chkpt_root`` goes on from its last checkpoint and ends with the same bits.

    ``None`` means "as the launcher says" where that says anything, else "off". Units
    are epochs or steps (optimizer updates), as ``train_unit`` says.

    Raises:
        TypeError, ValueError: wrong arguments, naming them.
    """

    run_name: str = "run"  #: names the log file and the TensorBoard run
    train_unit: str | TrainingUnit = "epoch"  #: or "iteration": steps
    total_steps: float | None = None  #: units to train, or inf; `fit` needs it
    valid_frequency: int | None = None  #: units between validations
    chkpt_frequency: int | None = None  #: units; None: at the end and at a stop
    print_frequency: int | None = None  #: steps between log points; None: each epoch
    accumulation_steps: int | None = None  #: batches a step
    batch_size: str | None = None  #: "auto": as large a part of the data's as fits
    enable_cudnn_benchmark: bool = False  #: faster kernels, not reproducible ones
    enable_deterministic: bool = False  #: which exactness on GPUs needs
    early_stop_cycles: int | None = None  #: validations without an improvement
    use_cpu: bool | None = None  #: None: where there is no accelerator
    gpus: Sequence[int] | None = None  #: GPUs to use, by index; a rank for each
    random_seed: int | None = None  #: of everything; None: Helios's default seed
    enable_tensorboard: bool = False  #: below `log_root`
    enable_file_logging: bool = False  #: below `log_root`
    capture_warnings: bool = True  #: log what goes through `warnings`
    enable_progress_bar: bool = True  #: where standard error is a terminal
    chkpt_root: PathLike | None = None  #: folder of the checkpoints
    log_root: PathLike | None = None  #: folder of the logs
    log_path: PathLike | None = None  #: older: folder of the log file
    run_path: PathLike | None = None  #: older: folder of TensorBoard's runs
    src_root: PathLike | None = None  #: a folder whose modules are imported
    import_prefix: str = ""  #: the package that `src_root` is
    print_banner: bool = True  #: log what runs where, at the start
    accelerator: Accelerator | None = None  #: honoured in all that it was built with
    mixed_precision: str | None = None  #: "no", "bf16" or "fp16"
    num_processes: int | None = None  #: ranks; started, where no launcher did it
    max_restarts: int = 0  #: of those that it starts, all at once, where one fails
    log_with: Any = None  #: trackers of Accelerate
    callbacks: Sequence[Callback] = ()  #: called in this order, after the model's hooks
    resume: PathLike = "auto"  #: or "never", "must", or the path of a checkpoint
    chkpt_interval_s: float | None = None  #: seconds between checkpoints, in addition
    keep_last: int | None = None  #: checkpoints that are kept; None: all
    keep_every: int | None = None  #: units whose multiples are kept too
    keep_best: KeepBest | None = None  #: which are kept too, by a metric
    max_shard_bytes: int = MAX_SHARD_BYTES  #: of a checkpoint's files
    allow_inexact: bool = False  #: resume also where exactness is lost
    async_save: bool = True  #: write checkpoints behind the training
    hang_timeout_s: float | None = None  #: without a batch: the run is ended
    bad_numbers: str | None = "warn"  #: if NaN; or "stop", "skip", "rollback"
    crash_bundle: str | None = "samples"  #: of a step that fails; or "batch", too
    max_time_s: float | None = None  #: then a call stops, as by a signal
    stop_grace_s: float | None = None  #: from a stop to the end, whatever it is doing
    exit_when_stopped: bool = False  #: with status 75, rather than return False
    train_exceptions: Sequence[type[BaseException]] = ()  #: pass through unlogged
    test_exceptions: Sequence[type[BaseException]] = ()  #: pass through unlogged

    def __post_init__(self) -> None:
        check_arguments(self)
        self._make_schedule(self.accumulation_steps or 1)
        values = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(SaveOptions)
        }
        self._save_options = SaveOptions(**values)
        seed = self.random_seed
        self.seed = rng.get_default_seed() if seed is None else seed
        self._bar = ProgressBar()
        bars = [self._bar] if self.enable_progress_bar else []
        self._hooks: list[Callback] = [*bars, *self.callbacks]
        self.engine: Engine | None = None
        self._fitted: Model | None = None
        self._session: Session | None = None
        self._stops = Stops()
        self._parts = 1  # of each batch of the DataModule
        self._state = TrainingState()
        roots = [] if self.src_root is None else [os.fspath(self.src_root)]
        prefix = self.import_prefix and f"{self.import_prefix}."
        for module in pkgutil.walk_packages(roots, prefix):
            importlib.import_module(module.name)

    def request_stop(self, reason: str = "asked by the program") -> None:
        """Ask the run in progress to save and stop at the next batch."""
        self._stops.request(reason)

    def fit(self, model: Model, datamodule: DataModule) -> bool:
        """Train; every rank must call.

        A process that is to start its ranks does so first, and ends with them: a
        SystemExit (see :mod:`helios.launching`). :meth:`validate` and :meth:`test` too.

        Order: ``prepare_data`` (main rank), the DataModule's ``setup``, the model's
        ``setup``, preparation by Accelerate, the checkpoint to resume from, then the
        loop (see :mod:`helios.loop`). Afterwards ``model`` holds the trained weights.

        Returns True when finished, or ended for want of improvement; False when stopped
        on request, with a checkpoint: the same command goes on from there. With
        ``exit_when_stopped`` it raises SystemExit then (docs/stops.md). Raises a
        HeliosError where the data, the model or the checkpoint cannot be used, and
        whatever the user's code raises, logged first.
        """
        prepare_replay(self, model)
        prepare_verification(self)
        if self.total_steps is None:
            raise ValueError("`total_steps` is not set; pass it to the Trainer")
        self._start_ranks()
        is_finished = False
        with self._listening():
            parts = find_parts(self, model, datamodule)
            if parts is not None:
                self._parts = parts
                is_finished = self._train(model, datamodule)
        return self._ended(is_finished)

    def validate(self, model: Model, datamodule: DataModule) -> bool:
        """Validate once; like :meth:`test`."""
        return self._evaluate(model, datamodule, BatchPhase.VALID)

    def test(self, model: Model, datamodule: DataModule) -> bool:
        """Test; every rank must call.

        The model that this trainer has just fitted is tested as it is. Any other is set
        up for inference and takes the last whole checkpoint of its name; without one,
        ``model.load_for_testing()`` is called. Returns False when stopped on request.
        """
        return self._evaluate(model, datamodule, BatchPhase.TEST)

    def _train(self, model: Model, datamodule: DataModule) -> bool:
        is_finished = False
        with self._running(model, datamodule, self.train_exceptions) as engine:
            self._fitted = None
            is_finished = self._fit(engine, model, datamodule)
            self._fitted = model
        return is_finished

    def _fit(self, engine: Engine, model: Model, datamodule: DataModule) -> bool:
        if type(model).train_step is Model.train_step:
            raise ModelError(f"{type(model).__name__} does not override `train_step`")
        if self.print_banner:
            facts = [f"{k} {v}" for k, v in list(fingerprint.versions().items())[:4]]
            precision = f"precision {engine.mixed_precision}"
            facts += [f"{engine.world_size} x {engine.device}", precision]
            get_root_logger().info("%s", model.append_to_banner(", ".join(facts)))
        if self.chkpt_root is not None:
            check_writable(pathlib.Path(self.chkpt_root))
        self._set_up_data(engine, datamodule)
        call = partial(self._stops.setup, engine)
        model._run_setup(engine, for_inference=False, call=call)
        found = model._holdings()
        check_anew(found.networks.values())
        if found.has_strangers():
            raise ModelError(
                "an optimizer trains parameters that are in no network among the "
                "model's attributes, so that they would not be saved; add that network"
            )
        if not any(p.requires_grad for p in found.all_parameters()):
            raise ModelError(
                f"{type(model).__name__} has no parameter to train; create networks "
                "as attributes in `setup`, with `requires_grad`"
            )
        if engine.world_size > 1:
            if found.parameters:
                raise ModelError(
                    f"the parameters {sorted(found.parameters)} are in no network, and "
                    "the ranks would train each its own; put them into one"
                )
            rng.seed_rngs(rng.derive_key(self.seed, engine.rank) % 2**63)
        session = self._make_session(engine, model, datamodule)
        common = datamodule._common(session.identity["train_data"])
        common |= {"random_seed": self.seed, **vars(session.schedule)}
        fingerprint.check_agreement(engine.gather_objects(common))
        was_resumed = restore(session, self.resume, allow_inexact=self.allow_inexact)
        step = session.state.current_iteration
        self._open_logs(session, purge_step=step + 1 if step else 0)
        with watched(session, self.hang_timeout_s):
            is_finished = fit(self, session, model, datamodule, was_resumed)
            session.wait_for_checkpoint()
            if not is_finished:
                self._stops.leave(engine)
        state = self._state = session.state
        end = "finished" if is_finished else f"{session.stop_reason}: stopped, to go on"
        at = f"{state.global_epoch} epochs, {state.current_iteration} steps"
        session.logger.info("%s after %s", end, at)
        return is_finished

    def _evaluate(
        self, model: Model, datamodule: DataModule, phase: BatchPhase
    ) -> bool:
        self._start_ranks()
        is_finished = False
        with (
            self._listening(),
            self._running(model, datamodule, self.test_exceptions) as engine,
        ):
            self._set_up_data(engine, datamodule)
            is_test = phase is BatchPhase.TEST
            test, valid = datamodule.test_dataloader, datamodule.valid_dataloader
            loader = loader_of(test() if is_test else valid(), phase.value)
            if loader is None:
                raise DataError(f"the DataModule has no {phase.value} data")
            session = self._make_session(engine, model, datamodule)
            if self._fitted is not model:
                call = partial(self._stops.setup, engine)
                model._run_setup(engine, for_inference=True, call=call)
                session.restore_for_inference(self.resume)
            else:
                session.state = self._state
            self._open_logs(session, purge_step=None)
            with watched(session, self.hang_timeout_s):
                is_finished = evaluate(session, model, loader, phase)
            if not is_finished:
                self._stops.leave(engine)
        return self._ended(is_finished)

    def _ended(self, is_finished: bool) -> bool:
        if not is_finished and self.exit_when_stopped:
            raise SystemExit(exit_status())
        return is_finished

    def _set_up_data(self, engine: Engine, datamodule: DataModule) -> None:
        datamodule._begin(self)
        rng.seed_rngs(self.seed)
        is_first = engine.local_rank == 0 and datamodule.prepare_data_per_host
        is_first = is_first or engine.is_main
        prepare = datamodule.prepare_data if is_first else lambda: None
        self._stops.setup(engine, prepare)
        rng.seed_rngs(self.seed)
        self._stops.setup(engine, datamodule.setup)
        for phase in datamodule._phases():
            phase.params.batch_size //= self._parts
        rng.seed_rngs(self.seed)

    def _make_session(
        self, engine: Engine, model: Model, datamodule: DataModule
    ) -> Session:
        store, root = None, self._folder(model)
        if root is not None:
            store = CheckpointStore(root, max_shard_bytes=self.max_shard_bytes)
        identity = {**datamodule.identities(), **engine.identity()}
        identity["deterministic"] = self.enable_deterministic
        own = [c for c in self.callbacks if overridden([c], Callback.state_dict)]
        callbacks = {f"callback_{i}": c for i, c in enumerate(own)}
        self._session = model._session = Session(
            engine,
            model=model,
            parts={"data": datamodule, **callbacks},
            schedule=self._make_schedule(engine.accumulation_steps),
            identity=identity,
            store=store,
            options=self._save_options,
            callbacks=self._hooks,
            shows_progress=self.enable_progress_bar,
            stops=self._stops,
        )
        self._stops.request_save = self._session.request_save
        return self._session

    def _folder(self, model: Model) -> pathlib.Path | None:
        """That of the run's checkpoints, if it has any."""
        root = self.chkpt_root
        return None if root is None else pathlib.Path(root) / model.save_name

    def _make_schedule(self, accumulation_steps: int) -> Schedule:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(Schedule)}
        values["train_unit"] = TrainingUnit.from_str(self.train_unit)
        values["accumulation_steps"] = accumulation_steps
        if self.total_steps is None:  # tests need no end
            values["total_steps"] = math.inf
        return Schedule(**values)

    def _open_logs(self, session: Session, *, purge_step: int | None) -> None:
        root = self.run_path or self.log_root
        if self.enable_tensorboard and root and session.engine.is_main:
            folder = pathlib.Path(root) / self.run_name
            session.journal.writer = open_writer(folder, purge_step)
        accelerator = session.engine.accelerator
        if accelerator.log_with and not accelerator.trackers:
            accelerator.init_trackers(self.run_name)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Hear what may stop one call of fit, validate or test, trials included."""
        self._stops = Stops(max_time_s=self.max_time_s, grace_s=self.stop_grace_s)
        with self._stops.listening():
            yield
        self._stops.tell_late()

    @contextlib.contextmanager
    def _running(
        self, model: Model, datamodule: DataModule, silent: Sequence[Any]
    ) -> Iterator[Engine]:
        """The surroundings of a run: engine, logs, flags, the exception rule."""
        if not isinstance(model, Model):
            raise TypeError(f"`model` must be a helios.Model, got {model!r}")
        if not isinstance(datamodule, DataModule):
            raise TypeError(f"`datamodule` must be a DataModule, got {datamodule!r}")
        self.model, self.datamodule = model, datamodule
        model.trainer = datamodule.trainer = self
        root, file = self.log_path or self.log_root, None
        if self.enable_file_logging and root is not None:
            file = pathlib.Path(root) / f"{self.run_name}.log"
        for folder in (self.log_root, self.log_path, self.run_path):
            if folder and (self.enable_file_logging or self.enable_tensorboard):
                check_possible(pathlib.Path(folder))
        stops = self._stops
        with (
            text_logging(
                file, (engine := self._make_engine()).rank, self.capture_warnings
            ) as log,
            torch_flags(self.enable_cudnn_benchmark, self.enable_deterministic),
        ):
            self.engine = engine
            stops.join(engine, self._folder(model))
            with ending(self, engine, silent):
                try:
                    yield engine
                except Stopped:
                    log.info("%s: stopped in the setup, to start again", stops.reason)
                    stops.leave(engine)

    def _start_ranks(self) -> None:
        adopt_ranks()
        if self.accelerator is None:  # else it knows its ranks
            asked = ("use_cpu", "gpus", "num_processes", "max_restarts")
            start_ranks_if_asked(**{name: getattr(self, name) for name in asked})

    def _make_engine(self) -> Engine:
        root, parts = self.run_path or self.log_root, self._parts
        steps = self.accumulation_steps
        engine = Engine(
            accelerator=self.accelerator,
            use_cpu=self.use_cpu,
            device_index=self.gpus[0] if self.gpus and len(self.gpus) == 1 else None,
            mixed_precision=self.mixed_precision,
            accumulation_steps=steps if parts == 1 else (steps or 1) * parts,
            log_with=self.log_with,
            project_dir=None if root is None else os.fspath(root),
        )
        if self.num_processes not in (None, engine.world_size):
            raise LaunchError(
                f"`num_processes` is {self.num_processes}, and this job has "
                f"{engine.world_size} rank(s); start it with `accelerate launch "
                f"--num_processes {self.num_processes}`, or leave it out"
            )
        return engine
