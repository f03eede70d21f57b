"""`sdxl-model generate` and `sdxl-model compare`: draw images with checkpoints, in the same way as previews.

The checkpoint says how to draw: with which objective, and for a flow with which shift (model/declared.py). Options say
it where the checkpoint does not. An image depends on the model, the prompt, the options and the seed. The batch size
changes it only by rounding.
"""

import argparse
import base64
import html
import io
import logging
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image

from sdxl_finetune.commands.latents import vae_options
from sdxl_finetune.commands.said_objective import check_options, drawn_objective
from sdxl_finetune.data.tokens import Tokenizer, build_tokenizer
from sdxl_finetune.errors import Problem, Problems, UserError, counted
from sdxl_finetune.files import atomic_path
from sdxl_finetune.model.declared import LEAST_SIDE, MOST_SIDE, SDXL_SIZE, read_declared
from sdxl_finetune.model.load import load_checkpoint, open_base_model
from sdxl_finetune.model.tensorfile import TensorFile
from sdxl_finetune.output.previews import (
    Drawing,
    NotFinite,
    PreviewModel,
    draw_latents,
    generation_parameters,
    save_image,
    to_image,
)
from sdxl_finetune.output.prompts import MAX_SEED, MAX_STEPS, Prompt, load_prompts, with_size
from sdxl_finetune.output.samplers import sampler_remarks, used_sampler
from sdxl_finetune.printable import printable, printable_lines
from sdxl_finetune.progress import track

logger = logging.getLogger(__name__)

MOST_SHOWN = 100
"""Characters of a foreign value that a message shows."""
RANDOM_SEEDS = 2**32
"""Seeds to choose from if no seed is given. Web UIs use this range as well."""
SAMPLER = "euler_a"
"""Sampler if none is asked for. A flow is drawn with euler then."""
MIN_STEPS = {"pndm": 4}
"""Samplers that need more than one step."""
IMAGE_NAME = re.compile(r"(\d{5,})-\d+\.png")
STYLE = """
body { font: 14px sans-serif; margin: 1em; background: #fff; color: #222 }
table { border-collapse: collapse } th, td { padding: 4px; vertical-align: top; text-align: left; max-width: 20em }
thead th { position: sticky; top: 0; background: #fff } img { display: block; width: 100%; min-width: 96px }
"""


def generate(arguments: argparse.Namespace, model_hash: str | None) -> None:
    """Draws `images` images of each prompt into the folder `output`. Raises UserError."""
    (file,) = _open_models([arguments.model], arguments.vae)
    requests = _read_requests(arguments, trained_size(file))
    _make_folder(arguments.output)
    matches = (IMAGE_NAME.fullmatch(path.name) for path in arguments.output.iterdir())
    first_number = max((int(match[1]) for match in matches if match), default=-1) + 1
    for number, (drawing, image) in enumerate(_draw(arguments.model, requests, arguments), first_number):
        path = arguments.output / f"{number:05d}-{drawing.seed}.png"
        save_image(path, image, generation_parameters(drawing, arguments.model.stem, model_hash))
    print(f"wrote {counted(len(requests), 'image')} into {arguments.output}")


def draw_requested(
    arguments: argparse.Namespace, model_hash: str | None, *, most: int
) -> Iterator[tuple[Image.Image, str]]:
    """Draws the images that the command line asks for, at most `most`. Yields each with its parameters.

    Raises UserError.
    """
    (file,) = _open_models([arguments.model], arguments.vae)
    requests = _read_requests(arguments, trained_size(file))
    if len(requests) > most:
        logger.warning("the first %d of %d images are drawn", most, len(requests))
    for drawing, image in _draw(arguments.model, requests[:most], arguments):
        yield image, generation_parameters(drawing, arguments.model.stem, model_hash)


