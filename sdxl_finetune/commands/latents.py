"""`sdxl-model adapt-latents` and `sdxl-model latent-stats`: models for other latent spaces.

The module imports only what `--help` needs.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_finetune.files import atomic_path

if TYPE_CHECKING:
    import torch

    from sdxl_finetune.config import VaeOptions
    from sdxl_finetune.model.architecture import Architecture
    from sdxl_finetune.model.save import SaveAs

REFORGE_CHANNELS, REFORGE_SCALE, REFORGE_OFFSET = 32, 0.6043, 0.076
"""reForge gives a U-Net of so many channels the VAE's latents times the scale plus the offset."""
IMAGES = 1000
"""Default of `--images`: the error of a mean is then about a thirtieth of its spread over images."""


def add_vae_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that change the scale and the padding of a VAE, as those of a run."""
    numbers = "0.5 or 0.5,0.6,..."
    parser.add_argument("--vae_custom_scale", metavar=numbers, help="factor of latents (default: as the VAE says)")
    parser.add_argument("--vae_custom_shift", metavar=numbers, help="shift of latents (default: as the VAE says)")
    parser.add_argument("--vae_reflection_padding", action="store_true", help="the VAE pads by reflection")


def vae_options(arguments: argparse.Namespace) -> "VaeOptions":
    """The VaeOptions of the command line. Raises UserError."""
    from pydantic import ValidationError

    from sdxl_finetune.config import VaeOptions
    from sdxl_finetune.config.fields import expected
    from sdxl_finetune.errors import Problem, UserError

    names = ("vae_custom_scale", "vae_custom_shift", "vae_reflection_padding")
    given = {name: getattr(arguments, name) for name in names}
    try:
        return VaeOptions(**given)
    except ValidationError as error:
        wrong = [str(mistake["loc"][0]) for mistake in error.errors()]
        raise UserError(
            [
                Problem(f"must be {expected(VaeOptions.model_fields[name])}", key=name, value=given[name])
                for name in wrong
            ]
        ) from None


def add_adapt_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Adds adapt-latents and its options, without those that all writing commands share."""
    text = "write a model for the latents of another VAE, to be trained on"
    adapt = commands.add_parser("adapt-latents", help=text, description=text)
    adapt.add_argument("model", type=Path, help="file or diffusers folder to read")
    adapt.add_argument("output", type=Path, help="file (.safetensors, .ckpt) or diffusers folder to write")
    adapt.add_argument("--vae", type=Path, required=True, help="the new VAE: a file or a diffusers folder")
    channels = "weights of channels that the U-Net does not have yet (default: zero)"
    adapt.add_argument("--new_channels", choices=("zero", "copy"), default="zero", help=channels)
    add_vae_options(adapt)
    return adapt


def adapt(arguments: argparse.Namespace, save_as: "SaveAs", dtype: "torch.dtype | None") -> None:
    """Writes the model with the new VAE, in `dtype`, or each tensor as it was. Raises UserError."""
    from sdxl_finetune.model.adapt import adapt_latents
    from sdxl_finetune.model.load import open_vae_alone, open_weights
    from sdxl_finetune.model.save import converted, save_weights
    from sdxl_finetune.model.vae_file import check_scale

    vae = open_vae_alone(arguments.vae, vae_options(arguments))
    check_scale(vae.architecture)
    opened = open_weights(arguments.model)
    old = opened.weights.architecture
    weights = adapt_latents(opened.weights, vae, arguments.new_channels)
    with atomic_path(arguments.output) as temporary:
        save_weights(
            temporary,
            converted(weights, dtype) if dtype else weights,
            save_as=save_as,
            metadata=opened.file.metadata,
            epoch=opened.file.epoch or 0,
            global_step=opened.file.global_step or 0,
        )
    for path, each in ((arguments.output, weights.architecture), (arguments.model, old)):
        print(f"{path}: latents of {each.latent_channels} channels, {each.latent_scale}")
    print("the model knows nothing of its new latents yet: train it before you draw with it")


def latent_lines(architecture: "Architecture") -> Iterator[str]:
    """Yields what interfaces make of latents other than those of SDXL's own VAE; nothing for these.

    The rules were read in the sources of reForge, ldm_patched/modules: the class SDXL_flux2 in supported_models.py, and
    the class VAE in sd.py. The latent format of SDXL is the same in ComfyUI, Forge and reForge.
    """
    from sdxl_finetune.model.vae_file import describe_latents

    if not describe_latents(architecture):
        return
    channels, scale = architecture.latent_channels, architecture.latent_scale or "nothing says their scale"
    yield f"latents: {channels} channels, {scale}" + _padding(architecture)
    yield "ComfyUI, AUTOMATIC1111 and Forge decode latents of SDXL as 4 channels of scale 0.13025, without a shift"
    if channels == REFORGE_CHANNELS:
        shift = -REFORGE_OFFSET / REFORGE_SCALE
        yield f"reForge decodes SDXL's latents of 32 channels as shift {shift:.6g}, scale {REFORGE_SCALE}"


def _padding(architecture: "Architecture") -> str:
    return ", padding by reflection, which no interface does" if architecture.vae_reflection_padding else ""


def add_stats_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Adds latent-stats and its options."""
    text = "measure the mean and the standard deviation of latents, for vae_custom_shift and vae_custom_scale"
    more = "The images are those of --config FILE. Every option of the config is an option here as well."
    stats = commands.add_parser("latent-stats", help=text, description=f"{text}. {more}", allow_abbrev=False)
    stats.add_argument("--config", required=True, metavar="FILE", help="config that names the VAE and the images")
    images = f"images to measure at most, drawn at random (default: {IMAGES})"
    stats.add_argument("--images", type=int, default=IMAGES, metavar="N", help=images)
    return stats


def stats(arguments: argparse.Namespace, options: Sequence[str]) -> int:
    """Measures latents and prints the result. Returns the exit status. Raises UserError."""
    from sdxl_finetune.commands.latent_stats import latent_stats

    return latent_stats(arguments, options)
