"""How much memory a training step takes, known before any of it is allocated.

The training loop itself makes a step on fake tensors (torch's FakeTensorMode), which have shapes and storages but no
memory; every storage is followed from its making to its end. So nothing is known here of models, checkpointing,
optimizers or updates: what they allocate is seen. What fake tensors do not show is stated: SCRATCH, and the
places in which CUDA differs from a CPU (`_norms_as_on_cuda`, `_batched`), since fake tensors of a GPU need a build of
torch for one.
"""

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from sdxl_finetune.batch import Batch, Position
from sdxl_finetune.config import Config
from sdxl_finetune.data.batch_plan import Plan
from sdxl_finetune.data.index import Index
from sdxl_finetune.diffusion.schedule import build_schedule
from sdxl_finetune.model.architecture import Architecture, vae_config
from sdxl_finetune.model.attention import enable_gradient_checkpointing
from sdxl_finetune.model.sdxl import SDXL
from sdxl_finetune.optim.ema import build_ema
from sdxl_finetune.optim.parameters import trained_parameters
from sdxl_finetune.optim.step_unit import StepUnit
from sdxl_finetune.optim.update import IN_FLIGHT, ExactUpdate, PlainUpdate, build_update
from sdxl_finetune.runtime.processes import weight_dtype
from sdxl_finetune.runtime.signals import StopRequest
from sdxl_finetune.training.loop import training_steps
from sdxl_finetune.training.setup import Run

SCRATCH = {"bitsandbytes::optimizer_update_8bit_blockwise": 20, "bitsandbytes::optimizer_update_32bit": 12}
"""Bytes for each element that bitsandbytes' kernels take on a CPU while they step on a tensor: float32 copies of state,
gradient and terms. On CUDA they take none."""
STATES, STEPPING = "optimizer states", "optimizer step"
Shape = tuple[int, int, int]
"""Images, height and width in pixels of a batch on one process."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes of tensors at the moment in a step when they are most."""

    parts: dict[str, int]
    """By what they are for; together they are the peak."""
    phase: str
    """Of the step, in which the peak is."""
    step_unit: StepUnit | None
    """Of the optimizer, where the update asks for it."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def estimate(config: Config, architecture: Architecture, shape: Shape, *, cuda: bool, ranks: int = 1) -> Estimate:
    """Of a step of `config` on batches of this shape, on one of `ranks` processes; on a GPU (`cuda`) or a CPU. Raises
    UserError for an optimizer or for rates that cannot be.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger(scratch=not cuda) as ledger:
        rehearsed = _Rehearsed(config, architecture, shape, ledger, cuda=cuda, ranks=ranks)
        next(training_steps(rehearsed.run, StopRequest()))
        ledger.own(STATES, rehearsed.states())
        return Estimate(parts=rehearsed.parts(), phase=ledger.peak()[1], step_unit=rehearsed.step_unit)


def largest_batch(index: Index, plan: Plan) -> Shape:
    """The first of the run, which is the one with the most pixels; on one of the processes."""
    rows = plan.epoch(plan.origin[1]).batch(0)
    number = index.bucket[rows[0]]
    bucket = index.buckets[number]
    return min(len(rows), index.datasets[bucket.dataset].batch_size), bucket.height, bucket.width


