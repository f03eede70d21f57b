"""Ends right after what the ranks did together, with the run left (`leave`) or as one that was stopped: a test's."""

import sys

import torch

from sdxl_finetune.config import load_config
from sdxl_finetune.runtime import build_accelerator

if __name__ == "__main__":
    leave = sys.argv.pop(1) == "leave"
    config = load_config(sys.argv[1:], program="sdxl-train")
    assert config is not None
    accelerator = build_accelerator(config)
    others = [torch.distributed.new_group() for _ in range(4)]  # each with threads of its own
    print("ended", flush=True)
    sys.setswitchinterval(1000)  # what gloo's threads ask for at the end is not given while Python code runs
    for group in [None, *others] * 3:
        torch.distributed.all_reduce(torch.randn(10), group=group)
    if leave:
        accelerator.end_training()
