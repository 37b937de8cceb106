"""Run by test_stops.py: a run that is stopped, or killed, at a place of its own.

It does that to itself, or to the launcher that is its parent: at the very place that a
cell of the matrix names, and by the same means as anybody else would.
"""

import json
import os
import pathlib
import random
import signal
import sys
import time

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from support import AugmentedDataset, RandomData, digest
from torch import nn
from torch.utils.data import DataLoader

import helios

TIMEOUT_S = 60
EPOCHS, GRACE_S = 3, 0.5
LIMIT_S = 10.0  # by then a busy machine, too, has come to any place
#: Faults that are a signal: which, and whether the loader's workers get it too.
SIGNALS = {
    "SIGTERM": (signal.SIGTERM, False),
    "SIGTERM to all": (signal.SIGTERM, True),
    "SIGINT": (signal.SIGINT, False),
    "SIGINT twice": (signal.SIGINT, False),
    "SIGUSR1": (signal.SIGUSR1, False),
    "SIGUSR1 to all": (signal.SIGUSR1, True),
    "SIGKILL": (signal.SIGKILL, False),
    "too slow": (signal.SIGTERM, False),
}


class Fault:
    """What happens where a place has the name of the cell's."""

    def __init__(self, plan):
        self.name, self.phase = plan.get("fault"), plan.get("phase")
        self.launcher = plan["launcher"]
        self.folder = pathlib.Path(plan["folder"])
        self.request_stop = self.reason = None  # as the Trainer, or the Session, has it

    def at(self, phase):
        rank = os.environ.get("RANK", "0")
        if self.name is None or phase != self.phase or rank != "0":
            return
        name, self.name = self.name, None
        (self.folder / "happened").touch()
        if name in SIGNALS:
            self.send(*SIGNALS[name])
        elif name == "request_stop()":
            self.request_stop()
        elif name == "file `stop`":
            (self.folder / "runs" / "net").mkdir(parents=True, exist_ok=True)
            (self.folder / "runs" / "net" / "stop").touch()
        if name == "request_stop()":
            return
        self.wait(lambda: self.reason() is not None)
        if name == "SIGINT twice":
            time.sleep(0.3)  # those of one moment are one
            self.send(signal.SIGINT, False)
        if name in ("SIGINT twice", "too slow"):
            self.wait(lambda: False)

    def send(self, number, is_for_all):
        # Torch's launchers pass these on, and that of Helios all of them.
        passed_on = {signal.SIGTERM, signal.SIGINT}
        if self.launcher == "ranks of Helios":
            passed_on.add(signal.SIGUSR1)
        if is_for_all:  # a rank and its workers are a group
            os.killpg(os.getpgrp(), number)
        elif number in passed_on and self.launcher not in ("plain", "PID 1"):
            os.kill(os.getppid(), number)
        else:
            os.kill(os.getpid(), number)

    def wait(self, condition):
        until = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < until, "it never came to be"
            time.sleep(0.002)


class NetModel(helios.Model):
    """Dropout, and a validation that draws random numbers, all of it saved."""

    def __init__(self, fault, folder):
        super().__init__("net")
        self.fault, self.scores, self.saves = fault, [], 0
        self.ids = folder / f"ids_{os.environ.get('RANK', '0')}"

    def setup(self, for_inference=False):
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
        self.optimizer = torch.optim.Adam(self.net.parameters())
        self.fault.at("setup")

    def train_step(self, batch, state):
        if state.global_iteration == 5:
            self.fault.at("training")
        if state.global_iteration == 6:  # the first batch of a window of two
            self.fault.at("window")
        self.optimizer.zero_grad()
        self.backward((self.net(batch[1])[:, 0] - batch[2]).square().mean())
        self.optimizer.step()
        with open(self.ids, "a") as file:
            file.write(f"{batch[0].tolist()}\n")

    def on_training_epoch_end(self, current_epoch):
        super().on_training_epoch_end(current_epoch)
        if current_epoch == 1:
            self.fault.at("end of an epoch")

    def valid_step(self, batch, step):
        own = random.random() + np.random.random() + torch.rand(1).item()
        self.scores.append(own + self.net(batch[1]).sum().item())
        if self.trainer._session.state.validation_cycles == 1 and step == 0:
            self.fault.at("validation")

    def test_step(self, batch, step):
        if step == 1:
            self.fault.at("testing")

    def append_metadata_to_chkpt_name(self, name):
        self.saves += 1
        if self.saves == 2:
            self.fault.at("save")
        return name

    def user_state_dict(self):
        return {"scores": list(self.scores)}

    def load_user_state_dict(self, state, for_inference):
        self.scores = list(state["scores"])


