"""`sdxl-model generate` and `compare`: pictures of any checkpoint, drawn as previews are while it trains.

What the file says of itself is taken for granted: v-prediction by modelspec.prediction_type, zero terminal SNR by the
config that this project writes into it. A picture depends on model, prompt, options and seed, not on the batch that it
is drawn in (but for rounding).
"""

import argparse
import base64
import html
import io
import json
import logging
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from sdxl_finetune.data.tokens import Tokenizer, build_tokenizer
from sdxl_finetune.diffusion.schedule import build_schedule
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.files import atomic_path
from sdxl_finetune.model.load import Loaded, load_checkpoint, open_base_model
from sdxl_finetune.output.previews import build_sampler, draw_latents, parameters, save_picture, to_image
from sdxl_finetune.output.prompts import MAX_SEED, MAX_STEPS, Prompt, load_prompts

logger = logging.getLogger(__name__)

LARGEST_DRAWN = 2**32
LEAST_STEPS = {"pndm": 4}
"""Of samplers that need more than one."""
PICTURE = re.compile(r"(\d{5,})-\d+\.png")
STYLE = """
body { font: 14px sans-serif; margin: 1em; background: #fff; color: #222 }
table { border-collapse: collapse } th, td { padding: 4px; vertical-align: top; text-align: left; max-width: 20em }
thead th { position: sticky; top: 0; background: #fff } img { display: block; width: 100%; min-width: 96px }
"""


@dataclass(frozen=True)
class Wanted:
    """One picture to draw."""

    prompt: Prompt
    seed: int


def generate(arguments: argparse.Namespace, model_hash: str | None) -> None:
    """Draws every prompt `images` times into the folder `output`. Raises UserError."""
    wanted = _wanted(arguments)
    _check_models([arguments.model], arguments.vae)
    _make_folder(arguments.output)
    loaded = _load(arguments.model, arguments)
    first = _next_number(arguments.output)
    for number, (one, image) in enumerate(_draw(loaded, wanted, arguments), first):
        sampler = one.prompt.sampler or arguments.sampler
        path = arguments.output / f"{number:05d}-{one.seed}.png"
        save_picture(path, image, parameters(one.prompt, one.seed, sampler, arguments.model.stem, model_hash))
    print(f"wrote {len(wanted)} pictures into {arguments.output}")


def compare(arguments: argparse.Namespace) -> None:
    """Writes one HTML page: a row for each prompt and seed, a column for each checkpoint. Raises UserError, before
    anything is drawn. A checkpoint that draws nothing but NaN has a column that says so.
    """
    wanted = _wanted(arguments)
    if arguments.output.is_dir():
        raise UserError(Problem("is a folder: name a file", key="output", value=str(arguments.output)))
    _check_models(arguments.models, arguments.vae)
    _make_folder(arguments.output.parent)
    columns = [_column(model, wanted, arguments) for model in arguments.models]
    head = "".join(f"<th>{html.escape(str(model))}</th>" for model in arguments.models)
    rows = []
    for one, *pictures in zip(wanted, *columns, strict=True):
        said = html.escape(parameters(one.prompt, one.seed, one.prompt.sampler or arguments.sampler, None))
        cells = "".join(f"<td>{picture}</td>" for picture in pictures)
        rows.append(f"<tr><td>{said.replace(chr(10), '<br>')}</td>{cells}</tr>")
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    page = f'<!doctype html><meta charset="utf-8"><title>Checkpoints compared</title><style>{STYLE}</style>{table}\n'
    with atomic_path(arguments.output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"wrote {arguments.output}: {len(wanted)} pictures of each of {len(arguments.models)} checkpoints")


def _column(model: Path, wanted: Sequence[Wanted], arguments: argparse.Namespace) -> list[str]:
    """What one checkpoint draws, as HTML."""
    loaded = _load(model, arguments)
    try:
        return [_embedded(image) for _, image in _draw(loaded, wanted, arguments, about=model.name)]
    except UserError as error:
        logger.error("%s: %s", model, error)
        return [html.escape(str(error))] * len(wanted)


def _check_models(models: Sequence[Path], vae: Path | None) -> None:
    """Raises UserError with everything that is wrong with them, as the names of their tensors tell."""
    if problems := [problem for model in models for problem in _problems_of(model, vae)]:
        raise UserError(problems)


def _problems_of(model: Path, vae: Path | None) -> Sequence[Problem]:
    try:
        open_base_model(model, needs_vae=vae is None)
    except UserError as error:
        return error.problems
    return []


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(Problem(f"cannot be made: {error.strerror}", key="output", value=str(folder))) from error


