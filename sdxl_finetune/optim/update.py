"""From gradients to new weights: sums over micro-batches and processes, clipping, and the optimizer's step.

`PlainUpdate` leaves all of it to torch and accelerate: float32 weights, or bf16 ones rounded as in the reference.
`ExactUpdate` does it tensor by tensor. With full_bf16 the optimizer works on float32 views of the weights (masters.py),
which so take the very steps of float32 training; gradients are added up in float32; and with fused_backward_pass each
tensor is stepped on as soon as its gradient is complete, which then makes room for the next.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_

from sdxl_finetune.config import Config
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.low_bits import Masters, exact_value, join, rounded, split
from sdxl_finetune.optim.optimizer import (
    averaged_weights,
    build_optimizer,
    optimizer_class,
    optimizer_name,
    trial_optimizer,
)
from sdxl_finetune.optim.parameters import Group
from sdxl_finetune.optim.stepping import Reach, find_reach, only

PIECE = 1 << 22
"""Elements that are stepped on at a time. States are kept by piece, so that another number makes them unreadable."""
IN_FLIGHT = 4
"""Gradients that may be on their way between processes while the backward pass goes on."""

Norms: TypeAlias = dict[str, Tensor]
"""Norm of the gradients of each group before clipping."""


class PlainUpdate:
    """The optimizer on the model's own parameters, as accelerate prepared both."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any, groups: Sequence[Group]) -> None:
        self._accelerator, self._model, self._prepared = accelerator, model, optimizer
        self.optimizer: torch.optim.Optimizer = optimizer.optimizer
        self.stepped = groups
        """What the optimizer steps on, in its order: what its state is of."""

    def gradients(self, *, last: bool, alone: bool) -> AbstractContextManager[None]:
        """Around forward and backward pass of a micro-batch; the `last` of its step, and perhaps the only one."""
        return nullcontext() if last else self._accelerator.no_sync(self._model)

    @torch.no_grad()
    def step(self, max_norm: float) -> Norms:
        """Makes the step, after gradients were scaled down together to `max_norm` (0: as they are)."""
        self._accelerator.unscale_gradients(self._prepared)
        given = {
            group.name: [one for one in group.parameters.values() if one.grad is not None] for group in self.stepped
        }
        norms = {name: _norm([one.grad for one in own if one.grad is not None]) for name, own in given.items()}
        if max_norm:
            clip_grads_with_norm_([one for own in given.values() for one in own], max_norm, total_norm(norms))
        self._prepared.step()
        self._prepared.zero_grad(set_to_none=True)
        return norms

    def shown(self) -> AbstractContextManager[None]:
        """Within it the model holds the weights for use, where an optimizer tells them from those in training."""
        return averaged_weights(self.optimizer)


@dataclass(frozen=True, eq=False)
class Piece:
    """What the optimizer steps on as one tensor: all of a parameter, or so many of its elements."""

    group: int
    parameter: Parameter
    start: int
    stop: int
    shadow: Parameter
    """What the optimizer knows: float32; of low bits, filled only during the step. Or the parameter itself."""

    def take(self, tensor: Tensor) -> Tensor:
        """This part of a tensor of the parameter's shape, as the optimizer sees it."""
        if tensor.shape == self.shadow.shape:
            return tensor.detach()
        return tensor.detach().view(-1)[self.start : self.stop].view(self.shadow.shape)


