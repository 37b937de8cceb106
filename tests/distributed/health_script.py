"""Run by test_health_on_ranks.py on each rank: one rank's numbers go bad."""

import json
import math
import os
import pathlib
import sys

import torch
from support import IdModel, IndexData, digest, train

from helios.errors import BadNumbersError

torch.set_num_threads(1)
folder = pathlib.Path(sys.argv[1])
rank = int(os.environ["RANK"])
OPTIONS = {"train_unit": "iteration", "total_steps": 8, "chkpt_frequency": 1}


class Spoiled(IdModel):
    """Has bad numbers, on the second rank only."""

    def __init__(self, name, batches, leaves_out=()):
        super().__init__(name)
        self.spoiled, self.leaves_out = batches, leaves_out

    def train_step(self, batch, state):
        if state.global_iteration in self.leaves_out:
            return
        self.batches.append(batch.tolist())
        loss = 0.001 * self.net(batch.float()[:, None]).square().mean()
        if rank == 1 and state.global_iteration in self.spoiled:
            loss = loss + math.nan  # whose gradient is none of it
        self.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._loss_items["mine"] = loss


report = {}
for window in (1, 2):
    left_out = [n // window * window + i for n in (3, 6) for i in range(window)]
    for policy in ("skip", "rollback", "stop", "warn", None):
        name = f"{policy}_{window}"
        model = Spoiled(name, (3, 6), left_out if policy is None else ())
        logs = {"enable_file_logging": True, "log_root": folder, "run_name": name}
        try:
            data = IndexData(40, batch_size=1)
            options = {**OPTIONS, **logs, "accumulation_steps": window}
            train(model, data, folder, bad_numbers=policy, **options)
            error = None
        except BadNumbersError as raised:
            error = str(raised)
        report[name] = {"weights": digest(model.net.state_dict()), "error": error}
(folder / f"rank_{rank}.json").write_text(json.dumps(report))
torch.distributed.barrier()  # ranks leave together
torch.distributed.destroy_process_group()