def _wanted(arguments: argparse.Namespace) -> list[Wanted]:
    """Every picture, with its seed: the prompt's, the option's, or one that is drawn; then the numbers after it."""
    default = Prompt(
        prompt="",
        negative_prompt=arguments.negative_prompt,
        width=arguments.width,
        height=arguments.height,
        steps=arguments.steps,
        scale=arguments.scale,
    )
    prompts = [replace(default, prompt=prompt) for prompt in arguments.prompt]
    if arguments.prompts:
        prompts += load_prompts(arguments.prompts, default)
    if not prompts:
        message = "holds no prompt" if arguments.prompts else "is needed, or --prompts: what to draw"
        where = str(arguments.prompts) if arguments.prompts else None
        raise UserError(Problem(message, key="prompts" if where else "prompt", file=where))
    drawn = secrets.randbelow(LARGEST_DRAWN) if arguments.seed is None else arguments.seed
    for prompt in prompts:
        least = LEAST_STEPS.get(prompt.sampler or arguments.sampler, 1)
        if not least <= prompt.steps <= MAX_STEPS:
            message = f"must be from {least} to {MAX_STEPS} for {prompt.sampler or arguments.sampler}"
            raise UserError(Problem(message, key="steps", value=prompt.steps))
        _warn_if_cut(prompt.prompt, arguments.max_token_length)
    wanted = [
        Wanted(prompt, (drawn if prompt.seed is None else prompt.seed) + number)
        for prompt in prompts
        for number in range(arguments.images)
    ]
    if (largest := max(one.seed for one in wanted)) > MAX_SEED:
        raise UserError(Problem(f"must be at most {MAX_SEED}", key="seed", value=largest))
    return wanted


def _warn_if_cut(prompt: str, most: int) -> None:
    if (count := Tokenizer(max_token_length=most, weighted=True).length(prompt)) > most:
        logger.warning("only the first %d of %d tokens are read of: %s", most, count, prompt)


def _load(path: Path, arguments: argparse.Namespace) -> Loaded:
    gpu = torch.cuda.is_available()
    name = arguments.precision or ("bf16" if gpu else "float")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "float": torch.float32}[name]
    loaded = load_checkpoint(path, dtype=dtype, vae_path=arguments.vae)
    device = torch.device("cuda" if gpu else "cpu")
    loaded.model.to(device).eval()
    loaded.vae.to(device)
    return loaded


@torch.no_grad()
def _draw(
    loaded: Loaded, wanted: Sequence[Wanted], arguments: argparse.Namespace, about: str = "drawing"
) -> Iterator[tuple[Wanted, Image.Image]]:
    """The pictures in order; those next to each other that differ in text and seed only share batches."""
    predicts_v = arguments.v_parameterization or loaded.metadata.get("modelspec.prediction_type") == "v"
    trained = json.loads(loaded.metadata.get("sdxl_finetune.config", "{}"))
    zero = arguments.zero_terminal_snr or bool(trained.get("zero_terminal_snr"))
    tokenizer = build_tokenizer(max_token_length=arguments.max_token_length, weighted_captions=True)
    schedule = build_schedule(zero_terminal_snr=zero)
    with tqdm(total=len(wanted), desc=about, unit=" images", disable=None) as progress:
        for (name, *_), run in groupby(wanted, lambda one: _shared(one.prompt, arguments.sampler)):
            alike = list(run)
            for start in range(0, len(alike), arguments.batch_size):
                batch = alike[start : start + arguments.batch_size]
                sampler = build_sampler(str(name), schedule, v_parameterization=predicts_v)
                prompts, seeds = [one.prompt for one in batch], [one.seed for one in batch]
                latents = draw_latents(loaded.model, tokenizer, sampler, prompts, seeds)
                if not latents.isfinite().all():
                    message = "the model gives values that are infinite or not a number"
                    remedy = "" if next(loaded.model.parameters()).dtype == torch.float32 else ": try --precision float"
                    raise UserError(f"{message}{remedy}")
                for one, latent in zip(batch, latents, strict=True):
                    yield one, to_image(loaded.vae, latent[None])
                progress.update(len(batch))


def _shared(prompt: Prompt, sampler: str) -> tuple[object, ...]:
    return prompt.sampler or sampler, prompt.width, prompt.height, prompt.steps, prompt.scale


def _next_number(folder: Path) -> int:
    found = (PICTURE.fullmatch(path.name) for path in folder.iterdir())
    return max((int(match[1]) for match in found if match), default=-1) + 1


def _embedded(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}" alt="">'
