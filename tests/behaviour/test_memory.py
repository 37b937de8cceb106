"""How much memory saving and loading take: `python test_memory.py CASE ROOT` tells."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from support import RandomData, train

import helios

STATE_BYTES = 3 * 4 * 4096 * 4096  # a weight, and what Adam keeps of it


def status_bytes(name):
    """What the system says of the memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = [line.split()[1] for line in lines if line.startswith(name)]
    return 1024 * int(found)


def anonymous_bytes():
    """Without what is mapped from files."""
    return status_bytes("RssAnon")


class Peak(threading.Thread):
    """Looks every half millisecond."""

    def __init__(self):
        super().__init__(daemon=True)
        self.start_bytes = self.bytes = anonymous_bytes()
        self.ended = threading.Event()
        self.start()

    def run(self):
        while not self.ended.wait(0.0005):
            self.bytes = max(self.bytes, anonymous_bytes())

    def end(self):
        self.ended.set()
        self.join()
        return self.bytes - self.start_bytes


class LargeModel(helios.Model):
    """Tells how much memory was taken at most until its first step."""

    until_first_step = None

    def setup(self):
        self.peak = Peak()
        self.net = torch.nn.Linear(4096, 4096, bias=False)
        # Not all at once: Adam would take as much again as a save.
        self.optimizer = torch.optim.Adam(self.net.parameters(), foreach=False)

    def train_step(self, batch, state):
        if self.until_first_step is None:
            self.until_first_step = self.peak.end()
        self.backward(self.net(batch[1].new_ones(1, 4096)).sum())
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(case, root):
    torch.set_num_threads(1)
    model = LargeModel("large")
    options = {"total_steps": 4, "train_unit": helios.TrainingUnit.ITERATION}
    if case == "plain":
        options["chkpt_root"] = None
    elif case == "save":
        options |= {"chkpt_frequency": 1, "keep_last": 1}
    else:
        options |= {"total_steps": 5, "resume": "must"}
    assert train(model, RandomData(), root, **options)[0]
    return model.until_first_step, status_bytes("VmHWM")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_saving_and_loading_take_one_copy_of_the_state_at_most(tmp_path):
    peaks = {}
    for case in ("plain", "save", "load"):
        command = [sys.executable, __file__, case, str(tmp_path)]
        path = ":".join(sys.path)
        done = subprocess.run(
            command,
            capture_output=True,
            timeout=120,
            check=False,
            env={"PYTHONPATH": path},
        )
        assert done.returncode == 0, done.stderr.decode()
        peaks[case] = json.loads(done.stdout.splitlines()[-1])
    begin, whole = 0, 1
    assert peaks["save"][whole] <= peaks["plain"][whole] + 1.1 * STATE_BYTES
    # The weights are there already, and two thirds of the state come beside them.
    most = peaks["plain"][begin] + (2 / 3 + 0.1) * STATE_BYTES
    assert peaks["load"][begin] <= most


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2])))
