"""Where samples come from, in which order, and with which random numbers."""

from helios.data.adopting import make_resumable as make_resumable
from helios.data.datamodule import DataModule as DataModule
from helios.data.datamodule import Dataset as Dataset
from helios.data.datamodule import DatasetSplit as DatasetSplit
from helios.data.lengths import (
    ResumableLengthGroupedSampler as ResumableLengthGroupedSampler,
)
from helios.data.loader import ResumableDataLoader as ResumableDataLoader
from helios.data.loader import create_dataloader as create_dataloader
from helios.data.params import DataLoaderParams as DataLoaderParams
from helios.data.samplers import SAMPLER_REGISTRY as SAMPLER_REGISTRY
from helios.data.samplers import (
    ResumableDistributedSampler as ResumableDistributedSampler,
)
from helios.data.samplers import ResumableRandomSampler as ResumableRandomSampler
from helios.data.samplers import ResumableSampler as ResumableSampler
from helios.data.samplers import ResumableSamplerType as ResumableSamplerType
from helios.data.samplers import (
    ResumableSequentialSampler as ResumableSequentialSampler,
)
from helios.data.samplers import (
    ResumableSubsetRandomSampler as ResumableSubsetRandomSampler,
)
from helios.data.samplers import create_sampler as create_sampler
from helios.data.seeding import SampleRng as SampleRng
from helios.data.seeding import sample_rng as sample_rng
from helios.data.weighted import (
    ResumableWeightedRandomSampler as ResumableWeightedRandomSampler,
)
