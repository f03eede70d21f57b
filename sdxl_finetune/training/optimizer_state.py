"""The optimizer's part of a training state (`optimizer.pt`): collecting it, and restoring it bit for bit.

The file holds a dictionary:

- `state`: tensors and numbers that the optimizer keeps, by the full name of each parameter (unet.xxx).
- `groups`: the values of each parameter group (betas, weight decay, ...), by the group's name.
- `average`: the EMA of the trained weights in float32, by full name.
- `scaler`: the loss scale of fp16.
- `loss_weights`: the network of learned loss weights, if there is one, and the `state` and `groups` of its optimizer.
- `random`, `random_cuda`: torch's random states, from which some optimizers draw.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_finetune.errors import Problem, UserError, counted
from sdxl_finetune.model.pickles import load_pickle
from sdxl_finetune.optim.parameters import Group, named_parameters, part_of

logger = logging.getLogger(__name__)

COUNTERS_ON_CPU = ("step", "mu_product")
"""State values that torch's optimizers keep on the CPU, where reading them costs no synchronisation."""


def collect_optimizer_state(
    optimizer: torch.optim.Optimizer,
    groups: Sequence[Group],
    *,
    ema: Mapping[str, Tensor] | None,
    scaler: Mapping[str, Any] | None,
    loss_weights: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything in `optimizer.pt`. The tensors are those of the optimizer, not copies."""
    return {
        **optimizer_values(optimizer, groups),
        "average": ema,
        "scaler": scaler,
        **({} if loss_weights is None else {"loss_weights": loss_weights}),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def optimizer_values(optimizer: torch.optim.Optimizer, groups: Sequence[Group]) -> dict[str, Any]:
    """The `state` and `groups` of an optimizer."""
    return {
        "state": {name: dict(optimizer.state[one]) for name, one in named_parameters(groups) if one in optimizer.state},
        "groups": {
            group.name: {name: value for name, value in values.items() if name not in ("params", "lr")}
            for group, values in zip(groups, optimizer.param_groups, strict=True)
        },
    }


def restore_optimizer_state(
    file: Path, optimizer: torch.optim.Optimizer, groups: Sequence[Group], *, changed: frozenset[str]
) -> tuple[dict[str, Any] | None, list[str]]:
    """Gives the optimizer the state in `file` bit for bit, and torch its random state.

    Returns the loss scale's state, and the names of trained parameters that the file does not know. States of
    parameters that are frozen now are left out, and the log says so.
    """
    saved = _load(file)
    unknown = restore_values(saved, optimizer, groups, changed=changed)
    trained = {name for name, _ in named_parameters(groups)}
    if left_out := [name for name in saved["state"] if name not in trained]:
        count = counted(len(left_out), "parameter")
        logger.info("frozen now, so their saved optimizer state is left out: %s, for example %s", count, left_out[0])
    try:
        torch.set_rng_state(saved["random"].clone())
    except (RuntimeError, TypeError) as error:
        message = f"the state of the random numbers is damaged ({error}): use another training state"
        raise UserError(Problem(message, file=str(file))) from None
    if saved["random_cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(saved["random_cuda"].clone())
    return saved["scaler"], unknown if saved["state"] else []


def restore_values(
    saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, groups: Sequence[Group], *, changed: frozenset[str]
) -> list[str]:
    """Gives the optimizer its saved `state` and `groups`. Returns the names of parameters without a saved state.

    Values of parameter groups that are named in `changed` keep what the config says now.

    torch's `load_state_dict` is not used, because it converts states to the precision of the parameters. Some
    optimizers also copy every state once more.
    """
    for group, values in zip(groups, optimizer.param_groups, strict=True):
        old: dict[str, Any] = saved["groups"].get(group.name) or next(  # block_lr was turned on or off
            (old for name, old in saved["groups"].items() if part_of(name) == group.part), {}
        )
        values.update({name: _copy(value, values.get(name)) for name, value in old.items() if name not in changed})
    values_of = {id(parameter): values for values in optimizer.param_groups for parameter in values["params"]}
    unknown = []
    for name, parameter in named_parameters(groups):
        if name in saved["state"]:
            optimizer.state[parameter] = {
                key: _placed(optimizer, parameter, key, value, values_of[id(parameter)])
                for key, value in saved["state"][name].items()
            }
        else:
            unknown.append(name)
    return unknown


def load_loss_weights(file: Path) -> Mapping[str, Any] | None:
    """The learned loss weights in `file`; None if the run had none."""
    return _load(file).get("loss_weights")


def load_ema(file: Path) -> Mapping[str, Tensor]:
    """The EMA in `file`, mapped from the disk; empty if the run had none."""
    return _load(file).get("average") or {}


def _load(file: Path) -> dict[str, Any]:
    """The content of `optimizer.pt`. Raises UserError for a file that this program has not written."""
    saved = load_pickle(file)
    of_names: dict[str, Any] = {
        "state": Mapping,
        "groups": Mapping,
        "average": Mapping | None,
        "scaler": Mapping | None,
    }
    of_names |= {"loss_weights": Mapping | None, "random": Tensor, "random_cuda": Tensor | None}
    wrong = [name for name, kind in of_names.items() if not isinstance(_part(saved, name), kind)]
    if not wrong:
        inner = [(name, *item) for name in ("state", "groups") for item in saved[name].items()]
        wrong = [name for name, key, value in inner if not isinstance(key, str) or not isinstance(value, Mapping)]
    if wrong:
        message = f"this is no optimizer state of this program, because of {wrong[0]}: use another training state"
        raise UserError(Problem(message, file=str(file)))
    return dict(saved)


def _part(saved: Any, name: str) -> Any:
    return saved.get(name) if isinstance(saved, Mapping) else None


def _placed(optimizer: torch.optim.Optimizer, parameter: Tensor, key: str, value: Any, group: Mapping[str, Any]) -> Any:
    """Copies a value to where the optimizer keeps it.

    Step counters stay on the CPU unless the optimizer counts on the device. The paged optimizers of bitsandbytes get
    their own paged buffers.
    """
    if key in COUNTERS_ON_CPU and not (group.get("capturable") or group.get("fused")):
        return _copy(value)
    if getattr(optimizer, "is_paged", False) and isinstance(value, Tensor):
        if value.shape == parameter.shape:
            return optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)  # type: ignore[attr-defined]
        if value.shape == (2, *parameter.shape):  # AdEMAMix
            return optimizer._get_state_double_buffer(parameter, dtype=value.dtype).copy_(value)  # type: ignore[attr-defined]
    return _copy(value, parameter)


def _copy(value: Any, like: Any = None) -> Any:
    """Copies tensors out of the mapped file, onto the device of `like` if that is a tensor."""
    match value:
        case Tensor():
            device = like.device if isinstance(like, Tensor) else value.device
            return torch.empty_like(value, device=device).copy_(value)
        case dict():
            return {key: _copy(one, like) for key, one in value.items()}
        case list() | tuple():
            return type(value)(_copy(one, like) for one in value)
        case _:
            return value
