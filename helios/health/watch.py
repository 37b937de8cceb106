"""The Health of a training: losses and gradients that are NaN or infinite.

What is looked at stays on the device: the losses, and at each optimizer step whether
all gradients are finite. It is copied to the host, for several batches at once, and
read when the copy has come. Only "skip" waits for the device, before the step.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from helios.engine import inner_optimizer
from helios.errors import BadNumbersError
from helios.health.numbers import Found, Value, Watched, Where, dense, together
from helios.session import Session
from helios.sharding import is_sharded
from helios.state import TrainingState

POLICIES = ("warn", "stop", "skip", "rollback", None)
# In what a rank has read, which is saved with it.
LEFT_OUT, SKIPPED, BUFFERS = "left_out_steps", "skipped_steps", "buffers_before"
WINDOW = "seen_in_window"
REASON = "numbers have gone bad"  # for a stop
_WARN_EVERY = 32  # batches
_AHEAD = 8  # copies that may be under way
_GRADIENT = "gradient"
# With a device, in a run that has failed: it may fail too, or wait for other ranks.
_PATIENCE_S, _HASTE_S = 5.0, 0.5  # interrupted, it has two in all

Step: TypeAlias = Callable[[Any, TrainingState], None]


class RollBack(Exception):
    """Asks to go back to before a step, and to leave it out.

    ``step`` is how many steps come before it, ``batch`` how many batches.
    """

    def __init__(self, step: int, batch: int, reason: str) -> None:
        super().__init__(reason)
        self.step, self.batch = step, batch


class Health:
    """Watches the numbers of a session's training, as a policy says.

    "warn" writes them down; "stop" and "rollback" raise a BadNumbersError, or a
    RollBack, on all ranks before anything more is saved; "skip" leaves the step out.
    """

    def __init__(
        self, session: Session, policy: str | None, accelerator: Any = None
    ) -> None:
        """Watch what ``accelerator.backward`` gets; None: the engine's ``backward``."""
        self._session, self._model, self._policy = session, session._model, policy
        self._calls = accelerator or session.engine
        self._every = _WARN_EVERY if policy in ("warn", "skip") else 1
        self._values: list[Value] = []  # of the batch in work
        self._takes = self._takes_all = accelerator is None
        self._window: list[Watched] = []  # "skip": before the step
        #: And what was judged before, as a checkpoint was to be saved.
        self._seen: list[tuple[Where, str | None]] = []
        self._open: list[Watched] = []  # not looked at yet
        self._copies: list[Any] = []  # under way to the host
        self._found: Found | None = None
        self._flags: list[torch.Tensor] = []  # not used yet
        self._skipped_at: int | None = None
        # "skip": those of the networks, and as they were before the step.
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._undo = contextlib.ExitStack()
        if policy is not None:
            self._attach()

    def detach(self) -> None:
        """Watch no longer, and leave what was watched as it was."""
        self._undo.close()

    def around(self, train_step: Step) -> Step:
        """The step of a model, watched; what is left out does not come to it."""
        left_out = {*self._session.reading.get(LEFT_OUT, ())}
        watched = train_step
        if self._policy is not None:
            self.begin()

            def watched(batch: Any, state: TrainingState) -> None:
                self.before_batch()
                train_step(batch, state)
                self.after_batch()

        if not left_out:
            return watched

        def step(batch: Any, state: TrainingState) -> None:
            # By step: only its end tells how many batches the last one has.
            if state.current_iteration not in left_out:
                watched(batch, state)
                return
            self._session.logger.info("left out: %s", self._where())

        return step

    def begin(self) -> None:
        """Forget what an earlier way through these batches has left, if any."""
        self._open, self._values, self._window, self._copies = [], [], [], []
        self._found = None
        if self._policy != "skip":
            return
        seen = self._session.reading.pop(WINDOW, ())
        self._seen = [(Where(*where), what) for where, what in seen]
        live = [*self._model._holdings().buffers().values()]
        # Inside a window, those from before it have been saved.
        olds = self._session.reading.get(BUFFERS, live)
        self._buffers = [
            (own, own.clone().copy_(old)) for own, old in zip(live, olds, strict=True)
        ]
        if self._session.schedule.accumulation_steps > 1:
            self._session.reading[BUFFERS] = [old for _, old in self._buffers]

    def before_batch(self) -> None:
        """Keep what "skip" puts back; before each batch."""
        self._takes = True
        window = self._session.schedule.accumulation_steps
        if self._buffers and self._session.state.dataset_iter % window == 0:
            for live, old in self._buffers:
                old.copy_(live)

    def settle(self) -> None:
        """Read all that is under way, and act on it; every rank must call.

        Raises:
            BadNumbersError, RollBack: numbers of any rank are bad, by policy.
        """
        self._look()
        self._read(0)
        if self._policy == "skip":
            self._judge_window()
        if self._policy in ("warn", "skip"):
            return
        engine, window = self._session.engine, self._session.schedule.accumulation_steps
        if not engine.agree(self._found is not None):
            return
        found = [f for f in engine.gather_objects(self._found) if f is not None]
        where = min((f.where for f in found), key=lambda w: w.batch)
        reason = "; ".join(f.what for f in found if f.where.batch == where.batch)
        self._found = None  # told by what is raised
        if self._policy == "stop":
            is_there = self._has_checkpoint()
            last = "The last checkpoint is" if is_there else "There is no checkpoint"
            other = ' or "rollback"' if is_there and self._takes_all else ""
            raise BadNumbersError(
                f"{reason}. {last} from before that. The same command "
                "comes to the same numbers: change what makes them, or pass "
                f'`bad_numbers="skip"`{other}'
            )
        raise RollBack(where.step - 1, where.batch - where.number % window, reason)

    def tell_unread(self, error: BaseException) -> None:
        """Write down what was not told, as the run has failed; any rank, by itself."""
        found = [] if self._found is None else [self._found]
        copies, unread = self._copies, [*self._window, *self._open]
        if self._values:
            unread.append((self._where(), self._values))
        self._window, self._open, self._values, self._copies = [], [], [], []

        def read() -> None:
            with contextlib.suppress(Exception):
                for batches, numbers, event in copies:
                    if event is not None:
                        event.synchronize()
                    found.extend(self._bad(batches, numbers.tolist()))
                for batch in unread:
                    found.extend(self._bad([batch], together(batch[1]).tolist()))

        reader = threading.Thread(target=read, name="helios-numbers", daemon=True)
        with contextlib.suppress(BaseException):  # the run's own failure comes first
            reader.start()
            reader.join(_PATIENCE_S if isinstance(error, Exception) else _HASTE_S)
            if found:
                self._warn(found)

    def _has_checkpoint(self) -> bool:
        """Whether the run has made or taken up one; every rank must call."""
        session = self._session
        if session.saver is not None:  # one may be under way
            session.saver.complete()
            session.saver.finish()
        return session.engine.agree(session.base is not None)

    def _attach(self) -> None:
        """See the losses that go into a backward, and the optimizers' gradients."""
        engine, calls = self._session.engine, self._calls
        backward = calls.backward

        def watched(loss: Any, *args: Any, **kwargs: Any) -> None:
            if self._takes:
                self._values.append(("loss", loss.detach()))
            backward(loss, *args, **kwargs)

        def give_back() -> None:
            self._takes = self._takes_all = False
            if calls.backward is watched:  # else another session's lies on top
                calls.backward = backward

        calls.backward = watched
        self._undo.callback(give_back)
        self._session.before_save = self.settle
        self._session.tell_unread = self.tell_unread
        self._undo.callback(setattr, self._session, "tell_unread", lambda error: None)
        for optimizer in self._model._holdings().optimizers.values():
            if self._policy == "skip":
                self._guard(optimizer)
            elif engine.scaler is None:  # else that looks, and skips the step
                inner = inner_optimizer(optimizer)
                hook = inner.register_step_pre_hook(self._look_at_gradients)
                self._undo.callback(hook.remove)

    def _where(self) -> Where:
        state, loaded = self._session.state, self._session.engine.loaded
        return Where(
            state.global_iteration,
            state.current_iteration + 1,
            state.global_epoch,
            state.dataset_iter,
            None if loaded is None else loaded.indices,
        )

    def after_batch(self) -> None:
        """Look at what it has left; after each batch."""
        if self._policy is None:
            return
        values, self._values, self._takes = self._values, [], self._takes_all
        for name, value in self._model._loss_items.items():
            if isinstance(value, torch.Tensor):
                values.append((name, value.detach()))
            elif not math.isfinite(value):  # of the host, which is there already
                values.append((name, value))
        if self._policy == "skip":
            if self._skipped_at == self._session.state.global_iteration:
                return
            if not self._session.engine.accelerator.sync_gradients:
                self._window.append((self._where(), values))
                return
            self._window, self._seen = [], []
        self._open.append((self._where(), values))
        if len(self._open) >= self._every:
            self._look()
            self._read(_AHEAD)

    def _look(self) -> None:
        """Begin to copy to the host what has come together."""
        batches, self._open = self._open, []
        if not batches:
            return
        numbers = together([v for _, values in batches for v in values])
        event = None
        if numbers.is_cuda:
            pinned = torch.empty_like(numbers, device="cpu", pin_memory=True)
            numbers = pinned.copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._copies.append((batches, numbers, event))
        if event is None:
            self._read(0)

    def _read(self, remaining: int) -> None:
        """Read the copies that have come; wait only where there are more than that."""
        while self._copies:
            batches, numbers, event = self._copies[0]
            if event is not None and not event.query():
                if len(self._copies) <= remaining:
                    return
                event.synchronize()
            del self._copies[0]
            if found := self._bad(batches, numbers.tolist()):
                self._report(found)

    def _report(self, found: list[Found]) -> None:
        if self._policy in ("stop", "rollback"):
            if self._found is None:
                self._found = found[0]
                reason = f"{REASON}: {found[0].what}"
                self._session.stops.request(reason, is_own=True)
            return
        self._warn(found)

    def _warn(self, found: list[Found]) -> None:
        more, told = "", "NUMBERS HAVE GONE BAD: %s%s"
        if len(found) > 1:
            more = f"; and in {len(found) - 1} more batches, to step "
            more += f"{found[-1].where.step}"
        self._session.logger.warning(told, found[0].what, more)

    def _bad(self, batches: list[Watched], numbers: list[float]) -> list[Found]:
        """What is bad, batch by batch; `numbers` are those of all values, in turn."""
        found, left = [], iter(numbers)
        for where, values in batches:
            words = dict[str, None]()  # each once
            for (name, _), number in zip(values, left, strict=False):
                if name == _GRADIENT and number:
                    words["a gradient is not finite"] = None
                elif not math.isfinite(number):
                    words[f"{name} is {number}"] = None
            if words:
                rank = self._session.engine.rank
                what = f"rank {rank}: {', '.join(words)}, at {where}"
                found.append(Found(where, what))
        return found

    def _look_at_gradients(self, optimizer: Any, *_: Any) -> None:
        """Have a flag put on the device where a gradient is not finite."""
        groups = optimizer.param_groups
        grads = [p.grad for g in groups for p in g["params"] if p.grad is not None]
        if not (grads and self._takes):
            return
        first = grads[0]
        if not self._flags:
            device = first.device
            self._flags = list(torch.zeros(_WARN_EVERY, device=device).unbind())
            self._one = torch.ones((), device=device)
        flag = self._flags.pop()
        try:
            if first.requires_grad or is_sharded(first):
                raise NotImplementedError
            # As torch's gradient scaler does: one pass over all, and times one.
            torch._amp_foreach_non_finite_check_and_unscale_(grads, flag, self._one)
        except RuntimeError:  # of several devices, sparse, complex
            for grad in grads:
                flag += (~torch.isfinite(dense(grad.detach()))).any()
        self._values.append((_GRADIENT, flag))

    def _guard(self, optimizer: Any) -> None:
        """Have an optimizer leave out the steps of bad numbers."""
        original, inner = optimizer.step, inner_optimizer(optimizer)
        engine = self._session.engine

        @functools.wraps(original)  # torch's schedulers look for a mark of theirs
        def step(*args: Any, **kwargs: Any) -> Any:
            if not engine.accelerator.sync_gradients or not self._skips(inner):
                return original(*args, **kwargs)
            # Cleared here: a `zero_grad` in a window need not act after this.
            inner.zero_grad()
            inner._opt_called = True
            if engine.scaler is not None:  # it keeps its scale, and begins anew
                engine.scaler.update(engine.scaler.get_scale())
            return None

        optimizer.step = step
        self._undo.callback(setattr, optimizer, "step", original)

    def _skips(self, optimizer: Any) -> bool:
        """Whether the step in work is bad on any rank; every rank must call."""
        engine, state = self._session.engine, self._session.state
        if self._skipped_at == state.global_iteration:  # for another optimizer
            return True
        if engine.scaler is None:  # whose business they are otherwise
            self._look_at_gradients(optimizer)
        batches = [*self._window, (self._where(), self._values)]
        self._values = []
        numbers = together([v for _, values in batches for v in values])
        found = self._bad(batches, numbers.tolist())
        whats = [what for _, what in self._seen if what] + [f.what for f in found]
        if not engine.agree(bool(whats)):
            return False
        left_out = [*(where for where, _ in self._seen), *(w for w, _ in batches)]
        self._window, self._seen = [], []
        self._skipped_at = state.global_iteration
        for live, old in self._buffers:
            live.copy_(old)
        reading = self._session.reading
        reading[SKIPPED] = reading.get(SKIPPED, 0) + 1
        own = whats[0] if whats else None
        told = [what for what in engine.gather_objects(own) if what is not None]
        self._session.logger.log(
            logging.WARNING if engine.is_main else logging.INFO,
            "STEP %d IS SKIPPED, %d so far: %s",
            *(state.current_iteration + 1, reading[SKIPPED], "; ".join(told)),
        )
        for where in left_out:
            self._session.logger.info("skipped on rank %d: %s", engine.rank, where)
        return True

    def _judge_window(self) -> None:
        """Look at what the open window has so far: a resume has no numbers of it."""
        for batch in self._window:
            found = self._bad([batch], together(batch[1]).tolist())
            self._seen.append((batch[0], found[0].what if found else None))
        self._window = []
        reading = self._session.reading
        reading.pop(WINDOW, None)
        if self._seen:
            reading[WINDOW] = [(tuple(where), what) for where, what in self._seen]
