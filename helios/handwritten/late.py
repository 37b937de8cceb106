"""What a script has made after its Session, which so does not know of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from helios.callbacks.base import Callback
from helios.data.adopting import AdoptedLoader
from helios.engine import inner_optimizer, is_scheduler
from helios.errors import ModelError
from helios.model.holdings import Holdings
from helios.session import Session

_DEPTH = 3  # of what another object may hold a scheduler in


def registered_with(accelerator: Any) -> list[Any]:
    """What was registered for checkpointing; where loaders are, the session knows."""
    found = accelerator._custom_objects
    return [one for one in found if not isinstance(one, AdoptedLoader)]


class Latecomers(Callback):
    """Refuses, when training starts, what would not be saved.

    Of what Accelerate knows a Session takes what is there when it is made, unless its
    user has named what counts.
    """

    def __init__(self, is_named: bool) -> None:
        self._is_named = is_named

    def on_training_start(self, session: Session) -> None:
        """Raise a ModelError if something has come later, or is left out."""
        accelerator, model = session.engine.accelerator, session._model
        held: dict[str, Any] = vars(model)["objects"]
        now = {
            "models": accelerator._models,
            "optimizers": accelerator._optimizers,
            "schedulers": accelerator._schedulers,
        }
        if self._is_named:
            now = {}
        now["registered"] = registered_with(accelerator)
        for name, found in now.items():
            for one in found:
                if not any(one is other for other in held.get(name, ())):
                    raise ModelError(
                        f"a {type(one).__name__} was prepared, or registered for "
                        "checkpointing, after the session was made, which does not "
                        "save it; make the session behind all of that"
                    )
        _check_schedulers(model._holdings())


def _check_schedulers(found: Holdings) -> None:
    """Raise a ModelError if an optimizer has a scheduler that is not among these."""
    known = set[int]()
    for scheduler in (
        *found.schedulers.values(),
        *(each for other in found.others.values() for each in _schedulers_in(other)),
    ):
        inner = getattr(scheduler, "scheduler", scheduler)
        own = getattr(inner, "optimizer", None) or getattr(inner, "_optimizer", None)
        known.add(id(inner_optimizer(own)))
    for path, optimizer in found.optimizers.items():
        inner = inner_optimizer(optimizer)
        # A mark that torch's schedulers leave.
        steps = inner.step, optimizer.step
        has_one = any(getattr(s, "_wrapped_by_lr_sched", False) for s in steps)
        if has_one and id(inner) not in known:
            raise ModelError(
                f"a scheduler was made for `{path}`, and is not among what the session "
                "saves: pass it, as `scheduler=scheduler`, or prepare or register it "
                "before the session is made"
            )


def _schedulers_in(value: Any, depth: int = _DEPTH) -> Iterator[Any]:
    """The schedulers that an object holds, and so may save."""
    if is_scheduler(value):
        yield value
    elif depth:
        parts = value if isinstance(value, list | tuple) else ()
        named = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
        for part in (*parts, *named.values()):
            yield from _schedulers_in(part, depth - 1)
