"""From gradients to new weights: sums over micro-batches and ranks, gradient clipping, the optimizer's step.

`PlainUpdate` leaves all of it to torch and accelerate. Its weights are float32, or bf16 and rounded after each step as
in the reference.

`ExactUpdate` works tensor by tensor. With full_bf16 or full_fp16 the optimizer steps on float32 buffers that are filled
from weights and low bits (low_bits.py). So the weights take the same steps as in float32 training. Gradients are summed
in float32. With fused_backward_pass the update steps on each tensor as soon as its gradient is complete, and frees the
gradient.

With mixed_precision fp16 the gradients are those of the scaled loss (loss_scale.py). Both updates divide them by the
scale in float32 before they clip, and skip the optimizer's step if a gradient is not finite.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import Parameter

from sdxl_finetune.config import Config, OptimizerOptions
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.low_bits import MasterWeights, elements_of
from sdxl_finetune.optim.loss_scale import LossScale, accepts_step, build_loss_scale, gradient_factor
from sdxl_finetune.optim.optimizer import (
    averaged_weights,
    build_optimizer,
    optimizer_class,
    trial_optimizer,
)
from sdxl_finetune.optim.parameters import Group, TrainedParameters
from sdxl_finetune.optim.step_unit import StepUnit, find_step_unit, restricted_to

SLICE = 1 << 22
"""Elements of a slice: its float32 buffer takes 16 MiB. Saved optimizer states are divided by slices, so another number
makes them unreadable."""
IN_FLIGHT = 4
"""Gradients that may be on their way between ranks while the backward pass goes on."""

Context: TypeAlias = Callable[[], AbstractContextManager[Any]]
Norms: TypeAlias = dict[str, Tensor]
"""Norm of the gradients of each group before clipping."""


@runtime_checkable  # jaxtyping checks annotations in the tests
class Update(Protocol):
    """Turns gradients into new weights."""

    optimizer: torch.optim.Optimizer
    optimizer_groups: Sequence[Group]
    """Tensors on which the optimizer steps, in its order; its states are saved under their names."""
    loss_scale: LossScale | None
    """Factor on the loss of which gradients are computed; None without float16."""
    parameter_norms: Tensor
    """Norm of the gradient of each trained parameter in the last step, in the order of `TrainedParameters.named`. It is
    not divided by the loss scale, and 0 for a parameter without a gradient."""

    def accumulate(self, *, last: bool, only: bool) -> AbstractContextManager[None]:
        """Returns a context for the forward and backward pass of a micro-batch.

        `last` is True for the last micro-batch of an optimizer step, `only` if the step has no other.
        """

    def step(self) -> Norms:
        """Clips the gradients to max_grad_norm and makes the optimizer's step.

        The norms are those of the loss that is not scaled. They are infinite or NaN for a step that was skipped.
        """

    def weights_for_use(self) -> AbstractContextManager[None]:
        """Returns a context in which the model holds the weights to save and to draw previews with.

        They differ from the weights in training only with schedule-free optimizers.
        """


class PlainUpdate:
    """Steps on the model's own parameters, with model and optimizer as accelerate prepared them."""

    def __init__(
        self, config: Config, parameters: TrainedParameters, model: nn.Module, optimizer: Any, accelerator: Accelerator
    ) -> None:
        self._accelerator, self._model, self._prepared = accelerator, model, optimizer
        self._numbers, self._max_norm = config, config.max_grad_norm
        self.loss_scale = build_loss_scale(config, accelerator.device)
        self.parameter_norms = torch.zeros(0)
        self.optimizer: torch.optim.Optimizer = optimizer.optimizer
        self.optimizer_groups = parameters.groups
        self._trained = [parameter for _, parameter in parameters.named()]

    def accumulate(self, *, last: bool, only: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self._accelerator.no_sync(self._model)

    @torch.no_grad()
    def step(self) -> Norms:
        """Clips all gradients together."""
        norms, self.parameter_norms = _norms(self.optimizer_groups, lambda parameter: parameter.grad, self.loss_scale)
        factor = gradient_factor(total_norm(norms), self._max_norm, self.loss_scale)
        if accepts_step(total_norm(norms), self.loss_scale, self._numbers):
            if factor is not None:
                gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
                torch._foreach_mul_(gradients, factor)
            self._prepared.step()
        self._prepared.zero_grad(set_to_none=True)
        return norms

    def weights_for_use(self) -> AbstractContextManager[None]:
        return averaged_weights(self.optimizer)


@dataclass(frozen=True, eq=False)
class Slice:
    """Elements of a parameter that the optimizer sees as one tensor."""

    name: str
    """Name of the parameter. Further slices of the same parameter end in #1, #2, ..."""
    group: int
    """Number of the parameter's group."""
    parameter: Parameter
    elements: slice | None
    """Elements of the flattened parameter. None: the whole parameter in its own shape."""
    buffer: Parameter
    """float32 buffer that the optimizer updates. With low bits it is filled just before the step and released after it.
    Without a master weight it is the parameter itself."""
    released: Tensor
    """Data of the buffer between two steps: with low bits a tensor of this shape in 4 bytes."""


class ExactUpdate:
    """Steps on float32 values, one slice or a few at a time; all ranks step with the same gradients."""

    def __init__(
        self,
        config: Config,
        parameters: TrainedParameters,
        accelerator: Accelerator,
        real_tensors: Context = nullcontext,
    ) -> None:
        """Builds the optimizer within `real_tensors()`, which the memory estimate needs: its model has fake tensors."""
        self._groups, self._masters, self._ranks = parameters.groups, parameters.masters, accelerator.num_processes
        self._fused, self._numbers, self._max_norm = config.is_fused, config, config.max_grad_norm
        self.loss_scale = build_loss_scale(config, accelerator.device)
        self.parameter_norms = torch.zeros(0)
        with real_tensors():
            self.step_unit = step_unit(config, accelerator.device)
        assert not (self._fused and self.step_unit == StepUnit.ALL), "see check_update"
        trained = [parameter for _, parameter in parameters.named()]
        for parameter in trained if config.keeps_masters else ():
            self._masters.prepare(parameter, whole=self.step_unit == StepUnit.ALL)
        if self._ranks > 1:
            parameters.broadcast()
        size = SLICE if self.step_unit == StepUnit.ELEMENTS else None
        slices = [_slices(number, group, self._masters, size) for number, group in enumerate(self._groups)]
        self.optimizer_groups: Sequence[Group] = [
            Group(group.name, {part.name: part.buffer for part in parts}, group.lr)
            for group, parts in zip(self._groups, slices, strict=True)
        ]
        with real_tensors():
            self.optimizer = build_optimizer(config, self.optimizer_groups)
        together = list(chain.from_iterable(slices))
        self._calls = _optimizer_calls(together, self.step_unit)
        self._slices: dict[Parameter, list[Slice]] = defaultdict(list)
        for part in together:
            self._slices[part.parameter].append(part)
        self.sums: dict[Parameter, Tensor] = {}
        """Gradients in float32, summed over micro-batches and ranks."""
        self._in_flight: deque[tuple[Parameter, Any]] = deque()
        self._fused_norms: dict[Parameter, Tensor] = {}
        """Gradient norms of a fused step."""
        self._last = self._only = True
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._receive_gradient)

    @contextmanager
    def accumulate(self, *, last: bool, only: bool) -> Iterator[None]:
        self._last, self._only = last, only
        yield
        while self._in_flight:
            self._finish_reduction()

    @torch.no_grad()
    def step(self) -> Norms:
        """Clips all gradients together. A fused step is made already; it clipped the gradient of each tensor alone."""
        if self._fused:
            none = torch.zeros((), device=next(iter(self._fused_norms.values())).device)
            self.parameter_norms = torch.stack([self._fused_norms.pop(each, none) for each in self._slices])
            of_groups = self.parameter_norms.split([len(group.parameters) for group in self._groups])
            return {
                group.name: torch.linalg.vector_norm(norms)
                for group, norms in zip(self._groups, of_groups, strict=True)
            }
        norms, self.parameter_norms = _norms(self._groups, self._gradient, self.loss_scale)
        factor = gradient_factor(total_norm(norms), self._max_norm, self.loss_scale)
        if accepts_step(total_norm(norms), self.loss_scale, self._numbers):
            for call in self._calls:
                self.step_on(call, factor)
        for parameter in self._slices:
            parameter.grad = None
        self.sums.clear()
        return norms

    @contextmanager
    def weights_for_use(self) -> Iterator[None]:
        try:
            with averaged_weights(self.optimizer):
                self._round_masters()
                yield
        finally:
            self._round_masters()

    def _round_masters(self) -> None:
        """Rounds whole float32 master weights, which the optimizer changed, into the model."""
        for parameter in self._slices:
            self._masters.round_into(parameter)

    @torch.no_grad()
    def _receive_gradient(self, parameter: Parameter) -> None:
        """Takes the gradient of a micro-batch; autograd calls it when the gradient is complete."""
        if not self._only or self._ranks > 1:
            assert parameter.grad is not None
            if parameter in self.sums:
                self.sums[parameter].add_(parameter.grad)
            else:
                self.sums[parameter] = parameter.grad.float()
            parameter.grad = None
            if not self._last:
                return
        if self._ranks > 1:
            work = torch.distributed.all_reduce(self.sums[parameter], async_op=True)
            self._in_flight.append((parameter, work))
            if len(self._in_flight) > IN_FLIGHT:
                self._finish_reduction()
        elif self._fused:
            self._step_on_parameter(parameter)

    @torch.no_grad()
    def _finish_reduction(self) -> None:
        """Waits for the oldest sum over ranks."""
        parameter, work = self._in_flight.popleft()
        work.wait()
        self.sums[parameter].div_(self._ranks)
        if self._fused:
            self._step_on_parameter(parameter)

    def _step_on_parameter(self, parameter: Parameter) -> None:
        """Makes the fused step on one parameter and frees its gradient. Is called for each tensor of each step."""
        gradient = self._gradient(parameter)
        assert gradient is not None
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        self._fused_norms[parameter] = norm
        factor = gradient_factor(norm, self._max_norm)
        for part in self._slices[parameter]:
            self.step_on([part], factor)
        parameter.grad = None
        self.sums.pop(parameter, None)

    def _gradient(self, parameter: Parameter) -> Tensor | None:
        return self.sums.get(parameter, parameter.grad)

    def step_on(self, slices: Sequence[Slice], factor: Tensor | None) -> None:
        """Calls the optimizer for those of these slices that have a gradient, which is multiplied by `factor`."""
        stepped = [(part, gradient) for part in slices if (gradient := self._gradient(part.parameter)) is not None]
        buffers: list[list[Parameter]] = [[] for _ in self._groups]
        for part, gradient in stepped:
            if self._masters.has_low_bits(part.parameter):
                part.buffer.data = self._masters.read(part.parameter, part.elements)
            sliced = elements_of(gradient, part.elements)
            sliced = sliced if factor is None else sliced.float() * factor
            part.buffer.grad = sliced.to(part.buffer.dtype)
            buffers[part.group].append(part.buffer)
        with restricted_to(self.optimizer, buffers):
            self.optimizer.step()
        for part, _ in stepped:
            if self._masters.has_low_bits(part.parameter):
                self._masters.write(part.parameter, part.elements, part.buffer.data)
                part.buffer.data = part.released
            else:
                self._masters.round_into(part.parameter)
            part.buffer.grad = None