def compare(arguments: argparse.Namespace) -> None:
    """Writes an HTML page with a row for each prompt and seed, and a column for each checkpoint.

    Raises UserError for wrong arguments before anything is drawn. If a checkpoint gives infinite values or NaN, its
    column says so.
    """
    if arguments.output.is_dir():
        raise UserError(Problem("is a folder. Give the name of a file", key="output", value=str(arguments.output)))
    file, *_ = _open_models(arguments.models, arguments.vae)
    requests = _read_requests(arguments, trained_size(file))
    _make_folder(arguments.output.parent)
    columns = [_draw_column(model, requests, arguments) for model in arguments.models]
    head = "".join(f"<th>{html.escape(printable(model))}</th>" for model in arguments.models)
    rows = []
    for request, *images in zip(requests, *columns, strict=True):
        cells = "".join(f"<td>{image}</td>" for image in images)
        text = html.escape(printable_lines(generation_parameters(request, None)))
        rows.append(f"<tr><td>{text.replace(chr(10), '<br>')}</td>{cells}</tr>")
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    page = f'<!doctype html><meta charset="utf-8"><title>Checkpoints compared</title><style>{STYLE}</style>{table}\n'
    with atomic_path(arguments.output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    models = counted(len(arguments.models), "checkpoint")
    print(f"wrote {arguments.output}: {counted(len(requests), 'image')} from each of {models}")


def _draw_column(model: Path, requests: Sequence[Drawing], arguments: argparse.Namespace) -> list[str]:
    """Draws all images with one checkpoint, and returns them as HTML."""
    try:
        return [_to_html(image) for _, image in _draw(model, requests, arguments, progress_label=model.name)]
    except UserError as error:
        logger.error("%s", error)
        return [html.escape(str(error))] * len(requests)


def _open_models(models: Sequence[Path], vae: Path | None) -> list[TensorFile]:
    """Opens the models, and checks the names of their tensors. Raises UserError with the problems of all models."""
    problems = Problems()
    opened = [problems.attempt(open_base_model, model, needs_vae=vae is None) for model in models]
    problems.raise_if_any()
    return [each[0] for each in opened if each]


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"the folder cannot be made: {error.strerror}. Give another --output"
        raise UserError(Problem(message, key="output", value=str(folder))) from error


def _read_requests(arguments: argparse.Namespace, default_size: tuple[int, int]) -> list[Drawing]:
    """Reads the images to draw from the command line and the prompt file. Raises UserError.

    An image for which neither gives a width or a height gets that of `default_size`.
    The first image of a prompt gets the prompt's own seed, the option `seed`, or a random seed. Each further image of
    this prompt gets the next seed.
    """
    check_options(arguments)
    options = {name: getattr(arguments, name) for name in ("negative_prompt", "width", "height", "steps", "scale")}
    default = Prompt(prompt="", **options)
    prompts = [replace(default, prompt=prompt) for prompt in arguments.prompt]
    if arguments.prompts:
        prompts += load_prompts(arguments.prompts, default)
    if not prompts:
        if arguments.prompts:
            raise UserError(Problem("the file holds no prompt. Add one", key="prompts", value=str(arguments.prompts)))
        raise UserError(Problem("is missing. Say what to draw with --prompt or --prompts", key="prompt"))
    first_seed = secrets.randbelow(RANDOM_SEEDS) if arguments.seed is None else arguments.seed
    requests = []
    for prompt in with_size(prompts, default_size):
        sampler = prompt.sampler or arguments.sampler or SAMPLER
        seed = first_seed if prompt.seed is None else prompt.seed
        least = MIN_STEPS.get(sampler, 1)
        if not least <= prompt.steps <= MAX_STEPS:
            message = f"must be from {least} to {MAX_STEPS} for the sampler {sampler}"
            raise UserError(Problem(message, key="steps", value=prompt.steps))
        if seed + arguments.images - 1 > MAX_SEED:
            raise UserError(Problem(f"the seed of the last image must be at most {MAX_SEED}", key="seed", value=seed))
        _warn_if_too_long(prompt.prompt, arguments.max_token_length)
        requests += [Drawing(prompt=prompt, seed=seed + number, sampler=sampler) for number in range(arguments.images)]
    return requests


def trained_size(file: TensorFile) -> tuple[int, int]:
    """Width and height in pixels at which a checkpoint says that it was trained; SDXL's if it says nothing usual."""
    size, said = read_declared(file).size, file.metadata.get("modelspec.resolution")
    if size is None and said:
        logger.warning(
            "modelspec.resolution = %s in the model is not believed, because it does not name sides from %d to %d "
            "pixels, such as 1024x1024: images have %dx%d pixels unless --width and --height say another size",
            *(said[:MOST_SHOWN], LEAST_SIDE, MOST_SIDE, *SDXL_SIZE),
        )
    return size or SDXL_SIZE


def _warn_if_too_long(prompt: str, max_tokens: int) -> None:
    count = Tokenizer(max_token_length=max_tokens, weighted=True, breaks=True).count(prompt)
    if count.lost:
        message = "only the first %d of %d tokens are used of the prompt: %s. Shorten it or raise --max_token_length"
        logger.warning(message, count.tokens - count.lost, count.tokens, prompt)


def _load(path: Path, arguments: argparse.Namespace) -> PreviewModel:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = arguments.precision or ("bf16" if device.type == "cuda" else "float")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "float": torch.float32}[name]
    loaded = load_checkpoint(path, dtype=dtype, vae_path=arguments.vae, options=vae_options(arguments))
    objective, flow = drawn_objective(loaded.declared, arguments)
    loaded.vae.to(device)
    loaded.model.zero_cond = arguments.use_zero_cond or bool(loaded.declared.zero_cond)
    return PreviewModel(
        sdxl=loaded.model.to(device).eval(),
        vae=loaded.vae,
        tokenizer=build_tokenizer(max_token_length=arguments.max_token_length, caption_break=True),
        objective=objective,
        flow=flow,
    )


