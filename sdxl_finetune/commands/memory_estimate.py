"""The memory estimate: how much memory a run takes on a device, known before any of it is allocated.

Two things are observed on fake tensors, which have shapes and storages but no memory. First the training loop makes a
forward and a backward pass, in which gradients are dropped and only their moments are recorded. Then the run's own
update receives gradients at these moments and steps. There are no formulas for models, gradient checkpointing or
optimizers here: their allocations are recorded. Configs that differ only in the optimizer share the recorded pass.

A run has phases that are never on the device together: the encoding of images and captions for the caches, the training
steps, and the previews between steps. Checkpoints are saved tensor by tensor, and validation makes a forward pass, so
neither takes more than a step. Weights are loaded in host memory, so loading takes none of a GPU.
"""

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from sdxl_finetune.batch import Batch, Position, Tokens
from sdxl_finetune.commands.allocations import OPTIMIZER_STATES, Allocations, Recording
from sdxl_finetune.commands.fake_learner import (
    OPTIMIZER_STEP,
    Modules,
    allocate,
    build_fake_learner,
    optimizer_states,
    unallocated,
)
from sdxl_finetune.config import Config
from sdxl_finetune.data.batch_plan import Plan
from sdxl_finetune.data.index import Index
from sdxl_finetune.model.architecture import Architecture, te1_config, te2_config
from sdxl_finetune.model.text import build_te1, build_te2, encode_tokens
from sdxl_finetune.model.vae import decode, encode
from sdxl_finetune.optim.meter import sample
from sdxl_finetune.optim.step_unit import StepUnit
from sdxl_finetune.optim.update import IN_FLIGHT, ExactUpdate, Norms, PlainUpdate, Slice
from sdxl_finetune.runtime.signals import StopRequest
from sdxl_finetune.training.learner import Learner
from sdxl_finetune.training.loop import training_steps

GRADIENTS = "gradients"
KEPT = ("weights", "masters", OPTIMIZER_STATES, "EMA", "VAE")
"""Parts that stay on the device between two steps."""
MOST_MICRO_BATCHES = 3
"""Micro-batches of an estimated step at most, because later ones take the same memory as the third."""
PASS_ONLY: dict[str, Any] = {
    "optimizer_type": "SGD",
    "optimizer_args": {},
    "use_8bit_adam": False,
    "use_lion_optimizer": False,
    "fused_backward_pass": False,
    "fused_optimizer_groups": None,
    "exact_masters": False,
    "ema_decay": None,
    "ema_half_life": None,
}
"""Options that do not change the forward and backward pass, each with the value that is cheapest to observe."""


@dataclass(frozen=True)
class BatchShape:
    """The shape of a batch on one process."""

    images: int
    height: int
    """Pixels."""
    width: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes of tensors at the peak of a phase of the run."""

    parts: dict[str, int]
    """Bytes by purpose; their sum is the peak."""
    phase: str
    """The part of the run, or of a step, in which the peak is."""
    step_unit: StepUnit | None = None
    """How the optimizer steps, if the update asks for it."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def kept(self) -> dict[str, int]:
        """The parts that stay on the device between two steps."""
        return {part: size for part, size in self.parts.items() if part in KEPT}


@dataclass(frozen=True)
class Known:
    """Parts of earlier estimates of one architecture, which later estimates use."""

    passes: dict[tuple[str, BatchShape, bool], Recording] = field(default_factory=dict)
    """Recorded forward and backward passes, by options, shape, and whether they are those of a GPU."""
    results: dict[Hashable, Any] = field(default_factory=dict)
    """Shapes of the results of operations (Allocations)."""
    caches: dict[Hashable, list[Estimate]] = field(default_factory=dict)
    """Estimates of the encoding for caches, by everything that they depend on."""
    modules: dict[Architecture, Modules] = field(default_factory=dict)

    def modules_of(self, architecture: Architecture) -> Modules:
        """The modules of this architecture, built at the first call."""
        if architecture not in self.modules:
            self.modules[architecture] = Modules(architecture)
        return self.modules[architecture]