def build_update(
    config: Config,
    parameters: TrainedParameters,
    model: nn.Module,
    accelerator: Accelerator,
    real_tensors: Context = nullcontext,
) -> tuple[nn.Module, Update]:
    """Returns the model as accelerate prepares it, and its update. `real_tensors` is as in ExactUpdate."""
    if config.keeps_masters or config.is_fused or config.full_fp16:
        update = ExactUpdate(config, parameters, accelerator, real_tensors)
        # Prepared for evaluation, so without DDP, whose buckets sum gradients in the precision of the weights.
        return accelerator.prepare_model(model, evaluation_mode=True), update
    with real_tensors():
        optimizer = build_optimizer(config, parameters.groups)
    model, prepared = accelerator.prepare(model, optimizer)
    return model, PlainUpdate(config, parameters, model, prepared, accelerator)


def check_update(config: Config, device: torch.device) -> None:
    """Raises UserError if the optimizer cannot be built, or cannot step inside the backward pass as the options ask."""
    if config.is_fused and step_unit(config, device) == StepUnit.ALL:
        message = f"{config.optimizer_name} needs all gradients at once and cannot step inside the backward pass"
        remedy = "remove fused_backward_pass and fused_optimizer_groups, or choose another optimizer_type"
        raise UserError(Problem(f"{message}: {remedy}", key="fused_backward_pass", value=True))


