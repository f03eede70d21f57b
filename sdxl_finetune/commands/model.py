"""`sdxl-model`: makes small models; describes, converts and merges checkpoints; draws and writes pages with them.

The module imports only what `--help` needs. Each command imports the rest.
"""

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_finetune.commands.latents import (
    adapt,
    add_adapt_parser,
    add_stats_parser,
    add_vae_options,
    latent_lines,
    stats,
    vae_options,
)
from sdxl_finetune.commands.merge import add_parser as add_merge_parser
from sdxl_finetune.commands.said_objective import add_drawn_objective, add_written_objective, write_objective
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.files import atomic_path, auto_v2
from sdxl_finetune.output.prompts import SAMPLERS
from sdxl_finetune.printable import printable

if TYPE_CHECKING:
    import torch

    from sdxl_finetune.model.architecture import Architecture
    from sdxl_finetune.model.save import SaveAs
    from sdxl_finetune.model.tensorfile import Source

CHUNK = 75
"""Tokens that the text encoders read at once."""
PRECISIONS = {"fp16": "float16", "bf16": "bfloat16", "float": "float32"}
MOST_OF_A_VALUE = 160
"""Characters of a value of the metadata that info shows, after control characters are made visible."""
FORMATS = ("safetensors", "ckpt", "diffusers", "diffusers_safetensors")


def main(argv: list[str]) -> int:
    """Runs one command and returns the exit status. Raises UserError if the user's input is wrong."""
    parser = build_parser()
    arguments, options = parser.parse_known_args(argv)
    if arguments.run in (_tags, stats):
        return int(arguments.run(arguments, options))
    if options:
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    arguments.run(arguments)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdxl-model", description="Makes, describes, converts and merges SDXL checkpoints."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    positive = partial(_integers, 1)
    init = commands.add_parser("init", help="make a small model with random weights")
    init.set_defaults(run=_init)
    init.add_argument("output", type=Path, help="file (.safetensors, .ckpt) or diffusers folder to write")
    init.add_argument("--preset", choices=("tiny", "small"), default="tiny", help="size to start from (default: tiny)")
    init.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: 0)")
    init.add_argument("--unet_widths", type=positive, metavar="32,64,128", help="channels of each U-Net level")
    init.add_argument("--unet_layers", type=positive, metavar="2,2,2", help="residual layers of each U-Net level")
    layers = "transformer layers in each attention block of each U-Net level. 0: no attention; not for the last level"
    init.add_argument("--transformer_layers", type=partial(_integers, 0), metavar="0,1,2", help=layers)
    for name, encoder in (("te1", "text encoder 1"), ("te2", "text encoder 2")):
        init.add_argument(f"--{name}", type=positive, metavar="WIDTH,LAYERS", help=f"width and layers of {encoder}")
    init.add_argument("--vae_widths", type=positive, metavar="32,32,64,64", help="channels of each VAE level")
    init.add_argument("--vae_layers", type=int, choices=(1, 2, 3, 4), help="residual layers of each VAE level")
    init.add_argument("--latent_channels", type=partial(_integer, 1), metavar="4", help="channels of the latents")
    info = commands.add_parser("info", help="describe a checkpoint: format, architecture, data types and metadata")
    info.set_defaults(run=_info)
    info.add_argument("model", type=Path, help="file or diffusers folder")
    info.add_argument("--all", action="store_true", help="show long values of the metadata whole")
    convert = commands.add_parser("convert", help="save a checkpoint in another format or precision")
    convert.set_defaults(run=_convert)
    convert.add_argument("model", type=Path, help="file or diffusers folder to read")
    convert.add_argument("output", type=Path, help="file (.safetensors, .ckpt) or diffusers folder to write")
    convert.add_argument("--vae", type=Path, help="VAE (file or folder) that replaces the model's own")
    add_vae_options(convert)
    add_written_objective(convert)
    merge = add_merge_parser(commands)
    merge.set_defaults(run=_merge)
    adapt_latents = add_adapt_parser(commands)
    adapt_latents.set_defaults(run=_adapt)
    add_stats_parser(commands).set_defaults(run=stats)
    unchanged = ((convert, "unchanged"), (adapt_latents, "unchanged"))
    for command, precision in ((init, "fp16"), *unchanged, (merge, "that of the first model")):
        described = f"precision of the weights (default: {precision})"
        command.add_argument("--save_precision", choices=tuple(PRECISIONS), help=described)
        command.add_argument("--save_model_as", choices=FORMATS, help="format (default: from the name of the output)")
        command.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    _add_image_commands(commands)
    _add_tags(commands)
    return parser


