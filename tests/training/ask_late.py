"""A test process: trains like sdxl-train. Its first rank makes `stop` after step 2 and `save` after step 3."""

import os
from pathlib import Path

from sdxl_finetune import cli
from sdxl_finetune.output.log import Log, Step
from sdxl_finetune.runtime import signals

record = Log.record


def record_and_ask(log: Log, step: Step) -> None:
    record(log, step)
    if os.environ["RANK"] == "0" and step.number in (2, 3):
        Path("out", "stop" if step.number == 2 else "save").touch()


if __name__ == "__main__":
    signals.LOOK_EVERY = 0.0
    Log.record = record_and_ask  # type: ignore[method-assign]
    cli.train()