def step_unit(options: OptimizerOptions, device: torch.device) -> StepUnit:
    """Finds the step unit of the optimizer. Raises UserError if the optimizer cannot be built."""
    cls = optimizer_class(options.optimizer_name)
    return find_step_unit(partial(trial_optimizer, options), cls, device)


def total_norm(norms: Mapping[str, Tensor]) -> Tensor:
    """Returns the norm of all gradients, given the norm of each group."""
    return torch.linalg.vector_norm(torch.stack(list(norms.values())))


def _norms(
    groups: Sequence[Group], gradient_of: Callable[[Parameter], Tensor | None], scale: LossScale | None
) -> tuple[Norms, Tensor]:
    """Returns the norm of each group's gradients, divided by the scale, and `Update.parameter_norms`.

    Parameters without a gradient do not count.
    """
    norms, of_parameters = {}, []
    for group in groups:
        gradients = [gradient_of(parameter) for parameter in group.parameters.values()]
        each = _each_norm([gradient for gradient in gradients if gradient is not None])
        norm = torch.linalg.vector_norm(each)
        norms[group.name] = norm if scale is None else norm / scale.value
        if len(each) < len(gradients):
            rest = iter(each)
            each = torch.stack([each.new_zeros(()) if gradient is None else next(rest) for gradient in gradients])
        of_parameters.append(each)
    return norms, torch.cat(of_parameters)


