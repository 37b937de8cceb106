"""Run by test_crashes.py: a run that dies at each operation of its saves in turn.

Each run is a fork, which ends at once, as by SIGKILL, writer and all.
"""

import os
import pathlib
import sys

import torch
import torch._dynamo  # which the first optimizer imports: here, not in each fork
from support import IndexData, digest, train
from support.disk import Disk

import helios
import helios.trainer
from helios.checkpoint import CheckpointStore, find_damage
from helios.checkpoint import store as store_module

torch.set_num_threads(1)
DIED = 9
OPTIONS = {"train_unit": "iteration", "total_steps": 3, "keep_last": 1}
OPTIONS |= {"valid_frequency": 1, "chkpt_frequency": 1}
SCORES = [0.9, 0.1, 0.95]


class Model(helios.Model):
    """A network with dropout, and a score for `keep_best`."""

    def setup(self, for_inference=False):
        self.net = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Dropout(0.2))
        self.optimizer = torch.optim.Adam(self.net.parameters())

    def train_step(self, batch, state):
        self.backward(self.net(batch.float()[:, None]).square().mean())
        self.optimizer.step()
        self.optimizer.zero_grad()

    def valid_step(self, batch, step):
        pass

    def on_validation_end(self, validation_cycle):
        self.log("score", SCORES[validation_cycle])


class Data(IndexData):
    def setup(self):
        super().setup()
        self._add_valid_dataset([0, 1])


class Acknowledge(helios.Callback):
    def __init__(self, out):
        self.out = out

    def on_checkpoint_saved(self, session, path):
        os.write(self.out, path.name.encode() + b"\n")


def run(root, disk):
    """Run in a fork: its exit status, and the names of the checkpoints it reported."""
    receive, send = os.pipe()
    pid = os.fork()
    if not pid:
        disk.replace_that_of(store_module)
        model = Model("net")
        train(
            model,
            Data(6, batch_size=2),
            root,
            Acknowledge(send),
            **OPTIONS,
            keep_best=helios.KeepBest("score"),
        )
        state = {"net": model.net.state_dict(), "adam": model.optimizer.state_dict()}
        os.write(send, f"{digest(state)} {len(disk.log)}\n".encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        told = pipe.read().split("\n")[:-1]
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), told


def contents(root):
    """The checkpoints, newest first, and which is marked; each of them is whole."""
    records = CheckpointStore(root / "net").records()
    assert all(find_damage(path) == {} for path in records)
    return {path.name: record["is_best"] for path, record in records.items()}


def main():
    root = pathlib.Path(sys.argv[1])
    code, told = run(root / "whole", Disk(0, lambda: None))
    assert code == 0
    *names, (outcome, count) = [*told[:-1], told[-1].split()]
    expected, reached = contents(root / "whole"), set()
    for fail_at in range(1, int(count) + 1):
        here = root / str(fail_at)
        code, told = run(here, Disk(fail_at, lambda: os._exit(DIED)))
        assert code == DIED, (fail_at, code)
        found = list(contents(here)) if (here / "net").exists() else []
        # The newest is the one that was acknowledged last, or the next.
        at = names.index(told[-1]) if told else -1
        newest = names.index(found[0]) if found else -1
        assert newest in (at, at + 1), (fail_at, told, found)
        code, told = run(here, Disk(0, lambda: None))
        assert code == 0, fail_at
        assert told[-1].split()[0] == outcome, fail_at
        assert contents(here) == expected, (fail_at, contents(here), expected)
        left = {path.name for path in (here / "net").iterdir()}
        assert left == set(expected), (fail_at, left)
        reached.add(newest)
    assert reached == {-1, *range(len(names))}
    print(f"died {count} times")


if __name__ == "__main__":
    main()
