"""Reads and writes the diffusers layout: the folder of a pipeline, and a VAE in any layout.

Tensors get the names of keymap.py (`unet.`, `te1.`, `te2.`, `vae.`). A written folder holds everything that diffusers
needs to open it offline.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig

from sdxl_finetune.config.flow_options import shift_ratio
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.model.architecture import Architecture, te1_config, te2_config, unet_config
from sdxl_finetune.model.declared import ZTSNR, marked_objective, marked_shift
from sdxl_finetune.model.keymap import VAE, module_name
from sdxl_finetune.model.tensorfile import Source, TensorFile, open_tensors, write_pickle, write_safetensors
from sdxl_finetune.model.tokenizer_files import save_tokenizers
from sdxl_finetune.model.vae import build_vae
from sdxl_finetune.model.weights import Weights
from sdxl_finetune.parsing import parse_json

PARTS = {
    "unet": ("unet", ("diffusion_pytorch_model",)),
    "te1": ("text_encoder", ("model", "pytorch_model")),
    "te2": ("text_encoder_2", ("model", "pytorch_model")),
    "vae": ("vae", ("diffusion_pytorch_model",)),
}
"""Folder of each part, and the possible names of its files without suffix. Safetensors files use the first name, .bin
files the last."""

_PIPELINE = (
    ("unet", "diffusers", "UNet2DConditionModel"),
    ("vae", "diffusers", "AutoencoderKL"),
    ("text_encoder", "transformers", "CLIPTextModel"),
    ("text_encoder_2", "transformers", "CLIPTextModelWithProjection"),
    ("tokenizer", "transformers", "CLIPTokenizer"),
    ("tokenizer_2", "transformers", "CLIPTokenizer"),
)
_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
_SHIFT_PIXELS = 1024**2
"""Pixels of the image whose shift a folder says, if the model was trained with a shift by resolution."""

VAE_CONFIG = "config.json"
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Names in the VAE's attention that diffusers used before 0.17, and the names since."""


def open_folder(folder: Path) -> TensorFile:
    """Opens all parts of a diffusers pipeline. Raises UserError for another kind of pipeline."""
    index = folder / "model_index.json"
    kind = str(_read_json(index).get("_class_name", "")) if index.is_file() else "StableDiffusionXLPipeline"
    if not kind.startswith("StableDiffusionXL"):
        raise UserError(Problem(f"this is a {kind}, not an SDXL base model: choose another folder", file=str(index)))
    if not (folder / "unet").is_dir():
        raise UserError(Problem("this is not the folder of a diffusers model: it has no `unet`", file=str(folder)))
    if (folder / "text_encoder_2").is_dir() and not (folder / "text_encoder").is_dir():
        raise UserError(
            Problem("this is the SDXL refiner, not an SDXL base model: choose another folder", file=str(folder))
        )
    tensors: dict[str, Source] = {}
    metadata: dict[str, str] = {}
    for part, (name, _) in PARTS.items():
        if (folder / name).is_dir():
            for file in _files(part, folder / name):
                tensors.update(file.tensors)
                metadata.update(file.metadata)
    metadata.pop("format", None)
    scheduler, vae = folder / "scheduler" / "scheduler_config.json", folder / "vae" / VAE_CONFIG
    return TensorFile(
        tensors=tensors,
        metadata=metadata,
        scheduler=_read_json(scheduler) if scheduler.is_file() else {},
        vae=_read_json(vae) if vae.is_file() else {},
    )


def open_vae(path: Path) -> TensorFile:
    """Opens a VAE, with its tensors by key or name, and its config.json if there is one.

    `path` may be a diffusers folder of the VAE or of a pipeline, a file of the VAE in either layout, or a complete
    single-file checkpoint. Raises UserError if it holds no VAE.
    """
    folder = path / "vae" if (path / "vae").is_dir() else path
    files = list(_files("vae", folder)) if path.is_dir() else [open_tensors(path)]
    tensors = {key: source for file in files for key, source in file.tensors.items()}
    config = folder / VAE_CONFIG if path.is_dir() else path.with_name(VAE_CONFIG)
    if path.is_file():
        tensors = _vae_tensors(tensors)
    if not any(key.endswith("decoder.conv_in.weight") for key in tensors):
        raise UserError(Problem("there is no VAE in this file or folder: choose another one", file=str(path)))
    # Beside a file of another name, config.json may belong to anything.
    has_config = config.is_file() and (path.is_dir() or path.name.startswith(PARTS["vae"][1]))
    return TensorFile(tensors=tensors, vae=_read_json(config) if has_config else {})