class Ledger(TorchDispatchMode):
    """Follows all storages that are made within it."""

    def __init__(self, *, scratch: bool) -> None:
        super().__init__()
        self._scratch = scratch
        self._numbers: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._events: list[tuple[int, int, str]] = []
        self._nonzero: set[int] = set()
        """Answers to whether there is anything but zeros in numbers, which is so in weights and not in what is wrong
        with them (Prodigy asks the one, others the other)."""
        self.owners: dict[int, str] = {}
        """What storages are for, by number; those of the step itself have no entry."""
        self.phase = ""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which takes time in every call, and there is no dynamo here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # asked for as often as everything else together, and slow to find out
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if self.number(args[0]) in self._nonzero else _number(args[0].dtype)
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.any.default and args[0].is_floating_point():
            self._nonzero.add(self.number(made))
        if not func.is_view:
            for one in made if isinstance(made, list | tuple) else (made,):
                if isinstance(one, Tensor):
                    self.number(one)
        if self._scratch and (each := SCRATCH.get(func.name())):
            size = each * args[2].numel()
            self._events += [(-1, size, self.phase), (-1, -size, self.phase)]
        return made

    def number(self, tensor: Tensor) -> int:
        """Of the tensor's storage, which is noted if it is new."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._numbers:
            number = self._numbers[key] = len(self._sizes)
            size = self._sizes[number] = storage.nbytes()
            self._events.append((number, size, self.phase))
            weakref.finalize(storage, self._end, key)
        return self._numbers[key]

    def _end(self, key: int) -> None:
        number = self._numbers.pop(key)
        self._events.append((number, -self._sizes[number], self.phase))

    def own(self, owner: str, tensors: Iterable[Tensor]) -> None:
        """Notes what these tensors are for."""
        for tensor in tensors:
            self.owners[self.number(tensor)] = owner

    def peak(self) -> tuple[dict[int, int], str]:
        """Bytes of each storage that lived when they were most, and the phase in which that was. States of the
        optimizer, which the first step makes, count from the start, as in all later steps.
        """
        kept = {number: self._sizes[number] for number, owner in self.owners.items() if owner == STATES}
        events = [event for event in self._events if event[0] not in kept]
        sums = list(accumulate(size for _, size, _ in events))
        most = max(range(len(sums)), key=sums.__getitem__)
        live = defaultdict(int, kept)
        for number, size, _ in events[: most + 1]:
            live[number] += size
        return live, events[most][2]


def _number(dtype: torch.dtype) -> float | int | bool:
    """Stands for any number that an optimizer asks of a tensor (Adafactor, Prodigy): a fake one has none."""
    if dtype == torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 1


class _Alone(Accelerator):
    """What the training loop asks of accelerate, for one process that shares nothing and sets nothing up."""

    num_processes = 1
    device = torch.device("cpu")

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def backward(self, loss: Tensor) -> None:
        self._ledger.phase = "backward pass"
        loss.backward()
        self._ledger.phase = STEPPING

    def reduce(self, tensor: Tensor, reduction: str = "sum", scale: float = 1.0) -> Tensor:
        return tensor

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def unscale_gradients(self, optimizer: Any = None) -> None:
        pass

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        return model, SimpleNamespace(optimizer=optimizer, step=optimizer.step, zero_grad=optimizer.zero_grad)

    def prepare_model(self, model: nn.Module, *_: Any, **__: Any) -> nn.Module:
        return model


class _Autocast(nn.Module):
    """The model as accelerate prepares it: in the precision of the arithmetic that the config asks for."""

    def __init__(self, sdxl: SDXL, ledger: Ledger, mixed_precision: str) -> None:
        super().__init__()
        self.sdxl, self._ledger = sdxl, ledger
        self._dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]

    def forward(self, *inputs: Any) -> Tensor:
        self._ledger.phase = "forward pass"
        with torch.autocast("cpu", self._dtype, enabled=self._dtype != torch.float32):
            return self.sdxl(*inputs)


class _Part(Run):
    """As much of a Run as the training loop asks for."""

    def __init__(self, made: Sequence[Batch], **given: Any) -> None:
        self.__dict__.update(given, made=made)

    def batches(self) -> Iterator[Batch]:
        return iter(self.__dict__["made"])


class _Rehearsed:
    """A run on fake tensors."""

    def __init__(
        self,
        config: Config,
        architecture: Architecture,
        shape: Shape,
        ledger: Ledger,
        *,
        cuda: bool,
        ranks: int,
    ) -> None:
        self.config, self._ledger, self._shape, self._ranks = config, ledger, shape, ranks
        self.accelerator = _Alone(ledger)
        with torch.device("meta"):
            self.sdxl, vae = SDXL(architecture), AutoencoderKL(**vae_config(architecture))
        _allocate(self.sdxl, weight_dtype(config))
        ledger.own("weights", [*self.sdxl.parameters(), *self.sdxl.buffers()])
        self.vae = vae.eval().requires_grad_(False)
        if not (cuda and config.cache_latents):  # then it has gone back to the machine's memory
            _allocate(vae, torch.float32)
            ledger.own("VAE", vae.parameters())
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(self.sdxl)
        self.sdxl.train()
        masters = self.sdxl.masters
        self.parameters = trained_parameters(config, self.sdxl.parameters_by_part(), masters)
        self.trained = [parameter for _, parameter in self.parameters.named()]
        self._note_gradients()
        _, self.update = build_update(config, self.parameters, self.sdxl, self.accelerator, _disable_current_modes)
        self._note_gradients()
        ledger.own(STATES, self.states())
        if config.keeps_masters and not cuda:  # low bits of what is frozen stay in the machine's memory
            for parameter in self.sdxl.parameters():
                if not parameter.requires_grad:
                    masters.prepare(parameter, whole=False)
        ledger.own("masters", masters.tensors())
        if cuda and config.mixed_precision != "no":
            _norms_as_on_cuda(self.sdxl)
        if cuda:
            _batched(self.update.optimizer)
        self.ema = build_ema(self.parameters, config) if not (cuda and config.ema_on_cpu) else None
        ledger.own("average", self.ema.averages.values() if self.ema else ())

    def parts(self) -> dict[str, int]:
        """Bytes at the peak by what they are for."""
        known = self._ledger.owners
        live, phase = self._ledger.peak()
        order = ("weights", "masters", "gradients", STATES, "average", "VAE")
        rest = "temporary" if phase == STEPPING else "activations"
        parts = dict.fromkeys((*order, rest), 0)
        for number, size in live.items():
            parts[known.get(number, rest)] += size
        parts["gradients"] += self._between_processes()
        return {part: size for part, size in parts.items() if size}

    def states(self) -> list[Tensor]:
        states = self.update.optimizer.state.values()
        return [one for state in states for one in state.values() if isinstance(one, Tensor)]

    @property
    def step_unit(self) -> StepUnit | None:
        return self.update.step_unit if isinstance(self.update, ExactUpdate) else None

    def _between_processes(self) -> int:
        """What several processes take for their gradients, beside what one does."""
        sizes = [one.numel() for one in self.trained]
        if self._ranks == 1:
            return 0
        if isinstance(self.update, PlainUpdate):  # DDP's buckets
            buckets = sum(one.numel() * one.element_size() for one in self.trained)
            return 0 if self.config.ddp_gradient_as_bucket_view else buckets
        return 4 * IN_FLIGHT * max(sizes) if self.config.is_fused else 0

    def _note_gradients(self) -> None:
        """Tells the ledger of each gradient. Once before and once after the update's own hooks, which may move it."""

        def note(parameter: Parameter) -> None:
            sums = self.update.sums if isinstance(self.update, ExactUpdate) else {}
            found = parameter.grad, sums.get(parameter)
            self._ledger.own("gradients", (one for one in found if one is not None))

        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(note)

    def batches(self) -> Iterator[Batch]:
        """Those of a step. With several processes exact gradients are added up as over several micro-batches."""
        micros = self.config.gradient_accumulation_steps
        if self._ranks > 1 and isinstance(self.update, ExactUpdate) and not self.config.is_fused:
            micros = max(2, micros)
        for micro in range(min(micros, 3)):  # more are like the third
            yield _batch(self.config, self._shape, Position(0, 0, micro, min(micros, 3)))

    @property
    def run(self) -> Run:
        """For the training loop."""
        config, sdxl = self.config, self.sdxl
        return _Part(
            list(self.batches()),
            config=config,
            accelerator=self.accelerator,
            sdxl=sdxl,
            model=_Autocast(sdxl, self._ledger, config.mixed_precision),
            vae=self.vae,
            schedule=build_schedule(zero_terminal_snr=config.zero_terminal_snr),
            parameters=self.parameters,
            update=self.update,
            ema=self.ema,
            lr=lambda step, base: base,
        )