@torch.no_grad()
def _draw(
    path: Path, requests: Sequence[Drawing], arguments: argparse.Namespace, progress_label: str = "drawing"
) -> Iterator[tuple[Drawing, Image.Image]]:
    """Loads a checkpoint and yields its images in order. Neighbours that differ in text and seed only share a batch.

    Raises UserError if the model gives infinite values or NaN.
    """
    model = _load(path, arguments)
    asked = [name for request in requests if (name := request.prompt.sampler or arguments.sampler)]
    for remark in sampler_remarks(asked, model.objective):
        logger.warning("%s", remark)
    with track(progress_label, len(requests), "images") as progress:
        for _, group in groupby(requests, _batch_key):
            similar = list(group)
            for start in range(0, len(similar), arguments.batch_size):
                batch = similar[start : start + arguments.batch_size]
                prompts, seeds = [request.prompt for request in batch], [request.seed for request in batch]
                latents = draw_latents(model, batch[0].sampler, prompts, seeds)
                for request, latent in zip(batch, latents, strict=True):
                    try:
                        image = to_image(model.vae, latent[None])
                    except NotFinite as error:
                        is_exact = next(model.sdxl.parameters()).dtype == torch.float32
                        advice = "use another model" if is_exact else "try --precision float"
                        raise UserError(Problem(f"{error}: {advice}", file=str(path))) from None
                    yield _as_drawn(request, model), image
                progress.update(len(batch))


def _batch_key(request: Drawing) -> tuple[object, ...]:
    """Returns what must be equal for images that are drawn in one batch."""
    return request.sampler, request.prompt.width, request.prompt.height, request.prompt.steps, request.prompt.scale


def _as_drawn(request: Drawing, model: PreviewModel) -> Drawing:
    sampler, shift = used_sampler(request.sampler, model.objective), model.shift(request.prompt)
    return replace(request, sampler=sampler, shift=shift)


def _to_html(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}" alt="">'
