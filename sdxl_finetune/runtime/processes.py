"""Processes, device and precision of a run, through accelerate, and the seed that all processes share.

The config overrules `accelerate config`. A different precision or gradient accumulation there is named in a warning.
Accelerate prepares only the model and the optimizer. Batches, gradient accumulation and the learning rate are functions
of the step and are not wrapped. `Autocast` sets the precision of the computation, because accelerate has no float16 on
a CPU and its gradient scaler refuses weights in float16 (see optim/loss_scale.py).
"""

import atexit
import datetime
import gc
import logging
import os
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    KwargsHandler,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor, nn

from sdxl_finetune.config import Config, HardwareOptions, LengthOptions
from sdxl_finetune.errors import Problem, UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")


def build_accelerator(config: Config) -> Accelerator:
    """Joins the processes of an `accelerate launch`, or sets up a single process."""
    _warn_of_overruled_settings(config)
    handlers: list[KwargsHandler] = [
        DistributedDataParallelKwargs(
            gradient_as_bucket_view=config.ddp_gradient_as_bucket_view, static_graph=config.ddp_static_graph
        )
    ]
    if config.ddp_timeout:
        handlers.append(InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=config.ddp_timeout)))
    accelerator = Accelerator(
        mixed_precision="no",  # see Autocast
        # A plugin, because ACCELERATE_GRADIENT_ACCUMULATION_STEPS would overrule a plain number.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=handlers,
    )
    if torch.distributed.is_initialized():
        atexit.register(_free_process_group, [torch.distributed.group.WORLD])
    if config.mixed_precision == "bf16" and accelerator.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def check_precision(options: HardwareOptions, device: torch.device) -> None:
    """Raises UserError for a precision that the device does not have."""
    is_old = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if options.mixed_precision == "bf16" and is_old:
        message = f"{torch.cuda.get_device_name()} has no bfloat16: use fp16"
        raise UserError(Problem(message, key="mixed_precision", value="bf16"))


def _free_process_group(references: list[object]) -> None:
    """Frees the process group, and with it gloo's threads, while the interpreter still runs.

    One of gloo's threads may be waiting for the GIL to free a tensor. Python releases the GIL while it waits for that
    thread. If DDP's reducer frees the group instead, it waits with the GIL held, for ever. If nobody does, the thread
    asks for the GIL of an interpreter that has ended, and aborts the process. Both happened with torch 2.13, in runs
    that had saved everything.
    """
    gc.collect()  # frees DDP's reducers before the group
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()  # still initialized after a run that was stopped or that failed
    references.clear()


def _warn_of_overruled_settings(config: Config) -> None:
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", config.mixed_precision)
    if precision != config.mixed_precision:
        logger.warning(
            "accelerate was launched with mixed_precision=%s; the config's mixed_precision=%s is used",
            precision,
            config.mixed_precision,
        )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", str(config.gradient_accumulation_steps)):
        logger.warning(
            "accelerate was launched with gradient_accumulation_steps=%s; the config's %d is used",
            steps,
            config.gradient_accumulation_steps,
        )


def shared_seed(options: LengthOptions) -> int:
    """The seed of the run: `seed`, or if it is not set, a number that rank 0 draws and shares with all ranks."""
    if options.seed is not None:
        return options.seed
    drawn = [secrets.randbelow(2**31)]
    broadcast_object_list(drawn)
    logger.info("seed %d (drawn, because seed is not set)", drawn[0])
    return drawn[0]


def on_first_rank(accelerator: Accelerator, find: Callable[[], T]) -> T:
    """Calls `find` on the first rank only. Returns its result, or raises its UserError, on all ranks."""
    results: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            results = [find()]
        except UserError as error:
            results = [error]
    broadcast_object_list(results)
    if isinstance(results[0], UserError):
        raise results[0]
    return cast(T, results[0])


def on_every_rank(find: Callable[[], T]) -> T:
    """Calls `find` on every rank and returns this rank's result.

    If it raises UserError on some ranks, it raises on all: a rank that went on alone would wait for the others.
    """
    result, error = None, None
    try:
        result = find()
    except UserError as failure:
        error = failure
    errors = [failure for failure in gather_object([error]) if failure is not None]
    if errors:
        raise errors[0]
    return cast(T, result)


def weight_dtype(options: HardwareOptions) -> torch.dtype:
    """The precision of the model's weights in memory."""
    if options.full_fp16:
        return torch.float16
    return torch.bfloat16 if options.full_bf16 else torch.float32


def trained_dtype(options: HardwareOptions) -> torch.dtype:
    """The precision of the values that the optimizer updates: float32 if there are master weights."""
    return torch.float32 if options.keeps_masters else weight_dtype(options)


def autocast(options: HardwareOptions, device: torch.device) -> AbstractContextManager[Any]:
    """Returns a context that computes in the precision of `mixed_precision`."""
    if options.mixed_precision == "no":
        return nullcontext()
    return torch.autocast(device.type, {"fp16": torch.float16, "bf16": torch.bfloat16}[options.mixed_precision])


class Autocast(nn.Module):
    """A module whose forward pass runs within `context()`."""

    def __init__(self, module: nn.Module, context: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.module, self._context = module, context

    def forward(self, *inputs: Any) -> Tensor:
        with self._context():
            result: Tensor = self.module(*inputs)
        return result
