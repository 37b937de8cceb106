"""What a script has made after its Session, which so does not know of it."""

from __future__ import annotations

from typing import Any

from helios.callbacks.base import Callback
from helios.data.adopting import AdoptedLoader
from helios.errors import ModelError
from helios.session import Session


def registered_with(accelerator: Any) -> list[Any]:
    """What was registered for checkpointing; where loaders are, the session knows."""
    found = accelerator._custom_objects
    return [one for one in found if not isinstance(one, AdoptedLoader)]


class Latecomers(Callback):
    """Refuses, when training starts, what would not be saved.

    Of what Accelerate knows a Session takes what is there when it is made.
    """

    def on_training_start(self, session: Session) -> None:
        """Raise a ModelError if something has come later."""
        accelerator, model = session.engine.accelerator, session._model
        held: dict[str, Any] = vars(model)["objects"]
        now = {
            "models": accelerator._models,
            "optimizers": accelerator._optimizers,
            "schedulers": accelerator._schedulers,
        }
        if not now.keys() <= held.keys():  # the user has named what counts
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
