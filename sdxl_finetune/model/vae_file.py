"""Reads from a file or folder the architecture of its VAE, and the scale of its latents.

Weights do not show the scale, and a U-Net that is given latents of another scale draws noise. These places say it, and
the first of them counts:

- the options `vae_custom_scale` and `vae_custom_shift`
- `config.json` of a diffusers folder, or beside a VAE file of such a folder
- tensors of checkpoints of this program: `latent_shift` and `latent_scale`
- statistics of a batch norm in the VAE of Flux 2
- four latent channels, which are SDXL's
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_finetune.batch import LATENT_CHANNELS
from sdxl_finetune.config import VaeOptions
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.model.architecture import VaeArchitecture
from sdxl_finetune.model.latent_scale import SDXL_SCALE, LatentScale, scale_of_config
from sdxl_finetune.model.named_tensors import NamedTensors
from sdxl_finetune.model.vae import PADDING

SHIFT, SCALE, REFLECTION = "vae.latent_shift", "vae.latent_scale", "vae.reflection_padding"
"""Names of the tensors by which a single file says how its latents differ from SDXL's. SDXL's own need none."""
LATENTS = "sdxl_finetune.latents"
"""Metadata field of a .safetensors file that says channels, shift, scale and padding, as JSON."""
NORM_MEAN, NORM_VARIANCE = "vae.bn.running_mean", "vae.bn.running_var"
VAE_EXTRAS = (SHIFT, SCALE, REFLECTION, NORM_MEAN, NORM_VARIANCE, "vae.bn.num_batches_tracked")
"""Names of tensors of a VAE that are no weights of AutoencoderKL."""
NO_OPTIONS = VaeOptions()
_QUANT_CONVS = tuple(f"vae.{name}.{kind}" for name in ("quant_conv", "post_quant_conv") for kind in ("weight", "bias"))
_CLASSES = ("AutoencoderKL", "AutoencoderKLFlux2")
_NORM_EPSILON = 1e-4
"""Number that diffusers' AutoencoderKLFlux2 adds to the variance of its batch norm."""