class NetData(RandomData):
    """Four batches an epoch for one rank or for each of two; and a test."""

    def __init__(self, fault, **params):
        super().__init__(16 * int(os.environ.get("WORLD_SIZE", "1")), **params)
        self.fault = fault

    def prepare_data(self):
        self.fault.at("prepare_data")

    def setup(self):
        super().setup()
        self._add_test_dataset(self.valid_dataset, {"batch_size": 1})


class Written(helios.Callback):
    """Tells when the second checkpoint is on the disk, in the writer's thread."""

    def __init__(self, fault):
        self.fault, self.count = fault, 0

    def on_checkpoint_saved(self, session, path):
        self.count += 1
        if self.count == 2:
            self.fault.at("write")


def limits(plan):
    """What the Trainer and the Session are told alike."""
    return {
        "async_save": plan["async_save"],
        "max_time_s": LIMIT_S if plan["fault"] == "`max_time_s`" else None,
        "stop_grace_s": GRACE_S if plan["fault"] == "too slow" else None,
    }


def loop(plan):
    """A loop by hand, as the plan says; write down how it ended."""
    torch.set_num_threads(1)
    folder, rank = pathlib.Path(plan["folder"]), os.environ.get("RANK", "0")
    fault, workers = Fault(plan), plan["workers"]
    accelerator = Accelerator()
    set_seed(7)
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(net.parameters())
    loader = DataLoader(
        AugmentedDataset(16 * accelerator.num_processes),
        batch_size=4,
        shuffle=True,
        num_workers=workers,
    )
    net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    session = helios.Session(
        accelerator, folder / "runs" / "net", loader, save_every="epoch", **limits(plan)
    )
    fault.reason = lambda: session.stop_reason
    fault.request_stop = lambda: session.request_stop("asked")
    losses = []
    for _ in session.epochs(EPOCHS, carry=["losses", "total"]):
        total = torch.zeros(())
        for ids, inputs, targets in session.batches(loader):
            if session.state.global_iteration == 5:
                fault.at("loop by hand")
            loss = (net(inputs)[:, 0] - targets).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
            with open(folder / f"ids_{rank}", "a") as file:
                file.write(f"{ids.tolist()}\n")
        losses.append(total)
    weights = accelerator.unwrap_model(net).state_dict()
    (folder / f"report_{rank}").write_text(digest([weights, losses]))
    accelerator.wait_for_everyone()
    accelerator.end_training()


def run(plan):
    """Train and test, as the plan says; write down how it ended."""
    if plan["phase"] == "loop by hand":
        return loop(plan)
    torch.set_num_threads(1)
    folder = pathlib.Path(plan["folder"])
    fault = Fault(plan)
    model = NetModel(fault, folder)
    workers = plan["workers"]
    data = NetData(fault, num_workers=workers, persistent_workers=workers > 0)
    trainer = helios.Trainer(
        use_cpu=True,
        total_steps=EPOCHS,
        valid_frequency=1,
        chkpt_frequency=1,
        accumulation_steps=plan["window"],
        chkpt_root=folder / "runs",
        num_processes=plan["ranks"],
        callbacks=[Written(fault)],
        print_banner=False,
        enable_progress_bar=False,
        exit_when_stopped=True,
        **limits(plan),
    )
    fault.request_stop, fault.reason = (
        trainer.request_stop,
        lambda: trainer._stops.reason,
    )
    assert trainer.fit(model, data)  # or it exits
    rank = os.environ.get("RANK", "0")
    # The user's state is that of the main rank.
    state = model.state_dict() if rank == "0" else model.net.state_dict()
    assert trainer.test(model, data)
    (folder / f"report_{rank}").write_text(digest(state))


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
