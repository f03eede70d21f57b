"""Prompts of previews: reading of prompt files, and names of preview files.

A prompt file holds one prompt per line, with options, as in `a cat --n blurry --w 832 --h 1216 --d 42`. It may also be
TOML or JSON, with the same options under their long names. Formats and file names are those of sd-scripts
(load_prompts, line_to_prompt_dict, sample_images_common). Unlike sd-scripts, every entry that cannot be read is
reported with file and line.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from sdxl_finetune.config.output_options import Sampler
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.parsing import parse_json, parse_toml_text

LINE_OPTIONS = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "s": "sample_steps",
    "l": "scale",
    "d": "seed",
    "ss": "sample_sampler",
}
"""Short names of options on a line of a text file, and their long names."""
KNOWN_OPTIONS = {"prompt", *LINE_OPTIONS.values()}
OPTION_START = re.compile(r"(?:^|\s)--(?=[a-z])", re.IGNORECASE)
NAME_AND_VALUE = re.compile(r"([^\s=]*)\s*=?(.*)", re.DOTALL)
SAMPLERS = get_args(Sampler)
MAX_SIDE = 8192
"""Pixels. Larger values are typing errors."""
MAX_STEPS = 1000
"""Sampling steps: the number of timesteps of the noise schedule."""
MAX_SEED = 2**64 - 1
"""Largest seed that torch.Generator accepts."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Prompt and options of one preview image. The defaults are those of sd-scripts, except for the size."""

    prompt: str
    negative_prompt: str | None = None
    width: int | None = None
    """Pixels. A multiple of 8, at least 64. None: the training resolution."""
    height: int | None = None
    """Pixels. A multiple of 8, at least 64. None: the training resolution."""
    steps: int = 30
    scale: float = 7.5
    """Strength of classifier-free guidance. Values up to 1 turn guidance off."""
    seed: int | None = None
    """None: a new seed for each preview."""
    sampler: str | None = None
    """None: the option `sample_sampler`."""


@dataclass(frozen=True, kw_only=True)
class PreviewFiles:
    """Folder and file names of the previews that are drawn at one step. The names are those of sd-scripts."""

    folder: Path
    output_name: str | None
    epoch: int | None
    """Number of finished epochs if previews are drawn by epoch, 0 before training. None if they are drawn by step."""
    step: int
    """Number of optimizer steps that were made."""
    time: datetime

    def path(self, index: int, seed: int | None) -> Path:
        """Returns the path for prompt number `index`. `seed` is the seed in the prompt file, if there is one."""
        moment = f"{self.step:06d}" if self.epoch is None else f"e{self.epoch:06d}"
        parts = [self.output_name, moment, f"{index:02d}", f"{self.time:%Y%m%d%H%M%S}", seed]
        return self.folder / ("_".join(str(part) for part in parts if part is not None) + ".png")


def load_prompts(path: Path, default: Prompt | None = None) -> tuple[Prompt, ...]:
    """Loads the prompts of a .txt, .toml or .json file, in the file's order.

    Options that the file does not set are taken from `default`. Raises UserError with all problems of the file. Warns
    of options that do not exist or that SDXL does not have (`--g`, `--cn`, ...); sd-scripts skips them silently.
    """
    default = default or Prompt(prompt="")
    try:
        text = path.read_text(encoding="utf-8-sig")
        match path.suffix.lower():
            case ".txt":
                entries = list(_text_entries(path, text))
            case ".toml":
                entries = list(_entries(path, _toml_prompts(parse_toml_text(text))))
            case ".json":
                entries = list(_entries(path, parse_json(text)))
            case _:
                raise ValueError("the name of a prompt file must end in .txt, .toml or .json")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(Problem(reason, key="sample_prompts", file=str(path))) from error
    if not entries:
        logger.warning("%s: the file holds no prompt, so no previews are drawn. Add a prompt to the file", path)
    problems: list[Problem] = []
    prompts = tuple(_read_prompt(place, values, default, problems) for place, values in entries)
    if problems:
        raise UserError(problems)
    reported = set(KNOWN_OPTIONS)
    for place, values in entries:
        for key in sorted(values.keys() - reported):
            logger.warning("%s: %s has no effect on previews", place, key)
        reported |= values.keys()
    return prompts


