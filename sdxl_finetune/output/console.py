"""Messages of a run on the terminal or in `console_log_file`."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from sdxl_finetune.config import LoggingOptions


class _AboveProgressBar(logging.Handler):
    """Writes messages to stderr, above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


@contextmanager
def console(options: LoggingOptions, rank: int) -> Iterator[None]:
    """Sends messages to the terminal, or to `console_log_file`, until the context ends.

    The first rank shows messages from `console_log_level` up. Other ranks show only warnings and errors, each with the
    rank in front.
    """
    if options.console_log_file:
        options.console_log_file.parent.mkdir(parents=True, exist_ok=True)
        handler: logging.Handler = logging.FileHandler(options.console_log_file, encoding="utf-8")
    else:
        handler = _AboveProgressBar()
    level = logging.getLevelName(options.console_log_level or "INFO")
    where = f"[rank {rank}] " if rank else ""
    layout = "%(message)s" if options.console_log_simple else "%(asctime)s %(levelname)-7s %(message)s"
    handler.setFormatter(logging.Formatter(where + layout, datefmt="%Y-%m-%d %H:%M:%S"))
    handler.setLevel(max(level, logging.WARNING) if rank else level)
    root, ours = logging.getLogger(), logging.getLogger("sdxl_finetune")
    previous = root.level, ours.level
    root.setLevel(max(level, logging.INFO))  # DEBUG shows our messages, and not those of Pillow and other libraries
    ours.setLevel(level)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(previous[0])
        ours.setLevel(previous[1])
        handler.close()
