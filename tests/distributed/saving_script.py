"""Run by test_saving_on_ranks.py on each rank: the first write, or each one, fails."""

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


CheckpointStore.commit = failing
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
