"""The checks of a Session's arguments."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

from helios.arguments import check_faults
from helios.callbacks.base import Callback
from helios.checkpoint import Encoder
from helios.data.adopting import check_loader
from helios.engine import Accelerator
from helios.errors import UnstorableError
from helios.handwritten.faults import POLICIES
from helios.handwritten.parts import TRAIN
from helios.model import holdings
from helios.retention import SaveOptions
from helios.state import Schedule, TrainingUnit, check_name


def check_arguments(
    given: Mapping[str, Any], objects: dict[str, Any]
) -> tuple[Any, bool]:
    """Raise a ValueError or TypeError on wrong arguments, before anything is made.

    Returns the objects: also those that Accelerate knows, where none that is given is
    an optimizer, and each without a ``state_dict`` as its :class:`Attributes`. And
    whether an optimizer was given.
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
    for name, loader in loaders.items():
        check_loader(loader, f"loaders[{name!r}]")
        if twice := [n for n, one in loaders.items() if n != name and one is loader]:
            raise ValueError(
                f"`loaders` has one loader as {name!r} and as {twice[0]!r}, and it can "
                "only be read in one place; make one for each"
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
            objects = {**objects, name: Attributes(name, value)}
    is_named = bool(holdings.find(objects).optimizers)
    if not is_named:
        known: Any = accelerator
        lists = {
            "models": list(known._models),
            "optimizers": list(known._optimizers),
            "schedulers": list(known._schedulers),
        }
        if taken := sorted(lists.keys() & objects.keys()):
            raise ValueError(
                f"`{taken[0]}` names what Accelerate knows, which is added, as no "
                "optimizer was passed; use another name"
            )
        objects = {**lists, **objects}
    if not holdings.find(objects).optimizers:
        raise ValueError(
            "no optimizer was passed, so that nothing would be trained; pass it and "
            "its networks by keywords, as `model=model, optimizer=optimizer`, or none "
            "of those that Accelerate has prepared"
        )
    return objects, is_named


def settings_of(given: Mapping[str, Any]) -> tuple[Schedule, SaveOptions]:
    """When the run logs, saves and ends, by the arguments, and what it keeps."""
    by_epochs = given["save_every"] == "epoch"
    schedule = Schedule(
        train_unit=TrainingUnit.EPOCH,
        total_steps=math.inf,
        chkpt_frequency=1 if by_epochs else None,
        print_frequency=given["log_every"],
        accumulation_steps=given["accelerator"].gradient_accumulation_steps,
    )
    names = (field.name for field in dataclasses.fields(SaveOptions))
    return schedule, SaveOptions(**{n: given[n] for n in names if n in given})


class Attributes:
    """An object without a ``state_dict``, to be saved by its attributes.

    Raises:
        TypeError: they are not all plain values, tensors, and containers of these.
    """

    def __init__(self, name: str, owner: Any) -> None:
        self.owner = owner
        try:
            if not vars(owner):  # or it has none: a TypeError
                raise TypeError("it has no attributes")
            Encoder().encode(self.state_dict(), file=name)
        except (TypeError, UnstorableError) as error:
            raise TypeError(
                f"`{name}` is no argument of the Session, and has no state to be saved "
                "either: it must be a network, an optimizer, a scheduler, have "
                "`state_dict` and `load_state_dict`, or plain attributes, got "
                f"{owner!r:.100}: {error}"
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """Its attributes."""
        return dict(vars(self.owner))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put its attributes back."""
        vars(self.owner).update(state)