def _allocate(module: nn.Module, dtype: torch.dtype) -> None:
    """Gives a module that was built on the meta device fake tensors; parameters in `dtype`."""
    for part in module.modules():
        for name, one in part.named_parameters(recurse=False):
            made = torch.empty(one.shape, dtype=dtype)
            setattr(part, name, Parameter(made, requires_grad=one.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _batch(config: Config, shape: Shape, position: Position) -> Batch:
    """Nothing but sizes."""
    images, height, width = shape
    chunks = -(-(config.max_token_length or 75) // 75)
    latent = torch.zeros(images, 4, height // 8, width // 8)
    tokens = torch.zeros(images, chunks, 77, dtype=torch.int64)
    pair = torch.zeros(images, 2, dtype=torch.int64)
    return Batch(
        position=position,
        latents=latent if config.cache_latents else None,
        images=None if config.cache_latents else torch.zeros(images, 3, height, width),
        encoding_noise=None if config.cache_latents else latent,
        noise=latent,
        input_noise=latent if config.ip_noise_gamma else None,
        timesteps=torch.zeros(images, dtype=torch.int64),
        tokens1=tokens,
        tokens2=tokens,
        token_weights=tokens.float() if config.weighted_captions else None,
        original_size=pair,
        crop_top_left=pair,
        target_size=pair,
        weights=torch.ones(images),
    )


def _norms_as_on_cuda(sdxl: SDXL) -> None:
    """Norms give float32 under CUDA's autocast, and keep a float32 copy of what they are given; a CPU's leaves them be
    (torch.amp's documentation, "CUDA Ops that can autocast to float32").
    """
    for module in sdxl.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def _batched(optimizer: torch.optim.Optimizer) -> None:
    """On CUDA torch's own optimizers step on all tensors in one call, with temporary copies of all ("foreach")."""
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True
