"""Messages of a run on the terminal or in `console_log_file`."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from sdxl_finetune.config import LoggingOptions
from sdxl_finetune.config.options import secrets_of
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.output.log_file import MessageFile
from sdxl_finetune.printable import PrintableFormatter
from sdxl_finetune.redaction import redacted


class RedactingFormatter(PrintableFormatter):
    """Formats messages and tracebacks with *** in the place of secrets, those of the config among them."""

    def __init__(self, layout: str, options: LoggingOptions, datefmt: str | None = None) -> None:
        super().__init__(layout, datefmt)
        self._secrets = secrets_of(options)

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record), self._secrets)


class _AboveProgressBar(logging.Handler):
    """Writes messages to stderr, above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


def _open_file(path: Path) -> MessageFile:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        message = f"the file cannot be written ({error.strerror}): choose another one"
        raise UserError(Problem(message, key="console_log_file", value=str(path))) from error
    return MessageFile(path)


@contextmanager
def console(options: LoggingOptions, rank: int) -> Iterator[None]:
    """Sends messages to the terminal, or to `console_log_file`, until the context ends.

    The first rank shows messages from `console_log_level` up. Other ranks show only warnings and errors, each with the
    rank in front. Raises UserError if `console_log_file` cannot be opened.
    """
    if options.console_log_file:
        handler: logging.Handler = _open_file(options.console_log_file)
    else:
        handler = _AboveProgressBar()
    level = logging.getLevelName(options.console_log_level or "INFO")
    where = f"[rank {rank}] " if rank else ""
    layout = "%(message)s" if options.console_log_simple else "%(asctime)s %(levelname)-7s %(message)s"
    handler.setFormatter(RedactingFormatter(where + layout, options, "%Y-%m-%d %H:%M:%S"))
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
