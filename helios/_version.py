"""The package's version; the format version of checkpoints is separate."""

__version__ = "3.0.0.dev0"
