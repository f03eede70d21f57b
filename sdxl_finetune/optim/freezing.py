"""Parameters that are frozen or trained by name: `freeze_unet_blocks`, `freeze_parameters` and `train_parameters`.

The U-Net's blocks are counted as `block_lr` counts them, in the reference's order: embeddings, input blocks, middle
blocks, output blocks, output convolution. SDXL has 23 of them, 0 to 22.

A pattern may hold `*`, `?` and `[...]` as a shell's. It is compared with whole names:

- U-Net: the name in a single-file checkpoint, `model.diffusion_model.input_blocks.4.1.norm.weight`, with or without
  `model.diffusion_model.`
- text encoders: `text_encoder1.` or `text_encoder2.`, and transformers' name of the parameter, with or without
  `text_model.`
"""

import difflib
import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch.nn import Parameter

from sdxl_finetune.config import OptimizerOptions
from sdxl_finetune.errors import Problem, UserError

UNET_PREFIX, TEXT_PREFIX = "model.diffusion_model.", "text_model."
BLOCKS = {"time_embed": 0, "label_emb": 0, "input_blocks": 1, "middle_block": 2, "output_blocks": 3, "out": 4}
"""Order of the U-Net's blocks by the first word of their names. Embeddings are one block."""
CLOSE_MATCHES, SIMILARITY = 3, 0.6
"""Names that a message on a pattern without a match shows at most, and how similar they must be, from 0 to 1."""

Parts = Mapping[str, Mapping[str, Parameter]]
"""Parameters of unet, text_encoder1 and text_encoder2 by name."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The parameters that one block number or one pattern names."""

    option: str
    text: str
    """The block number or the pattern."""
    parts: Parts
    """The parameters by part. Parts without any are left out."""

    def holds(self, part: str, name: str) -> bool:
        return name in self.parts.get(part, ())


@dataclass(frozen=True)
class Selections:
    """Everything that the options name."""

    frozen: Sequence[Selection]
    """Selections by `freeze_unet_blocks` and `freeze_parameters`."""
    trained: Sequence[Selection]
    """Selections by `train_parameters`. If there are any, all other parameters are frozen."""

    def freeze(self, part: str, name: str) -> bool:
        """True if a parameter is frozen by its name, whatever its learning rate."""
        is_left_out = bool(self.trained) and not any(each.holds(part, name) for each in self.trained)
        return is_left_out or any(each.holds(part, name) for each in self.frozen)

    def __bool__(self) -> bool:
        return bool(self.frozen or self.trained)


def find_selections(options: OptimizerOptions, parts: Parts) -> Selections:
    """Returns what the options name. Raises UserError with every block and pattern that names nothing."""
    problems: list[Problem] = []
    frozen = list(_blocks(options, parts["unet"], problems))
    trained: list[Selection] = []
    for option, found in (("freeze_parameters", frozen), ("train_parameters", trained)):
        for pattern in getattr(options, option) or ():
            selection = Selection(option=option, text=pattern, parts=_matching(pattern, parts))
            found.append(selection)
            if not selection.parts:
                message = f"no parameter has a name like {pattern}: {_close_names(pattern, parts)}"
                problems.append(Problem(message, key=option, value=pattern))
    if problems:
        raise UserError(problems)
    return Selections(frozen, trained)


def unet_blocks(parameters: Mapping[str, Parameter]) -> list[dict[str, Parameter]]:
    """Divides the U-Net's parameters into its blocks, in the order of BLOCKS."""
    blocks: dict[tuple[int, int], dict[str, Parameter]] = defaultdict(dict)
    for name, parameter in parameters.items():
        kind, number, *_ = name.removeprefix(UNET_PREFIX).split(".")
        place = BLOCKS[kind], int(number) if "block" in kind else 0
        blocks[place][name] = parameter
    return [blocks[place] for place in sorted(blocks)]


def _blocks(options: OptimizerOptions, unet: Mapping[str, Parameter], problems: list[Problem]) -> Iterator[Selection]:
    option, numbers = "freeze_unet_blocks", options.freeze_unet_blocks or ()
    blocks = unet_blocks(unet) if numbers else []
    for number in numbers:
        if number < len(blocks):
            yield Selection(option=option, text=str(number), parts={"unet": blocks[number]})
        else:
            message = f"this U-Net has {len(blocks)} blocks, 0 to {len(blocks) - 1}: remove {number}"
            problems.append(Problem(message, key=option, value=number))


def _matching(pattern: str, parts: Parts) -> Parts:
    matches = re.compile(fnmatch.translate(pattern)).match
    found = {
        part: {name: each for name, each in named.items() if any(map(matches, _spellings(part, name)))}
        for part, named in parts.items()
    }
    return {part: named for part, named in found.items() if named}


def _spellings(part: str, name: str) -> tuple[str, str]:
    """The whole and the short name of a parameter. transformers 5 dropped `text_model.` from some of its names."""
    if part == "unet":
        return name, name.removeprefix(UNET_PREFIX)
    short = name.removeprefix(TEXT_PREFIX)
    return f"{part}.{TEXT_PREFIX}{short}", f"{part}.{short}"


def _close_names(pattern: str, parts: Parts) -> str:
    """Names of parameters and modules, or single words of names, that resemble the pattern without its wildcards."""
    known: set[str] = set()
    for part, named in parts.items():
        for name in named:
            for words in (spelling.split(".") for spelling in _spellings(part, name)):
                known.update(words)
                known.update(".".join(words[:end]) for end in range(2, len(words) + 1))
    bare = re.sub(r"[*?\[\]]+", "", pattern).strip(".")
    near = difflib.get_close_matches(bare, sorted(known), CLOSE_MATCHES, SIMILARITY)
    if not near:
        return f"names are, for example, {', '.join(next(iter(named)) for named in parts.values())}"
    if pattern in known:
        return f"that is a module: {pattern}.* stands for its parameters"
    return f"did you mean {' or '.join(near)}?"
