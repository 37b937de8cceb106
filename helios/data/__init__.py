"""Where samples come from, in which order, and with which random numbers."""

from helios.data.datamodule import DataModule as DataModule
from helios.data.datamodule import Dataset as Dataset
from helios.data.loader import DataLoaderParams as DataLoaderParams
from helios.data.loader import ResumableDataLoader as ResumableDataLoader
from helios.data.loader import create_dataloader as create_dataloader
from helios.data.samplers import ResumableRandomSampler as ResumableRandomSampler
from helios.data.samplers import ResumableSampler as ResumableSampler
from helios.data.samplers import ResumableSamplerType as ResumableSamplerType
from helios.data.samplers import (
    ResumableSequentialSampler as ResumableSequentialSampler,
)
