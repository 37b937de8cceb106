"""The root logger: the console and, if asked, a file that a resumed run continues."""

from __future__ import annotations

import logging
import pathlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

__all__ = ["get_root_logger", "text_logging"]


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
    logger, label = get_root_logger(), f" [rank {rank}]" if rank else ""
    before = logger.level, logger.propagate, logger.handlers
    handlers: list[logging.Handler] = [
        _ConsoleHandler(logging.WARNING if rank else logging.INFO)
    ]
    formats = [logging.Formatter(f"%(asctime)s{label} %(message)s", "%H:%M:%S")]
    if file is not None:
        path = file.with_suffix(f".rank_{rank}{file.suffix}") if rank else file
        path.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
        formats.append(
            logging.Formatter(f"%(asctime)s %(levelname)s{label} %(message)s")
        )
    for handler, formatter in zip(handlers, formats, strict=True):
        handler.setFormatter(formatter)
    logger.setLevel(logging.INFO)
    logger.propagate, logger.handlers = False, handlers
    if capture_warnings:
        logging.captureWarnings(True)
        logging.getLogger("py.warnings").handlers = handlers
    try:
        yield logger
    finally:
        if capture_warnings:
            logging.captureWarnings(False)
            logging.getLogger("py.warnings").handlers = []
        logger.setLevel(before[0])
        _, logger.propagate, logger.handlers = before
        for handler in handlers:
            handler.close()
