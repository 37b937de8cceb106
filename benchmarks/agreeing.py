"""What it costs two ranks to agree, after each batch, on stops, saves and writes.

    torchrun --standalone --nproc-per-node 2 benchmarks/agreeing.py

The vote is timed by itself, in chunks; the figure is the fastest tenth of them, as the
machine has other work too. A step of 5 ms is what it is held against.
"""

import argparse
import statistics
import time

import torch
from torch import distributed

from helios.engine import Engine

STEP_S = 5e-3
CHUNK = 20


def seconds(ask, chunks):
    """The time of one call, in the fastest tenth of the chunks, and in the median."""
    for _ in range(CHUNK):
        ask()
    found = []
    for _ in range(chunks):
        began_s = time.perf_counter()
        for _ in range(CHUNK):
            ask()
        found.append((time.perf_counter() - began_s) / CHUNK)
    found.sort()
    return found[len(found) // 10], statistics.median(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=200)
    chunks = parser.parse_args().chunks
    torch.set_num_threads(1)
    engine = Engine(use_cpu=True)
    votes = torch.zeros(3, dtype=torch.int64)
    contenders = {
        "Helios": lambda: engine.agree_each(False, False, False),
        "Accelerate's reduce": lambda: engine.accelerator.reduce(votes).tolist(),
    }
    for name, ask in contenders.items():
        fast_s, median_s = seconds(ask, chunks)
        if engine.is_main:
            print(
                f"{name}: {fast_s * 1e6:.0f} us, {100 * fast_s / STEP_S:.2f} % of a "
                f"step of 5 ms (median {median_s * 1e6:.0f} us)",
                flush=True,
            )
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
