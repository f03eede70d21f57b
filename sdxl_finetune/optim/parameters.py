"""Which parameters are trained, at which learning rate.

The parts are the reference's: the U-Net (or its blocks, with `block_lr`), text encoder 1 and text encoder 2.
A rate of 0 freezes a part and keeps it out of the optimizer. Parameters come under their checkpoint names, so
that a block means the same thing as in the reference: embeddings, input blocks, middle blocks, output blocks
and the output convolution, in this order (23 of them in SDXL).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch.nn import Parameter

from sdxl_finetune.config import Config
from sdxl_finetune.errors import Problem, UserError

UNET_PREFIX = "model.diffusion_model."


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate."""

    name: str
    """As the reference logs it: unet, text_encoder1, text_encoder2, or block0, block1, ... with block_lr."""
    parameters: dict[str, Parameter]
    """Under their names in a checkpoint file."""
    lr: float
    """The learning rate that the schedule starts from."""

    @property
    def part(self) -> str:
        """unet, text_encoder1 or text_encoder2: what a parameter belongs to with block_lr or without."""
        return part_of(self.name)

    @property
    def size(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())


def part_of(name: str) -> str:
    """The part of the group of this name."""
    return name if name.startswith("text_encoder") else "unet"


def part_rates(config: Config) -> dict[str, float]:
    """Base learning rate of each part; 0 is frozen. Without train_text_encoder the encoders are frozen, as in the
    reference; a text encoder's rate that is not given is the U-Net's.
    """

    def encoder_rate(given: float | None) -> float:
        if not config.train_text_encoder:
            return 0.0
        return config.learning_rate if given is None else given

    return {
        "unet": config.learning_rate,
        "text_encoder1": encoder_rate(config.learning_rate_te1),
        "text_encoder2": encoder_rate(config.learning_rate_te2),
    }


def build_groups(config: Config, parts: Mapping[str, Mapping[str, Parameter]]) -> list[Group]:
    """Freezes what is not trained and returns what is. `parts` maps unet, text_encoder1 and text_encoder2 to their
    parameters under checkpoint names. Raises UserError when nothing is left to train.
    """
    rates = part_rates(config)
    groups = []
    for part, parameters in parts.items():
        if part == "unet" and config.block_lr is not None:
            groups += _blocks(config.block_lr, parameters)
        else:
            groups.append(Group(part, dict(parameters), rates[part]))
    for group in groups:
        for parameter in group.parameters.values():
            parameter.requires_grad_(group.lr != 0)
    trained = [group for group in groups if group.lr != 0]
    if not trained:
        raise UserError(Problem("every learning rate is 0, so nothing would be trained", key="learning_rate"))
    return trained


def _blocks(rates: tuple[float, ...], parameters: Mapping[str, Parameter]) -> list[Group]:
    blocks = _unet_blocks(parameters)
    count = max(blocks.values()) + 1
    if len(rates) != count:
        problem = f"needs one learning rate for each of this U-Net's {count} blocks, got {len(rates)}"
        raise UserError(Problem(problem, key="block_lr"))
    return [
        Group(f"block{index}", {name: parameters[name] for name in parameters if blocks[name] == index}, rate)
        for index, rate in enumerate(rates)
    ]


def _unet_blocks(names: Iterable[str]) -> dict[str, int]:
    """The block of each U-Net parameter: 0 embeddings, then input, middle and output blocks, last the output."""
    place = {}
    for name in names:
        first, second, *_ = name.removeprefix(UNET_PREFIX).split(".")
        kind = {"time_embed": 0, "label_emb": 0, "input_blocks": 1, "middle_block": 2, "output_blocks": 3, "out": 4}
        place[name] = (kind[first], int(second) if kind[first] in (1, 2, 3) else 0)
    order = {key: index for index, key in enumerate(sorted(set(place.values())))}
    return {name: order[key] for name, key in place.items()}
