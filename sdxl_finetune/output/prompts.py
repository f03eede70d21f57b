"""The prompts of previews: what a prompt file says, when previews are due and what their files are called.

A prompt file is text, one prompt a line with options as in `a cat --n blurry --w 832 --h 1216 --d 42`, or
TOML or JSON with the same options under their long names. The formats, times and names are sd-scripts'
(load_prompts, line_to_prompt_dict, sample_images_common); unlike there, what cannot be understood is said,
with file and line.
"""

import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from sdxl_finetune.config.output_options import Sampler
from sdxl_finetune.errors import Problem, UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LINE_OPTIONS = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "s": "sample_steps",
    "l": "scale",
    "d": "seed",
    "ss": "sample_sampler",
}
KEYS = {"prompt", *LINE_OPTIONS.values()}
LINE_OPTION = re.compile(r"(?:^|\s)--(?=[a-z])", re.IGNORECASE)
SAMPLERS = get_args(Sampler)
LARGEST_SIDE, MOST_STEPS, LARGEST_SEED = 8192, 1000, 2**64 - 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One preview image. The defaults are the reference's."""

    prompt: str
    negative_prompt: str | None = None
    width: int = 512
    """Pixels, a multiple of 8, at least 64; so is the height."""
    height: int = 512
    steps: int = 30
    scale: float = 7.5
    """Strength of classifier-free guidance."""
    seed: int | None = None
    """None: another one each time."""
    sampler: str | None = None
    """None: the run's `sample_sampler`."""


def load_prompts(path: Path, default: Prompt | None = None) -> tuple[Prompt, ...]:
    """The prompts of a .txt, .toml or .json file, in order, what they do not say from `default`. Raises UserError
    with everything that is wrong in it; warns of options that do not exist or that SDXL does not have (`--g`,
    `--cn`, ...), which the reference skips.
    """
    default = default or Prompt(prompt="")
    try:
        text = path.read_text(encoding="utf-8-sig")
        match path.suffix.lower():
            case ".txt":
                entries = list(_text_entries(path, text))
            case ".toml":
                entries = list(_entries(path, _toml_prompts(tomllib.loads(text))))
            case ".json":
                entries = list(_entries(path, json.loads(text)))
            case _:
                raise ValueError("a prompt file ends in .txt, .toml or .json")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(Problem(reason, key="sample_prompts", file=str(path))) from error
    if not entries:
        logger.warning("%s holds no prompt, so that nothing is drawn", path)
    problems: list[Problem] = []
    prompts = tuple(_prompt(where, values, default, problems) for where, values in entries)
    if problems:
        raise UserError(problems)
    unknown: dict[str, str] = {}
    for where, values in entries:
        for key in values.keys() - KEYS:
            if unknown.setdefault(key, where) == where:
                logger.warning("%s: %s has no effect on previews", where, key)
    return prompts


def line_values(line: str) -> dict[str, str]:
    """The prompt and the options of one line, by their long names; unknown options as `--name`. An option
    follows white space or begins the line; the last of several wins; one without a value is as if it were not
    there."""
    first, *options = LINE_OPTION.split(line)
    values = {"prompt": first.strip()}
    for option in options:
        name, *value = option.split(maxsplit=1)
        if value:
            values[LINE_OPTIONS.get(name.lower(), f"--{name}")] = value[0].strip()
    return values


def _text_entries(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield f"{path}:{number}", line_values(line)


def _entries(path: Path, prompts: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The prompts of a JSON list (or of one object), each an object or a line."""
    for number, entry in enumerate(prompts if isinstance(prompts, list) else [prompts], start=1):
        if not isinstance(entry, (dict, str)):
            raise ValueError(f"prompt {number} is neither text nor a table of options")
        values = line_values(entry) if isinstance(entry, str) else entry
        yield f"{path}: prompt {number}", {key: value for key, value in values.items() if key != "subset"}


def _toml_prompts(data: dict[str, Any]) -> list[Any]:
    """[prompt] holds what its [[prompt.subset]] tables share; what one of them says itself wins."""
    common = data.get("prompt")
    if not isinstance(common, dict):
        raise ValueError("has no [prompt] table")
    subsets = common.get("subset", [{}])
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        raise ValueError("prompt.subset is not a list of tables: write [[prompt.subset]]")
    return [common | subset for subset in subsets]


def _prompt(where: str, values: Mapping[str, Any], default: Prompt, problems: list[Problem]) -> Prompt:
    """Reads one entry; what cannot be read is added to `problems` and its default taken."""

    def number(key: str, usual: Any, lowest: int, highest: int, kind: type[int | float] = int) -> Any:
        if (value := values.get(key)) is None:
            return usual
        parsed = _number(value, kind)
        if parsed is not None and lowest <= parsed <= highest:
            return parsed
        message = f"must be a number from {lowest} to {highest}"
        problems.append(Problem(message, key=key, value=value, file=where))
        return usual

    def text(key: str, usual: str | None) -> str | None:
        value = values.get(key)
        if value is not None and not isinstance(value, str):
            problems.append(Problem("must be text", key=key, value=value, file=where))
        return value if isinstance(value, str) else usual

    sampler = text("sample_sampler", default.sampler)
    if sampler is not None and sampler not in SAMPLERS:
        message = f"is no sampler: one of {', '.join(SAMPLERS)}"
        problems.append(Problem(message, key="sample_sampler", value=sampler, file=where))
    width, height = (number(key, getattr(default, key), 0, LARGEST_SIDE) for key in ("width", "height"))
    seed = number("seed", default.seed, -LARGEST_SEED, LARGEST_SEED)
    return Prompt(
        prompt=text("prompt", "") or "",
        negative_prompt=text("negative_prompt", default.negative_prompt),
        width=max(64, width - width % 8),
        height=max(64, height - height % 8),
        steps=min(max(1, number("sample_steps", default.steps, 0, 10**6)), MOST_STEPS),
        scale=number("scale", default.scale, 0, 1000, float),
        seed=None if seed is None or seed < 0 else seed,
        sampler=sampler,
    )


def _number(value: Any, kind: type[int | float]) -> int | float | None:
    """`value` as a number: a number itself, or what text begins with, as in `512px`; else None."""
    if isinstance(value, str):
        match = re.match(r"-?[\d.]+" if kind is float else r"-?\d+", value)
        value = match.group() if match else value
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return kind(value)
    except (ValueError, OverflowError):
        return None


def preview_name(
    output_name: str | None, *, epoch: int | None, step: int, index: int, time: datetime, seed: int | None
) -> str:
    """The file name of the preview of prompt `index`, with `epoch` and `step` as in `preview_due` (before
    training `epoch` is 0) and the prompt's own seed, if it has one."""
    parts = [f"{step:06d}" if epoch is None else f"e{epoch:06d}", f"{index:02d}", f"{time:%Y%m%d%H%M%S}"]
    if output_name is not None:
        parts.insert(0, output_name)
    if seed is not None:
        parts.append(str(seed))
    return "_".join(parts) + ".png"
