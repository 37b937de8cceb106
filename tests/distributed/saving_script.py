"""Run by test_saving_on_ranks.py on each rank: writes fail.

The "first" one, "each" one, or those of the "other" rank.
"""

import json
import os
import pathlib
import sys

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


if sys.argv[2] != "other":
    CheckpointStore.commit = failing
elif rank == 1:
    CheckpointStore.write_group = failing_here
error, is_finished = None, None
try:
    is_finished, _ = train(
        IdModel(),
        IndexData(),
        folder / "checkpoints",
        StopAt(batch=2),
        train_unit="iteration",
        total_steps=6,
        chkpt_frequency=2,
        async_save=False,
    )
except CheckpointError as failure:
    error = str(failure)
torch.distributed.barrier()  # nobody has to end for the others to come this far
report = {"is_finished": is_finished, "writes": len(calls), "error": error}
(folder / f"rank_{rank}.json").write_text(json.dumps(report))
torch.distributed.barrier()  # ranks leave together
torch.distributed.destroy_process_group()
