"""A test process: joins and leaves ten runs, one after the other, on every rank."""

import gc
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from sdxl_finetune.config import load_config
from sdxl_finetune.runtime.processes import build_accelerator

if __name__ == "__main__":
    config = load_config(sys.argv[1:], program="sdxl-train")
    assert config is not None
    for number in range(10):
        place = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
        # gloo cannot connect twice through one store.
        torch.distributed.init_process_group("gloo", init_method=Path(f"store{number}").absolute().as_uri(), **place)
        accelerator = build_accelerator(config)
        model = accelerator.prepare(torch.nn.Linear(1000, 100))
        accelerator.backward(model(torch.randn(4, 1000)).sum())
        accelerator.reduce(torch.cat([torch.randn(100_000), torch.randn(10)]))
        accelerator.end_training()
        del accelerator, model
        AcceleratorState._reset_state(reset_partial_state=True)
        gc.collect()  # reducers are freed before the interpreter ends
    print("left")
