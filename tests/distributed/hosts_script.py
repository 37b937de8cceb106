"""Run by test_hosts.py on each rank of two hosts: trains, and tells how it went."""

import datetime
import json
import os
import pathlib
import signal
import sys
import tempfile
import time

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from support import IndexDataset, RandomData, StopAt, digest, train
from torch import nn

import helios
from helios.voting import Votes

torch.set_num_threads(1)


class NetModel(helios.Model):
    """A network with dropout, of which each rank has its own random numbers."""

    def setup(self, for_inference=False):
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
        self.optimizer = torch.optim.Adam(self.net.parameters())
        self.drawn, self.copies = [], None

    def train_step(self, batch, state):
        if state.global_iteration == 4 and waits:
            self.wait()
        if state.global_iteration == 4 and rank == 3 and kills_once:
            if not (folder / "killed").exists():
                (folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        self.backward((self.net(batch[1])[:, 0] - batch[2]).square().mean())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.drawn.append(torch.rand(1).item())
        self.copies = len(list(pathlib.Path(tempfile.gettempdir()).glob("net_epoch_*")))

    def test_step(self, batch, step):
        pass

    def wait(self):
        """Wait until the test has done to a host what it does."""
        (folder / f"waits_{rank}").touch()
        until = time.monotonic() + 60
        while not (folder / "go").exists() and time.monotonic() < until:
            time.sleep(0.02)


class DiskData(RandomData):
    """Data that have to be prepared on the disk."""

    def prepare_data(self):
        with open(root / "prepared", "a") as file:
            file.write(f"{rank}\n")

    def setup(self):
        assert (root / "prepared").exists(), f"rank {rank} has no data"
        super().setup()
        self._add_test_dataset(IndexDataset(4), {"batch_size": 1})


folder, root, rank = *map(pathlib.Path, sys.argv[1:3]), int(os.environ["RANK"])
options = json.loads(sys.argv[3])
waits, stop_at = options.pop("waits", False), options.pop("stop_at", None)
kills_once = options.pop("kills_once", False)
DiskData.prepare_data_per_host = options.pop("per_host", False)
options |= {"log_root": root / "logs", "enable_file_logging": True}
options |= {"enable_tensorboard": True}
if timeout_s := options.pop("timeout_s", None):
    options["use_cpu"] = None
    options["accelerator"] = Accelerator(
        cpu=True,
        gradient_accumulation_steps=options.pop("accumulation_steps"),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=timeout_s))
        ],
    )
model, tested = NetModel("net"), NetModel("net")
stop = StopAt(batch=stop_at if rank == 3 else None)  # on the other host
is_finished, _ = train(model, DiskData(length=40), root / "runs", stop, **options)
trainer = helios.Trainer(
    chkpt_root=root / "runs", use_cpu=True, enable_progress_bar=False
)
trainer.test(tested, DiskData())
report = {
    "is_finished": is_finished,
    "drawn": model.drawn,
    "weights": digest(model.net.state_dict()),
    "optimizer": digest(model.optimizer.state_dict()),
    "tested": digest(tested.net.state_dict()),
    "copies": model.copies,
    "host": os.uname().nodename,
    "is_wired": Votes(torch.device("cpu")).is_wired,
}
(folder / f"rank_{rank}.json").write_text(json.dumps(report))
