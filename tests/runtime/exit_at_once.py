"""A test process: exits right after an all-reduce, with the run left (`leave`) or stopped (`stop`)."""

import sys

import torch

from sdxl_finetune.config import load_config
from sdxl_finetune.runtime.processes import build_accelerator


def main(end: str, arguments: list[str]) -> None:
    config = load_config(arguments, program="sdxl-train")
    assert config is not None
    accelerator = build_accelerator(config)
    print("ended", flush=True)
    sys.setswitchinterval(1000)  # gloo's threads do not get the GIL while Python code runs
    for _ in range(20):
        torch.distributed.all_reduce(torch.randn(10))
    if end == "leave":
        accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
