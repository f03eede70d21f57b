"""The trained parameters: their learning rates, their names in checkpoints and training states, their exact values.

The parts are the reference's: U-Net, text encoder 1 and text encoder 2. With `block_lr` the U-Net is divided into its
blocks, in the reference's order: embeddings, input blocks, middle blocks, output blocks, output convolution. SDXL has
23 of them. A learning rate of 0 freezes a part and keeps it out of the optimizer.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor
from torch.nn import Parameter

from sdxl_finetune.config import OptimizerOptions
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.low_bits import MasterWeights

UNET_PREFIX = "model.diffusion_model."
BLOCKS = {"time_embed": 0, "label_emb": 0, "input_blocks": 1, "middle_block": 2, "output_blocks": 3, "out": 4}
"""Order of the U-Net's blocks by the first word of their names. Embeddings are one block."""


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
    every learning rate is 0, or if block_lr does not fit the U-Net.
    """
    rates = part_rates(options)
    groups = []
    for part, parameters in parts.items():
        if part == "unet" and options.block_lr is not None:
            groups += _block_groups(options.block_lr, parameters)
        else:
            groups.append(Group(part, dict(parameters), rates[part]))
    for group in groups:
        for parameter in group.parameters.values():
            parameter.requires_grad_(group.lr != 0)
    trained = [group for group in groups if group.lr != 0]
    if not trained:
        problem = "every learning rate is 0, so nothing would be trained: set one above 0"
        raise UserError(Problem(problem, key="learning_rate"))
    return TrainedParameters(trained, masters)


def _block_groups(rates: Sequence[float], parameters: Mapping[str, Parameter]) -> list[Group]:
    """Returns one group for each block of the U-Net, in the order of BLOCKS."""
    blocks: dict[tuple[int, int], dict[str, Parameter]] = defaultdict(dict)
    for name, parameter in parameters.items():
        kind, number, *_ = name.removeprefix(UNET_PREFIX).split(".")
        place = BLOCKS[kind], int(number) if "block" in kind else 0
        blocks[place][name] = parameter
    if len(rates) != len(blocks):
        problem = f"needs one learning rate for each of this U-Net's {len(blocks)} blocks, got {len(rates)}"
        raise UserError(Problem(f"{problem}: give {len(blocks)} numbers, 0 for a frozen block", key="block_lr"))
    pairs = zip(sorted(blocks), rates, strict=True)
    return [Group(f"block{index}", blocks[place], rate) for index, (place, rate) in enumerate(pairs)]
