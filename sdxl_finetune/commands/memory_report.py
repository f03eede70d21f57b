"""The memory lines of sdxl-check: memory of a step, cards that it fits, and options that make it fit others."""

import logging
from collections.abc import Iterator
from dataclasses import replace

import torch

from sdxl_finetune.commands.memory_estimate import BatchShape, Estimate, estimate
from sdxl_finetune.config import Config
from sdxl_finetune.errors import UserError
from sdxl_finetune.model.architecture import Architecture
from sdxl_finetune.optim.step_unit import StepUnit
from sdxl_finetune.runtime.out_of_memory import remedies

logger = logging.getLogger(__name__)

GiB = 1 << 30
ALLOWANCE = 1 * GiB, 0.05
"""Memory that CUDA takes beside tensors, not measured: bytes for its context and the workspaces of cuBLAS and cuDNN,
and unused memory between tensors, as a share of the tensors."""
CARDS = (24, 48, 80)
"""Usual sizes of cards in GB. A GB is counted as 10^9 bytes, which each such card has at least."""


def on_cuda(found: Estimate) -> int:
    """Bytes on a GPU: the estimate with the allowance."""
    return found.total + ALLOWANCE[0] + int(found.total * ALLOWANCE[1])


def fits(config: Config, architecture: Architecture, shape: BatchShape, found: Estimate, ranks: int) -> Iterator[str]:
    """Lines that say which CARDS the step fits, and which options would make it fit the other cards."""
    missing = [card for card in sorted(CARDS, reverse=True) if on_cuda(found) > card * 10**9]
    fitting = [card for card in CARDS if card not in missing]
    if fitting:
        yield f"fits a card of {' / '.join(map(str, fitting))} GB"
    used: list[str] = []
    tried = ((name, changes, shape) for name, changes in remedies(config))
    for name, changes, smaller in (*tried, ("train_batch_size = 1", {}, replace(shape, images=1))):
        if not missing or (not changes and shape.images == 1):
            break
        config = config.model_copy(update=changes)
        used.append(name)
        try:
            now = estimate(config, architecture, smaller, cuda=True, ranks=ranks)
        except UserError:  # an optimizer that cannot be fused
            used.pop()
            continue
        while missing and on_cuda(now) <= missing[0] * 10**9:
            yield f"does not fit {missing.pop(0)} GB; would with {', '.join(used)}: {on_cuda(now) / GiB:.1f} GiB"
    for card in missing:
        yield f"does not fit {card} GB" + (f", nor with {', '.join(used)}" if used else "")


def describe(config: Config, architecture: Architecture, shape: BatchShape, ranks: int) -> Iterator[str]:
    """The lines on memory for sdxl-check."""
    logger.info("estimating the memory of a step, on tensors without memory")
    found = estimate(config, architecture, shape, cuda=True, ranks=ranks)
    images = f"{shape.images} image{'s' * (shape.images > 1)} of {shape.width}x{shape.height}"
    yield f"{images}, {config.max_token_length} tokens, on a GPU:"
    yield ", ".join(f"{part} {_size(size)}" for part, size in found.parts.items())
    yield f"together {_size(found.total)} at the peak, in the {found.phase}"
    extra = on_cuda(found) - found.total
    yield f"and an allowance of {_size(extra)} for CUDA's context, workspaces and fragmentation (not measured)"
    yield from fits(config, architecture, shape, found, ranks)
    if found.step_unit == StepUnit.ALL and config.keeps_masters:
        plain, low = found.parts["masters"], found.parts["masters"] // 2
        name = config.optimizer_name
        yield f"{name} needs all tensors at once: float32 masters take {_size(plain)}, for others {_size(low)}"
    if not torch.cuda.is_available():
        here = estimate(config, architecture, shape, cuda=False, ranks=ranks)
        yield f"on this CPU {_size(here.total)} of tensors, most in the {here.phase}"


def _size(size: float) -> str:
    return f"{size / GiB:.2f} GiB" if size > GiB // 100 else f"{size / (1 << 20):.1f} MiB"
