"""The log file, on a disk that may be full, read-only or gone."""

import contextlib
import logging
import sys

from tqdm import tqdm


class LogFile(logging.FileHandler):
    """Says on the console, once each time, that lines are missing in the file."""

    _has_failed = False

    def emit(self, record: logging.LogRecord) -> None:
        self._is_failing = False
        super().emit(record)
        self._has_failed = self._is_failing

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's
        self._is_failing = True
        if not self._has_failed:
            why = (
                f"THE LOG FILE CANNOT BE WRITTEN, lines are missing: {sys.exception()}"
            )
            tqdm.write(why, file=sys.stderr)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of what is still to be written
            super().close()
