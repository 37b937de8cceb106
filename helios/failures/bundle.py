"""The crash bundle: a folder with what is known of a step that has failed."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from helios import rng
from helios.checkpoint import Encoder
from helios.checkpoint.codec import decode
from helios.checkpoint.tensors import map_tensors, write_tensors
from helios.data.batches import listed
from helios.errors import CheckpointError
from helios.health.watch import LEFT_OUT
from helios.session import Session
from helios.state import EpochStage

KINDS = ("samples", "batch", None)
REPLAYS = "HELIOS_REPLAY"  # the bundle that a process is to replay
RECORD, TENSORS, TRACEBACK = "bundle.json", "step.safetensors", "traceback.txt"
CHECKPOINT = "checkpoint"
_FORMAT = 1
_VARIABLES = (
    *("ACCELERATE_", "CUDA_", "CUBLAS_", "NCCL_", "GLOO_", "OMP_", "MKL_"),
    *("PYTHON", "TORCH_", "HELIOS_"),
)


class Wish(NamedTuple):
    """What a run wants of a bundle."""

    kind: str | None  # of KINDS
    root: str | os.PathLike[str] | None  # the folder that the bundle is put into
    run_name: str
    parts: int = 1  # of each batch of the data


def write_bundle(wish: Wish, session: Session, error: BaseException) -> None:
    """Write a bundle, if a batch of the training was in work and one is wanted.

    That it cannot be written is logged.
    """
    state, loaded, logger = session.state, session.engine.loaded, session.logger
    root = wish.root
    is_in_work = (
        loaded is not None
        and state.epoch_stage == EpochStage.OPEN
        and loaded.number >= state.dataset_iter
        and session.journal.keeps != "means"
    )
    is_wanted = wish.kind is not None and isinstance(error, Exception)
    if not (is_in_work and is_wanted) or root is None or REPLAYS in os.environ:
        return
    at = f"batch_{state.global_iteration}_rank_{session.engine.rank}"
    folder = Path(root) / f"{wish.run_name}_crash_{at}"
    partial = folder.with_name(f".{folder.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        text = "".join(traceback.format_exception(error))
        (partial / TRACEBACK).write_text(text, encoding="utf-8")
        facts = _facts(wish, session, error)
        facts["trees"] = _write_step(wish, session, partial)
        facts["checkpoint"] = _link_checkpoint(session, partial)
        record = json.dumps(facts, indent=2, default=repr)
        (partial / RECORD).write_text(record, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
    except OSError as problem:
        logger.error("no crash bundle could be written: %s", problem)
        return
    finally:  # its links would keep what the run deletes
        shutil.rmtree(partial, ignore_errors=True)
    logger.critical("what is known of the step: helios replay %s", folder)


def _facts(wish: Wish, session: Session, error: BaseException) -> dict[str, Any]:
    engine, state, loaded = session.engine, session.state, session.engine.loaded
    assert loaded is not None, "a batch is in work"
    indices = loaded.indices
    variables = {k: v for k, v in os.environ.items() if k.startswith(_VARIABLES)}
    return {
        "format": _FORMAT,
        "error": f"{type(error).__name__}: {error}",
        "run_name": wish.run_name,
        "save_name": session._model.save_name,
        "parts_of_batches": wish.parts,
        "rank": engine.rank,
        "world_size": engine.world_size,
        "batch": {
            "of_the_run": state.global_iteration,
            "of_the_epoch": loaded.number,
            "samples": None if indices is None else listed(indices),
            "rows": loaded.rows,
            "rows_without_padding": loaded.real,
        },
        "progress": state.dict(),
        "left_out": session.reading.get(LEFT_OUT, []),  # since the checkpoint, too
        "identity": session.identity,
        "environment": {
            "executable": sys.executable,
            "arguments": sys.orig_argv[1:],
            "folder": os.getcwd(),
            "variables": variables,
            "host": platform.node(),
            "platform": platform.platform(),
        },
    }


def _write_step(wish: Wish, session: Session, folder: Path) -> dict[str, Any]:
    """Write the random numbers and, if wanted, the batch; the trees of what could be.

    After some errors a device can't be used any more, and some batches have no stored
    form: it is said in the log what is missing.
    """
    loaded, encoder = session.engine.loaded, Encoder()
    values: dict[str, Callable[[], Any]] = {
        "rng": lambda: rng.capture_rng(session.engine.device)
    }
    if wish.kind == "batch" and loaded is not None:
        values["batch"] = lambda: loaded.data
    trees, tensors = dict[str, Any](), dict[str, Any]()
    for name, value in values.items():
        try:
            tree = encoder.encode({name: value()}, file=name)
            found = encoder.files[name].items()
            held = {f"{name}.{n}": t.detach().cpu().contiguous() for n, t in found}
        except (CheckpointError, RuntimeError) as problem:
            session.logger.error("the bundle is without the %s: %s", name, problem)
            continue
        trees[name], tensors = tree, {**tensors, **held}
    with open(folder / TENSORS, "wb") as out:
        write_tensors(out, tensors, {})
    return trees


def _link_checkpoint(session: Session, folder: Path) -> str | None:
    """Keep the files of the checkpoint that a replay starts from; return where it is.

    None: the run began without one.
    """
    if session.saver is not None:
        session.saver._background.wait()  # for the one in flight
    if (last := session.base) is None:
        return None
    kept = folder / CHECKPOINT / last.name
    try:
        kept.mkdir(parents=True)
        for path in last.iterdir():
            os.link(path, kept / path.name)
    except OSError:  # on another file system: then it is there as long as it is
        shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
        return os.fspath(last.absolute())
    return f"{CHECKPOINT}/{last.name}"


def read_bundle(folder: Path) -> dict[str, Any]:
    """The record of a bundle, with the values that it holds under "values".

    Raises:
        CheckpointError: it is none, or is damaged.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        tensors = dict(map_tensors(folder / TENSORS))
        if record["format"] != _FORMAT:
            raise ValueError(f"it has format {record['format']}, not {_FORMAT}")
        record["values"] = {
            name: decode(tree, lambda _, file, key, *__: tensors[f"{file}.{key}"])[name]
            for name, tree in record["trees"].items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a crash bundle: {error}") from error
    found: dict[str, Any] = record
    return found
