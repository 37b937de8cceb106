"""Run by test_hosts.py on each rank of two hosts: trains, and tells how it went."""

import datetime
import json
import os
import pathlib
import sys
import time

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from support import RandomData, StopAt, digest, train
from torch import nn

import helios

torch.set_num_threads(1)


class NetModel(helios.Model):
    """A network with dropout, of which each rank has its own random numbers."""

    def setup(self, for_inference=False):
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
        self.optimizer = torch.optim.Adam(self.net.parameters())
        self.drawn = []

    def train_step(self, batch, state):
        if state.global_iteration == 4 and how == "wait":
            self.wait()
        self.backward((self.net(batch[1])[:, 0] - batch[2]).square().mean())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.drawn.append(torch.rand(1).item())

    def wait(self):
        """Wait until the test has done what it does to one of the hosts."""
        (folder / f"waits_{rank}").touch()
        until = time.monotonic() + 60
        while not (folder / "go").exists() and time.monotonic() < until:
            time.sleep(0.02)


class DiskData(RandomData):
    """Needs on its host what has to be prepared there."""

    def prepare_data(self):
        with open(data / "prepared", "a") as file:
            file.write(f"{rank}\n")

    def setup(self):
        assert (data / "prepared").exists(), f"rank {rank} has no data"
        super().setup()


how, folder, root = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
options = json.loads(sys.argv[4])
rank, data = int(os.environ["RANK"]), root
DiskData.prepare_data_per_host = options.pop("per_host", False)
stop = options.pop("stop", None)
if timeout_s := options.pop("timeout_s", None):
    timeout = InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=timeout_s))
    options["accelerator"] = Accelerator(cpu=True, kwargs_handlers=[timeout])
    options["use_cpu"] = None
options |= {"log_root": root / "logs", "enable_file_logging": True}
options |= {"enable_tensorboard": True}
model = NetModel("net")
# Of the ranks of the other host, one asks to stop.
stop_at = StopAt(batch=stop if rank == 3 else None)
is_finished, _ = train(
    model, DiskData(length=40, num_workers=0), root / "runs", stop_at, **options
)
report = {"is_finished": is_finished, "drawn": model.drawn}
report["weights"] = digest(model.net.state_dict())
report["optimizer"] = digest(model.optimizer.state_dict())
report["host"] = os.uname().nodename
(folder / f"rank_{rank}.json").write_text(json.dumps(report))
