"""The memory estimate: how much memory a training step takes, known before any of it is allocated.

The training loop makes a step on fake tensors (torch's FakeTensorMode), which have shapes and storages but no memory,
and every storage is recorded from its allocation to its end. There are no formulas for models, gradient checkpointing
or optimizers here: their allocations are observed. Fake tensors of a GPU need a CUDA build of torch, so fake CPU
tensors are used, and the places in which CUDA differs are stated below (`_cast_norms_as_cuda`,
`_step_on_all_tensors_at_once`).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter
from torch.utils._python_dispatch import _disable_current_modes

from sdxl_finetune.batch import LATENT_CHANNELS, Batch, Position
from sdxl_finetune.commands.allocations import OPTIMIZER_STATES, Allocations
from sdxl_finetune.config import Config
from sdxl_finetune.data.batch_plan import Plan
from sdxl_finetune.data.index import Index
from sdxl_finetune.model.architecture import Architecture, vae_config
from sdxl_finetune.model.attention import enable_gradient_checkpointing
from sdxl_finetune.model.sdxl import SDXL
from sdxl_finetune.optim.step_unit import StepUnit
from sdxl_finetune.optim.update import IN_FLIGHT, ExactUpdate, PlainUpdate
from sdxl_finetune.runtime.processes import weight_dtype
from sdxl_finetune.runtime.signals import StopRequest
from sdxl_finetune.training.learner import Learner, build_learner
from sdxl_finetune.training.loop import training_steps

FORWARD, BACKWARD, OPTIMIZER_STEP = "forward pass", "backward pass", "optimizer step"
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Data type of the arithmetic for each value of `mixed_precision`."""
MOST_MICRO_BATCHES = 3
"""Micro-batches of an estimated step at most, because later ones take the same memory as the third."""


@dataclass(frozen=True)
class BatchShape:
    """The shape of a batch on one process."""

    images: int
    height: int
    """Pixels."""
    width: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes of tensors at the peak of a step."""

    parts: dict[str, int]
    """Bytes by purpose; their sum is the peak."""
    phase: str
    """The part of the step in which the peak is."""
    step_unit: StepUnit | None
    """How the optimizer steps, if the update asks for it."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def estimate(config: Config, architecture: Architecture, shape: BatchShape, *, cuda: bool, ranks: int = 1) -> Estimate:
    """Estimates a step on batches of this shape, on one of `ranks` processes, on a GPU (`cuda`) or a CPU.

    Raises UserError for an optimizer or for learning rates that cannot be used.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), Allocations(count_scratch=not cuda) as allocations:
        learner = _build_fake_learner(config, architecture, allocations, cuda=cuda)
        next(training_steps(learner, _batches(learner, shape, ranks), StopRequest()))
        allocations.set_owner(OPTIMIZER_STATES, _optimizer_states(learner))
        parts, phase = _parts_of_peak(allocations)
    if extra := _bytes_between_processes(learner, ranks):
        parts["gradients"] = parts.get("gradients", 0) + extra
    step_unit = learner.update.step_unit if isinstance(learner.update, ExactUpdate) else None
    return Estimate(parts=parts, phase=phase, step_unit=step_unit)


def largest_batch(index: Index, plan: Plan) -> BatchShape:
    """The shape, on one process, of the run's first batch, which is the one with the most pixels."""
    rows = plan.epoch(plan.origin[1]).batch(0)
    bucket = index.buckets[index.bucket[rows[0]]]
    images = min(len(rows), index.datasets[bucket.dataset].batch_size)
    return BatchShape(images, bucket.height, bucket.width)


def _build_fake_learner(config: Config, architecture: Architecture, allocations: Allocations, *, cuda: bool) -> Learner:
    """A learner of fake tensors whose owners are noted."""
    with torch.device("meta"):
        sdxl, vae = SDXL(architecture), AutoencoderKL(**vae_config(architecture))
    modules = [sdxl]
    if config.cache_text_encoder_outputs:
        sdxl.detach_text_encoders()
        modules += [] if cuda else [sdxl.te1, sdxl.te2]  # a GPU does not hold encoders whose outputs are cached
    for module in modules:
        _allocate(module, weight_dtype(config))
        allocations.set_owner("weights", [*module.parameters(), *module.buffers()])
    vae = vae.eval().requires_grad_(False)
    if not (cuda and config.cache_latents):  # with cached latents the VAE is back in host memory
        _allocate(vae, torch.float32)
        allocations.set_owner("VAE", vae.parameters())
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(sdxl)
    sdxl.train()
    if cuda and config.ema_on_cpu:
        config = config.model_copy(update={"ema_decay": None, "ema_half_life": None})
    _note_gradients(sdxl, allocations)
    accelerator = _FakeAccelerator(allocations, DTYPES[config.mixed_precision])
    learner = build_learner(config, sdxl, vae, accelerator, lambda step, rate: rate, _disable_current_modes)
    # Noted before and after the update's own hooks, because these may replace a gradient by a sum in float32.
    _note_gradients(sdxl, allocations, learner)
    allocations.set_owner(OPTIMIZER_STATES, _optimizer_states(learner))
    if config.keeps_masters and not cuda:  # on a GPU the low bits of frozen parameters stay in host memory
        for parameter in sdxl.parameters():
            if not parameter.requires_grad:
                sdxl.masters.prepare(parameter, whole=False)
    allocations.set_owner("masters", sdxl.masters.tensors())
    allocations.set_owner("EMA", learner.ema.averages.values() if learner.ema else ())
    if cuda and config.mixed_precision != "no":
        _cast_norms_as_cuda(sdxl)
    if cuda:
        _step_on_all_tensors_at_once(learner.update.optimizer)
    return learner


