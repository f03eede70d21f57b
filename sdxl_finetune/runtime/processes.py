"""Processes, device and precision of a run, through accelerate, and the seed that all processes share.

The config decides over `accelerate config`: a precision or an accumulation that was set there and differs is said
and not used. Accelerate prepares the model and the optimizer only; batches, accumulation windows and the learning
rate are functions of the step and need no wrapping.
"""

import atexit
import datetime
import gc
import logging
import os
import secrets

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    KwargsHandler,
    broadcast_object_list,
)

from sdxl_finetune.config import Config, HardwareOptions, LengthOptions
from sdxl_finetune.errors import Problem, UserError

logger = logging.getLogger(__name__)


def build_accelerator(config: Config) -> Accelerator:
    """Joins the processes of an `accelerate launch`, or stands alone. Raises UserError for a precision that the
    device does not have.
    """
    _say_overruled(config)
    handlers: list[KwargsHandler] = [
        DistributedDataParallelKwargs(
            gradient_as_bucket_view=config.ddp_gradient_as_bucket_view, static_graph=config.ddp_static_graph
        )
    ]
    if config.ddp_timeout:
        handlers.append(InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=config.ddp_timeout)))
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        # Given as a plugin because ACCELERATE_GRADIENT_ACCUMULATION_STEPS would win over a plain number.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=handlers,
    )
    if torch.distributed.is_initialized():
        atexit.register(_free_group, [torch.distributed.group.WORLD])
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        remedy = "float16 cannot be trained on a CPU, where it has no gradient scaler; use bf16 or no"
        raise UserError(Problem(remedy, key="mixed_precision", value="fp16"))
    if config.mixed_precision == "bf16" and accelerator.device.type == "cuda":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            remedy = f"{torch.cuda.get_device_name()} has no bfloat16; use fp16"
            raise UserError(Problem(remedy, key="mixed_precision", value="bf16"))
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def _free_group(held: list[object]) -> None:
    """Frees the process group, which joins gloo's threads, while the interpreter still runs, and from Python, which
    lets go of the GIL for that.

    Such a thread may be waiting for the GIL to free a tensor. Where DDP's reducer holds the group last, it waits for
    that thread with the GIL held; and a thread that asks for the GIL of an interpreter that has ended aborts the
    process (both seen with torch 2.13, in runs that had saved everything).
    """
    gc.collect()  # reducers, before the group
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()  # of a run that was stopped, or failed
    held.clear()


def _say_overruled(config: Config) -> None:
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", config.mixed_precision)
    if asked != config.mixed_precision:
        logger.warning(
            "accelerate was launched with mixed_precision=%s; the config's mixed_precision=%s is used",
            asked,
            config.mixed_precision,
        )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", str(config.gradient_accumulation_steps)):
        logger.warning(
            "accelerate was launched with gradient_accumulation_steps=%s; the config's %d is used",
            steps,
            config.gradient_accumulation_steps,
        )


def shared_seed(config: LengthOptions) -> int:
    """The run's seed: the config's, or one that the first process draws and all share."""
    if config.seed is not None:
        return config.seed
    drawn = [secrets.randbelow(2**31)]
    broadcast_object_list(drawn)
    logger.info("seed %d (drawn, as none was given)", drawn[0])
    return drawn[0]


def weight_dtype(config: HardwareOptions) -> torch.dtype:
    """The precision in which the trained weights are held."""
    return torch.bfloat16 if config.full_bf16 else torch.float32
