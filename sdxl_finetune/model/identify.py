"""Recognises checkpoints that are not SDXL base models, by tensors that only their kind has.

`kind_of` names the kind for the user. None means that the checkpoint has everything that an SDXL base model has, of any
size. The file layouts are those that model hubs and user interfaces exchange.
"""

from collections.abc import Mapping

import torch

from sdxl_finetune.model.keymap import TE1, TE2, UNET, VAE
from sdxl_finetune.model.tensorfile import Source

_MARKS = (
    (("lora_", "lora.up", "lora.down", "hada_w1", "lokr_w1", "oft_blocks"), "a LoRA (or LyCORIS)"),
    (("control_model.", "input_hint_block.", "controlnet_"), "a ControlNet"),
    (("motion_modules.",), "an AnimateDiff motion module"),
    (("time_stack.", "temporal_transformer_blocks."), "Stable Video Diffusion"),
    (("double_blocks.", "single_transformer_blocks."), "Flux (or a relative)"),
    (("joint_blocks.", "attn.add_k_proj", "context_embedder."), "Stable Diffusion 3"),
    (("transformer_blocks.0.img_mod.",), "Qwen-Image"),
    (("cap_embedder.",), "Lumina (or a relative)"),
    (("double_layers.",), "AuraFlow"),
    (("adaln_single.", "t_block.1."), "PixArt"),
    (("clip_txt_pooled_mapper.", "effnet_mapper."), "Stable Cascade"),
    (("cond_stage_model.transformer.",), "Stable Diffusion 1.x"),
    (("cond_stage_model.model.",), "Stable Diffusion 2.x"),
    (("conditioner.embedders.0.model.",), "the SDXL refiner"),
    (("emb_params", "string_to_param", "clip_g"), "a textual inversion embedding"),
)
_QUANTISED = (".absmax", ".quant_map", ".weight_scale", "scaled_fp8")
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_CHANNELS = {8: "an InstructPix2Pix model", 9: "an inpainting model"}
_CONV_OUT = (f"{UNET}out.2.weight", "unet.conv_out.weight")
_PARTS = (
    ("U-Net", f"{UNET}input_blocks.0.0.weight", "unet.conv_in.weight"),
    (
        "first text encoder",
        f"{TE1}text_model.embeddings.token_embedding.weight",
        "te1.text_model.embeddings.token_embedding.weight",
    ),
    (
        "second text encoder",
        f"{TE2}token_embedding.weight",
        "te2.text_model.embeddings.token_embedding.weight",
    ),
    ("VAE", f"{VAE}encoder.conv_in.weight", "vae.encoder.conv_in.weight"),
)


def kind_of(tensors: Mapping[str, Source], *, needs_vae: bool = True) -> str | None:
    """The kind of the model with these tensors, with its article; None for an SDXL base model."""
    if any(source.dtype in _FLOAT8 for source in tensors.values()):
        return "an fp8 model (8-bit weights, which cannot be trained)"
    if _marked(tensors, _QUANTISED):
        return "a quantised model, which cannot be trained"
    present = [part for part, *keys in _PARTS if any(key in tensors for key in keys)]
    # A complete SDXL may hold any other tensors as well, because tools that merge models leave some behind.
    if len(present) < len(_PARTS):
        for marks, kind in _MARKS:
            if _marked(tensors, marks):
                return kind
    if not present:
        return _kind_of_single_part(tensors)
    if "U-Net" in present and (other := _unet_kind(tensors)):
        return other
    missing = [part for part, *_ in _PARTS if part not in present and (needs_vae or part != "VAE")]
    if missing:
        return f"an incomplete model: it has no {' and no '.join(missing)}"
    return None


def _marked(tensors: Mapping[str, Source], marks: tuple[str, ...]) -> bool:
    return any(mark in key for key in tensors for mark in marks)


def _unet_kind(tensors: Mapping[str, Source]) -> str | None:
    channels = next(tensors[key] for key in _PARTS[0][1:] if key in tensors).shape[1]
    conv_out = next((tensors[key] for key in _CONV_OUT if key in tensors), None)
    if conv_out and channels != conv_out.shape[0]:
        return _CHANNELS.get(channels, f"a U-Net of {channels} input channels") + f" ({channels} input channels)"
    if not any(key in tensors for key in (f"{UNET}label_emb.0.0.weight", "unet.add_embedding.linear_1.weight")):
        return "a Stable Diffusion 1.x or 2.x U-Net (no size conditioning)"
    return None


def _kind_of_single_part(tensors: Mapping[str, Source]) -> str:
    """The kind of a file that holds one part without its prefix, or of an unknown file."""
    if "encoder.conv_in.weight" in tensors:
        return "a VAE alone (which can be given as `vae`)"
    if "conv_in.weight" in tensors or "input_blocks.0.0.weight" in tensors:
        return "a U-Net alone, without text encoders and VAE"
    if any(key.startswith("text_model.") for key in tensors):
        return "a text encoder alone"
    return f"no kind that is known here (its first tensors are {', '.join(list(tensors)[:3])})"
