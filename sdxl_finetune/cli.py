"""Entry points: parse, load the config, call one function, turn the outcome into an exit status.

0 done; 2 the user's input is wrong (every problem on a line of its own, no traceback); 1 a failure of ours or of
the machine; 130 and 143 stopped by SIGINT and SIGTERM. torch is imported only by what a command needs, so that
--help and a mistake in the config are answered at once.
"""

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

from sdxl_finetune.errors import UserError, say_errors

LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL",
    "failed to recv",
    "recvValue",
)
"""What torch says in a process when another of the run has gone."""


def train() -> NoReturn:
    """sdxl-train"""
    _run(partial(_configured, "sdxl-train", "sdxl_finetune.training.loop"))


def cache() -> NoReturn:
    """sdxl-cache"""
    _run(partial(_configured, "sdxl-cache", "sdxl_finetune.commands.cache"))


def check() -> NoReturn:
    """sdxl-check"""
    _run(partial(_configured, "sdxl-check", "sdxl_finetune.commands.check"))


def model() -> NoReturn:
    """sdxl-model"""
    _run(_model)


def _configured(program: str, module: str, arguments: Sequence[str]) -> int:
    """Calls the function named as the program, of a module that is imported once the config is known to be right."""
    from sdxl_finetune.config import load_config

    config = load_config(arguments, program=program)
    if config is None:
        return 0
    return getattr(importlib.import_module(module), program.removeprefix("sdxl-"))(config)


def _model(arguments: Sequence[str]) -> int:
    from sdxl_finetune.commands.model import main

    return main(list(arguments))


def _run(command: Callable[[Sequence[str]], int]) -> NoReturn:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded, by libraries either
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)  # misses a kernel that nothing here uses
    try:
        status = command(sys.argv[1:])
    except UserError as error:
        say_errors(*error.problems)
        status = 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:
        if "RANK" not in os.environ:
            raise
        status = _fail_among_others(error)
    sys.exit(status)


def _fail_among_others(error: Exception) -> int:
    """Of several processes only the one that failed shows a traceback, and not those that lost it."""
    if any(words in str(error) for words in LOST_PEER):
        say_errors("another process of this run has ended; its own message says why", cause=False)
    else:
        traceback.print_exc()
        say_errors(f"{type(error).__name__}: {error}")
    return 1
