"""Run by test_ranks_disagree.py on each rank: runs whose ranks differ in one thing."""

import json
import os
import pathlib
import sys

import torch
from support import IdModel, IndexData, train

import helios

torch.set_num_threads(1)
rank = int(os.environ["RANK"])
CASES = {
    "batch": ({"batch_size": 2 + rank}, {}),
    "length": ({"length": 12 + 4 * rank}, {}),
    "seed": ({}, {"random_seed": rank}),
    "steps": ({}, {"total_steps": 2 + rank}),
    "frequency": ({}, {"valid_frequency": 1 + rank}),
    "accumulation": ({}, {"accumulation_steps": 1 + rank}),
    "own data": ({"length": 12 + 2 * rank, "is_distributed": False}, {}),
    "one sample": ({"length": 1}, {}),
    "one sample dropped": ({"length": 1, "drop_last": True}, {}),
}
said = {}
for name, (data, options) in CASES.items():
    model, options = IdModel(), {"total_steps": 1, **options}
    try:
        finished, _ = train(model, IndexData(valid=0, **data), None, **options)
        said[name] = [finished, model.batches]
    except helios.HeliosError as error:
        said[name] = [type(error).__name__, str(error), model.batches]
folder = pathlib.Path(sys.argv[1])
(folder / f"rank_{rank}.json").write_text(json.dumps(said))
torch.distributed.barrier()  # ranks leave together
torch.distributed.destroy_process_group()