def estimate(
    config: Config,
    architecture: Architecture,
    shape: BatchShape,
    *,
    cuda: bool,
    ranks: int = 1,
    known: Known | None = None,
) -> Estimate:
    """Estimates a step on batches of this shape, on one of `ranks` processes, on a GPU (`cuda`) or a CPU.

    Raises UserError for an optimizer or for learning rates that cannot be used.
    """
    known = known or Known()
    modules = known.modules_of(architecture)
    pass_config = config.model_copy(update=PASS_ONLY)
    key = repr(pass_config), shape, cuda
    if key not in known.passes:
        with Allocations(count_scratch=not cuda, results=known.results) as allocations:
            learner = build_fake_learner(pass_config, modules, allocations, cuda=cuda)
            known.passes[key] = _record_pass(learner, shape, allocations)
    with Allocations(count_scratch=not cuda, results=known.results) as allocations:
        learner = build_fake_learner(config, modules, allocations, cuda=cuda)
        _make_step(learner, known.passes[key], allocations, ranks)
        allocations.set_owner(OPTIMIZER_STATES, optimizer_states(learner))
        parts, phase = _parts_of_peak(allocations)
    if extra := _bytes_between_processes(learner, ranks):
        parts[GRADIENTS] = parts.get(GRADIENTS, 0) + extra
    step_unit = learner.update.step_unit if isinstance(learner.update, ExactUpdate) else None
    return Estimate(parts=parts, phase=phase, step_unit=step_unit)


def estimate_caches(
    config: Config, architecture: Architecture, largest: BatchShape, known: Known | None = None
) -> list[Estimate]:
    """Estimates the encoding of images and captions for the caches that the config asks for, on a GPU.

    The model is still in host memory then. `largest` is the largest bucket, whose images are encoded in batches of
    `vae_batch_size`.
    """
    known = known or Known()
    images = config.vae_batch_size if config.cache_latents else None
    captions = (config.text_encoder_batch_size, _chunks(config)) if config.cache_text_encoder_outputs else None
    key = architecture, largest, images, captions
    if key not in known.caches:
        known.caches[key] = _estimate_caches(config, architecture, largest, known)
    return known.caches[key]


def _estimate_caches(config: Config, architecture: Architecture, largest: BatchShape, known: Known) -> list[Estimate]:
    found = []
    if config.cache_latents:
        shape = replace(largest, images=config.vae_batch_size)
        with Allocations(count_scratch=False, results=known.results) as allocations, torch.no_grad():
            vae = _build_fake_vae(known.modules_of(architecture), allocations)
            noise = torch.zeros(shape.images, *architecture.latent_size.of(shape))
            encode(vae, torch.zeros(shape.images, 3, shape.height, shape.width), noise)
            found.append(Estimate(parts=_parts_of_peak(allocations)[0], phase="encoding of images"))
    if config.cache_text_encoder_outputs:
        with Allocations(count_scratch=False, results=known.results) as allocations, torch.no_grad():
            encoders = []
            for build, settings in ((build_te1, te1_config(architecture)), (build_te2, te2_config(architecture))):
                with unallocated():
                    encoders.append(build(settings).eval())
                allocate(encoders[-1], torch.float32)
                allocations.set_owner("weights", [*encoders[-1].parameters(), *encoders[-1].buffers()])
            tokens = torch.zeros(config.text_encoder_batch_size, _chunks(config), 77, dtype=torch.int64)
            encode_tokens(encoders[0], encoders[1], Tokens(tokens, tokens))
            found.append(Estimate(parts=_parts_of_peak(allocations)[0], phase="encoding of captions"))
    return found


def estimate_previews(architecture: Architecture, step: Estimate, width: int, height: int) -> Estimate:
    """Estimates the previews of so many pixels on a GPU, between two steps of this estimate.

    Their peak is in the VAE, which decodes one picture at a time in float32.
    """
    with Allocations(count_scratch=False) as allocations, torch.no_grad():
        vae = _build_fake_vae(Modules(architecture), allocations)
        decode(vae, torch.zeros(1, *architecture.latent_size.of(BatchShape(1, height, width))))
        parts, _ = _parts_of_peak(allocations)
    return Estimate(parts=step.kept | parts, phase="previews")


