"""Run by test_saving_on_ranks.py on each rank: writes fail.

The "first" one, "each" one, or those of the "other" rank. Or else that rank's first one
ends only after the training has gone on: "behind".
"""

import json
import os
import pathlib
import sys
import threading

import torch
from support import IdModel, IndexData, StopAt, train

from helios.checkpoint import CheckpointStore
from helios.errors import CheckpointError

torch.set_num_threads(1)
folder, rank = pathlib.Path(sys.argv[1]), int(os.environ["RANK"])
commit, calls = CheckpointStore.commit, []


def failing(self, *args):
    calls.append(args)
    if len(calls) == 1 or sys.argv[2] == "each":
        raise OSError(28, "No space left on device")
    return commit(self, *args)


def failing_here(self, *args):
    raise OSError(28, "No space left on device")


write_group, went_on, was_behind = CheckpointStore.write_group, threading.Event(), []


def waiting(self, *args):
    was_behind.append(went_on.wait(timeout=30))
    return write_group(self, *args)


class Model(IdModel):
    def train_step(self, batch, state):
        super().train_step(batch, state)
        if state.current_iteration == 3:  # a step after the one that was saved
            went_on.set()


if sys.argv[2] in ("first", "each"):
    CheckpointStore.commit = failing
elif rank == 1:
    how = {"other": failing_here, "behind": waiting}
    CheckpointStore.write_group = how[sys.argv[2]]
error, is_finished = None, None
try:
    is_finished, _ = train(
        Model(),
        IndexData(),
        folder / "checkpoints",
        StopAt(batch=None if sys.argv[2] == "behind" else 2),
        train_unit="iteration",
        total_steps=6,
        chkpt_frequency=2,
        async_save=sys.argv[2] == "behind",
    )
except CheckpointError as failure:
    error = str(failure)
torch.distributed.barrier()  # nobody has to end for the others to come this far
report = {"is_finished": is_finished, "writes": len(calls), "error": error}
report["was_behind"] = was_behind
(folder / f"rank_{rank}.json").write_text(json.dumps(report))
torch.distributed.barrier()  # ranks leave together
torch.distributed.destroy_process_group()
