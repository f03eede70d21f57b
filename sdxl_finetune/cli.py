"""The command line programs. Each reads its arguments, runs one function and exits with a status.

    0          done
    1          a failure of the program or of the machine
    2          the user's input is wrong: each problem is printed on a line, without a traceback
    3          sdxl-train --reproduce: all numbers are finite, the fault does not come back
    130, 143   stopped by SIGINT, SIGTERM

torch takes seconds to import. It is imported only after the config has been checked, so that --help and a mistake in
the config are answered at once.
"""

import importlib
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from sdxl_finetune import OFFLINE_BY_DEFAULT
from sdxl_finetune.errors import Problem, UserError, say_errors
from sdxl_finetune.files import storage_failure
from sdxl_finetune.printable import PrintableFormatter, PrintableStream
from sdxl_finetune.redaction import hide_in_output, redacted
from sdxl_finetune.runtime.signals import STOP_SIGNALS

LOST_CONNECTION = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "failed to recv", "recvValue",
)  # fmt: skip
"""Parts of the messages that torch raises in a process after another process of the run has ended."""


def train() -> NoReturn:
    """Runs sdxl-train."""
    _run("sdxl-train", "sdxl_finetune.training.loop", "train")


def cache() -> NoReturn:
    """Runs sdxl-cache."""
    _run("sdxl-cache", "sdxl_finetune.commands.cache", "cache")


def check() -> NoReturn:
    """Runs sdxl-check."""
    _run("sdxl-check", "sdxl_finetune.commands.check", "check")


def model() -> NoReturn:
    """Runs sdxl-model."""
    _run("sdxl-model", "sdxl_finetune.commands.model", "main", has_config=False)


def data() -> NoReturn:
    """Runs sdxl-data."""
    _run("sdxl-data", "sdxl_finetune.commands.data", "main", has_config=False)


def _run(program: str, module: str, function: str, *, has_config: bool = True) -> NoReturn:
    """Calls a function of a module and exits with the status that it returns.

    The function takes the config of the command line, or the arguments themselves if the program has no config.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "HF_HUB_OFFLINE" not in os.environ:  # keeps libraries from downloading anything; output/hub.py goes without it
        os.environ |= {"HF_HUB_OFFLINE": "1", OFFLINE_BY_DEFAULT: "1"}
    # File names may hold bytes that are no text, and a terminal may lack letters: both are shown as \x.. or \u....
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # bitsandbytes warns about a missing CPU kernel that this program does not use.
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
    if not isinstance(sys.stdout, PrintableStream):
        sys.stdout = PrintableStream(sys.stdout)
    if logging.lastResort:  # shows the warnings of programs and moments without a console of their own
        logging.lastResort.setFormatter(PrintableFormatter())
    argument: Any = sys.argv[1:]
    secrets = hide_in_output()
    try:
        if has_config:
            from sdxl_finetune.config import load_config

            argument = load_config(argument, program=program)
            secrets = _hide_secrets(argument)
        status = 0 if argument is None else getattr(importlib.import_module(module), function)(argument)
    except UserError as error:
        _say_problems(error, argument)
        status = 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:
        if reason := storage_failure(error):
            say_errors(_storage_problem(error, reason))
        elif "RANK" not in os.environ:
            raise
        else:
            _say_failure_of_rank(error, secrets)
        status = 1
    if status > 128:  # a further signal may come while the interpreter ends
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: os._exit(status))
    sys.exit(status)


def _hide_secrets(config: Any) -> tuple[str, ...]:
    """Hides the secrets of a config in all that is printed to stderr from now on, and returns them."""
    from sdxl_finetune.config.options import secrets_of

    return hide_in_output(secrets_of(config))


def _say_problems(error: UserError, argument: Any) -> None:
    """Prints the problems. Those of a config are followed by those of everything that its other options name.

    The checks take a while, and a single process prints the problems of the config before. Several processes print once
    at the end, because only the errors of the first one shall be seen.
    """
    from sdxl_finetune.config import Config, FaultyConfig, with_options

    if isinstance(error, FaultyConfig):
        _hide_secrets(error.config)
    problems: Sequence[Problem] = error.problems
    if isinstance(config := error.config if isinstance(error, FaultyConfig) else argument, Config):
        problems = with_options(problems, config)
    is_alone = "RANK" not in os.environ
    if is_alone or not isinstance(error, FaultyConfig):
        say_errors(*problems)
    if not isinstance(error, FaultyConfig):
        return
    checks = importlib.import_module("sdxl_finetune.training.checks")
    further = with_options(checks.find_further_problems(error.config, error.faulty), error.config)
    say_errors(*further, *(() if is_alone else problems))


def _storage_problem(error: Exception, reason: str) -> Problem:
    """The message for an error of storage that nothing has handled."""
    where = getattr(error, "filename", None)
    advice = "check the disk, its free space and the permissions, and start again"
    return Problem(f"storage failed ({reason}): {advice}", file=None if where is None else os.fsdecode(where))


def _say_failure_of_rank(error: Exception, secrets: Sequence[str]) -> None:
    """Prints the traceback of a process that failed, but not of a process that only lost its connection to it."""
    if any(words in str(error) for words in LOST_CONNECTION):
        message = "another process of this run has ended: its own message, or the launcher's report, says why."
        message += " The system kills processes when memory runs out. Start the run again with resume = auto"
        say_errors(message, cause=False)
    else:
        traceback.print_exc()
        say_errors(redacted(f"{type(error).__name__}: {error}", secrets))