class ExactUpdate:
    """Steps on float32 values, a few tensors or a part of one at a time, all processes on the same gradients."""

    def __init__(
        self,
        config: Config,
        groups: Sequence[Group],
        masters: Masters,
        accelerator: Accelerator,
        numbers: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Within `numbers()` tensors are real, where those of the model are not: to try out and build the optimizer."""
        self._groups, self._masters, self._ranks = groups, masters, accelerator.num_processes
        self._fused, self._max_norm = config.is_fused, config.max_grad_norm
        with numbers():
            self.reach = reach = reach_of(config, accelerator.device)
        assert not (self._fused and reach == Reach.ALL), "see check_update"
        trained = [one for group in groups for one in group.parameters.values()]
        for parameter in trained:
            if config.keeps_masters:
                masters[parameter] = _master(parameter, masters, whole=reach == Reach.ALL)
            for tensor in (parameter.data, masters.get(parameter)) if self._ranks > 1 else ():
                if tensor is not None:  # files on several machines might differ; int16 is no type of gloo's and NCCL's
                    torch.distributed.broadcast(tensor.view(-1).view(torch.uint8), 0)
        size = PIECE if reach == Reach.ELEMENTS else None
        pieces = [_pieces(number, group, masters, size) for number, group in enumerate(groups)]
        self.stepped: Sequence[Group] = [
            Group(group.name, {name: one.shadow for name, one in own.items()}, group.lr)
            for group, own in zip(groups, pieces, strict=True)
        ]
        with numbers():
            self.optimizer = build_optimizer(config, self.stepped)
        self._pieces: dict[Parameter, list[Piece]] = defaultdict(list)
        for piece in (piece for own in pieces for piece in own.values()):
            self._pieces[piece.parameter].append(piece)
        self._bundles = _bundles([one for own in self._pieces.values() for one in own], reach)
        self.sums: dict[Parameter, Tensor] = {}
        """Gradients in float32, added up over micro-batches and processes."""
        self._in_flight: deque[tuple[Parameter, Any]] = deque()
        self._squares: dict[int, Tensor] = {}
        self._last = self._alone = True
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._receive)

    @contextmanager
    def gradients(self, *, last: bool, alone: bool) -> Iterator[None]:
        self._last, self._alone = last, alone
        yield
        while self._in_flight:
            self._arrive()

    @torch.no_grad()
    def step(self, max_norm: float) -> Norms:
        """As of PlainUpdate; fused, the step has been made, and each tensor's gradient was scaled by itself."""
        if self._fused:
            squares, self._squares = self._squares, {}
            return {
                group.name: squares[number].sqrt() for number, group in enumerate(self._groups) if number in squares
            }
        gradients = {one: self._gradient(one) for one in self._pieces}
        norms = {
            group.name: _norm([gradients[one] for one in group.parameters.values() if gradients[one] is not None])  # type: ignore[misc]
            for group in self._groups
        }
        scale = _scale(total_norm(norms), max_norm) if max_norm else None
        for bundle in self._bundles:
            self._step_on([(piece, one) for piece in bundle if (one := gradients[piece.parameter]) is not None], scale)
        for parameter in self._pieces:
            parameter.grad = None
        self.sums.clear()
        return norms

    @contextmanager
    def shown(self) -> Iterator[None]:
        try:
            with averaged_weights(self.optimizer):
                self._show()
                yield
        finally:
            self._show()

    @torch.no_grad()
    def _show(self) -> None:
        """Gives the model what the optimizer has done to masters that are float32 tensors of their own."""
        for parameter, kept in self._masters.items():
            if kept.dtype == torch.float32:
                parameter.copy_(rounded(kept))

    @torch.no_grad()
    def _receive(self, parameter: Parameter) -> None:
        """Called when the gradient of a micro-batch is complete."""
        if not self._alone or self._ranks > 1:
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
                self._arrive()
        elif self._fused:
            self._step_at_once(parameter)

    def _arrive(self) -> None:
        parameter, work = self._in_flight.popleft()
        work.wait()
        self.sums[parameter].div_(self._ranks)
        if self._fused:
            self._step_at_once(parameter)

    def _gradient(self, parameter: Parameter) -> Tensor | None:
        return self.sums.get(parameter, parameter.grad)

    @torch.no_grad()
    def _step_at_once(self, parameter: Parameter) -> None:
        gradient = self._gradient(parameter)
        assert gradient is not None
        norm = _norm([gradient])
        number = self._pieces[parameter][0].group
        self._squares[number] = self._squares.get(number, 0) + norm.square()
        scale = _scale(norm, self._max_norm) if self._max_norm else None
        for piece in self._pieces[parameter]:
            self._step_on([(piece, gradient)], scale)
        parameter.grad = None
        self.sums.pop(parameter, None)

    def _step_on(self, given: Sequence[tuple[Piece, Tensor]], scale: Tensor | None) -> None:
        """The optimizer's step on these pieces, with these gradients of their parameters."""
        known: list[list[Parameter]] = [[] for _ in self._groups]
        for piece, gradient in given:
            kept = self._masters.get(piece.parameter)
            if kept is not None and kept.dtype == torch.int16:
                piece.shadow.data = join(piece.take(piece.parameter), piece.take(kept))
            own = piece.take(gradient).to(piece.shadow.dtype)
            piece.shadow.grad = own if scale is None else own * scale
            known[piece.group].append(piece.shadow)
        with only(self.optimizer, known):
            self.optimizer.step()
        for piece, _ in given:
            self._keep(piece)
            piece.shadow.grad = None

    def _keep(self, piece: Piece) -> None:
        """Takes the new values. They are copied, so that autograd notices if something still needs the old ones."""
        kept = self._masters.get(piece.parameter)
        if kept is None:
            return
        if kept.dtype == torch.int16:
            high, low = split(piece.shadow.data)
            piece.take(kept).copy_(low)
            piece.shadow.data = _placeholder(piece.parameter.device, piece.shadow.shape)
        else:
            high = rounded(piece.shadow.data)
        piece.take(piece.parameter).copy_(high)


Update: TypeAlias = PlainUpdate | ExactUpdate


def is_exact(config: Config) -> bool:
    """Whether the run needs an ExactUpdate."""
    return config.keeps_masters or config.is_fused


def check_update(config: Config, device: torch.device) -> None:
    """Raises UserError for an optimizer that cannot be built, or not step within the backward pass as is asked for."""
    if config.is_fused and reach_of(config, device) == Reach.ALL:
        message = f"{optimizer_name(config)} steps on all tensors at once, not on one as soon as it has its gradient"
        raise UserError(Problem(f"{message}: leave this out", key="fused_backward_pass", value=True))


def reach_of(config: Config, device: torch.device) -> Reach:
    """What the config's optimizer has to see together. Raises UserError for one that cannot be built."""

    name = optimizer_name(config)
    return find_reach(partial(trial_optimizer, config), optimizer_class(name), device)


def total_norm(norms: Mapping[str, Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(list(norms.values())))


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    """In float32: bf16 norms have three digits."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients), 2, dtype=torch.float32)))


def _scale(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients are multiplied with, as torch's clip_grad_norm_ does."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _master(parameter: Parameter, masters: Masters, *, whole: bool) -> Tensor:
    """The low bits of a trained parameter on its device, or its `whole` value."""
    if whole:
        return exact_value(parameter, masters).float().to(parameter.device)
    low = masters.get(parameter)
    return torch.zeros_like(parameter, dtype=torch.int16) if low is None else low.to(parameter.device)


def _pieces(number: int, group: Group, masters: Masters, size: int | None) -> dict[str, Piece]:
    """The pieces of a group by name: the parameter's, or that and a number."""
    pieces = {}
    for name, parameter in group.parameters.items():
        assert parameter.is_contiguous()
        kept, count = masters.get(parameter), parameter.numel()
        if kept is None or kept.dtype == torch.float32:
            shadow = parameter if kept is None else Parameter(kept)
            pieces[name] = Piece(number, parameter, 0, count, shadow)
            continue
        parts = max(1, count // size) if size else 1  # the last one takes in what is left
        cuts = [*(part * (size or 0) for part in range(parts)), count]
        for at, (start, stop) in enumerate(pairwise(cuts)):
            shape = parameter.shape if len(cuts) == 2 else torch.Size([stop - start])
            shadow = Parameter(_placeholder(parameter.device, shape))
            pieces[name if at == 0 else f"{name}#{at}"] = Piece(number, parameter, start, stop, shadow)
    return pieces


def _placeholder(device: torch.device, shape: torch.Size) -> Tensor:
    """A float32 tensor of that shape and no size to speak of, for a shadow between two steps."""
    return torch.zeros((), device=device).expand(shape)


def _bundles(pieces: Sequence[Piece], reach: Reach) -> list[list[Piece]]:
    """Pieces that are stepped on in one call, about PIECE elements; or all."""
    if reach == Reach.ALL:
        return [list(pieces)]
    bundles: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        size = piece.stop - piece.start
        if size > room or not bundles:
            bundles.append([])
            room = PIECE
        bundles[-1].append(piece)
        room -= size
    return bundles
