"""The memory lines of sdxl-check: memory of each phase, cards that the run fits, options that make it fit others."""

import gc
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from sdxl_finetune.commands.memory_estimate import (
    BatchShape,
    Estimate,
    Known,
    estimate,
    estimate_caches,
    estimate_previews,
)
from sdxl_finetune.config import Config
from sdxl_finetune.config.rules import find_conflicts
from sdxl_finetune.errors import UserError, counted
from sdxl_finetune.files import size_text
from sdxl_finetune.model.architecture import Architecture
from sdxl_finetune.optim.step_unit import StepUnit
from sdxl_finetune.runtime.host import memory_bytes
from sdxl_finetune.runtime.out_of_memory import Remedy, remedies

logger = logging.getLogger(__name__)

GiB = 1 << 30
ALLOWANCE = 1 * GiB, 0.05
"""Memory that CUDA takes beside tensors, not measured: bytes for its context and the workspaces of cuBLAS and cuDNN,
and unused memory between tensors, as a share of the tensors."""
CARDS = (8, 12, 16, 24, 32, 48, 80)
"""Usual sizes of cards in GB. A GB is counted as 10^9 bytes, which each such card has at least."""
WORTH_SAYING = 0.98
"""A remedy helps if it leaves at most this share of the memory."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The sizes on which the memory of one process of a run depends."""

    batch: BatchShape
    """The largest batch of a step."""
    bucket: BatchShape
    """The largest bucket, whose images the VAE encodes."""
    preview: tuple[int, int] | None = None
    """Width and height of the largest preview in pixels; None if there are no previews."""
    ranks: int = 1


@dataclass
class Estimator:
    """Estimates a workload under several configs, and keeps what they have in common."""

    architecture: Architecture
    workload: Workload
    known: Known = field(default_factory=Known)

    def phases(self, config: Config, images: int | None = None) -> list[Estimate]:
        """The step on the workload's batch, or on so many images, and the encoding for caches, on a GPU.

        Raises UserError for an optimizer that cannot be used.

        Previews do not count: if the memory is too small for them, they fail with a message, and training goes on.
        """
        work = self.workload
        step = estimate(
            config,
            self.architecture,
            replace(work.batch, images=images or work.batch.images),
            cuda=True,
            ranks=work.ranks,
            known=self.known,
        )
        return [step, *estimate_caches(config, self.architecture, work.bucket, self.known)]


def on_cuda(found: Sequence[Estimate]) -> int:
    """Bytes on a GPU: the largest phase, with the allowance."""
    most = max(phase.total for phase in found)
    return most + ALLOWANCE[0] + int(most * ALLOWANCE[1])


def fits(config: Config, estimator: Estimator, found: Sequence[Estimate]) -> Iterator[str]:
    """Lines that say which CARDS the run fits, and which options would make it fit the other cards.

    Remedies are added one after the other. One that does not lower the memory is tried again after the others, because
    the peak may have moved, and is then left out.
    """
    needed = on_cuda(found)
    missing = [card for card in sorted(CARDS, reverse=True) if needed > card * 10**9]
    fitting = [card for card in CARDS if card not in missing]
    if fitting:
        yield f"fits a card of {' / '.join(map(str, fitting))} GB"
    used: list[Remedy] = []
    images = estimator.workload.batch.images
    waiting = deque((remedy, 2) for remedy in remedies(config, images))
    while missing and waiting:
        remedy, trials = waiting.popleft()
        now = _with_remedy(config, remedy, estimator, images)
        if now is None or now > WORTH_SAYING * needed:
            if trials > 1:
                waiting.append((remedy, trials - 1))
            continue
        config, needed = config.model_copy(update=remedy.changes), now
        images = remedy.images or images
        # A later optimizer_type replaces an earlier one.
        used = [each for each in used if not each.changes.keys() & remedy.changes.keys()] + [remedy]
        fits_now = [card for card in missing if needed <= card * 10**9]
        if fits_now:
            missing = [card for card in missing if card not in fits_now]
            cards = " / ".join(map(str, sorted(fits_now)))
            yield f"does not fit {cards} GB; would with {_listed(used)}: {needed / GiB:.1f} GiB"
    if missing:
        cards = " / ".join(map(str, sorted(missing)))
        yield f"does not fit {cards} GB" + (f", nor with {_listed(used)}: {needed / GiB:.1f} GiB" if used else "")
    yield from (f"{remedy.text}: {remedy.cost}" for remedy in used if remedy.cost)


def _with_remedy(config: Config, remedy: Remedy, estimator: Estimator, images: int) -> int | None:
    """Bytes on a GPU with this remedy; None if it cannot be used together with the config."""
    changed = config.model_copy(update=remedy.changes)
    if set(find_conflicts(changed)) - set(find_conflicts(config)):
        return None
    logger.info("estimating the memory with %s", remedy.text)
    try:
        return on_cuda(estimator.phases(changed, remedy.images or images))
    except UserError:  # an optimizer that cannot be fused
        return None


def _listed(used: Sequence[Remedy]) -> str:
    return ", ".join(remedy.text for remedy in used)


def describe(config: Config, architecture: Architecture, workload: Workload) -> Iterator[str]:
    """The lines on memory for sdxl-check."""
    estimator, shape = Estimator(architecture, workload), workload.batch
    gc.freeze()  # the modules imported so far need not be searched for garbage
    logger.info("estimating the memory of a step, on tensors without memory (--no_memory leaves it out)")
    found = estimator.phases(config)
    step, *others = found
    images = f"{counted(shape.images, 'image')} of {shape.width}x{shape.height}"
    yield f"{images}, {config.max_token_length} tokens, on a GPU:"
    yield ", ".join(f"{part} {_size(size)}" for part, size in step.parts.items())
    yield f"together {_size(step.total)} at the peak, in the {step.phase}"
    if others:
        yield "before the first step: " + ", ".join(f"{phase.phase} {_size(phase.total)}" for phase in others)
    most = max(phase.total for phase in found)
    extra = on_cuda(found) - most
    yield (
        f"{_size(on_cuda(found))} with an allowance of {_size(extra)} for CUDA's context, workspaces and fragmentation"
        " (not measured)"
    )
    if workload.preview:
        width, height = workload.preview
        previews = estimate_previews(architecture, step, width, height)
        yield (
            f"previews of {width}x{height}: {_size(on_cuda([previews]))} with the allowance. On a smaller card they"
            " fail with a message, and training goes on"
        )
    yield from fits(config, estimator, found)
    if step.step_unit == StepUnit.ALL and config.keeps_masters:
        plain, low = step.parts["masters"], step.parts["masters"] // 2
        name = config.optimizer_name
        yield f"{name} needs all tensors at once: float32 masters take {_size(plain)}, for others {_size(low)}"
    if not torch.cuda.is_available():
        yield _on_cpu(config, estimator, step)


def _on_cpu(config: Config, estimator: Estimator, step: Estimate) -> str:
    """The line on training without a GPU. Its estimate takes time, so it is made only if the step could fit."""
    memory = memory_bytes()
    if step.total > memory:
        return f"this machine has no GPU, and its {_size(memory)} of memory are too little to train on its CPU"
    work = estimator.workload
    here = estimate(config, estimator.architecture, work.batch, cuda=False, ranks=work.ranks)
    return f"on this CPU {_size(here.total)} of tensors, most in the {here.phase}"


def _size(size: float) -> str:
    return f"{size / GiB:.2f} GiB" if size > GiB // 100 else size_text(size)