def _each_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Returns the norm of each gradient, in float32: a bf16 norm has three digits."""
    return torch.stack(torch._foreach_norm(list(gradients), 2, dtype=torch.float32))


def _slices(number: int, group: Group, masters: MasterWeights, size: int | None) -> list[Slice]:
    """Divides the parameters of group `number` into slices of `size` elements, or of whole parameters if None.

    Parameters without low bits stay whole.
    """
    slices = []
    for name, parameter in group.parameters.items():
        assert parameter.is_contiguous()
        if masters.has_low_bits(parameter):
            for index, elements in enumerate(_cuts(parameter.numel(), size)):
                released = torch.zeros((), device=parameter.device).expand(elements_of(parameter, elements).shape)
                slice_name = f"{name}#{index}" if index else name
                slices.append(Slice(slice_name, number, parameter, elements, Parameter(released), released))
        else:
            master = masters.kept(parameter)
            buffer = parameter if master is None else Parameter(master)
            slices.append(Slice(name, number, parameter, None, buffer, buffer.data))
    return slices


def _cuts(count: int, size: int | None) -> list[slice | None]:
    """Divides `count` elements into slices of `size`; the last takes in the rest. None stands for all elements."""
    if size is None or count < 2 * size:
        return [None]
    return [slice(start, stop) for start, stop in pairwise([*range(0, count - size + 1, size), count])]


def _optimizer_calls(slices: Sequence[Slice], unit: StepUnit) -> list[list[Slice]]:
    """Groups slices that the optimizer steps on in one call: about SLICE elements, or all if the optimizer needs all.

    A call for each small tensor would take tenths of a second for the 2,500 tensors of SDXL.
    """
    if unit == StepUnit.ALL:
        return [list(slices)]
    calls: list[list[Slice]] = []
    room = 0
    for part in slices:
        size = part.buffer.numel()
        if size > room or not calls:
            calls.append([])
            room = SLICE
        calls[-1].append(part)
        room -= size
    return calls
