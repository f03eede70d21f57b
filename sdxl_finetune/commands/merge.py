"""`sdxl-model merge`: an average of checkpoints, `A + (B - C) * m`, or an EMA after the fact from saved checkpoints.

The module imports only what `--help` needs. The command imports the rest.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.files import atomic_path, auto_v2
from sdxl_finetune.printable import printable

if TYPE_CHECKING:
    import torch

    from sdxl_finetune.model.load import Opened
    from sdxl_finetune.model.merge import Recipe
    from sdxl_finetune.model.save import SaveAs

PREFIX = "sdxl_finetune."
LONGEST = 0.28
"""Largest relative length of a power-function EMA: that of gamma = 0, in which all times count alike, is 0.289."""
ALONE, EARLY = 0.9, 0.2
"""Shares of the weights from which a merge remarks that the last or the first checkpoint stands for too much."""
KEPT = ("config", "seed", "step", "epoch", "versions")
"""Fields of this program's metadata that an EMA of one run keeps from the run's last checkpoint."""
DROPPED = ("title", "date", "hash_sha256", "thumbnail", "description", "merged_from", "prediction_type")
"""Fields of the first model's `modelspec` metadata that are not true of a merge."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Adds the command and its options, without those that all writing commands share."""
    merge = commands.add_parser("merge", help="average or blend checkpoints, or make an EMA from those of a run")
    add = merge.add_argument
    add("models", type=Path, nargs="+", metavar="model", help="files or diffusers folders")
    add("--output", type=Path, required=True, help="file (.safetensors, .ckpt) or diffusers folder to write")
    add("--weights", type=_numbers, metavar="2,1", help="share of each model (default: equal shares)")
    three = "A + (B - C) * M of the three models A, B and C, instead of an average"
    add("--add_difference", type=float, metavar="M", help=three)
    length = "average that approximates an EMA over the run of these checkpoints: its relative length, as 0.1"
    add("--ema", type=float, metavar="LENGTH", help=length)
    add("--ema_half_life", type=float, metavar="STEPS", help="the same, of a usual EMA with this half-life in steps")
    add("--steps", type=_numbers, metavar="100,200", help="optimizer step of each model, if their files do not say it")
    for part, words in (("unet", "U-Net"), ("te1", "text encoder 1"), ("te2", "text encoder 2"), ("vae", "VAE")):
        default = "the first model's VAE" if part == "vae" else "as --weights"
        add(f"--{part}_weights", type=_numbers, metavar="2,1", help=f"share of each model in the {words} ({default})")
    blocks = "share of each model in these U-Net blocks, as output_blocks=0,1 or input_blocks.4=1,2. Several times"
    add("--block_weights", type=_block, action="append", default=[], metavar="BLOCK=2,1", help=blocks)
    return merge


def _numbers(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(number) for number in text.split(","))
    except ValueError:
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        raise argparse.ArgumentTypeError(f"{text}: must be numbers with commas between them, as 2,1")
    return numbers


def _block(text: str) -> tuple[str, tuple[float, ...]]:
    block, equals, numbers = text.partition("=")
    if not equals or not block:
        raise argparse.ArgumentTypeError(f"{text}: must be a block and its shares, as output_blocks=0,1")
    return block.strip().strip("."), _numbers(numbers)


@dataclass(frozen=True)
class Model:
    """A checkpoint to merge."""

    path: Path
    opened: "Opened"
    step: int | None
    """Optimizer steps that the run had made when it saved the checkpoint."""


def merge(arguments: argparse.Namespace, save_as: "SaveAs", dtype: "torch.dtype | None") -> None:
    """Writes the merge, and prints the share of each model.

    `dtype` is None to keep that of the first model. Raises UserError.
    """
    from sdxl_finetune.model.merge import Ingredient, merge_weights
    from sdxl_finetune.model.save import save_weights

    models = _open(arguments)
    recipe = _ema_recipe(models, arguments) if _is_ema(arguments) else _recipe(models, arguments)
    if dtype is None:
        dtype = models[0].opened.dtype
    ingredients = [Ingredient(str(model.path), model.opened.weights) for model in models]
    merged = merge_weights(ingredients, recipe, dtype)
    metadata = _metadata(models, recipe, arguments)
    steps = models[-1].step if _is_ema(arguments) else 0
    with atomic_path(arguments.output) as temporary:
        save_weights(temporary, merged, save_as=save_as, metadata=metadata, global_step=steps or 0)
    print(f"wrote {arguments.output} ({str(dtype).removeprefix('torch.')})")
    _print_shares(models, recipe)


