"""`sdxl-model`: makes small random models, says what a checkpoint is, converts between layouts and precisions, draws.

Nothing is imported that `--help` does not need; each command imports what it works with.
"""

import argparse
import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.files import atomic_path
from sdxl_finetune.output.prompts import SAMPLERS

if TYPE_CHECKING:
    from sdxl_finetune.model.architecture import Architecture
    from sdxl_finetune.model.save import SaveAs
    from sdxl_finetune.model.tensorfile import Source

PRECISIONS = {"fp16": "float16", "bf16": "bfloat16", "float": "float32"}
FORMATS = ("safetensors", "ckpt", "diffusers", "diffusers_safetensors")


def main(argv: list[str]) -> int:
    """Runs one command and returns the exit status. UserError when the user's input is wrong."""
    arguments = build_parser().parse_args(argv)
    match arguments.command:
        case "init":
            _init(arguments)
        case "info":
            _info(arguments.model)
        case "convert":
            _convert(arguments)
        case "generate" | "compare":
            _picture(arguments)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sdxl-model", description="Makes, describes and converts SDXL checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    init = commands.add_parser("init", help="make a small model with random weights")
    init.add_argument("output", type=Path, help="file (.safetensors, .ckpt) or diffusers folder to write")
    init.add_argument("--preset", choices=("tiny", "small"), default="tiny", help="size to start from (tiny)")
    init.add_argument("--seed", type=int, default=0, help="of the random weights (0)")
    init.add_argument("--unet_widths", type=_numbers, metavar="32,64,128", help="channels of each U-Net level")
    init.add_argument("--unet_layers", type=_numbers, metavar="2,2,2", help="residual layers of each level")
    layers = "transformer layers of each level's attentions; 0 for no attention, but not on the last"
    init.add_argument("--transformer_layers", type=_numbers_or_zero, metavar="0,1,2", help=layers)
    for name, encoder in (("te1", "the first text encoder"), ("te2", "the second text encoder")):
        init.add_argument(f"--{name}", type=_numbers, metavar="WIDTH,LAYERS", help=f"size of {encoder}")
    init.add_argument("--vae_widths", type=_numbers, metavar="32,32,64,64", help="channels of each VAE level")
    init.add_argument("--vae_layers", type=int, choices=(1, 2, 3, 4), help="residual layers of each VAE level")
    info = commands.add_parser("info", help="say what a checkpoint is")
    info.add_argument("model", type=Path, help="file or diffusers folder")
    convert = commands.add_parser("convert", help="save a checkpoint in another layout or precision")
    convert.add_argument("model", type=Path, help="file or diffusers folder to read")
    convert.add_argument("output", type=Path, help="file (.safetensors, .ckpt) or diffusers folder to write")
    convert.add_argument("--vae", type=Path, help="VAE (file or folder) to put in place of the model's own")
    _add_pictures(commands)
    for command in (init, convert):
        command.add_argument("--save_precision", choices=tuple(PRECISIONS), help="default: fp16 (init), as it is")
        command.add_argument("--save_model_as", choices=FORMATS, help="default: by the name of the output")
        command.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    return parser