def largest_batch(index: Index, plan: Plan) -> BatchShape:
    """The shape, on one process, of the run's first batch, which is the one with the most pixels."""
    rows = plan.epoch(plan.origin[1]).batch(0)
    bucket = index.buckets[index.bucket[rows[0]]]
    images = min(len(rows), index.datasets[bucket.dataset].batch_size)
    return BatchShape(images, bucket.height, bucket.width)


def _build_fake_vae(modules: Modules, allocations: Allocations) -> AutoencoderKL:
    vae = modules.vae()
    allocate(vae, torch.float32)
    allocations.set_owner("VAE", vae.parameters())
    return vae


def _record_pass(learner: Learner, shape: BatchShape, allocations: Allocations) -> Recording:
    """Records the forward and backward pass of a micro-batch, with a mark where a gradient is complete."""
    names = {parameter: name for name, parameter in learner.parameters.named()}

    def drop_gradient(parameter: Tensor) -> None:
        assert isinstance(parameter, torch.nn.Parameter) and parameter.grad is not None
        allocations.set_owner(GRADIENTS, [parameter.grad])
        allocations.mark(names[parameter])
        parameter.grad = None

    for parameter in names:
        parameter.register_post_accumulate_grad_hook(drop_gradient)
    learner, since = replace(learner, update=_NoUpdate(learner)), allocations.now()
    position, architecture = Position(0, 0, 0, 1), learner.sdxl.architecture
    batches = (_batch(learner.config, architecture, shape, position) for _ in range(1))
    for _ in training_steps(learner, batches, StopRequest()):
        pass
    return allocations.record(since, without=GRADIENTS)


