"""Run by test_porting_pairs.py: a script that gets SIGTERM while it trains.

    stopped_script.py BATCH SCRIPT ARGUMENTS...

It is sent while the batch of that number is worked on, on the last rank.
"""

import contextlib
import os
import runpy
import signal
import sys

import helios

_, at, *sys.argv = sys.argv


class Stopped(helios.Session):
    def batches(self, loader="train"):
        batches = super().batches(loader)
        is_last = self.engine.rank == self.engine.world_size - 1
        is_mine = is_last and iter(batches) is self._train
        for batch in batches:
            if is_mine and self.state.global_iteration == int(at):
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


helios.Session = Stopped
with contextlib.suppress(helios.RunStopped):
    runpy.run_path(sys.argv[0], run_name="__main__")
    raise AssertionError("it has come to its end")
