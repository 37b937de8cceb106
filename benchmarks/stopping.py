"""How long a stop takes: from SIGTERM to the end of all processes, with a checkpoint.

    python benchmarks/stopping.py

The digits example on two ranks that Helios starts, each with two loader workers.
"""

import argparse
import contextlib
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
RANKS, WORKERS, TIMEOUT_S = 2, 2, 300


def train(folder):
    """Train until somebody stops it."""
    import torch
    from digits import DigitsData, DigitsModel

    import helios

    class Data(DigitsData):
        def setup(self):
            super().setup()
            for phase in self._phases():
                phase.params.num_workers = WORKERS
                phase.params.persistent_workers = True

    torch.set_num_threads(1)
    trainer = helios.Trainer(
        use_cpu=True,
        num_processes=RANKS,
        total_steps=10_000,
        print_frequency=10,
        chkpt_root=folder,
        exit_when_stopped=True,
    )
    trainer.fit(DigitsModel("digits"), Data())


def is_running(mark):
    """Whether any process has the mark in its environment."""
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes():
                return True
    return False


def measure(folder):
    """Seconds from SIGTERM to the starter's end, and to that of all processes."""
    paths = [str(ROOT), str(ROOT / "examples")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment |= {"OMP_NUM_THREADS": "1", "HELIOS_BENCHMARK": folder}
    process = subprocess.Popen(
        [sys.executable, __file__, "--train", folder],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if re.search(r"step 50 ", line):
            break
    else:
        raise SystemExit("it has not come to step 50")
    began_s = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    process.wait(TIMEOUT_S)
    ended_s = time.perf_counter() - began_s
    while is_running(f"HELIOS_BENCHMARK={folder}\0".encode()):
        time.sleep(0.005)
    all_ended_s = time.perf_counter() - began_s
    process.stderr.close()
    assert process.returncode == 75, process.returncode
    (checkpoint,) = pathlib.Path(folder).glob("digits/digits_*/helios.json")
    return ended_s, all_ended_s, checkpoint.parent.name


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--train", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.train)
        return
    found = []
    for _ in range(arguments.times):
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure(folder))
            print("{:.2f} s, all processes {:.2f} s: {}".format(*found[-1]))
    print(f"median {statistics.median(seconds for seconds, _, _ in found):.2f} s")


if __name__ == "__main__":
    main()
