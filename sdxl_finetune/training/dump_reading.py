"""Reads the dumps of dumps.py, and checks every value in them.

Users send one another dumps. A dump may be damaged, cut off, of another program, or made on purpose to do harm. Each of
them ends in one message that names the file. After `read_dump` the batches are like those of a run, and `check_fit`
says whether they fit the model.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import jaxtyped
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sdxl_finetune.batch import TIMESTEPS, Batch, LatentSize, Position
from sdxl_finetune.clip_vocabulary import END
from sdxl_finetune.config import Config
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.model.architecture import Architecture
from sdxl_finetune.parsing import parse_json
from sdxl_finetune.training.dumps import BATCHES, FOLDER, FORMAT, STEP, Dump, DumpedBatch

MOST_TEXT = 64 << 20
"""Bytes of step.json that are read at most: 64 MiB, which is 100,000 images with long names."""
LARGEST = (1 << 31) - 1
"""Largest number of steps, epochs, images and processes, as of the options of this kind."""
NORM_GROUPS = 32
"""Groups of a group norm. A level of so few channels cannot normalize a single image of one pixel."""
PAIRS = ("latents", "images"), ("hidden", "tokens1"), ("pooled", "tokens2")
"""Tensors of which a batch has one or the other."""
OPTIONAL = ("encoding_noise", "input_noise", "negative_latents", "negative_noise", "token_weights", "mask")
"""Tensors that a batch may do without."""


def read_dump(folder: Path) -> Dump:
    """Reads a dump. Raises UserError if it is none, if it is damaged, or if a newer version wrote it."""
    path = folder / STEP
    try:
        values = _read_step(path)
        steps = _whole(values, "steps", 1)
        step = _whole(values, "step", 1, steps)
        seed, ranks = _whole(values, "seed", 0, (1 << 63) - 1), _whole(values, "processes", 1)
        described = [_described(each, step) for each in _list(values, "batches")]
        path = folder / BATCHES
        tensors = load_file(path)
        batches = [_build(number, each, tensors) for number, each in enumerate(described)]
    except FileNotFoundError:
        message = f"this is not a dump of a step, {path.name} is missing: name a folder in {FOLDER}"
        raise UserError(Problem(message, key="reproduce", value=str(folder))) from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error) or type(error).__name__
        message = f"this part of a dump cannot be read ({reason}): use another dump"
        raise UserError(Problem(message, file=str(path))) from None
    return Dump(step=step, steps=steps, seed=seed, ranks=ranks, batches=batches)


def check_fit(dump: Dump, folder: Path, config: Config, architecture: Architecture, latent: LatentSize) -> None:
    """Raises UserError if the model, or the config, cannot compute the dump's batches."""
    text = {"hidden": architecture.te1.width + architecture.te2.width, "pooled": architecture.te2.projection}
    smallest = 2 ** (len(architecture.unet_widths) - 1)
    for number, each in enumerate(dump.batches):
        batch, fault = each.batch, None
        channels, *sides = batch.noise.shape[1:]
        if channels != latent.channels:
            fault = f"noise has {channels} channels, and the latents of the model have {latent.channels}"
        elif batch.images is not None and list(batch.images.shape[2:]) != [side * latent.pixels for side in sides]:
            fault = f"images have the size {list(batch.images.shape[2:])}, which does not fit noise of {sides}"
        elif batch.tokens1 is not None and config.cache_text_encoder_outputs:
            fault = "it holds tokens, and cache_text_encoder_outputs leaves out the text encoders"
        elif len(batch.weights) == 1 and max(sides) <= smallest and NORM_GROUPS in architecture.unet_widths:
            fault = f"noise has the size {sides}, which the normalization of a model of this width cannot compute"
        elif config.objective != "flow" and not _are_timesteps(batch.timesteps):
            fault = f"timesteps must be int64 from 0 to {TIMESTEPS - 1}, or flow_model = true must be set"
        for name, width in text.items():
            tensor: Tensor | None = getattr(batch, name)
            if tensor is not None and tensor.shape[-1] != width:
                fault = f"{name} has the width {tensor.shape[-1]}, and that of the model is {width}"
        if fault:
            message = f"batch {number} does not fit the model and the config of the dump ({fault})"
            raise UserError(
                Problem(f"{message}: use another dump, or the model of the run", file=str(folder / BATCHES))
            )


