"""Run by test_data_on_ranks.py on each rank: trains on data of many kinds.

Its arguments are a folder, a name for the reports, and a JSON object: of which `kinds`,
with what `batch_size`, at which batches it `stops`, and whether it `finishes` then.
"""

import json
import os
import pathlib
import sys

import torch
from support import AugmentedDataset, IdModel, StopAt, digest, train
from support.kinds import KINDS, LENGTH, KindData, KindModel, ShardedStream, Stream

import helios
from helios.data import create_dataloader
from helios.errors import HeliosError

torch.set_num_threads(1)
OPTIONS = {"total_steps": 3, "valid_frequency": 1, "accumulation_steps": 2}
RANK = int(os.environ["RANK"])


class RankModel(KindModel):
    """Trains no parameter outside of a network."""

    def setup(self, for_inference=False):
        super().setup()
        self.temperature = torch.ones(())
        body = torch.optim.AdamW(self.net.parameters(), lr=0.02)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(body, 30)
        self.optimizers = (body, self.optimizers[1])
        self.schedulers = [cosine, self.schedulers[1]]


def train_on(make, root, stops, batch_size):
    """One run after the other; all that is compared."""
    report = {"ids": [], "finished": [], "error": None}
    for stop in stops:
        model = RankModel()
        data = KindData(make, batch_size=batch_size)
        try:
            done, _ = train(model, data, root, StopAt(batch=stop), **OPTIONS)
            report["finished"].append(done)
        except (OSError, HeliosError) as error:
            report["error"] = str(error)
        report["ids"] += model.ids
    state = model.state_dict()
    return {**report, "weights": digest([state["networks"], state["optimizers"]])}


class Broken(AugmentedDataset):
    """Cannot load one of its samples."""

    def __getitem__(self, index):
        if index == 9:
            raise OSError("unreadable")
        return super().__getitem__(index)


class Counting(IdModel):
    """Gathers what a validation has seen."""

    def __init__(self):
        super().__init__()
        self.seen = {"tensors": [], "nested": [], "objects": []}

    def train_step(self, batch, state):
        super().train_step(batch[0], state)

    def valid_step(self, batch, step):
        ids = batch[0]
        found = self.gather_for_metrics({"ids": ids, "mean": ids.float().mean()})
        self.seen["nested"] += found["ids"].tolist()
        assert len(found["mean"]) == int(os.environ["WORLD_SIZE"])
        self.seen["tensors"] += self.gather_for_metrics(ids).tolist()
        self.seen["objects"] += self.gather_for_metrics([str(i) for i in ids.tolist()])
        self.seen["refused"] = []
        names = [str(i) for i in ids.tolist()]
        for value in (
            {"ids": ids, "names": ["one"]},
            (ids, names),
            [ids, names],
            [*names, "x"],
        ):
            try:
                self.gather_for_metrics(value)
            except TypeError as error:
                self.seen["refused"].append(str(error))


class Evaluated(helios.DataModule):
    """Some training data, and any for validation."""

    def __init__(self, dataset, **params):
        super().__init__()
        self.dataset, self.params = dataset, params

    def setup(self):
        self._add_train_phase(AugmentedDataset(4), {"batch_size": 1})
        self._add_valid_dataset(self.dataset, self.params)


class OwnLoaders(Evaluated):
    """Makes its loaders itself."""

    def train_dataloader(self):
        return create_dataloader(AugmentedDataset(4), {"batch_size": 1})

    def valid_dataloader(self):
        return create_dataloader(self.dataset, self.params)


def evaluate():
    """What validations of many kinds count."""
    steady = Stream(7)
    steady.order = lambda: [i for i in range(7) if i % 5 != 4]  # never left out
    found = {}
    own = OwnLoaders(AugmentedDataset(7), batch_size=2)
    model = Counting()
    train(model, own, None, **OPTIONS)
    found["own_loaders"] = model.seen
    found["trained_of_own_loaders"] = model.batches
    for name, dataset, params in (
        ("map", AugmentedDataset(7), {"batch_size": 2}),
        ("small", AugmentedDataset(1), {"batch_size": 2}),
        ("batches", AugmentedDataset(7), {"sampler": [[0, 1, 2], [3, 4], [5, 6]]}),
        ("stream", steady, {"batch_size": 2}),
        ("shards", ShardedStream(7), {"batch_size": 3}),
        ("too_few_shards", ShardedStream(1), {"batch_size": 3}),
    ):
        model = Counting()
        try:
            train(model, Evaluated(dataset, **params), None, **OPTIONS)
            found[name] = model.seen
        except HeliosError as error:
            found[name] = str(error)
    return found


folder, name, text = sys.argv[1:]
folder, spec = pathlib.Path(folder), json.loads(text)
stops = [*spec["stops"], *([None] if spec["finishes"] else [])]
report = {}
for kind in spec["kinds"]:
    root = folder / "checkpoints" / spec.get("run", name) / kind
    report[kind] = train_on(KINDS[kind], root, stops, spec["batch_size"])
if spec.get("breaks"):
    root, size = folder / "checkpoints" / name / "broken", spec["batch_size"]
    broken = train_on(lambda: Broken(LENGTH), root, [None], size)
    mended = train_on(lambda: AugmentedDataset(LENGTH), root, [None], size)
    report["broken"] = {"broken": broken, "mended": mended}
if spec.get("breaks"):
    # Of one sample: the second rank has none.
    root = folder / "checkpoints" / name / "empty"
    report["empty"] = train_on(lambda: ShardedStream(1), root, [None], 4)
if spec.get("evaluates"):
    report["evaluated"] = evaluate()
(folder / f"{name}_{RANK}.json").write_text(json.dumps(report))
if torch.distributed.is_initialized():
    torch.distributed.barrier()  # ranks leave together
    torch.distributed.destroy_process_group()
