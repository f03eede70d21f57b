"""Measures the host's work for one call of the optimizer within the backward pass.

    python -m scripts.benchmarks.update_calls [--parameters 1000]

A step of full-size SDXL makes 2,556 such calls, and a GPU that is faster than the host waits for them. The script steps
on small parameters with AdamW8bit, bf16 with exact masters and fused_backward_pass. The kernels of bitsandbytes are
left out, so that the processor time is that of Python and of launching torch's kernels. The time of the same backward
pass without an update is subtracted.
"""

import argparse
import time

import bitsandbytes.functional
import torch
from torch import nn

from sdxl_finetune.config import Config
from sdxl_finetune.low_bits import MasterWeights
from sdxl_finetune.optim.parameters import Group, TrainedParameters
from sdxl_finetune.optim.update import ExactUpdate
from sdxl_finetune.runtime.processes import build_accelerator

ELEMENTS = 8192
"""Elements of a parameter: enough for 8-bit states."""
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=1000, help="number of parameters (default: 1000)")
    count = parser.parse_args().parameters
    torch.set_num_threads(1)
    bitsandbytes.functional.optimizer_update_8bit_blockwise = lambda *_, **__: None
    alone = seconds(parameters(count), None)
    for clipped in (0.0, 1.0):
        config = Config(
            optimizer_type="AdamW8bit", mixed_precision="bf16", full_bf16=True, fused_backward_pass=True,
            max_grad_norm=clipped, learning_rate=1e-4,
        )  # fmt: skip
        model = parameters(count)
        trained = TrainedParameters([Group("unet", dict(model.items()), 1e-4)], MasterWeights())
        update = ExactUpdate(config, trained, build_accelerator(config))
        each = (seconds(model, update) - alone) / count
        print(f"max_grad_norm {clipped:g}: {1e6 * each:.0f} microseconds a call")


def parameters(count: int) -> nn.ParameterDict:
    return nn.ParameterDict({str(number): nn.Parameter(torch.ones(ELEMENTS).bfloat16()) for number in range(count)})


def seconds(model: nn.ParameterDict, update: ExactUpdate | None) -> float:
    """Returns the least processor time of some backward passes, each with a step of the update."""
    ones, least = torch.ones(ELEMENTS).bfloat16(), float("inf")
    for _ in range(REPEATS + 1):  # the first makes the optimizer's states
        loss = torch.stack([(parameter * ones).sum() for parameter in model.values()]).sum()
        began = time.process_time()
        if update is None:
            loss.backward()
        else:
            with update.accumulate(last=True, only=True):
                loss.backward()
            update.step()
        least = min(least, time.process_time() - began)
        for parameter in model.values():
            parameter.grad = None
    return least


if __name__ == "__main__":
    main()
