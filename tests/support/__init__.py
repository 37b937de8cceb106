"""Parts that the tests share: small data, small models, recorders, ranks."""

from support.byhand import ByHand, Stop
from support.data import AugmentedDataset, IndexData, IndexDataset, RandomData
from support.models import IdModel, RandomModel, TraceModel
from support.ranks import run_ranks
from support.resuming import Case, Outcome, every_batch
from support.runs import RecordingCallback, StopAt, TraceCallback, digest, train

__all__ = [
    "AugmentedDataset",
    "ByHand",
    "Case",
    "IdModel",
    "IndexData",
    "IndexDataset",
    "Outcome",
    "RandomData",
    "RandomModel",
    "RecordingCallback",
    "Stop",
    "StopAt",
    "TraceCallback",
    "TraceModel",
    "digest",
    "every_batch",
    "run_ranks",
    "train",
]