def _is_ema(arguments: argparse.Namespace) -> bool:
    return arguments.ema is not None or arguments.ema_half_life is not None


def _open(arguments: argparse.Namespace) -> list[Model]:
    """Opens the models: in order of their steps for an EMA, else as given."""
    from sdxl_finetune.errors import Problems
    from sdxl_finetune.model.load import open_weights

    paths, problems = arguments.models, Problems()
    if arguments.steps is not None and len(arguments.steps) != len(paths):
        message = f"must be {len(paths)} numbers, one for each model"
        raise UserError(Problem(message, key="steps", value=_text(arguments.steps)))
    models = []
    for number, path in enumerate(paths):
        if opened := problems.attempt(open_weights, path):
            said = opened.file.metadata.get(f"{PREFIX}step", opened.file.global_step)
            step = arguments.steps[number] if arguments.steps else said
            models.append(Model(path, opened, None if step is None else int(step)))
    problems.raise_if_any()
    if _is_ema(arguments):
        models.sort(key=lambda model: -1 if model.step is None else model.step)
    return models


def _recipe(models: Sequence[Model], arguments: argparse.Namespace) -> "Recipe":
    """The recipe of an average or of `A + (B - C) * m`. Raises UserError for shares that make no sense."""
    from sdxl_finetune.model.merge import PARTS, Recipe

    multiplier = arguments.add_difference
    if multiplier is not None and len(models) != 3:
        message = f"needs three models, A, B and C of A + (B - C) * M, and got {len(models)}"
        raise UserError(Problem(message, key="add_difference", value=multiplier))
    if multiplier is None and len(models) < 2:
        raise UserError(Problem("give at least two models", key="merge"))
    if multiplier is not None and arguments.weights:
        raise UserError(Problem("has no effect with --add_difference: leave it out", key="weights"))

    def shares(option: str, numbers: tuple[float, ...]) -> tuple[float, ...]:
        wanted = 1 if multiplier is not None else len(models)
        if len(numbers) != wanted:
            kind = "one number, which replaces M" if wanted == 1 else f"{wanted} numbers, one for each model"
            raise UserError(Problem(f"must be {kind}", key=option, value=_text(numbers)))
        if multiplier is not None:
            return (1.0, numbers[0], -numbers[0])
        if min(numbers) < 0 or sum(numbers) <= 0:
            message = "must be at least 0, and one of them more: use --add_difference to subtract a model"
            raise UserError(Problem(message, key=option, value=_text(numbers)))
        return tuple(number / sum(numbers) for number in numbers)

    equal = (1.0,) * len(models) if multiplier is None else (multiplier,)
    default = shares("weights", arguments.weights or equal)
    own = {part: getattr(arguments, f"{part}_weights") for part in PARTS}
    parts = {part: default if numbers is None else shares(f"{part}_weights", numbers) for part, numbers in own.items()}
    if own["vae"] is None:
        parts["vae"] = (1.0,) + (0.0,) * (len(models) - 1)
    blocks = {block: shares("block_weights", numbers) for block, numbers in arguments.block_weights}
    return Recipe(parts=parts, blocks=blocks)


