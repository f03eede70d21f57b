"""The trained parameters: their learning rates, their names in checkpoints and training states, their exact values.

The parts are the reference's: U-Net, text encoder 1 and text encoder 2. With `block_lr` the U-Net is divided into its
blocks. A learning rate of 0 freezes a part and keeps it out of the optimizer. Single parameters are frozen by their
names (freezing.py).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed
from torch import Tensor
from torch.nn import Parameter

from sdxl_finetune.config import OptimizerOptions
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.low_bits import MasterWeights
from sdxl_finetune.optim.freezing import Selections, find_selections, unet_blocks


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate."""

    name: str
    """Name in the reference's log: unet, text_encoder1, text_encoder2, or block0, block1, ... with block_lr."""
    parameters: dict[str, Parameter]
    """Parameters by their names in a checkpoint file."""
    lr: float
    """Learning rate before the learning-rate schedule changes it."""

    @property
    def part(self) -> str:
        """The part to which the group belongs, with block_lr or without: unet, text_encoder1 or text_encoder2."""
        return part_of(self.name)

    @property
    def size(self) -> int:
        """Number of elements of all parameters."""
        return sum(parameter.numel() for parameter in self.parameters.values())


@dataclass(frozen=True)
class TrainedParameters:
    """All trained parameters of a model with their exact values."""

    groups: Sequence[Group]
    masters: MasterWeights
    """Master weights of the whole model, frozen parameters included."""

    def named(self) -> Iterator[tuple[str, Parameter]]:
        """Yields each trained parameter with its full name, as in training states."""
        return named_parameters(self.groups)

    def value(self, parameter: Parameter) -> Tensor:
        """Returns the exact value of a parameter: in float32 if it has a master weight, else as it is."""
        return self.masters.value(parameter)

    def broadcast(self) -> None:
        """Gives all ranks the first rank's values, because files on several machines might differ."""
        for _, parameter in self.named():
            for tensor in (parameter.data, self.masters.kept(parameter)):
                if tensor is not None:  # as bytes, because gloo and NCCL do not know int16
                    torch.distributed.broadcast(tensor.view(-1).view(torch.uint8), 0)


def named_parameters(groups: Iterable[Group]) -> Iterator[tuple[str, Parameter]]:
    """Yields each parameter with its full name: its part, a dot, and its name in a checkpoint."""
    for group in groups:
        for name, parameter in group.parameters.items():
            yield f"{group.part}.{name}", parameter


def part_of(group_name: str) -> str:
    """Returns the part to which the group of this name belongs."""
    return group_name if group_name.startswith("text_encoder") else "unet"


def part_rates(options: OptimizerOptions) -> dict[str, float]:
    """Returns the learning rate of each part before the schedule; 0 means frozen.

    As in the reference, the text encoders are frozen without train_text_encoder. A text encoder without a learning
    rate of its own takes the U-Net's.
    """
    rates = {"unet": options.learning_rate}
    for part, rate in (("text_encoder1", options.learning_rate_te1), ("text_encoder2", options.learning_rate_te2)):
        rates[part] = (options.learning_rate if rate is None else rate) if options.train_text_encoder else 0.0
    return rates


def trained_parameters(
    options: OptimizerOptions, parts: Mapping[str, Mapping[str, Parameter]], masters: MasterWeights
) -> TrainedParameters:
    """Sets requires_grad of all parameters and returns those that are trained.

    `parts` maps unet, text_encoder1 and text_encoder2 to their parameters by checkpoint name. Raises UserError if
    nothing is left to train, if block_lr or freeze_unet_blocks do not fit the U-Net, or if a pattern names nothing
    that is trained.
    """
    selections = find_selections(options, parts)
    groups = _trained_groups(all_groups(options, parts), selections)
    trained = {id(parameter) for group in groups for parameter in group.parameters.values()}
    for parameters in parts.values():
        for parameter in parameters.values():
            parameter.requires_grad_(id(parameter) in trained)
    _check_trained(groups, selections)
    return TrainedParameters(groups, masters)


def all_groups(options: OptimizerOptions, parts: Mapping[str, Mapping[str, Parameter]]) -> list[Group]:
    """Returns the groups of all parameters, with a rate of 0 for parts and blocks that are not trained."""
    rates, groups = part_rates(options), []
    for part, parameters in parts.items():
        if part == "unet" and options.block_lr is not None:
            groups += _block_groups(options.block_lr, parameters)
        else:
            groups.append(Group(part, dict(parameters), rates[part]))
    return groups


def _trained_groups(groups: Sequence[Group], selections: Selections) -> list[Group]:
    """Leaves out frozen parameters, and groups without a trained one."""
    trained = []
    for group in groups:
        kept = {name: one for name, one in group.parameters.items() if not selections.freeze(group.part, name)}
        if kept and group.lr != 0:
            trained.append(replace(group, parameters=kept))
    return trained


def _check_trained(groups: Sequence[Group], selections: Selections) -> None:
    """Raises UserError if nothing is trained, or if nothing is trained of what a pattern of train_parameters names."""
    if not groups and not selections:
        problem = "every learning rate is 0, so nothing would be trained: set one above 0"
        raise UserError(Problem(problem, key="learning_rate"))
    trained = {(group.part, name) for group in groups for name in group.parameters}
    problems = [
        Problem(
            "all parameters that it names are frozen, by a learning rate of 0 or by an option that freezes them:"
            " set train_text_encoder and a rate above 0, or remove it",
            key=each.option,
            value=each.text,
        )
        for each in selections.trained
        if not any((part, name) in trained for part, named in each.parts.items() for name in named)
    ]
    if not groups and not problems:
        options = ", ".join(dict.fromkeys(each.option for each in selections.frozen))
        problem = f"nothing would be trained, because {options} freezes all that has a learning rate above 0"
        problems = [Problem(f"{problem}: remove a part of it", key=selections.frozen[0].option)]
    if problems:
        raise UserError(problems)


def _block_groups(rates: Sequence[float], parameters: Mapping[str, Parameter]) -> list[Group]:
    """Returns one group for each block of the U-Net."""
    blocks = unet_blocks(parameters)
    if len(rates) != len(blocks):
        problem = f"needs one learning rate for each of this U-Net's {len(blocks)} blocks, got {len(rates)}"
        raise UserError(Problem(f"{problem}: give {len(blocks)} numbers, 0 for a frozen block", key="block_lr"))
    return [Group(f"block{index}", block, rate) for index, (block, rate) in enumerate(zip(blocks, rates, strict=True))]
