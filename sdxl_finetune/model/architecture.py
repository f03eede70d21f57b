"""The architecture of an SDXL model of any width and depth: a few numbers, read from a checkpoint's names and shapes.

Shapes do not say the number of attention heads. It is max(1, width // 64) everywhere, which gives the original's number
at the original's size. Activations, epsilons and the 32 norm groups are those of the original SDXL.
"""

from dataclasses import dataclass, fields
from typing import Any

from sdxl_finetune.batch import LATENT_CHANNELS, LatentSize
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.model.keymap import Layout, Level
from sdxl_finetune.model.latent_scale import SDXL_SCALE, LatentScale
from sdxl_finetune.model.named_tensors import NamedTensors, common_value


@dataclass(frozen=True, kw_only=True)
class TextSize:
    """The size of a text encoder."""

    width: int
    layers: int
    mlp_width: int
    projection: int
    """Channels of the pooled output. That of the first encoder is not used."""
    vocabulary: int = 49408
    positions: int = 77


@dataclass(frozen=True, kw_only=True)
class VaeArchitecture:
    """The numbers that a VAE is built from, and the scale of its latents."""

    vae_widths: tuple[int, ...]
    vae_layers: int
    latent_channels: int = LATENT_CHANNELS
    latent_scale: LatentScale | None = SDXL_SCALE
    """Shift and scale of the latents that the U-Net works on. None: nothing says them, and nothing can be encoded."""
    vae_quant_conv: bool = True
    """True if 1x1 convolutions follow the encoder and precede the decoder, as in SDXL's VAE."""
    vae_reflection_padding: bool = False
    """True if the convolutions pad by reflection, and not with zeros as in SDXL's VAE."""

    @property
    def latent_size(self) -> LatentSize:
        """Channels of latents, and how much smaller they are than images: 4 and 8 for SDXL's four levels."""
        return LatentSize(2 ** (len(self.vae_widths) - 1), self.latent_channels)


@dataclass(frozen=True, kw_only=True)
class Architecture(VaeArchitecture):
    """All numbers that the modules are built from. The U-Net has as many channels as the VAE's latents."""

    unet_widths: tuple[int, ...]
    """Channels of each level, multiples of 32."""
    unet_layers: tuple[int, ...]
    """Residual layers of each level on the way down. On the way up there is one more."""
    transformer_layers: tuple[int, ...]
    """Transformer layers of each attention on a level; 0 for a level without attention."""
    middle_transformer_layers: int
    """Transformer layers of the middle block: those of the last level, if that has attention."""
    time_width: int
    size_width: int = 256
    """Channels of the embedding of each of the six numbers of the size conditioning."""
    te1: TextSize
    te2: TextSize

    @property
    def layout(self) -> Layout:
        """The numbers that the names of the tensors depend on."""
        return Layout(
            unet=tuple(Level(n, bool(m)) for n, m in zip(self.unet_layers, self.transformer_layers, strict=True)),
            te2_layers=self.te2.layers,
            vae_levels=len(self.vae_widths),
            vae_layers=self.vae_layers,
        )


FULL = Architecture(
    unet_widths=(320, 640, 1280),
    unet_layers=(2, 2, 2),
    transformer_layers=(0, 2, 10),
    middle_transformer_layers=10,
    time_width=1280,
    te1=TextSize(width=768, layers=12, mlp_width=3072, projection=768),
    te2=TextSize(width=1280, layers=32, mlp_width=5120, projection=1280),
    vae_widths=(128, 256, 512, 512),
    vae_layers=2,
)
"""The original SDXL: 2.57 billion parameters in the U-Net, 0.82 billion in the text encoders."""


def heads(width: int) -> int:
    """Number of attention heads of a layer with `width` channels."""
    return max(1, width // 64)


def unet_config(architecture: Architecture) -> dict[str, Any]:
    """Arguments of diffusers' UNet2DConditionModel."""
    attention = ["CrossAttn" if count else "" for count in architecture.transformer_layers]
    layers, usual_time_width = architecture.unet_layers, 4 * architecture.unet_widths[0]
    return {
        "sample_size": 128,
        "in_channels": architecture.latent_channels,
        "out_channels": architecture.latent_channels,
        "block_out_channels": list(architecture.unet_widths),
        "layers_per_block": list(layers) if len(set(layers)) > 1 else layers[0],
        "down_block_types": [f"{kind}DownBlock2D" for kind in attention],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(attention)],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        # diffusers uses the last number for the middle block, and needs a number for levels without attention.
        "transformer_layers_per_block": [
            *(count or 1 for count in architecture.transformer_layers[:-1]),
            architecture.middle_transformer_layers,
        ],
        # diffusers' name for the number of heads.
        "attention_head_dim": [heads(width) for width in architecture.unet_widths],
        "cross_attention_dim": architecture.te1.width + architecture.te2.width,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": architecture.size_width,
        "projection_class_embeddings_input_dim": 6 * architecture.size_width + architecture.te2.projection,
        "time_embedding_dim": None if architecture.time_width == usual_time_width else architecture.time_width,
    }


