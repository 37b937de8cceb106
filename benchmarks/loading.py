"""What a loader costs, beside torch's own: samples a second, and microseconds a sample.

    python benchmarks/loading.py [--samples 200000] [--rounds 5]

In-memory data of 20 numbers and a label a sample, shuffled, batches of 256, one process
and one thread; then a data set that does nothing, for what the seeding of each sample
costs. Each round times Helios's loader and torch's own in turn; the medians are shown.
The machine may be shared: quote ratios of one run, not times.
"""

import argparse
import pathlib
import statistics
import tempfile
import time

import numpy as np
import torch
from torch.utils import data

from helios.data import create_dataloader

WIDTH, BATCH = 20, 256


class Empty(data.Dataset):
    """Item i is None, and nothing is drawn."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return None


def first(items):
    return items[0]


def sources(count, folder):
    """Yield a name, a data set and a collate function."""
    inputs = np.random.default_rng(1).standard_normal((count, WIDTH), np.float32)
    labels = np.arange(count) % 10
    tensors = torch.from_numpy(inputs), torch.from_numpy(labels)
    yield "TensorDataset", data.TensorDataset(*tensors), None
    yield "numpy array", inputs, None
    np.save(folder / "inputs.npy", inputs)
    yield "memory map", np.load(folder / "inputs.npy", mmap_mode="r+"), None
    yield "Subset", data.Subset(data.TensorDataset(*tensors), range(count)), None
    try:
        import datasets
    except ImportError:
        pass
    else:
        few = count // 4  # torch is slow here
        columns = {"x": inputs[:few], "y": labels[:few]}
        table = datasets.Dataset.from_dict(columns)
        yield "datasets, torch", table.with_format("torch"), None
        yield "datasets, numpy", table.with_format("numpy"), None
    yield "empty", Empty(count), first


def seconds(loader):
    """Wall seconds of an epoch."""
    began_s = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - began_s


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'data':<16} {'torch/s':>12} {'Helios/s':>12} {'ratio':>6} {'µs more':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for name, dataset, collate_fn in sources(args.samples, pathlib.Path(folder)):
            options = {"batch_size": BATCH, "shuffle": True, "collate_fn": collate_fn}
            loaders = (
                data.DataLoader(dataset, **options),
                create_dataloader(dataset, options)[0],
            )
            rounds = [
                [seconds(loader) for loader in loaders] for _ in range(args.rounds)
            ]
            ratio = statistics.median(theirs / ours for theirs, ours in rounds)
            theirs, ours = map(statistics.median, zip(*rounds, strict=True))
            count = len(dataset)
            more = (ours - theirs) / count * 1e6
            rates = f"{count / theirs:>12,.0f} {count / ours:>12,.0f}"
            print(f"{name:<16} {rates} {ratio:>6.2f} {more:>8.2f}")


if __name__ == "__main__":
    main()