def _add_tags(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "measure which tags a checkpoint has learned"
    more = "The images are those of --config FILE. Every option of the config is an option here as well."
    tags = commands.add_parser("tags", help=text, description=f"{text}. {more}", allow_abbrev=False)
    tags.set_defaults(run=_tags)
    add = tags.add_argument
    add("model", help="file, diffusers folder, or address of a file in an object store")
    add("--config", required=True, metavar="FILE", help="config that names the images")
    add("--tags", metavar="TAGS", help='tags to measure, with patterns, as "style_*" or "cat, dog"')
    add("--tags_file", metavar="FILE", help="file of tags to measure, one tag or pattern on a line")
    add("--min_images", metavar="N", help="measure all tags that at least N images have")
    add("--images", metavar="N", help="images that each tag is measured on at most; default: 16")
    add("--others", metavar="K", help="other tags that compete with the right one; default: 3")
    add("--timesteps", metavar="LIST", help="timesteps at which each image is measured; default: 900,950,975,999")
    add("--budget", metavar="N", help="forward passes at most; fewer images for each tag keep it")
    add("--base", type=Path, metavar="PATH", help="model, or earlier report (.parquet), to compare with")
    add("--output", type=Path, metavar="FOLDER", help="folder of the report; default: tags in output_dir")
    add("--draw", type=partial(_integer, 0), default=16, metavar="N", help="tags that are drawn; default: 16")


def _add_image_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    generate = commands.add_parser("generate", help="draw images with a checkpoint")
    generate.set_defaults(run=_generate)
    generate.add_argument("model", type=Path, help="file or diffusers folder")
    generate.add_argument("--output", type=Path, default=Path("generated"), help="folder (default: generated)")
    compare = commands.add_parser("compare", help="draw the same images with several checkpoints, side by side")
    compare.set_defaults(run=_compare)
    compare.add_argument("models", type=Path, nargs="+", metavar="model", help="files or diffusers folders")
    compare.add_argument("--output", type=Path, default=Path("compare.html"), help="page (default: compare.html)")
    compare.add_argument("--overwrite", action="store_true", help="replace the page if it exists")
    card = _add_card(commands)
    positive, samplers = partial(_integer, 1), f"{', '.join(SAMPLERS)} (default: euler_a, euler for a flow)"
    trained_at = "what the metadata says of the training, or 1024"
    for command in (generate, compare, card):
        add = command.add_argument
        add("--prompts", type=Path, metavar="FILE", help="prompt file, as for sample_prompts. Options in the file win")
        add("--prompt", action="append", default=[], help="what to draw. May be given several times")
        add("--negative_prompt", help="what the images should not show")
        for side in ("width", "height"):
            add(f"--{side}", type=_side, help=f"pixels, a multiple of 8 (default: {trained_at})")
        add("--steps", type=positive, default=28, help="sampling steps (default: 28)")
        add("--scale", type=float, default=5.0, help="strength of classifier-free guidance (default: 5)")
        add("--sampler", choices=SAMPLERS, metavar="NAME", help=samplers)
        add("--seed", type=partial(_integer, 0), help="seed of each prompt's first image (default: a random seed)")
        add("--images", type=positive, default=1, help="images of each prompt, with consecutive seeds (default: 1)")
        add("--batch_size", type=positive, default=1, help="images that are drawn at once (default: 1)")
        tokens = "tokens of a prompt that are used, a multiple of 75 (default: 225). BREAK starts the next 75"
        add("--max_token_length", type=_token_length, default=225, metavar="TOKENS", help=tokens)
        add(
            "--precision", choices=tuple(PRECISIONS), help="precision of the model (default: bf16 on a GPU, else float)"
        )
        add("--vae", type=Path, help="VAE (file or folder) that replaces the model's own")
        add_vae_options(command)
        unsaid = "The metadata of models from sdxl-train says this already"
        add("--use_zero_cond", action="store_true", help=f"an empty prompt means zeros to the model. {unsaid}")
        add_drawn_objective(command)


def _add_card(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    text = "write the release page of a checkpoint, as Markdown and HTML, in English and Chinese"
    card = commands.add_parser("card", help=text, description=text)
    card.set_defaults(run=_card)
    card.add_argument("model", type=Path, help="file or diffusers folder")
    card.add_argument("--config", metavar="FILE", help="config of the run that trained the model")
    card.add_argument("--facts", type=Path, metavar="FILE", help="TOML file of what only the author knows")
    card.add_argument("--output", type=Path, default=Path("card"), help="folder (default: card)")
    card.add_argument("--overwrite", action="store_true", help="replace the pages if they exist")
    samples = "folder of sample pictures (PNG). Default: the previews that the run drew with this model"
    card.add_argument("--samples", type=Path, metavar="FOLDER", help=samples)
    tags = "tag report (.parquet). Default: the report of this model in output_dir/tags"
    card.add_argument("--tags", type=Path, metavar="FILE", help=tags)
    return card


def _card(arguments: argparse.Namespace) -> None:
    from sdxl_finetune.commands.card import card

    card(arguments)


def _generate(arguments: argparse.Namespace) -> None:
    from sdxl_finetune.commands.generate import generate

    generate(arguments, auto_v2(arguments.model).lower() if arguments.model.is_file() else None)


def _compare(arguments: argparse.Namespace) -> None:
    from sdxl_finetune.commands.generate import compare

    _check_output(arguments)
    compare(arguments)


def _merge(arguments: argparse.Namespace) -> None:
    from sdxl_finetune.commands.merge import merge

    merge(arguments, _choose_format(arguments), _precision(arguments))


def _adapt(arguments: argparse.Namespace) -> None:
    adapt(arguments, _choose_format(arguments), _precision(arguments))


def _precision(arguments: argparse.Namespace) -> "torch.dtype | None":
    """The dtype of `save_precision`; None if it is not given."""
    import torch

    return getattr(torch, PRECISIONS[arguments.save_precision]) if arguments.save_precision else None


def _tags(arguments: argparse.Namespace, options: Sequence[str] = ()) -> int:
    from sdxl_finetune.commands.tags import tags

    return tags(arguments, options)


def _integer(least: int, text: str) -> int:
    if not text.strip().isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text}: must be an integer of at least {least}")
    return int(text)


def _integers(least: int, text: str) -> tuple[int, ...]:
    return tuple(_integer(least, number) for number in text.split(","))


def _token_length(text: str) -> int:
    tokens = _integer(CHUNK, text)
    if tokens % CHUNK:
        raise argparse.ArgumentTypeError(f"{text}: must be a multiple of {CHUNK}")
    return tokens


def _side(text: str) -> int:
    side = _integer(64, text)
    if side % 8:
        raise argparse.ArgumentTypeError(f"{text}: must be a multiple of 8")
    return side


def _init(arguments: argparse.Namespace) -> None:
    import torch

    from sdxl_finetune.model.random_model import SMALL, TINY, build_random_model
    from sdxl_finetune.model.save import save_checkpoint

    architecture = _change_preset({"tiny": TINY, "small": SMALL}[arguments.preset], arguments)
    save_as = _choose_format(arguments)
    model, vae = build_random_model(architecture, arguments.seed)
    dtype = getattr(torch, PRECISIONS[arguments.save_precision or "fp16"])
    with atomic_path(arguments.output) as temporary:
        save_checkpoint(temporary, model, vae, save_as=save_as, dtype=dtype, metadata={})
    parameters = sum(parameter.numel() for parameter in model.unet.parameters())
    print(f"wrote {arguments.output}: {parameters / 1e6:.1f} million parameters in the U-Net")


def _change_preset(preset: "Architecture", arguments: argparse.Namespace) -> "Architecture":
    """Returns the preset with the sizes from the command line. Raises UserError if the sizes do not fit together."""
    from sdxl_finetune.model.architecture import width_problems
    from sdxl_finetune.model.random_model import text_size

    names = ("unet_widths", "unet_layers", "transformer_layers", "vae_widths", "vae_layers", "latent_channels")
    sizes = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    problems = []
    for name in ("te1", "te2"):
        value = getattr(arguments, name)
        if value and len(value) == 2:
            sizes[name] = text_size(*value)
        elif value:
            problems.append(Problem("must be two numbers: WIDTH,LAYERS", key=name, value=value))
    built = dataclasses.replace(preset, **sizes)
    levels = {name: len(getattr(built, name)) for name in names[:3]}
    if len(set(levels.values())) > 1:
        problems.append(Problem(f"each of these options needs one number per level of the U-Net: {levels}"))
    problems += [Problem(problem) for problem in width_problems(built)]
    if not built.transformer_layers[-1]:
        problems.append(Problem("the last level needs attention. Its number must not be 0", key="transformer_layers"))
    if problems:
        raise UserError(problems)
    return dataclasses.replace(
        built, middle_transformer_layers=built.transformer_layers[-1], time_width=4 * built.unet_widths[0]
    )


def _convert(arguments: argparse.Namespace) -> None:
    import torch

    from sdxl_finetune.model.load import load_checkpoint
    from sdxl_finetune.model.save import saturated, save_checkpoint

    save_as = _choose_format(arguments)
    loaded = load_checkpoint(arguments.model, dtype=None, vae_path=arguments.vae, options=vae_options(arguments))
    if arguments.save_precision:
        dtype = getattr(torch, PRECISIONS[arguments.save_precision])
    else:
        dtype = loaded.model.unet.dtype
    if names := saturated(loaded.model, loaded.vae, dtype):
        message = f"fp16 holds values up to 65504. These tensors exceed it: {', '.join(names)}. Choose bf16 or float"
        raise UserError(Problem(message, key="save_precision", value="fp16", file=str(arguments.model)))
    metadata = write_objective(loaded, arguments)
    with atomic_path(arguments.output) as temporary:
        save_checkpoint(
            temporary,
            loaded.model,
            loaded.vae,
            save_as=save_as,
            dtype=dtype,
            metadata=metadata,
            epoch=loaded.epoch or 0,
            global_step=loaded.global_step or 0,
        )
    print(f"wrote {arguments.output} ({str(dtype).removeprefix('torch.')})")


def _choose_format(arguments: argparse.Namespace) -> "SaveAs":
    """Returns the option `save_model_as`, or the format for the output's suffix. Raises UserError if it exists."""
    _check_output(arguments)
    suffixes = {".safetensors": "safetensors", ".ckpt": "ckpt"}
    by_name: SaveAs = suffixes.get(arguments.output.suffix, "diffusers_safetensors")  # type: ignore[assignment]
    return arguments.save_model_as or by_name


def _check_output(arguments: argparse.Namespace) -> None:
    if arguments.output.exists() and not arguments.overwrite:
        raise UserError(
            Problem("the output exists already. Choose another name, or add --overwrite", file=str(arguments.output))
        )


def _info(arguments: argparse.Namespace) -> None:
    from sdxl_finetune.model.declared import read_declared
    from sdxl_finetune.model.interfaces import describe_interfaces
    from sdxl_finetune.model.load import inspect_checkpoint
    from sdxl_finetune.model.unconditional import describe_unconditional

    path = arguments.model
    checkpoint = inspect_checkpoint(path)
    print(printable(f"{path}: {checkpoint.format}, {checkpoint.kind or 'an SDXL base model'}"))
    if path.is_file():
        print(f"size: {path.stat().st_size:,} bytes, AutoV2 hash {auto_v2(path)}")
    for part, sources in _group_by_part(checkpoint.file.tensors).items():
        parameters = sum(math.prod(source.shape) for source in sources)
        dtypes = sorted({str(source.dtype).removeprefix("torch.") for source in sources})
        print(f"{part}: {parameters:,} parameters in {len(sources)} tensors ({', '.join(dtypes)})")
    if checkpoint.architecture:
        for field in dataclasses.fields(checkpoint.architecture):
            print(f"  {field.name} = {getattr(checkpoint.architecture, field.name)}")
    _print_metadata(checkpoint.file.metadata, most=None if arguments.all else MOST_OF_A_VALUE)
    if checkpoint.kind is None:
        for line in describe_interfaces(path, checkpoint.file):
            print(printable(line))
        for line in latent_lines(checkpoint.architecture) if checkpoint.architecture else ():
            print(line)
        for line in describe_unconditional(read_declared(checkpoint.file).zero_cond):
            print(line)


def _print_metadata(metadata: "Mapping[str, str]", *, most: int | None) -> None:
    """Prints all fields, and of each value the first `most` characters."""
    for key, value in sorted(metadata.items()):
        text = printable(value)
        if most is not None and len(text) > most:
            text = f"{text[:most]}... ({len(value):,} characters, --all shows them)"
        print(f"metadata {printable(key)[:most]}: {text}")


def _group_by_part(tensors: "Mapping[str, Source]") -> "dict[str, list[Source]]":
    """Groups tensors by the part of SDXL that they belong to. Parts without tensors are left out."""
    from sdxl_finetune.model.keymap import TE1, TE2, UNET, VAE

    prefixes = {
        "U-Net": (UNET, "unet."),
        "text encoder 1": (TE1, "te1."),
        "text encoder 2": (TE2, "te2."),
        "VAE": (VAE, "vae."),
        "other": ("",),
    }
    parts: dict[str, list[Source]] = {part: [] for part in prefixes}
    for key, source in tensors.items():
        parts[next(part for part, prefix in prefixes.items() if key.startswith(prefix))].append(source)
    return {part: sources for part, sources in parts.items() if sources}
