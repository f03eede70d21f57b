"""The architecture of an SDXL model of any width and depth: a few numbers, read off a checkpoint's names and shapes.

Attention heads are not in the shapes: there are max(1, width // 64) everywhere, which gives the head counts of
the original at its size. Everything else that shapes do not say (activations, epsilons, 32 norm groups) is as in
the original SDXL.
"""

from dataclasses import dataclass
from typing import Any

from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.model.keymap import Layout, Level
from sdxl_finetune.model.layout import Named, same

SCALING_FACTOR = 0.13025
"""Of SDXL's VAE: latents are multiplied by it before the U-Net sees them."""


@dataclass(frozen=True, kw_only=True)
class TextSize:
    """A text encoder."""

    width: int
    layers: int
    mlp_width: int
    projection: int
    """Channels of the pooled output (the first encoder has none that is used)."""
    vocabulary: int = 49408
    positions: int = 77


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything that the modules are built from."""

    unet_widths: tuple[int, ...]
    """Channels of each level, multiples of 32."""
    unet_layers: tuple[int, ...]
    """Residual layers of each level on the way down; there is one more on the way up."""
    transformer_layers: tuple[int, ...]
    """Of each attention on a level; 0 where a level has no attention."""
    middle_transformer_layers: int
    """Those of the last level, if it has attention."""
    time_width: int
    size_width: int = 256
    """Channels that each of the six numbers of the size conditioning is embedded in."""
    te1: TextSize
    te2: TextSize
    vae_widths: tuple[int, ...]
    vae_layers: int

    @property
    def layout(self) -> Layout:
        """What the names of its tensors depend on."""
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
"""SDXL itself: 2.57 billion parameters in the U-Net, 0.82 in the encoders."""


def heads(width: int) -> int:
    """Attention heads of a layer of `width` channels."""
    return max(1, width // 64)


def unet_config(built: Architecture) -> dict[str, Any]:
    """Arguments of diffusers' UNet2DConditionModel."""
    attention = ["CrossAttn" if layers else "" for layers in built.transformer_layers]
    usual_time_width = 4 * built.unet_widths[0]
    return {
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": list(built.unet_widths),
        "layers_per_block": list(built.unet_layers) if len(set(built.unet_layers)) > 1 else built.unet_layers[0],
        "down_block_types": [f"{kind}DownBlock2D" for kind in attention],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(attention)],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        # diffusers takes the middle block's from the last, and wants a number where there is no attention.
        "transformer_layers_per_block": [
            *(layers or 1 for layers in built.transformer_layers[:-1]),
            built.middle_transformer_layers,
        ],
        # diffusers calls the number of heads so.
        "attention_head_dim": [heads(width) for width in built.unet_widths],
        "cross_attention_dim": built.te1.width + built.te2.width,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": built.size_width,
        "projection_class_embeddings_input_dim": 6 * built.size_width + built.te2.projection,
        "time_embedding_dim": None if built.time_width == usual_time_width else built.time_width,
    }


def text_config(size: TextSize, activation: str) -> dict[str, Any]:
    """Arguments of transformers' CLIPTextConfig; `activation` is quick_gelu for CLIP (te1), gelu for OpenCLIP (te2)."""
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
        # Pooling takes the first of these; with transformers' legacy value 2 it would take the highest token id.
        "eos_token_id": 49407,
    }


def te1_config(built: Architecture) -> dict[str, Any]:
    return text_config(built.te1, "quick_gelu")


def te2_config(built: Architecture) -> dict[str, Any]:
    return text_config(built.te2, "gelu")


def vae_config(built: Architecture) -> dict[str, Any]:
    """Arguments of diffusers' AutoencoderKL."""
    return _vae_config(built.vae_widths, built.vae_layers)


def read_vae_config(vae: Named) -> dict[str, Any]:
    """The same of the VAE with these tensors."""
    return _vae_config(_vae_widths(vae), vae.layout.vae_layers)


def _vae_config(widths: tuple[int, ...], layers: int) -> dict[str, Any]:
    return {
        "block_out_channels": list(widths),
        "down_block_types": ["DownEncoderBlock2D" for _ in widths],
        "up_block_types": ["UpDecoderBlock2D" for _ in widths],
        "layers_per_block": layers,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "scaling_factor": SCALING_FACTOR,
    }


def read_architecture(named: Named, vae: Named) -> Architecture:
    """The architecture of the model with these tensors, and of the VAE with those. UserError when the model is none of
    SDXL's kind.
    """
    levels = named.layout.unet
    te1, te2 = _text_size("te1", named), _text_size("te2", named)
    widths = tuple(named.shape(f"unet.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(len(levels)))
    sizes = named.shape("unet.add_embedding.linear_1.weight")[1] - te2.projection
    if sizes <= 0 or sizes % 6:
        raise UserError(f"the U-Net's label embedding has no room for six sizes beside te2's {te2.projection} channels")
    middle = _depth(named, "unet.mid_block.attentions.0")
    if not middle:
        raise UserError("the U-Net's middle block has no attention: this is a distilled SDXL (as SSD-1B), not SDXL")
    built = Architecture(
        unet_widths=widths,
        unet_layers=tuple(level.layers for level in levels),
        transformer_layers=_transformer_layers(named, middle),
        middle_transformer_layers=middle,
        time_width=named.shape("unet.time_embedding.linear_1.weight")[0],
        size_width=sizes // 6,
        te1=te1,
        te2=te2,
        vae_widths=_vae_widths(vae),
        vae_layers=vae.layout.vae_layers,
    )
    if problems := width_problems(built):
        raise UserError([Problem(problem) for problem in problems])
    return built


def width_problems(built: Architecture) -> list[str]:
    """What the widths are not divisible by and have to be."""
    grouped = [*(("the U-Net", width) for width in built.unet_widths), *(("the VAE", w) for w in built.vae_widths)]
    problems = [f"{part} has a level of {width} channels, no multiple of 32" for part, width in grouped if width % 32]
    attending = [("te1", built.te1.width), ("te2", built.te2.width), *(("the U-Net", w) for w in built.unet_widths)]
    return problems + [
        f"{part} is {width} wide, which its {heads(width)} attention heads do not divide"
        for part, width in attending
        if width % heads(width)
    ]


def _text_size(part: str, named: Named) -> TextSize:
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


def _transformer_layers(named: Named, middle: int) -> tuple[int, ...]:
    """Of each level, which must be the same everywhere on it, down and up."""
    levels = named.layout.unet
    layers = []
    for i, level in enumerate(levels):
        up = len(levels) - 1 - i
        places = [f"unet.down_blocks.{i}.attentions.{j}" for j in range(level.layers)]
        places += [f"unet.up_blocks.{up}.attentions.{j}" for j in range(level.layers + 1)]
        found = [_depth(named, place) for place in places]
        if i + 1 == len(levels) and level.attention:
            found.append(middle)
        layers.append(same(found, f"number of transformer layers of level {i}"))
    return tuple(layers)


def _depth(named: Named, attention: str) -> int:
    return named.count(f"{attention}.transformer_blocks.{{}}.norm1.weight")


def _vae_widths(vae: Named) -> tuple[int, ...]:
    first = "vae.encoder.down_blocks.{}.resnets.0.conv1.weight"
    return tuple(vae.shape(first.format(i))[0] for i in range(vae.layout.vae_levels))
