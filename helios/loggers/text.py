"""The root logger: the console and, if asked, a file that a resumed run continues."""

import contextlib
import logging
import pathlib
import sys
import threading
from collections.abc import Iterator

from tqdm import tqdm

from helios.failures.logfile import LogFile

# tqdm's own lock is shared with loader workers: one that is killed would keep it.
tqdm.set_lock(threading.RLock())


class _ConsoleHandler(logging.Handler):
    """Writes above whatever progress bar is on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # it may be a file, on a disk that is full
            tqdm.write(self.format(record), file=sys.stderr)


def get_root_logger() -> logging.Logger:
    """The logger that Helios writes to, and users may."""
    return logging.getLogger("helios")


@contextlib.contextmanager
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
    logger.setLevel(logging.INFO)
    logger.propagate, logger.handlers = False, handlers
    if file is not None:
        path = file.with_suffix(f".rank_{rank}{file.suffix}") if rank else file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(LogFile(path, encoding="utf-8"))
        except OSError as error:  # logs never stop a run
            logger.error("THERE IS NO LOG FILE, as it cannot be written: %s", error)
        form = "%(asctime)s %(levelname)s %(message)s"
        for handler in handlers[1:]:
            handler.setFormatter(logging.Formatter(form))
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