def _vae_tensors(tensors: Mapping[str, Source]) -> dict[str, Source]:
    """The tensors of a VAE in any file: with its key in a checkpoint, with the prefix `vae.` or without a prefix."""
    for prefix in (VAE, "vae."):
        if any(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): source for key, source in tensors.items() if key.startswith(prefix)}
    kept = {key: source for key, source in tensors.items() if not key.startswith(("loss.", "model_ema."))}
    diffusers = any(key.startswith("encoder.down_blocks.") for key in kept)
    return {_vae_name(key) if diffusers else VAE + key: source for key, source in kept.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(parse_json(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(
            Problem(f"this is no JSON object ({error}): fetch or save the folder again", file=str(path))
        ) from None


def _vae_name(name: str) -> str:
    for old, new in _OLD_ATTENTION.items():
        name = name.replace(old, new)
    return f"vae.{name}"


def _files(part: str, folder: Path) -> Iterator[TensorFile]:
    """Opens the files of one part, with the names of their tensors."""
    for path in _paths(folder, PARTS[part][1]):
        file = open_tensors(path)
        renamed = {_vae_name(n) if part == "vae" else module_name(part, n): s for n, s in file.tensors.items()}
        yield dataclasses.replace(file, tensors=renamed)


def _paths(folder: Path, stems: tuple[str, ...]) -> list[Path]:
    """The files of one part, complete or in shards. It prefers .safetensors to .bin, and full precision to fp16."""
    for suffix in ("safetensors", "bin"):
        for variant in ("", ".fp16"):
            for stem in stems:
                whole = folder / f"{stem}{variant}.{suffix}"
                shards = sorted(folder.glob(f"{stem}{variant}-*-of-*.{suffix}"))
                if whole.is_file() or shards:
                    return [whole] if whole.is_file() else shards
    raise UserError(Problem(f"the folder has no weights ({stems[0]}.safetensors or .bin)", file=str(folder)))


def save_folder(folder: Path, weights: Weights, metadata: Mapping[str, str], *, safe: bool) -> None:
    """Writes a diffusers pipeline: weights as .safetensors (if `safe`) or .bin, configs, scheduler and tokenizers."""
    for part, (name, stems) in PARTS.items():
        (folder / name).mkdir(parents=True)
        prefix = f"{part}."
        inside = {key.removeprefix(prefix): source for key, source in weights.tensors.items() if key.startswith(prefix)}
        if safe:
            header = {**(metadata if part == "unet" else {}), "format": "pt"}
            write_safetensors(folder / name / f"{stems[0]}.safetensors", inside, header)
        else:
            write_pickle(folder / name / f"{stems[-1]}.bin", {key: source.read() for key, source in inside.items()})
    save_configs(folder, weights.architecture, weights.markers)


def save_configs(folder: Path, architecture: Architecture, markers: Mapping[str, Tensor]) -> None:
    """Writes everything of a diffusers pipeline but its weights, as `from_single_file(..., config=folder)` needs.

    The scheduler has the objective of the `markers` (see declared.py).
    """
    with torch.device("meta"):
        UNet2DConditionModel(**unet_config(architecture)).save_config(folder / "unet")
        build_vae(architecture).save_config(folder / "vae")
    CLIPTextConfig(**te1_config(architecture), architectures=["CLIPTextModel"]).save_pretrained(folder / "text_encoder")
    config = CLIPTextConfig(**te2_config(architecture), architectures=["CLIPTextModelWithProjection"])
    config.save_pretrained(folder / "text_encoder_2")
    scheduler = _scheduler(markers)
    scheduler.save_config(folder / "scheduler")
    save_tokenizers(folder)
    index = {name: [library, kind] for name, library, kind in _PIPELINE}
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    text = {"_class_name": "StableDiffusionXLPipeline", "_diffusers_version": diffusers.__version__, **index}
    (folder / "model_index.json").write_text(json.dumps(text, indent=2) + "\n")


def _scheduler(markers: Mapping[str, Tensor]) -> EulerDiscreteScheduler | DPMSolverMultistepScheduler:
    """The scheduler of a pipeline for a model with these marker tensors.

    With zero terminal SNR its steps start at timestep 999, as Lin et al. ask for (arXiv 2305.08891, section 3.3).
    diffusers' own pipeline for SDXL cannot draw with its FlowMatchEulerDiscreteScheduler, which has no
    `init_noise_sigma`. A flow therefore gets the multistep solver, which knows flows and their shift as well.
    """
    objective = marked_objective(markers)
    if objective == "flow":
        shift = shift_ratio(marked_shift(markers), _SHIFT_PIXELS)
        return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    settings: dict[str, Any] = {"prediction_type": "v_prediction" if objective == "velocity" else "epsilon"}
    if ZTSNR in markers:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return EulerDiscreteScheduler(**_SCHEDULE | settings)
