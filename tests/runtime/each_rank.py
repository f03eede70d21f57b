"""A test process: trains like sdxl-train and prints, on every rank, a digest of the weights after each step.

At the end it saves how much the weights have changed, as changes.safetensors. The variable LOSS_SCALE is the scale of
the first step in float16.
"""

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence

from safetensors.torch import save_file

from sdxl_finetune.config import load_config
from sdxl_finetune.optim import loss_scale
from sdxl_finetune.runtime.signals import StopRequest
from sdxl_finetune.training.loop import training_steps
from sdxl_finetune.training.setup import Run, build_run


def digest_lines(arguments: Sequence[str]) -> Iterator[str]:
    """Trains and yields one line after each step."""
    config = load_config(arguments, program="sdxl-train")
    assert config is not None
    with build_run(config) as run:
        start = exact_values(run)
        for step in training_steps(run.learner, run.batches(), StopRequest()):
            digest = hashlib.sha256()
            for name, value in exact_values(run).items():
                digest.update(name.encode() + value.numpy().tobytes())
            yield f"digest {step.position.step} {digest.hexdigest()} {step.loss.item()!r} {step.grad_norm.item()!r}\n"
        if run.accelerator.is_main_process:
            changes = {name: value - start[name] for name, value in exact_values(run).items()}
            save_file(changes, "changes.safetensors")


def exact_values(run: Run) -> dict:
    masters, named = run.learner.sdxl.masters, sorted(run.learner.sdxl.named_parameters())
    return {name: masters.value(parameter).float().cpu().clone() for name, parameter in named}


if __name__ == "__main__":
    loss_scale.START = float(os.environ.get("LOSS_SCALE", loss_scale.START))
    for line in digest_lines(sys.argv[1:]):
        os.write(1, line.encode())  # in one write, so that lines of both ranks do not mix
