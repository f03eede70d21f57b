"""A test process: trains like sdxl-train and prints, on every rank, a digest of the weights after each step."""

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence

from sdxl_finetune.config import load_config
from sdxl_finetune.runtime.signals import StopRequest
from sdxl_finetune.training.loop import training_steps
from sdxl_finetune.training.setup import build_run


def digest_lines(arguments: Sequence[str]) -> Iterator[str]:
    """Trains and yields one line after each step."""
    config = load_config(arguments, program="sdxl-train")
    assert config is not None
    with build_run(config) as run:
        for step in training_steps(run.learner, run.batches(), StopRequest()):
            digest = hashlib.sha256()
            for name, parameter in sorted(run.learner.sdxl.named_parameters()):
                value = run.learner.sdxl.masters.value(parameter).float().cpu()
                digest.update(name.encode() + value.numpy().tobytes())
            yield f"digest {step.position.step} {digest.hexdigest()} {step.loss.item()!r} {step.grad_norm.item()!r}\n"


if __name__ == "__main__":
    for line in digest_lines(sys.argv[1:]):
        os.write(1, line.encode())  # in one write, so that lines of both ranks do not mix
