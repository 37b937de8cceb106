"""The progress bar, on a real terminal."""

import os
import pty
import re
import subprocess
import sys
import termios

from support import IdModel, IndexData, train

from helios.checkpoint import find_last_checkpoint

SCRIPT = """
import torch, helios
from support import IdModel, IndexDataset

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(range(10))

class Data(helios.DataModule):
    def setup(self):
        self._add_train_phase(IndexDataset(8), {"batch_size": 2})
        self._add_train_phase(Stream(), {"batch_size": 4})
        self._add_valid_dataset(Stream(), {"batch_size": 5})

class Model(IdModel):
    def train_step(self, batch, state):
        super().train_step(batch, state)
        self.trainer_bar().refresh()
    def valid_step(self, batch, step):
        pass
    def should_advance_dataset_phase(self):
        return self.trainer.datamodule._phase == 0
    def trainer_bar(self):
        return bar._bar

from helios.callbacks.progress import ProgressBar
bar = ProgressBar()
helios.Trainer(
    total_steps=2, valid_frequency=1, use_cpu=True, enable_progress_bar=False,
    print_banner=False, callbacks=[bar],
).fit(Model(), Data())
"""


CLOCK = """
import time
from helios.bars import clock
with clock("writing"):
    time.sleep(2)
"""
# The bar comes after a second: none of these checkpoints takes one.
AT_ONCE = """
from helios import bars
bars._OPTIONS["delay"] = 0
"""
VERIFY = """
from helios.cli import main
main(["checkpoint", "verify", "runs"])
"""
RESUME = """
import sys
from support import IdModel, IndexData, train
shown, resume = sys.argv[1:]
train(
    IdModel(), IndexData(), "runs",
    total_steps=1, enable_progress_bar=shown == "shown", resume=resume,
)
"""


def shown_on_a_terminal(script, folder, *arguments):
    """What a program writes to standard error; it has to end with status 0."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    shown = b""
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stderr=theirs,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        os.close(theirs)
        while True:
            try:
                shown += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
        assert process.wait(timeout=60) == 0, shown
    os.close(ours)
    return shown.decode()


def test_bar_counts_up_where_the_length_is_not_known(tmp_path):
    text = shown_on_a_terminal(SCRIPT, tmp_path)
    assert re.search(r"epoch 1: .*\b3/4\b", text)
    assert re.search(r"epoch 2: 2it", text)
    assert not re.search(r"epoch 2: [^\r]*/4\b", text)
    assert re.search(r"validation: 0it", text)


def test_clock_runs_on_a_terminal_after_a_second(tmp_path):
    assert "writing 00:01" in shown_on_a_terminal(CLOCK, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", CLOCK], stderr=subprocess.PIPE, timeout=60, check=True
    )
    assert done.stderr == b""


def test_reading_shows_how_far_it_is(tmp_path):
    train(IdModel(), IndexData(), tmp_path / "runs", total_steps=1, chkpt_frequency=1)
    path = str(find_last_checkpoint(tmp_path / "runs"))
    for script, arguments, is_shown in (
        (VERIFY, (), True),
        (RESUME, ("shown", "auto"), True),
        (RESUME, ("shown", path), True),
        (RESUME, ("hidden", "auto"), False),
    ):
        shown = shown_on_a_terminal(AT_ONCE + script, tmp_path, *arguments)
        assert ("reading: " in shown) is is_shown, shown
        assert ("resumed" in shown) is (script is RESUME), shown