def with_size(prompts: Sequence[Prompt], resolution: tuple[int, int]) -> tuple[Prompt, ...]:
    """Returns the prompts, each with a width and a height: its own, or those of the training resolution."""
    width, height = map(_side, resolution)
    return tuple(replace(prompt, width=prompt.width or width, height=prompt.height or height) for prompt in prompts)


def _side(pixels: int) -> int:
    """Returns the side of a preview: a multiple of 8, of at least 64 pixels."""
    return max(64, pixels - pixels % 8)


def line_values(line: str) -> dict[str, str]:
    """Splits one line into the prompt and its options, under their long names.

    An option stands after white space or at the start of the line, as `--w 64` or `--w=64`. The last of several equal
    options wins. Unknown options, and options without a value, keep their name, as `--name`.
    """
    first, *options = OPTION_START.split(line)
    values = {"prompt": first.strip()}
    for option in options:
        name, value = (part.strip() for part in NAME_AND_VALUE.findall(option)[0])
        values[LINE_OPTIONS.get(name.lower(), f"--{name}") if value else f"--{name}"] = value
    return values


def _text_entries(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield f"{path}:{number}", line_values(line)


def _entries(path: Path, prompts: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields place and options of each prompt in a list. A single object stands for a list of one."""
    for number, entry in enumerate(prompts if isinstance(prompts, list) else [prompts], start=1):
        if not isinstance(entry, (dict, str)):
            raise ValueError(f"prompt {number} is neither text nor a table of options. Write one of these")
        values = line_values(entry) if isinstance(entry, str) else entry
        yield f"{path}: prompt {number}", {key: value for key, value in values.items() if key != "subset"}


def _toml_prompts(data: dict[str, Any]) -> list[Any]:
    """Joins the shared options in [prompt] with each [[prompt.subset]]. The options of the subset win."""
    shared = data.get("prompt")
    if not isinstance(shared, dict):
        raise ValueError("the file has no [prompt] table. Put the prompts into [prompt] and [[prompt.subset]]")
    subsets = shared.get("subset", [{}])
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        raise ValueError("prompt.subset is not a list of tables. Write [[prompt.subset]]")
    return [shared | subset for subset in subsets]


def _read_prompt(place: str, values: Mapping[str, Any], default: Prompt, problems: list[Problem]) -> Prompt:
    """Reads one entry. A value that cannot be read is added to `problems`, and its default is used."""

    def number(key: str, if_missing: Any, low: int, high: int, kind: type[int | float] = int) -> Any:
        if (value := values.get(key)) is None:
            return if_missing
        parsed = _parse_number(value, kind)
        if parsed is not None and low <= parsed <= high:
            return parsed
        problems.append(Problem(f"must be a number from {low} to {high}", key=key, value=value, file=place))
        return if_missing

    def text(key: str, if_missing: str | None) -> str | None:
        value = values.get(key)
        if value is not None and not isinstance(value, str):
            problems.append(Problem("must be text", key=key, value=value, file=place))
        return value if isinstance(value, str) else if_missing

    sampler = text("sample_sampler", default.sampler)
    if sampler is not None and sampler not in SAMPLERS:
        message = f"there is no such sampler. Choose one of {', '.join(SAMPLERS)}"
        problems.append(Problem(message, key="sample_sampler", value=sampler, file=place))
    width, height = (number(key, getattr(default, key), 0, MAX_SIDE) for key in ("width", "height"))
    seed = number("seed", default.seed, -MAX_SEED, MAX_SEED)
    return Prompt(
        prompt=text("prompt", "") or "",
        negative_prompt=text("negative_prompt", default.negative_prompt),
        width=None if width is None else _side(width),
        height=None if height is None else _side(height),
        steps=min(max(1, number("sample_steps", default.steps, 0, 10**6)), MAX_STEPS),
        scale=number("scale", default.scale, 0, 1000, float),
        seed=None if seed is None or seed < 0 else seed,
        sampler=sampler,
    )


def _parse_number(value: Any, kind: type[int | float]) -> int | float | None:
    """Reads a number, or the number at the start of a text as in `512px`. Returns None if there is none."""
    if isinstance(value, str):
        match = re.match(r"-?[\d.]+" if kind is float else r"-?\d+", value)
        value = match.group() if match else value
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return kind(value)
    except (ValueError, OverflowError):
        return None
