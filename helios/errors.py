"""The exceptions of Helios, one tree.

::

    HeliosError
    ├── CheckpointError              a checkpoint cannot be written or used
    │   ├── CheckpointCorruptError   a file is missing, truncated or altered
    │   ├── CheckpointNotFoundError  none where one is demanded
    │   └── UnstorableError          a value of the state has no stored form
    ├── ResumeError                  the run differs from the one that was saved
    ├── DataError                    a data set or loader that cannot be trained on
    ├── ModelError                   a model that cannot be trained
    └── LaunchError                  processes or devices that are not there

Wrong arguments are plain ``ValueError`` or ``TypeError``, raised when the object is made.
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


class LaunchError(HeliosError):
    """The processes or devices that were asked for are not there."""
