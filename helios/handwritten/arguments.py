"""The checks of a Session's arguments."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from helios.arguments import check_faults
from helios.callbacks.base import Callback
from helios.engine import Accelerator
from helios.handwritten.faults import POLICIES
from helios.handwritten.parts import TRAIN
from helios.model import holdings
from helios.state import check_name


def check_arguments(given: Mapping[str, Any], objects: dict[str, Any]) -> Any:
    """Raise a ValueError or TypeError on wrong arguments, before anything is made.

    Returns the objects: those that Accelerate knows, where none are given.
    """
    accelerator, path, loaders = (given[n] for n in ("accelerator", "path", "loaders"))
    if not isinstance(accelerator, Accelerator):
        raise TypeError(f"`accelerator` must be an Accelerator, got {accelerator!r}")
    for name in ("path", "resume"):
        if not isinstance(given[name], str | os.PathLike):
            raise TypeError(f"`{name}` must be a path, got {given[name]!r}")
    check_name("path", os.path.basename(os.path.abspath(path)))
    if not isinstance(loaders, Mapping) or TRAIN not in loaders:
        has = sorted(map(str, loaders)) if isinstance(loaders, Mapping) else loaders
        raise ValueError(
            '`loaders` must be a DataLoader, or a dict of them with "train", which is '
            f"trained on; got {has!r}"
        )
    for name in ("save_every", "log_every"):
        value, word = given[name], ' or "epoch"' if name == "save_every" else ""
        is_word = value == "epoch" and bool(word)
        if not (value is None or is_word or (type(value) is int and value >= 1)):
            raise ValueError(
                f"`{name}` must be an int >= 1, in steps,{word} or None, got {value!r}"
            )
    seed, callbacks = given["random_seed"], given["callbacks"]
    if seed is not None and type(seed) is not int:
        raise TypeError(f"`random_seed` must be an int or None, got {seed!r}")
    check_faults(given, POLICIES)
    if not all(isinstance(callback, Callback) for callback in callbacks):
        raise TypeError(f"`callbacks` must be helios.Callback objects: {callbacks!r}")
    if "registered" in objects:
        raise ValueError("`registered` names what Accelerate knows; use another name")
    for name, value in objects.items():
        found = holdings.find({name: value})
        if not any(vars(found).values()):
            raise TypeError(
                f"`{name}` is no argument of the Session, and has no state to be saved "
                "either: it must be a network, an optimizer, a scheduler, or have "
                f"`state_dict` and `load_state_dict`, got {value!r:.100}"
            )
    known: Any = accelerator
    objects = objects or {
        "models": list(known._models),
        "optimizers": list(known._optimizers),
        "schedulers": list(known._schedulers),
    }
    if not holdings.find(objects).optimizers:
        raise ValueError(
            "no optimizer was passed, so that nothing would be trained; pass it and "
            "its networks by keywords, as `model=model, optimizer=optimizer`, or none "
            "of those that Accelerate has prepared"
        )
    return objects
