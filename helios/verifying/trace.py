"""The trace of a run: after each batch, a checksum of all that exactness is about.

A process whose environment says so writes one for each of its runs, to the folder that
the environment names. The run saves and logs there as well, and to no other place.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from helios import rng
from helios.callbacks.base import Callback
from helios.checkpoint import Encoder
from helios.data.batches import listed
from helios.errors import UnstorableError
from helios.session import Session
from helios.verifying.frames import plain, variables

if TYPE_CHECKING:
    from helios.trainer import Trainer

FOLDER, STOP, LAST = "HELIOS_VERIFY", "HELIOS_VERIFY_STOP", "HELIOS_VERIFY_LAST"
_SHOWN = 60  # characters of a value


class Trace(Callback):
    """Writes the trace, and stops the run where it is told to.

    A line for each batch: what it was made of, and by path the checksums, or the values
    where they are short, of what the run is made of.
    """

    def __init__(self, folder: Path, is_loop: bool) -> None:
        self._folder, self._is_loop = folder, is_loop
        self._stop, self._last = os.environ.get(STOP), os.environ.get(LAST)

    def on_training_start(self, session: Session) -> None:
        if self._is_loop:  # its user may log by the accelerator, past the session
            accelerator = session.engine.accelerator
            accelerator.log = partial(self._log, session, accelerator.log)

    def _log(
        self,
        session: Session,
        log: Callable[..., Any],
        values: Mapping[str, Any],
        step: int | None = None,
        *args: Any,
        **options: Any,
    ) -> None:
        at = session.state.current_iteration if step is None else int(step)
        self._write(session, logged={k: _exact(v) for k, v in values.items()}, step=at)
        log(values, step, *args, **options)

    def on_training_batch_end(self, session: Session) -> None:
        state, loaded = session.state, session.engine.loaded
        assert loaded is not None, "a batch is in work"
        indices = loaded.indices
        found, loops = variables() if self._is_loop else ({}, {})
        self._write(
            session,
            batch=state.global_iteration,
            epoch=state.global_epoch,
            step=state.current_iteration,
            samples=None if indices is None else listed(indices),
            data=_data(loaded.data),
            values=dict(_values(session)),
            attributes={} if self._is_loop else dict(_attributes(session._model)),
            is_loop=self._is_loop,
            variables=found,
            loops=loops,
        )
        name, number = session._model.save_name, str(state.global_iteration)
        if number == self._last or f"{name}:{number}" == self._stop:
            session.request_stop("its resume is to be verified")

    def on_log(self, session: Session, values: dict[str, float]) -> None:
        step = session.state.current_iteration
        exact = {name: _exact(value) for name, value in values.items()}
        self._write(session, logged=exact, step=step)

    def on_training_end(self, session: Session) -> None:
        self._write(session, end=session.state.global_iteration)

    def _write(self, session: Session, **line: Any) -> None:
        name = f"{session._model.save_name}.rank_{session.engine.rank}.jsonl"
        with open(self._folder / name, "a", encoding="utf-8") as file:
            print(json.dumps(line), file=file)


def _exact(value: Any) -> str:
    try:
        return float(value).hex()
    except (TypeError, ValueError, RuntimeError):  # text, pictures
        return repr(value)[:_SHOWN]


def _checksum(data: bytes | memoryview) -> str:
    return f"{zlib.crc32(data):08x}"


def _of_tensor(tensor: torch.Tensor) -> str:
    if tensor.numel() == 1 and not tensor.is_complex():
        return repr(tensor.item())
    # As bytes: numpy knows no bfloat16.
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tuple(tensor.shape)} {_checksum(data.data)}"


def _data(batch: Any) -> str | None:
    """The checksum of a batch; None where it has no stored form."""
    encoder = Encoder()
    try:
        tree = encoder.encode({"batch": batch}, file="batch")
    except UnstorableError:
        return None
    parts = [json.dumps(tree), *map(_of_tensor, encoder.files["batch"].values())]
    return _checksum(" ".join(parts).encode())


def _values(session: Session) -> Iterator[tuple[str, str]]:
    encoder, trees = session._encode()
    for file, tensors in encoder.files.items():
        for name, tensor in tensors.items():
            yield f"{_part(file)}.{name}", _of_tensor(tensor)
    for file, tree in trees.items():
        # Where a reader stands is shown by what it reads; it keeps times, too.
        kept = {k: v for k, v in tree.items() if (file, k) != (session._own, "reading")}
        yield from _leaves(kept, _part(file))


def _part(file: str) -> str:
    """What a part is called in paths, as its files may be shared out over the ranks."""
    return "rank" if file.startswith("rank_") else file


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, str]]:
    members: Mapping[Any, Any] = {}
    if isinstance(tree, dict):
        if tree.get("$") == "tensor":  # is among the files
            return
        members = tree
    elif isinstance(tree, list):
        members = dict(enumerate(tree))
    for key, member in members.items():
        yield from _leaves(member, path if key in ("$", "v") else f"{path}.{key}")
    if not isinstance(tree, dict | list):
        text = repr(tree)
        is_short = len(text) <= _SHOWN
        yield path, text if is_short else f"{text[:_SHOWN]} {_checksum(text.encode())}"


def _attributes(model: Any) -> Iterator[tuple[str, str]]:
    """The model's plain attributes: the ones that nobody saves unless it is told to."""
    for name, value in vars(model).items():
        if isinstance(value, rng.GENERATORS) or name.startswith("_"):
            continue
        if (text := plain(value)) is not None:
            yield name, text


def traces(
    path: str | os.PathLike[str], *, is_loop: bool = False
) -> tuple[Path, list[Callback]]:
    """Where a run below ``path`` is to write, and what is to be attached to it.

    That place and nothing, unless the environment asks for a trace. ``is_loop`` says
    that the user has written the loop.
    """
    if (place := os.environ.get(FOLDER)) is None:
        return Path(path), []
    trace = Trace(Path(place), is_loop)
    return Path(place) / "run" / os.path.basename(path), [trace]


def prepare_verification(trainer: Trainer) -> None:
    """Have a trainer's run be traced, if the environment says so."""
    root, callbacks = traces(trainer.chkpt_root or "")
    if not callbacks or any(isinstance(hook, Trace) for hook in trainer._hooks):
        return
    trainer.chkpt_root, trainer.resume = root, "auto"
    for name in ("log_root", "log_path", "run_path"):
        if getattr(trainer, name) is not None:
            setattr(trainer, name, root / name)
    trainer._hooks = [*trainer._hooks, *callbacks]