def _add_pictures(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    generate = commands.add_parser("generate", help="draw pictures")
    generate.add_argument("model", type=Path, help="file or diffusers folder")
    generate.add_argument("--output", type=Path, default=Path("generated"), help="folder for the pictures (generated)")
    compare = commands.add_parser("compare", help="one page of the same prompts and seeds through several checkpoints")
    compare.add_argument("models", type=Path, nargs="+", metavar="model", help="files or diffusers folders")
    compare.add_argument("--output", type=Path, default=Path("compare.html"), help="page to write (compare.html)")
    compare.add_argument("--overwrite", action="store_true", help="replace the page if it exists")
    for command in (generate, compare):
        prompts = "prompt file as for sample_prompts, whose own options win"
        command.add_argument("--prompts", type=Path, metavar="FILE", help=prompts)
        command.add_argument("--prompt", action="append", default=[], help="what to draw; may be given several times")
        command.add_argument("--negative_prompt", help="what to keep away from")
        for side in ("width", "height"):
            command.add_argument(f"--{side}", type=_side, default=1024, help="pixels, a multiple of 8 (1024)")
        command.add_argument("--steps", type=_count, default=28, help="of the sampler (28)")
        command.add_argument("--scale", type=float, default=5.0, help="strength of classifier-free guidance (5)")
        command.add_argument("--sampler", choices=SAMPLERS, default="euler_a", metavar="NAME", help=", ".join(SAMPLERS))
        command.add_argument("--seed", type=_seed, help="of the first picture of each prompt; drawn if not given")
        command.add_argument("--images", type=_count, default=1, help="pictures of each prompt, seed after seed (1)")
        command.add_argument("--batch_size", type=_count, default=1, help="pictures drawn at a time (1)")
        command.add_argument("--max_token_length", type=int, choices=(75, 150, 225), default=225, help="tokens (225)")
        command.add_argument("--precision", choices=tuple(PRECISIONS), help="of the model: float, on a GPU bf16")
        command.add_argument("--vae", type=Path, help="VAE (file or folder) to draw with")
        command.add_argument("--v_parameterization", action="store_true", help="if the file does not say it itself")
        command.add_argument("--zero_terminal_snr", action="store_true", help="if the file does not say it itself")


def _picture(arguments: argparse.Namespace) -> None:
    from sdxl_finetune.commands.generate import compare, generate

    if arguments.command == "compare":
        _check_output(arguments)
        compare(arguments)
    else:
        generate(arguments, auto_v2(arguments.model).lower() if arguments.model.is_file() else None)


def _count(text: str) -> int:
    return _number_from(1, text)


def _seed(text: str) -> int:
    return _number_from(0, text)


def _side(text: str) -> int:
    side = _count(text)
    if side % 8 or side < 64:
        raise argparse.ArgumentTypeError(f"{text}: a multiple of 8, at least 64, is needed")
    return side


def _numbers(text: str) -> tuple[int, ...]:
    return _numbers_from(1, text)


def _numbers_or_zero(text: str) -> tuple[int, ...]:
    return _numbers_from(0, text)


def _numbers_from(least: int, text: str) -> tuple[int, ...]:
    return tuple(_number_from(least, number) for number in text.split(","))


def _number_from(least: int, text: str) -> int:
    if not text.strip().isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text}: a whole number from {least} on is needed")
    return int(text)


def _init(arguments: argparse.Namespace) -> None:
    import torch

    from sdxl_finetune.model.random_model import SMALL, TINY, build_random_model
    from sdxl_finetune.model.save import save_checkpoint

    built = _chosen(arguments, {"tiny": TINY, "small": SMALL}[arguments.preset])
    save_as = _save_as(arguments)
    model, vae = build_random_model(built, arguments.seed)
    dtype = getattr(torch, PRECISIONS[arguments.save_precision or "fp16"])
    with atomic_path(arguments.output) as temporary:
        save_checkpoint(temporary, model, vae, save_as=save_as, dtype=dtype, metadata={})
    parameters = sum(parameter.numel() for parameter in model.unet.parameters())
    print(f"wrote {arguments.output}: {parameters / 1e6:.1f} million parameters in the U-Net")


