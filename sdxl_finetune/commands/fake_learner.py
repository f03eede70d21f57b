"""A learner of fake tensors: model, optimizer and update as a run has them, and none of their memory.

Fake tensors of a GPU need a CUDA build of torch, so fake CPU tensors are used. The places in which CUDA differs are
stated here (`_cast_norms_as_cuda`, `_step_on_all_tensors_at_once`).
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._python_dispatch import _disable_current_modes

from sdxl_finetune.commands.allocations import OPTIMIZER_STATES, Allocations
from sdxl_finetune.config import Config
from sdxl_finetune.low_bits import MasterWeights
from sdxl_finetune.model.architecture import Architecture
from sdxl_finetune.model.attention import enable_gradient_checkpointing
from sdxl_finetune.model.sdxl import SDXL
from sdxl_finetune.model.vae import build_vae
from sdxl_finetune.runtime.processes import weight_dtype
from sdxl_finetune.training.learner import Learner, build_learner

Module = TypeVar("Module", bound=nn.Module)
FORWARD, BACKWARD, OPTIMIZER_STEP = "forward pass", "backward pass", "optimizer step"
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Data type of the arithmetic for each value of `mixed_precision`."""


class Modules:
    """The modules of an architecture, built once on the meta device and copied for each estimate."""

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture

    @cached_property
    def _sdxl(self) -> SDXL:
        with unallocated():
            return SDXL(self._architecture)

    @cached_property
    def _vae(self) -> AutoencoderKL:
        with unallocated():
            return build_vae(self._architecture)

    def sdxl(self) -> SDXL:
        """U-Net and text encoders, which `allocate` then gives fake tensors."""
        sdxl = _copy(self._sdxl)
        sdxl.masters = MasterWeights()
        return sdxl

    def vae(self) -> AutoencoderKL:
        """The VAE in evaluation mode, which `allocate` then gives fake tensors."""
        return _copy(self._vae)


def _copy(module: Module) -> Module:
    """A copy whose parameters, buffers, hooks and submodules can be replaced. It takes a sixth of the time to build."""
    copy = object.__new__(type(module))
    own = (dict, OrderedDict)  # torch's registries; diffusers' FrozenDict stays shared
    vars(copy).update({name: each.copy() if type(each) in own else each for name, each in vars(module).items()})
    copy._modules = {name: None if each is None else _copy(each) for name, each in module._modules.items()}
    return copy


def build_fake_learner(config: Config, modules: Modules, allocations: Allocations, *, cuda: bool) -> Learner:
    """A learner of fake tensors whose owners are noted."""
    sdxl, vae = modules.sdxl(), modules.vae()
    on_device: list[nn.Module] = [sdxl]
    if config.cache_text_encoder_outputs:
        sdxl.detach_text_encoders()
        on_device += [] if cuda else [sdxl.te1, sdxl.te2]  # a GPU does not hold encoders whose outputs are cached
    for module in on_device:
        allocate(module, weight_dtype(config))
        allocations.set_owner("weights", [*module.parameters(), *module.buffers()])
    if not (cuda and config.cache_latents):  # with cached latents the VAE is back in host memory
        allocate(vae, torch.float32)
        allocations.set_owner("VAE", vae.parameters())
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(sdxl)
    sdxl.train()
    if cuda and config.ema_on_cpu:
        config = config.model_copy(update={"ema_decay": None, "ema_half_life": None})
    config = config.model_copy(update={"non_finite_steps": "stop"})  # nobody can look at a fake gradient
    accelerator = FakeAccelerator(allocations, DTYPES[config.mixed_precision])
    learner = build_learner(config, sdxl, vae, accelerator, lambda step, rate: rate, _disable_current_modes)
    if learner.update.loss_scale:  # fake gradients have no values that could overflow
        learner.update.loss_scale.accepts = lambda norm: True  # type: ignore[method-assign]
    allocations.set_owner(OPTIMIZER_STATES, optimizer_states(learner))
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


def optimizer_states(learner: Learner) -> list[Tensor]:
    states = learner.update.optimizer.state.values()
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


class FakeAccelerator(Accelerator):
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


@contextmanager
def unallocated() -> Iterator[None]:
    """Modules that are built in this context count as no memory, until `allocate` gives them tensors."""
    with _disable_current_modes(), torch.device("meta"):
        yield


def allocate(module: nn.Module, dtype: torch.dtype) -> None:
    """Gives a module on the meta device fake tensors; parameters are of `dtype`."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=dtype)
                child._parameters[name] = Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


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