def read_vae(named: NamedTensors, config: Mapping[str, Any], options: VaeOptions = NO_OPTIONS) -> VaeArchitecture:
    """The architecture of the VAE with these tensors. `config` is its config.json, or empty.

    Raises UserError for a VAE of another kind, and for options that do not fit it.
    """
    kind = config.get("_class_name", "AutoencoderKL")
    weight = named.shape("vae.decoder.conv_in.weight")
    if kind not in _CLASSES or len(weight) != 4:
        message = f"this VAE is of the class {kind}" if kind not in _CLASSES else "this VAE is not one of images"
        raise UserError(f"{message}, and only AutoencoderKL can be used: choose another VAE")
    channels = weight[1]
    if options.given_channels not in (None, channels):
        option = "latent_channels" if options.latent_channels else "vae_type"
        message = f"the VAE has {channels} latent channels, not {options.given_channels}: remove this option or choose"
        raise UserError(Problem(f"{message} another VAE", key=option, value=getattr(options, option)))
    levels = range(named.layout.vae_levels)
    is_reflected = REFLECTION in named or config.get(PADDING) == "reflect"
    return VaeArchitecture(
        vae_widths=tuple(named.shape(f"vae.encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in levels),
        vae_layers=named.layout.vae_layers,
        latent_channels=channels,
        latent_scale=_with_options(_said_scale(named, config, channels), channels, options),
        vae_quant_conv=any(name in named for name in _QUANT_CONVS),
        vae_reflection_padding=options.vae_reflection_padding or is_reflected,
    )


def check_scale(vae: VaeArchitecture) -> None:
    """Raises UserError if nothing says the scale of the VAE's latents."""
    if vae.latent_scale is None:
        raise UserError(
            f"this VAE has {vae.latent_channels} latent channels, and nothing says the scale of its latents: set"
            " vae_custom_scale and vae_custom_shift. Flux.1 has 0.3611 and 0.1159, Stable Diffusion 3 has 1.5305 and"
            " 0.0609, and sdxl-model latent-stats measures them"
        )


def unet_channels(named: NamedTensors) -> int:
    """Channels of the latents that the U-Net works on."""
    return named.shape("unet.conv_in.weight")[1]


def check_channels(named: NamedTensors, vae: VaeArchitecture, vae_path: Path | None) -> None:
    """Raises UserError if the U-Net and the VAE, which is the model's own without `vae_path`, do not fit together."""
    channels = unet_channels(named)
    if channels != vae.latent_channels:
        whose = f"the VAE {vae_path}" if vae_path else "the VAE in this model"
        message = f"the U-Net works on latents of {channels} channels, but {whose} has {vae.latent_channels}"
        remedy = "choose its own VAE, or write a U-Net for this one: sdxl-model adapt-latents MODEL NEW --vae VAE"
        raise UserError(f"{message}: {remedy}")


def scale_tensors(architecture: VaeArchitecture) -> dict[str, Tensor]:
    """Tensors by name that say the scale and the padding in a single file. SDXL's own VAE has none."""
    tensors, scale = {}, architecture.latent_scale
    if scale and (scale != SDXL_SCALE or architecture.latent_channels != LATENT_CHANNELS):
        for name, values in ((SHIFT, scale.shift), (SCALE, scale.scale)):
            tensors[name] = torch.tensor(values, dtype=torch.float64)
    return tensors | ({REFLECTION: torch.empty(0)} if architecture.vae_reflection_padding else {})


def describe_latents(architecture: VaeArchitecture) -> dict[str, str]:
    """Metadata that says the latents of a published model to readers, as JSON. SDXL's own VAE has none."""
    if not scale_tensors(architecture):
        return {}
    fields: dict[str, Any] = {"channels": architecture.latent_channels}
    if architecture.latent_scale:
        fields |= {"shift": architecture.latent_scale.shift, "scale": architecture.latent_scale.scale}
    fields["padding"] = "reflect" if architecture.vae_reflection_padding else "zeros"
    return {LATENTS: json.dumps(fields)}


def _with_options(said: LatentScale | None, channels: int, options: VaeOptions) -> LatentScale | None:
    """The scale that a file says, replaced by what the options say."""
    if said is None and options.given_scale is None:
        return None
    said = said or LatentScale()
    scale = LatentScale(shift=options.given_shift or said.shift, scale=options.given_scale or said.scale)
    for option, values in (("vae_custom_scale", scale.scale), ("vae_custom_shift", scale.shift)):
        if len(values) not in (1, channels):
            message = f"holds {len(values)} numbers, but the VAE has {channels} latent channels: give one number, or"
            raise UserError(Problem(f"{message} {channels}", key=option))
    return scale


def _said_scale(named: NamedTensors, config: Mapping[str, Any], channels: int) -> LatentScale | None:
    """The scale that the file or folder says."""
    if config and config.get("_class_name") != "AutoencoderKLFlux2":
        return scale_of_config(config)
    if SHIFT in named and SCALE in named:
        shift, scale = (tuple(named.read(name).tolist()) for name in (SHIFT, SCALE))
        return LatentScale(shift=shift, scale=scale)
    if NORM_MEAN in named and NORM_VARIANCE in named:
        return _scale_of_norm(named, channels, float(config.get("batch_norm_eps", _NORM_EPSILON)))
    return SDXL_SCALE if channels == LATENT_CHANNELS else None


def _scale_of_norm(named: NamedTensors, channels: int, epsilon: float) -> LatentScale:
    """The mean and the deviation of each latent channel, of a batch norm over patches of latents.

    The batch norm of Flux 2 has four statistics for each channel, one for each place in patches of 2 x 2. SDXL's U-Net
    works on latents without patches. By the law of total variance the variance of a channel is the mean of the four
    variances plus the variance of the four means.
    """
    means, variances = (named.read(name).double().view(channels, -1) for name in (NORM_MEAN, NORM_VARIANCE))
    variance = variances.mean(1) + means.var(1, correction=0) + epsilon
    return LatentScale(shift=tuple(means.mean(1).tolist()), scale=tuple(variance.rsqrt().tolist()))
