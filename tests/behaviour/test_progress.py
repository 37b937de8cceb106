"""The progress bar, on a real terminal."""

import os
import pty
import re
import subprocess
import sys
import termios

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


def test_bar_counts_up_where_the_length_is_not_known(tmp_path):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stderr=theirs,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
        assert process.wait(timeout=60) == 0, shown
    os.close(ours)
    text = shown.decode()
    assert re.search(r"epoch 1: .*\b3/4\b", text)
    assert re.search(r"epoch 2: 2it", text)
    assert not re.search(r"epoch 2: [^\r]*/4\b", text)
    assert re.search(r"validation: 0it", text)
