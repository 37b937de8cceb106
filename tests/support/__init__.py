"""Parts that the tests share: small data, small models, recorders, ranks."""

from support.data import AugmentedDataset, IndexData, IndexDataset, RandomData
from support.models import IdModel, RandomModel, TraceModel
from support.ranks import run_ranks
from support.runs import RecordingCallback, StopAt, TraceCallback, digest, train

__all__ = [
    "AugmentedDataset",
    "IdModel",
    "IndexData",
    "IndexDataset",
    "RandomData",
    "RandomModel",
    "RecordingCallback",
    "StopAt",
    "TraceCallback",
    "TraceModel",
    "digest",
    "run_ranks",
    "train",
]
