"""Entry points: parse, load the config, call one function, turn the outcome into an exit status.

0 done; 2 the user's input is wrong (every problem on a line of its own, no traceback); 1 a failure of ours or of
the machine; 130 and 143 stopped by SIGINT and SIGTERM. torch is imported only by what a command needs, so that
--help and a mistake in the config are answered at once.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from sdxl_finetune.problems import UserError


def train() -> NoReturn:
    """sdxl-train"""
    _run(_train)


def model() -> NoReturn:
    """sdxl-model"""
    _run(_model)


def _train(arguments: Sequence[str]) -> int:
    from sdxl_finetune.config import load_config

    config = load_config(arguments, program="sdxl-train")
    if config is None:
        return 0
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from sdxl_finetune.train import train

    return train(config)


def _model(arguments: Sequence[str]) -> int:
    from sdxl_finetune.tools.model import main

    return main(list(arguments))


def _run(command: Callable[[Sequence[str]], int]) -> NoReturn:
    try:
        status = command(sys.argv[1:])
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
