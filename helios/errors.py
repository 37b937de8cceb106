"""The exceptions of Helios, one tree under HeliosError.

Wrong arguments are plain ValueError or TypeError, raised when the object is made.
"""


class HeliosError(Exception):
    """Base of all errors that Helios raises at run time."""


class CheckpointError(HeliosError):
    """A checkpoint cannot be written or used."""


class CheckpointCorruptError(CheckpointError):
    """A file of a checkpoint is missing, truncated or altered."""


class CheckpointNotFoundError(CheckpointError):
    """A checkpoint is demanded, and there is none."""


class UnstorableError(CheckpointError):
    """A value of the training state has no stored form; the message names its path."""


class ResumeError(HeliosError):
    """The run differs from the saved one in what exactness depends on."""


class DataError(HeliosError):
    """A data set or loader that cannot be trained on."""


class ModelError(HeliosError):
    """A model that cannot be trained, such as one without parameters."""


class BadNumbersError(HeliosError):
    """Losses or gradients are NaN or infinite, and the run is to end by that."""


class LaunchError(HeliosError):
    """The processes or devices that were asked for are not there."""