def _note_gradients(sdxl: SDXL, allocations: Allocations, learner: Learner | None = None) -> None:
    """Notes each gradient as soon as it is complete."""

    def note(parameter: Parameter) -> None:
        sums = learner.update.sums if learner and isinstance(learner.update, ExactUpdate) else {}
        gradients = parameter.grad, sums.get(parameter)
        allocations.set_owner("gradients", (gradient for gradient in gradients if gradient is not None))

    for parameter in sdxl.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(note)


def _optimizer_states(learner: Learner) -> list[Tensor]:
    states = learner.update.optimizer.state.values()
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def _parts_of_peak(allocations: Allocations) -> tuple[dict[str, int], str]:
    """Bytes at the peak by purpose, and the phase of the peak."""
    alive, phase = allocations.peak()
    order = ("weights", "masters", "gradients", OPTIMIZER_STATES, "EMA", "VAE")
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


def _batches(learner: Learner, shape: BatchShape, ranks: int) -> Iterator[Batch]:
    """The micro-batches of a step. Exact gradients of several processes add up as those of several micro-batches."""
    micros = learner.config.gradient_accumulation_steps
    if ranks > 1 and isinstance(learner.update, ExactUpdate) and not learner.config.is_fused:
        micros = max(2, micros)
    micros = min(micros, MOST_MICRO_BATCHES)
    for micro in range(micros):
        yield _batch(learner.config, learner.sdxl.architecture, shape, Position(0, 0, micro, micros))


def _batch(config: Config, architecture: Architecture, shape: BatchShape, position: Position) -> Batch:
    """A batch of this shape; its values have no meaning."""
    chunks = -(-(config.max_token_length or 75) // 75)
    latents = torch.zeros(shape.images, LATENT_CHANNELS, shape.height // 8, shape.width // 8)
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
        timesteps=torch.zeros(shape.images, dtype=torch.int64),
        original_size=sizes,
        crop_top_left=sizes,
        target_size=sizes,
        weights=torch.ones(shape.images),
    )


class _FakeAccelerator(Accelerator):
    """The parts of accelerate that a learner and the training loop use, for one process that sets nothing up."""

    num_processes = 1
    device = torch.device("cpu")

    def __init__(self, allocations: Allocations, dtype: torch.dtype) -> None:
        self._allocations, self._dtype = allocations, dtype

    def prepare(self, model: SDXL, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, "_PreparedOptimizer"]:
        return self.prepare_model(model), _PreparedOptimizer(optimizer)

    def prepare_model(self, model: SDXL, **_settings: Any) -> nn.Module:
        return _PreparedModel(model, self._allocations, self._dtype)

    def backward(self, loss: Tensor) -> None:
        self._allocations.phase = BACKWARD
        loss.backward()
        self._allocations.phase = OPTIMIZER_STEP

    def reduce(self, tensor: Tensor, reduction: str = "sum", scale: float = 1.0) -> Tensor:
        return tensor

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def unscale_gradients(self, optimizer: Any = None) -> None:
        pass


class _PreparedModel(nn.Module):
    """A model as accelerate prepares it: its forward pass runs in the precision of `mixed_precision`."""

    def __init__(self, sdxl: SDXL, allocations: Allocations, dtype: torch.dtype) -> None:
        super().__init__()
        self.sdxl, self._allocations, self._dtype = sdxl, allocations, dtype

    def forward(self, *inputs: Any) -> Tensor:
        self._allocations.phase = FORWARD
        with torch.autocast("cpu", self._dtype, enabled=self._dtype != torch.float32):
            return self.sdxl(*inputs)


class _PreparedOptimizer:
    """An optimizer as accelerate prepares it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.step, self.zero_grad = optimizer, optimizer.step, optimizer.zero_grad


def _allocate(module: nn.Module, dtype: torch.dtype) -> None:
    """Gives a module on the meta device fake tensors; parameters are of `dtype`."""
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=dtype)
            setattr(child, name, Parameter(fake, requires_grad=parameter.requires_grad))
        for name, buffer in child.named_buffers(recurse=False):
            setattr(child, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _cast_norms_as_cuda(sdxl: SDXL) -> None:
    """Makes normalisation layers keep a float32 copy of their input, as they do under CUDA's autocast.

    A CPU's autocast leaves them alone (torch.amp's documentation, "CUDA Ops that can autocast to float32").
    """
    for module in sdxl.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def _step_on_all_tensors_at_once(optimizer: torch.optim.Optimizer) -> None:
    """Turns on `foreach`, CUDA's default in torch's optimizers: one call, with temporary copies of all tensors."""
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True
