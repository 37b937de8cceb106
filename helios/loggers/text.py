"""The root logger: the console and, if asked, a file that a resumed run continues."""

import logging
import pathlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

# tqdm's own lock is shared with loader workers: one that is killed would keep it.
tqdm.set_lock(threading.RLock())


class _ConsoleHandler(logging.Handler):
    """Writes above whatever progress bar is on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def get_root_logger() -> logging.Logger:
    """The logger that Helios writes to, and users may."""
    return logging.getLogger("helios")


@contextmanager
def text_logging(
    file: pathlib.Path | None, rank: int = 0, capture_warnings: bool = False
) -> Iterator[logging.Logger]:
    """Set the root logger up for one run, and put it back as it was.

    The console shows the main rank's lines and every rank's warnings. The file is
    appended to; each other rank writes to one of its own, with its number in the name.
    """
    logger, warned = get_root_logger(), logging.getLogger("py.warnings")
    before = logger.propagate, logger.handlers, warned.handlers
    handlers: list[logging.Handler] = [_ConsoleHandler()]
    handlers[0].setLevel(logging.WARNING if rank else logging.INFO)
    handlers[0].setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        path = file.with_suffix(f".rank_{rank}{file.suffix}") if rank else file
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
        form = "%(asctime)s %(levelname)s %(message)s"
        handlers[1].setFormatter(logging.Formatter(form))
    logger.setLevel(logging.INFO)
    logger.propagate, logger.handlers = False, handlers
    if capture_warnings:
        logging.captureWarnings(True)
        warned.handlers = handlers
    try:
        yield logger
    finally:
        logging.captureWarnings(False)
        logger.propagate, logger.handlers, warned.handlers = before
        for handler in handlers:
            handler.close()