class _NoUpdate:
    """Stands for an update while a pass is recorded: it makes no step."""

    def __init__(self, learner: Learner) -> None:
        self.optimizer, self.optimizer_groups = learner.update.optimizer, learner.update.optimizer_groups
        self.loss_scale, self.parameter_norms = learner.update.loss_scale, torch.zeros(0)

    def accumulate(self, *, last: bool, only: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def step(self) -> Norms:
        return {group.name: torch.zeros(()) for group in self.optimizer_groups}

    def weights_for_use(self) -> AbstractContextManager[None]:
        return nullcontext()


def _make_step(learner: Learner, recorded: Recording, allocations: Allocations, ranks: int) -> None:
    """Makes an optimizer step whose forward and backward passes are the recorded one."""
    update, parameters = learner.update, dict(learner.parameters.named())
    micros = _micro_batches(learner, ranks)
    is_fused = isinstance(update, ExactUpdate) and learner.config.is_fused and micros == 1

    def receive(name: str) -> None:
        parameter = parameters[name]

        @torch.no_grad()
        def complete_gradient() -> None:
            gradient = torch.empty_like(parameter)
            allocations.set_owner(GRADIENTS, [gradient])
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            del gradient  # autograd lets go of it as well
            for hook in (parameter._post_accumulate_grad_hooks or {}).values():
                hook(parameter)
            if isinstance(update, ExactUpdate) and parameter in update.sums:
                allocations.set_owner(GRADIENTS, [update.sums[parameter]])

        if is_fused:  # the step on one tensor is that on any other tensor of its shape
            allocations.repeat((parameter.shape, parameter.dtype), complete_gradient, remains=OPTIMIZER_STATES)
        else:
            complete_gradient()

    if isinstance(update, ExactUpdate):
        _repeat_steps(update, allocations)
    for micro in range(micros):
        with update.accumulate(last=micro + 1 == micros, only=micros == 1):
            allocations.replay(recorded, receive)
    allocations.phase = OPTIMIZER_STEP
    # The meter's copies of some weights live until the end of the step. In the recorded pass they have ended.
    sampled = [parameter for group in learner.parameters.groups for parameter in sample(group.parameters)]
    copies = [torch.empty(parameter.shape) for parameter in sampled]
    update.step()
    del copies
    if learner.ema:
        learner.ema.update(0, 1)


def _repeat_steps(update: ExactUpdate, allocations: Allocations) -> None:
    """Makes the update step only on the first slices of given shapes. Later ones are counted as those."""
    step_on = update.step_on

    def repeated(slices: Sequence[Slice], factor: Tensor | None) -> None:
        shapes = tuple((part.buffer.shape, part.parameter.dtype) for part in slices)
        allocations.repeat(shapes, lambda: step_on(slices, factor), remains=OPTIMIZER_STATES)

    setattr(update, "step_on", repeated)  # noqa: B010


def _micro_batches(learner: Learner, ranks: int) -> int:
    """Micro-batches of a step. Exact gradients of several processes add up as those of several micro-batches."""
    micros = learner.config.gradient_accumulation_steps
    if ranks > 1 and isinstance(learner.update, ExactUpdate) and not learner.config.is_fused:
        micros = max(2, micros)
    return min(micros, MOST_MICRO_BATCHES)


def _chunks(config: Config) -> int:
    return -(-(config.max_token_length or 75) // 75)


def _parts_of_peak(allocations: Allocations) -> tuple[dict[str, int], str]:
    """Bytes at the peak by purpose, and the phase of the peak."""
    alive, phase = allocations.peak()
    order = ("weights", "masters", GRADIENTS, OPTIMIZER_STATES, "EMA", "VAE")
    rest = "temporary" if phase == OPTIMIZER_STEP else "activations"
    parts = dict.fromkeys((*order, rest), 0)
    for number, size in alive.items():
        parts[allocations.owners.get(number, rest)] += size
    return {part: size for part, size in parts.items() if size}, phase


def _bytes_between_processes(learner: Learner, ranks: int) -> int:
    """Bytes that several processes take for their gradients, beside what one process takes."""
    trained = [parameter for parameter in learner.sdxl.parameters() if parameter.requires_grad]
    if ranks == 1:
        return 0
    if isinstance(learner.update, PlainUpdate):
        if learner.config.ddp_gradient_as_bucket_view:
            return 0
        return sum(parameter.numel() * parameter.element_size() for parameter in trained)  # DDP's buckets
    return 4 * IN_FLIGHT * max(parameter.numel() for parameter in trained) if learner.config.is_fused else 0


def _batch(config: Config, architecture: Architecture, shape: BatchShape, position: Position) -> Batch:
    """A batch of this shape; its values have no meaning."""
    chunks = _chunks(config)
    latents = torch.zeros(shape.images, *architecture.latent_size.of(shape))
    tokens = torch.zeros(shape.images, chunks, 77, dtype=torch.int64)
    sizes = torch.zeros(shape.images, 2, dtype=torch.int64)
    text: dict[str, Any] = {"tokens1": tokens, "tokens2": tokens}
    text["token_weights"] = tokens.float() if config.weighted_captions else None
    if config.cache_text_encoder_outputs:
        shape_of_hidden = shape.images, 75 * chunks + 2, architecture.te1.width + architecture.te2.width
        text = {"hidden": torch.zeros(shape_of_hidden, dtype=torch.float16)}
        text["pooled"] = torch.zeros(shape.images, architecture.te2.projection, dtype=torch.float16)
    return Batch(
        position=position,
        **text,
        latents=latents if config.cache_latents else None,
        images=None if config.cache_latents else torch.zeros(shape.images, 3, shape.height, shape.width),
        encoding_noise=None if config.cache_latents else latents,
        noise=latents,
        input_noise=latents if config.ip_noise_gamma else None,
        negative_latents=latents if config.contrastive_flow_matching else None,
        negative_noise=latents if config.contrastive_flow_matching else None,
        timesteps=torch.zeros(shape.images, dtype=torch.int64),
        original_size=sizes,
        crop_top_left=sizes,
        target_size=sizes,
        weights=torch.ones(shape.images),
    )
