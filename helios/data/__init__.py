"""Where samples come from, in which order, and with which random numbers."""

from helios.data.datamodule import DataModule, Dataset
from helios.data.loader import (
    DataLoaderParams,
    ResumableDataLoader,
    create_dataloader,
)
from helios.data.samplers import (
    ResumableDistributedSampler,
    ResumableRandomSampler,
    ResumableSampler,
    ResumableSamplerType,
    ResumableSequentialSampler,
)

__all__ = [
    "DataLoaderParams",
    "DataModule",
    "Dataset",
    "ResumableDataLoader",
    "ResumableDistributedSampler",
    "ResumableRandomSampler",
    "ResumableSampler",
    "ResumableSamplerType",
    "ResumableSequentialSampler",
    "create_dataloader",
]