def text_config(size: TextSize, activation: str) -> dict[str, Any]:
    """Arguments of transformers' CLIPTextConfig. `activation` is quick_gelu for CLIP (te1), gelu for OpenCLIP (te2)."""
    return {
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "intermediate_size": size.mlp_width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": heads(size.width),
        "max_position_embeddings": size.positions,
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
        "projection_dim": size.projection,
        "pad_token_id": 1,
        "bos_token_id": 49406,
        # Pooling uses the first token with this id. With transformers' legacy value 2 it would use the highest id.
        "eos_token_id": 49407,
    }


def te1_config(architecture: Architecture) -> dict[str, Any]:
    return text_config(architecture.te1, "quick_gelu")


def te2_config(architecture: Architecture) -> dict[str, Any]:
    return text_config(architecture.te2, "gelu")


def vae_config(architecture: VaeArchitecture) -> dict[str, Any]:
    """Arguments of diffusers' AutoencoderKL."""
    widths, quant_conv = architecture.vae_widths, architecture.vae_quant_conv
    config: dict[str, Any] = {
        "block_out_channels": list(widths),
        "down_block_types": ["DownEncoderBlock2D" for _ in widths],
        "up_block_types": ["UpDecoderBlock2D" for _ in widths],
        "layers_per_block": architecture.vae_layers,
        "latent_channels": architecture.latent_channels,
        "norm_num_groups": 32,
        "sample_size": 1024,
    }
    if architecture.latent_scale:
        config |= architecture.latent_scale.to_config(architecture.latent_channels)
    return config if quant_conv else {**config, "use_quant_conv": False, "use_post_quant_conv": False}


def read_architecture(named: NamedTensors, vae: VaeArchitecture) -> Architecture:
    """Reads the architecture of the model with tensors `named`, whose latents are those of `vae`.

    Raises UserError if the model is not an SDXL.
    """
    levels = named.layout.unet
    te1, te2 = _text_size("te1", named), _text_size("te2", named)
    widths = tuple(named.shape(f"unet.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(len(levels)))
    size_channels = named.shape("unet.add_embedding.linear_1.weight")[1] - te2.projection
    if size_channels <= 0 or size_channels % 6:
        message = f"the U-Net's label embedding does not hold six sizes beside te2's {te2.projection} channels"
        raise UserError(f"{message}: this is not SDXL")
    middle = _depth(named, "unet.mid_block.attentions.0")
    if not middle:
        raise UserError("the U-Net's middle block has no attention: this is not SDXL but a distilled one (as SSD-1B)")
    architecture = Architecture(
        unet_widths=widths,
        unet_layers=tuple(level.layers for level in levels),
        transformer_layers=_transformer_layers(named, middle),
        middle_transformer_layers=middle,
        time_width=named.shape("unet.time_embedding.linear_1.weight")[0],
        size_width=size_channels // 6,
        te1=te1,
        te2=te2,
        **{field.name: getattr(vae, field.name) for field in fields(VaeArchitecture)},
    )
    if problems := width_problems(architecture):
        raise UserError([Problem(problem) for problem in problems])
    return architecture


def width_problems(architecture: Architecture) -> list[str]:
    """The problems of widths that are not divisible by their norm groups or attention heads."""
    unet = [("the U-Net", width) for width in architecture.unet_widths]
    normed = [*unet, *(("the VAE", width) for width in architecture.vae_widths)]
    problems = [f"{part} has a level of {width} channels, no multiple of 32" for part, width in normed if width % 32]
    with_heads = [("te1", architecture.te1.width), ("te2", architecture.te2.width), *unet]
    return problems + [
        f"{part} has a width of {width}, which is not divisible by its {heads(width)} attention heads"
        for part, width in with_heads
        if width % heads(width)
    ]


def _text_size(part: str, named: NamedTensors) -> TextSize:
    vocabulary, width = named.shape(f"{part}.text_model.embeddings.token_embedding.weight")
    layer = f"{part}.text_model.encoder.layers.{{}}.mlp.fc1.weight"
    return TextSize(
        width=width,
        layers=named.count(layer),
        mlp_width=named.shape(layer.format(0))[0],
        projection=named.shape("te2.text_projection.weight")[0] if part == "te2" else width,
        vocabulary=vocabulary,
        positions=named.shape(f"{part}.text_model.embeddings.position_embedding.weight")[0],
    )


def _transformer_layers(named: NamedTensors, middle: int) -> tuple[int, ...]:
    """Reads the transformer layers of each level. All attentions of a level, down and up, must have as many."""
    levels = named.layout.unet
    layers = []
    for i, level in enumerate(levels):
        up = len(levels) - 1 - i
        places = [f"unet.down_blocks.{i}.attentions.{j}" for j in range(level.layers)]
        places += [f"unet.up_blocks.{up}.attentions.{j}" for j in range(level.layers + 1)]
        depths = [_depth(named, place) for place in places]
        if i + 1 == len(levels) and level.attention:
            depths.append(middle)
        layers.append(common_value(depths, f"number of transformer layers of level {i}"))
    return tuple(layers)


def _depth(named: NamedTensors, attention: str) -> int:
    return named.count(f"{attention}.transformer_blocks.{{}}.norm1.weight")