def _chosen(arguments: argparse.Namespace, preset: "Architecture") -> "Architecture":
    """The preset with what the command line changes. UserError when that is no architecture."""
    from sdxl_finetune.model.architecture import width_problems
    from sdxl_finetune.model.random_model import text_size

    names = ("unet_widths", "unet_layers", "transformer_layers", "vae_widths", "vae_layers")
    changed = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    problems = []
    for name in ("te1", "te2"):
        if (value := getattr(arguments, name)) is not None:
            if len(value) == 2:
                changed[name] = text_size(*value)
            else:
                problems.append(Problem("two numbers, WIDTH,LAYERS, are needed", key=name, value=value))
    built = dataclasses.replace(preset, **changed)
    levels = {name: len(getattr(built, name)) for name in names[:3]}
    if len(set(levels.values())) > 1:
        problems.append(Problem(f"one number per level of the U-Net is needed in each of these: {levels}"))
    problems += [Problem(problem) for problem in width_problems(built)]
    if not built.transformer_layers[-1]:
        problems.append(Problem("the last level needs attention", key="transformer_layers"))
    if problems:
        raise UserError(problems)
    return dataclasses.replace(
        built, middle_transformer_layers=built.transformer_layers[-1], time_width=4 * built.unet_widths[0]
    )


def _convert(arguments: argparse.Namespace) -> None:
    import torch

    from sdxl_finetune.model.load import exact_dtype, load_checkpoint, open_checkpoint
    from sdxl_finetune.model.save import saturated, save_checkpoint

    save_as = _save_as(arguments)
    loaded = load_checkpoint(arguments.model, dtype=None, vae_path=arguments.vae)
    if arguments.save_precision:
        dtype = getattr(torch, PRECISIONS[arguments.save_precision])
    else:
        dtype = exact_dtype(open_checkpoint(arguments.model)[0].tensors)
    if names := saturated(loaded.model, loaded.vae, dtype):
        message = f"these tensors have values that fp16 does not hold (above 65504): {', '.join(names)}"
        raise UserError(Problem(message, key="save_precision", value="fp16", file=str(arguments.model)))
    with atomic_path(arguments.output) as temporary:
        save_checkpoint(
            temporary,
            loaded.model,
            loaded.vae,
            save_as=save_as,
            dtype=dtype,
            metadata=loaded.metadata,
            epoch=loaded.epoch or 0,
            global_step=loaded.global_step or 0,
        )
    print(f"wrote {arguments.output} ({str(dtype).removeprefix('torch.')})")


def _save_as(arguments: argparse.Namespace) -> "SaveAs":
    """The format to write: as asked, or by the output's suffix. UserError when the output exists."""
    _check_output(arguments)
    suffixes = {".safetensors": "safetensors", ".ckpt": "ckpt"}
    by_name: SaveAs = suffixes.get(arguments.output.suffix, "diffusers_safetensors")  # type: ignore[assignment]
    return arguments.save_model_as or by_name


def _check_output(arguments: argparse.Namespace) -> None:
    if arguments.output.exists() and not arguments.overwrite:
        raise UserError(Problem("it exists already: choose another name, or --overwrite", file=str(arguments.output)))


def _info(path: Path) -> None:
    from sdxl_finetune.model.load import inspect_checkpoint

    found = inspect_checkpoint(path)
    print(f"{path}: {found.format}, {found.kind or 'an SDXL base model'}")
    if path.is_file():
        print(f"size: {path.stat().st_size:,} bytes, AutoV2 hash {auto_v2(path)}")
    for part, sources in _by_part(found.file.tensors).items():
        parameters = sum(math.prod(source.shape) for source in sources)
        dtypes = Counter(str(source.dtype).removeprefix("torch.") for source in sources)
        print(f"{part}: {parameters:,} parameters in {len(sources)} tensors ({', '.join(sorted(dtypes))})")
    if found.architecture:
        for field in dataclasses.fields(found.architecture):
            print(f"  {field.name} = {getattr(found.architecture, field.name)}")
    for key, value in sorted(found.file.metadata.items()):
        print(f"metadata {key}: {value}")


def _by_part(tensors: "Mapping[str, Source]") -> "dict[str, list[Source]]":
    """The tensors of each part of SDXL, and the rest."""
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


def auto_v2(path: Path) -> str:
    """The short hash by which model sites know a file: ten hex digits of its SHA-256, upper case."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()[:10].upper()
