"""Run by test_logging_on_ranks.py on each rank: logs in all ways, stopped or not."""

import json
import os
import pathlib
import sys

import torch
from support import IdModel, IndexData, StopAt, train

torch.set_num_threads(1)
rank = int(os.environ["RANK"])
WAYS = (None, "mean", "sum", "max", "min")


class Reducing(IdModel):
    def on_training_start(self):
        self.log("at once", rank + 1, reduce="sum")

    def train_step(self, batch, state):
        super().train_step(batch, state)
        if state.global_iteration % 3 == 0:  # what waits for a log point is saved
            for how in WAYS:
                value = torch.tensor(float(10 * state.global_iteration + rank))
                self.log(f"train {how}", value, reduce=how)

    def valid_step(self, batch, step):
        for how in WAYS:
            self.log(f"valid {how}", batch[0].item(), reduce=how)


folder, *stops = sys.argv[1:]
folder, logged = pathlib.Path(folder), []
for stop in [*map(int, stops), None]:
    _, recorder = train(
        Reducing(),
        IndexData(24, valid=12, batch_size=1),
        folder / f"runs_{len(stops)}",
        StopAt(batch=stop),
        total_steps=1,
        valid_frequency=1,
        print_frequency=4,
    )
    logged += recorder.logged
rows = [[step, name, float.fromhex(value)] for step, name, value in logged]
(folder / f"rank_{rank}.json").write_text(json.dumps(rows))
torch.distributed.barrier()  # ranks leave together
torch.distributed.destroy_process_group()
