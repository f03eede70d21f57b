"""Trains as sdxl-train does and prints, on every rank, a digest of the weights after each step: a process of a test."""

import hashlib
import os
import sys

from sdxl_finetune.config import load_config
from sdxl_finetune.run import build_run
from sdxl_finetune.runtime import StopRequest
from sdxl_finetune.train import training_steps


def main() -> None:
    config = load_config(sys.argv[1:], program="sdxl-train")
    assert config is not None
    with build_run(config) as run:
        for step in training_steps(run, StopRequest()):
            digest = hashlib.sha256()
            for name, tensor in sorted(run.sdxl.state_dict().items()):
                digest.update(name.encode() + tensor.numpy().tobytes())
            line = f"digest {step.position.step} {digest.hexdigest()} {step.loss.item()!r} {step.grad_norm.item()!r}\n"
            os.write(1, line.encode())  # whole, beside the other rank's


if __name__ == "__main__":
    main()