def _read_step(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        text = file.read(MOST_TEXT + 1)
    if len(text) > MOST_TEXT:
        raise ValueError(f"it is larger than {MOST_TEXT >> 20} MiB")
    values = _table(parse_json(text), "the file")
    if _whole(values, "format", 1) > FORMAT:
        message = f"the dump has format {values['format']}, and this version of the program reads up to {FORMAT}"
        raise UserError(Problem(f"{message}: update the program", file=str(path)))
    return values


def _described(value: Any, step: int) -> dict[str, Any]:
    """The entries of a micro-batch in step.json, except for its tensors. Checked as far as this needs no tensors."""
    values = _table(value, "a batch")
    position = _table(values["position"], "position")
    names = {field.name for field in dataclasses.fields(Position)}
    if position.keys() != names:
        raise ValueError(f"position has the keys {', '.join(sorted(map(str, position)))[:100]}")
    for name in names:
        _whole(position, name, 0)
    if position["step"] != step - 1 or position["micro_batch"] >= position["micro_batches_in_step"]:
        raise ValueError(f"position {position} does not belong to step {step}")
    images, losses = _list(values, "images"), _list(values, "losses")
    if not all(isinstance(name, str) for name in images):
        raise ValueError("images are no texts")
    if not all(loss is None or (type(loss) in (int, float) and math.isfinite(loss)) for loss in losses):
        raise ValueError("losses are no numbers")
    first, count = _whole(values, "first_slot", 0), _whole(values, "images_in_step", 1)
    if not 0 < len(images) == len(losses) <= count - first:
        raise ValueError(f"{len(images)} images and {len(losses)} losses from place {first} on, of {count} images")
    return values


def _build(number: int, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> DumpedBatch:
    """Builds a micro-batch. Raises ValueError unless its tensors are those that a Batch has."""
    own = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{number}.")}
    found: dict[str, Tensor] = {}
    with jaxtyped("context"):  # a letter of a shape stands for the same number in all of them
        for field in dataclasses.fields(Batch):
            types: tuple[Any, ...] = get_args(field.type) or (field.type,)
            hints = [each for each in types if hasattr(each, "dim_str")]
            tensor = own.get(field.name)
            if not hints or (tensor is None and field.name in (*OPTIONAL, *(name for pair in PAIRS for name in pair))):
                continue
            if tensor is None:
                raise ValueError(f"{number}.{field.name} is missing")
            if not tensor.numel() or not isinstance(tensor, hints[0]):
                raise ValueError(
                    f"{number}.{field.name} is {str(tensor.dtype).removeprefix('torch.')} of the shape"
                    f" {list(tensor.shape)}, and must be {hints[0].__name__.partition('[')[0]} of the shape"
                    f" [{hints[0].dim_str.strip()}]"
                )
            found[field.name] = tensor
    _check_values(number, found, len(values["images"]))
    missing = dict.fromkeys(["latents", "images", "encoding_noise", "input_noise"])
    fields: dict[str, Any] = missing | {name: values[name] for name in ("images_in_step", "first_slot")} | found
    batch = Batch(position=Position(**values["position"]), **fields)
    losses = [math.nan if loss is None else float(loss) for loss in values["losses"]]
    return DumpedBatch(batch, values["images"], losses)


def _check_values(number: int, found: Mapping[str, Tensor], images: int) -> None:
    """Raises ValueError for tensors that exclude one another, and for tokens that the vocabulary does not have."""
    for first, second in PAIRS:
        if (first in found) == (second in found):
            raise ValueError(f"{number} has {'both' if first in found else 'neither'} {first} and {second}")
    if ("hidden" in found) != ("pooled" in found):
        raise ValueError(f"{number} has only one of hidden and pooled")
    if len(found["weights"]) != images:
        raise ValueError(f"{number} has the tensors of {len(found['weights'])} images and the names of {images}")
    if found["timesteps"].dtype not in (torch.int64, torch.float32):
        raise ValueError(f"{number}.timesteps are neither int64 nor float32")
    for name in ("tokens1", "tokens2"):
        if name in found and not 0 <= int(found[name].min()) <= int(found[name].max()) <= END:
            raise ValueError(f"{number}.{name} has tokens outside of the vocabulary")


def _are_timesteps(tensor: Tensor) -> bool:
    """True for timesteps of SDXL's noise schedule."""
    return tensor.dtype == torch.int64 and bool(((tensor >= 0) & (tensor < TIMESTEPS)).all())


def _table(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is no table")
    return value


def _list(values: Mapping[str, Any], name: str) -> list[Any]:
    if not isinstance(values[name], list) or not values[name]:
        raise ValueError(f"{name} is no list, or an empty one")
    return values[name]


def _whole(values: Mapping[str, Any], name: str, least: int, most: int = LARGEST) -> int:
    """A whole number from `least` to `most`. Raises ValueError for any other value."""
    value = values[name]
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} = {value!r:.100} is no whole number from {least} to {most}")
    return value
