"""The Model: networks, optimizers and schedulers, and what a step does with them."""

from __future__ import annotations

import abc
import enum
import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from helios.engine import Engine
from helios.model import holdings
from helios.state import TrainingState, check_name

if TYPE_CHECKING:
    from accelerate import Accelerator

    from helios.session import Session
    from helios.trainer import Trainer


#: The attributes that are Helios's.
_OWN = ("trainer", "_engine", "_session")


class BatchPhase(enum.Enum):
    """What a batch is for."""

    TRAIN = "train"
    VALID = "valid"
    TEST = "test"


class Model(abc.ABC):
    """What is trained: assign networks, optimizers and schedulers in :meth:`setup`.

    The trainer finds them among the attributes (also in lists, tuples and dicts), has
    them prepared by Accelerate, puts the prepared objects back, and saves and restores
    them. ``train_step`` is an ordinary step: forward, ``self.backward(loss)``,
    ``optimizer.step()``, ``optimizer.zero_grad()``.

    Every hook may be left out. ``save_name``, a plain file name, is that of the
    checkpoints' folder.
    """

    trainer: Trainer
    _engine: Engine | None = None
    _session: Session | None = None

    def __init__(self, save_name: str) -> None:
        check_name("save_name", save_name)
        self.save_name = save_name
        self._loss_items: dict[str, Any] = {}
        self._running_losses: dict[str, Any] = {}
        self._val_scores: dict[str, Any] = {}
        self._test_scores: dict[str, Any] = {}

    # What it is and where it runs.

    @property
    def engine(self) -> Engine:
        """Helios's side of the accelerator."""
        assert self._engine is not None, "the model is in no run yet"
        return self._engine

    @property
    def accelerator(self) -> Accelerator:
        """The Accelerator of the run."""
        return self.engine.accelerator

    @property
    def device(self) -> torch.device:
        """This rank's device; the CPU outside of a run."""
        return self._engine.device if self._engine else torch.device("cpu")

    @property
    def is_distributed(self) -> bool:
        """Whether the run has more than one rank."""
        return self._engine is not None and self._engine.world_size > 1

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that logs and commits checkpoints."""
        return self._engine is None or self._engine.is_main

    @property
    def rank(self) -> int:
        """The local rank."""
        return self._engine.local_rank if self._engine else 0

    @property
    def map_loc(self) -> str:
        """A ``map_location`` for ``torch.load``."""
        return str(self.device)

    @property
    def metrics(self) -> dict[str, Any]:
        """The scores that stand for the model; to be overridden."""
        return {}

    @property
    def amp_context(self) -> Any:
        """The same as :meth:`autocast`."""
        return self.autocast()

    # The user's part.

    @abc.abstractmethod
    def setup(self, for_inference: bool = False) -> None:
        """Create networks, optimizers, schedulers and losses as attributes."""

    def train(self) -> None:
        """Put every network in training mode."""
        for net in self._holdings().networks.values():
            net.train()

    def eval(self) -> None:
        """Put every network in evaluation mode."""
        for net in self._holdings().networks.values():
            net.eval()

    def train_step(self, batch: Any, state: TrainingState) -> None:
        """Forward, backward and optimizer step for one batch."""

    def valid_step(self, batch: Any, step: int) -> None:
        """Evaluate one batch; gradients are off."""

    def test_step(self, batch: Any, step: int) -> None:
        """Evaluate one batch of the test set; gradients are off."""

    def batch_to_device(self, batch: Any, phase: BatchPhase) -> Any:
        """The batch as the step gets it; Accelerate has placed it already."""
        return batch

    def on_training_start(self) -> None:
        """Before the first step of a run, also after a resume."""

    def on_training_end(self) -> None:
        """After the last step of a run."""

    def on_training_epoch_start(self, current_epoch: int) -> None:
        """Before an epoch (counted from 0), and where a resume goes on inside one."""

    def on_training_epoch_end(self, current_epoch: int) -> None:
        """After the last batch of an epoch."""

    def on_training_batch_start(self, state: TrainingState) -> None:
        """Before a step; the default clears the loss items."""
        self._loss_items.clear()

    def on_training_batch_end(
        self, state: TrainingState, should_log: bool = False
    ) -> None:
        """After a batch, with the counters advanced; ``should_log`` at log points.

        The default adds the mean of ``self._loss_items`` over the ranks to
        ``self._running_losses``. Nothing is read from the device.
        """
        if not self._loss_items:
            return
        items, running = self.engine.reduce_mean(self._loss_items), self._running_losses
        for name, value in items.items():
            value = value.detach() if isinstance(value, torch.Tensor) else value
            self._loss_items[name] = value
            running[name] = running[name] + value if name in running else value

    def on_validation_start(self, validation_cycle: int) -> None:
        """Before a validation (counted from 0); the default clears the scores."""
        self._val_scores.clear()

    def on_validation_end(self, validation_cycle: int) -> None:
        """After a validation; the default clears the running losses."""
        self._running_losses.clear()

    def on_validation_batch_start(self, step: int) -> None:
        """Before a batch of a validation, counted from 0."""

    def on_validation_batch_end(self, step: int) -> None:
        """After a batch of a validation."""

    def on_testing_start(self) -> None:
        """Before a test; the default clears the scores."""
        self._test_scores.clear()

    def on_testing_end(self) -> None:
        """After a test."""

    def on_testing_batch_start(self, step: int) -> None:
        """Before a batch of a test, counted from 0."""

    def on_testing_batch_end(self, step: int) -> None:
        """After a batch of a test."""

    # Decisions.

    def have_metrics_improved(self) -> bool:
        """Asked after each validation, for early stopping."""
        return True

    def should_training_stop(self) -> bool:
        """Asked after every batch, validation and epoch; True on one rank stops all."""
        return False

    def should_save_checkpoint(self) -> bool:
        """Asked whenever a checkpoint is due; not for that of a stop."""
        return True

    def should_advance_dataset_phase(self) -> bool:
        """Asked at the end of each epoch: whether the next phase's data is to come."""
        return False

    def append_metadata_to_chkpt_name(self, name: str) -> str:
        """The checkpoint's name with what the user adds."""
        return name

    def append_to_banner(self, banner: str) -> str:
        """The banner with what the user adds."""
        return banner

    def get_train_steps_per_epoch(self) -> int:
        """Steps an epoch of the current training phase, for schedulers."""
        return self.trainer.datamodule.get_train_steps_per_epoch()

    # State.

    def load_for_testing(self) -> None:
        """Load weights for a test without a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that training changes, found by itself, and the user's state."""
        tree = self._holdings().capture(self.unwrap)
        return {**tree, "user": self.user_state_dict()}

    def load_state_dict(
        self, state: dict[str, Any], for_inference: bool = False
    ) -> None:
        """Put :meth:`state_dict` back; for inference the networks only."""
        self._holdings().restore(state, self.unwrap, for_inference)
        if "user" in state:  # else it is from elsewhere
            self.load_user_state_dict(state["user"], for_inference)

    def user_state_dict(self) -> dict[str, Any]:
        """What the model knows besides, as a tree of plain values and tensors."""
        return {}

    def load_user_state_dict(self, state: dict[str, Any], for_inference: bool) -> None:
        """Put :meth:`user_state_dict` back."""

    def trained_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What to publish: the networks' weights, by the network's attribute."""
        return self._holdings().capture_networks(self.unwrap)

    # Thin calls.

    def autocast(self) -> Any:
        """The context of the run's precision, for what stands outside of a network."""
        return self.accelerator.autocast()

    def backward(self, loss: torch.Tensor) -> None:
        """The backward pass, with the scaling of precision and accumulation."""
        self.engine.backward(loss)

    def clip_gradients(
        self, parameters: Any, optimizer: Any, max_norm: float, **kwargs: Any
    ) -> Any:
        """Clip to a total norm, and return it; None inside an accumulation window."""
        return self.engine.clip_gradients(parameters, optimizer, max_norm, **kwargs)

    def create_scaler(self, dtype: torch.dtype = torch.float16, **_: Any) -> None:
        """Check older projects' precision, whose scaler belongs to Accelerate."""
        name = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype)
        if self.engine.mixed_precision != name:
            raise ValueError(
                f"`create_scaler` asks for {dtype}, and the run's precision is "
                f"{self.engine.mixed_precision!r}; set `mixed_precision` of the Trainer"
            )

    def unwrap(self, module: nn.Module) -> Any:
        """The user's module inside what Accelerate made of it."""
        return self._engine.unwrap(module) if self._engine else module

    def log(self, name: str, value: Any, *, reduce: str | None = None) -> None:
        """Log one value; see :meth:`log_dict`."""
        self.log_dict({name: value}, reduce=reduce)

    def log_dict(self, values: dict[str, Any], *, reduce: str | None = None) -> None:
        """Log values (numbers, or tensors of one element) under the current step.

        In ``train_step`` the latest value before a log point is written, of rank 0; in
        ``valid_step`` and ``test_step`` the mean over batches and ranks, at the end;
        in other hooks the value, at once.

        `reduce`: "mean", "sum", "max" or "min" of the ranks' values, and in
        ``valid_step`` and ``test_step`` of those of the batches. Then every rank must
        log it, in other hooks at the same time.

        Raises:
            ValueError: another `reduce`.
        """
        assert self._session is not None, "the model is in no run"
        self._session.log(values, reduce)

    def gather(self, tensor: torch.Tensor) -> Any:
        """The tensors of all ranks, joined; every rank must call."""
        return self.accelerator.gather(tensor)

    def gather_for_metrics(self, values: Any) -> Any:
        """The values of all ranks without padded duplicates; every rank must call.

        For what has a row, or an item, for each sample of the batch in work, so that
        an evaluation counts every sample once whatever the number of ranks.
        """
        return self.engine.gather_for_metrics(values)

    def print(self, *args: Any) -> None:
        """Print on the main rank."""
        self.accelerator.print(*args)

    # For the trainer and the session.

    def _holdings(self) -> holdings.Holdings:
        """What the model holds now, by path."""
        return holdings.find({k: v for k, v in vars(self).items() if k not in _OWN})

    def _books(self) -> dict[str, dict[str, Any]]:
        """The running losses and scores, which are saved with the run."""
        return {"losses": self._running_losses, "scores": self._val_scores}

    def _run_setup(
        self,
        engine: Engine,
        *,
        for_inference: bool,
        call: Callable[[Callable[[], None]], None],
    ) -> None:
        """``call`` the ``setup``, prepare what it made, and put that in its place."""
        self._engine = engine
        for book in self._books().values():
            book.clear()
        call(partial(self._call_for_inference, self.setup, for_inference))
        found = self._holdings()
        kinds = (found.networks, found.optimizers, found.schedulers)
        by = engine.prepare(*(list(kind.values()) for kind in kinds))
        for parameter in found.parameters.values():
            parameter.data = parameter.data.to(engine.device)
        for name, value in vars(self).items():
            if name not in _OWN:
                vars(self)[name] = holdings.replace(value, by)

    @staticmethod
    def _call_for_inference(
        method: Callable[..., None], for_inference: bool, *args: Any
    ) -> None:
        """Pass the flag under the name that the user's method has for it, if any."""
        names = {"for_inference", "fast_init"} & {*inspect.signature(method).parameters}
        method(*args, **dict.fromkeys(names, for_inference))