def _ema_recipe(models: Sequence[Model], arguments: argparse.Namespace) -> "Recipe":
    """The recipe of an average that approximates an EMA. Remarks on checkpoints that are too far apart."""
    from sdxl_finetune.model.averaging import exponential_profile, power_profile
    from sdxl_finetune.model.merge import PARTS, Recipe

    option = "ema" if arguments.ema is not None else "ema_half_life"
    value, highest = getattr(arguments, option), LONGEST if option == "ema" else math.inf
    others = ["weights", "add_difference", *(f"{part}_weights" for part in PARTS), "block_weights"]
    others += ["ema_half_life"] if option == "ema" else []
    for other in others:
        if getattr(arguments, other) not in (None, []):
            raise UserError(Problem(f"has no effect with --{option}, which sets all shares: leave it out", key=other))
    if not 0 < value <= highest:
        limit = f" and at most {highest}" if math.isfinite(highest) else ""
        raise UserError(Problem(f"must be above 0{limit}", key=option, value=value))
    if len(models) < 2:
        raise UserError(Problem("needs at least two checkpoints of one run", key=option, value=value))
    for model in models:
        if model.step is None:
            message = "the file does not say at which step it was saved: give the steps of all models with --steps"
            raise UserError(Problem(message, file=str(model.path)))
    steps = [model.step or 0 for model in models]
    if min(steps) < 0 or len(set(steps)) < len(steps):
        message = f"the checkpoints of an EMA need different steps, not {', '.join(map(str, steps))}"
        raise UserError(Problem(f"{message}: leave out doubles, or give --steps", key="steps"))
    profile = (power_profile if option == "ema" else exponential_profile)(steps, value)
    print(f"an average that approximates the EMA at step {steps[-1]}, from {len(steps)} checkpoints")
    if profile.weights[-1] > ALONE:
        share = f"the last checkpoint has {profile.weights[-1]:.0%} of the weight"
        print(f"{share}: this EMA is shorter than the distance of the checkpoints. Give more of them")
    elif profile.before > EARLY:
        share = f"{profile.before:.0%} of this EMA lie before the first checkpoint, which stands for it"
        print(f"{share}: give earlier checkpoints too, or a shorter EMA")
    last = (0.0,) * (len(models) - 1) + (1.0,)
    return Recipe(parts={part: last if part == "vae" else profile.weights for part in PARTS})


def _metadata(models: Sequence[Model], recipe: "Recipe", arguments: argparse.Namespace) -> dict[str, str]:
    """The metadata of the merge: that of the first model as far as it is still true, and what was merged."""
    import sdxl_finetune
    from sdxl_finetune.model.declared import ZERO_COND

    is_ema = _is_ema(arguments)
    base: Mapping[str, str] = models[-1 if is_ema else 0].opened.file.metadata
    dropped = {f"modelspec.{name}" for name in DROPPED}
    kept = {f"{PREFIX}{name}" for name in KEPT if is_ema}
    metadata = {
        key: value for key, value in base.items() if key not in dropped and (not key.startswith(PREFIX) or key in kept)
    }
    described: list[dict[str, Any]] = []
    for model in models:
        digest = auto_v2(model.path) if model.path.is_file() else None
        described.append({"name": model.path.name, "hash": digest, "step": model.step})
    zero_cond = None if is_ema else _zero_cond(models)
    if zero_cond is not None:
        metadata[ZERO_COND] = json.dumps(zero_cond)
    method = "ema" if is_ema else "average" if arguments.add_difference is None else "add difference"
    length = {name: value for name in ("ema", "ema_half_life") if (value := getattr(arguments, name)) is not None}
    said = {"method": method, **length, "models": described, "weights": recipe.parts, "block_weights": recipe.blocks}
    return metadata | {
        "modelspec.title": arguments.output.stem,
        "modelspec.date": datetime.now().replace(microsecond=0).isoformat(),
        "modelspec.merged_from": ", ".join(model.path.stem for model in models),
        "modelspec.prediction_type": "epsilon",  # the writer changes it for v-prediction and flows
        f"{PREFIX}version": sdxl_finetune.__version__,
        f"{PREFIX}merge": json.dumps(said),
    }


def _zero_cond(models: Sequence[Model]) -> bool | None:
    """The meaning of an empty caption in all models: zeros (True) or the encoded empty text. None: they do not agree.

    Prints a remark if some of the models mean zeros and others do not say so.
    """
    from sdxl_finetune.model.declared import read_declared

    said = [read_declared(model.opened.file).zero_cond for model in models]
    if True in said and set(said) != {True}:
        other = models[next(number for number, each in enumerate(said) if not each)].path
        message = f"{models[said.index(True)].path} was trained with zeros for empty captions (use_zero_cond)"
        print(printable(f"{message}, and {other} does not say so. The merge says nothing of empty captions"))
    return said[0] if len(set(said)) == 1 else None


def _print_shares(models: Sequence[Model], recipe: "Recipe") -> None:
    for heading, weights in (*recipe.parts.items(), *recipe.blocks.items()):
        used = [f"{weight:.4g} x {model.path.name}" for model, weight in zip(models, weights, strict=True) if weight]
        print(printable(f"{heading}: {' + '.join(used).replace('+ -', '- ')}"))


def _text(numbers: tuple[float, ...]) -> str:
    return ",".join(f"{number:g}" for number in numbers)
