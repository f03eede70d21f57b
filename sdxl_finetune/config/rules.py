"""Checks over several options, and of the files that a config names.

A finding names the options that it is about, the one to change first, so that it can be left out when one of
them has a value that was refused already. Checks that need to know the device, the model or the optimizer's
class stand with those.
"""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from sdxl_finetune.config.dataset import find_folders
from sdxl_finetune.config.options import Config

Findings = Iterator[tuple[str, str]]
"""Names of options, separated by spaces; what is wrong with the first and what to do."""

REQUIRED = {
    "pretrained_model_name_or_path": "the SDXL checkpoint to start from",
    "train_data_dir": "the folder of images",
    "resolution": 'the size in pixels to train at, as "1024,1024"',
    "output_dir": "the folder to save in",
}
NEEDS = {
    "zero_terminal_snr": ("v_parameterization",),
    "scale_v_pred_loss_like_noise_pred": ("v_parameterization",),
    "adaptive_noise_scale": ("noise_offset", "cache_latents"),
}
"""An option that does nothing good without others: pure noise holds nothing for a noise prediction to learn
(zero_terminal_snr), and noise is drawn before images could be encoded (adaptive_noise_scale)."""
EXCLUDES = {
    "v_pred_like_loss": ("v_parameterization",),
    "color_aug": ("cache_latents",),
    "random_crop": ("cache_latents",),
    "use_8bit_adam": ("use_lion_optimizer", "optimizer_type"),
    "use_lion_optimizer": ("optimizer_type",),
    "ema_decay": ("ema_half_life",),
}


def find_problems(config: Config) -> Findings:
    """Everything that keeps `config` from being trained as it stands."""
    data = () if config.dataset_config is None else ("train_data_dir", "resolution")
    for option, meaning in REQUIRED.items():
        if (
            getattr(config, option) is None
            and option not in data
            and not (option == "train_data_dir" and config.in_json)
        ):
            yield option, f"is needed: {meaning}"
    for option, others in NEEDS.items():
        for other in others:
            if getattr(config, option) and not getattr(config, other):
                yield f"{option} {other}", f"needs {other}: set that as well, or leave this out"
    for option, others in EXCLUDES.items():
        for other in others:
            if getattr(config, option) and getattr(config, other):
                yield f"{option} {other}", f"does not go with {other}: keep one of them"
    yield from _training(config)
    yield from _buckets(config)
    yield from _output(config)
    yield from _files(config)


def find_remarks(config: Config) -> Findings:
    """What a user may not expect, though it is no mistake."""
    for option in ("train_data_dir", "reg_data_dir", "in_json"):
        if config.dataset_config and getattr(config, option):
            yield option, "has no effect, because dataset_config says which images"
    if config.in_json and config.reg_data_dir and not config.dataset_config:
        yield "reg_data_dir", "has no effect with in_json, as in the reference; dataset_config can have both"
    if config.full_bf16 and not config.exact_masters:
        message = "weights are rounded to bf16 after each step, as in the reference: small updates are lost"
        yield "exact_masters", f"{message}; true keeps them, at 2 bytes for each weight"
    for option in ("ddp_gradient_as_bucket_view", "ddp_static_graph"):
        if getattr(config, option) and (config.is_fused or config.keeps_masters):
            yield option, "has no effect, because gradients are averaged tensor by tensor, without DDP"
    if config.is_fused and config.max_grad_norm:
        message = "is for each tensor by itself with fused_backward_pass, as in the reference"
        yield "max_grad_norm", f"{message}; 0 clips nothing, and trains as without fused_backward_pass"
    if config.max_train_epochs and config.max_train_steps != Config.model_fields["max_train_steps"].default:
        yield "max_train_steps", "has no effect, because max_train_epochs wins"
    if config.sample_every_n_epochs and config.sample_every_n_steps:
        yield "sample_every_n_steps", "has no effect, because sample_every_n_epochs wins"
    for option in ("sample_every_n_epochs", "sample_every_n_steps", "sample_at_first"):
        if getattr(config, option) and not config.sample_prompts:
            yield option, "there will be no previews, because sample_prompts is not set"
            break
    if config.validate_every_n_epochs and config.validate_every_n_steps:
        yield "validate_every_n_steps", "has no effect, because validate_every_n_epochs wins"
    for option in ("validate_every_n_epochs", "validate_every_n_steps", "max_validation_steps"):
        if getattr(config, option) and not (config.validation_split or config.dataset_config):
            yield option, "there will be no validation, because validation_split holds no images out"
            break
    for option in ("learning_rate_te1", "learning_rate_te2"):
        if getattr(config, option) and not config.train_text_encoder:
            yield option, "has no effect without train_text_encoder"
    for option, way in (("min_bucket_reso", "down"), ("max_bucket_reso", "up")):
        if config.enable_bucket and getattr(config, option) % config.bucket_reso_steps:
            yield option, f"is rounded {way} to a multiple of bucket_reso_steps"


def _training(c: Config) -> Findings:
    if c.full_bf16 and c.mixed_precision != "bf16":
        yield "full_bf16 mixed_precision", 'needs mixed_precision = "bf16"'
    for option in ("fused_backward_pass", "fused_optimizer_groups"):
        if getattr(c, option) and c.mixed_precision == "fp16":
            message = "cannot be used with fp16, whose gradients are looked at together before any step; use bf16"
            yield f"{option} mixed_precision", message
    first = 0 if c.min_timestep is None else c.min_timestep
    end = 1000 if c.max_timestep is None else c.max_timestep
    if first >= end:
        options = "max_timestep min_timestep" if c.min_timestep is None else "min_timestep max_timestep"
        yield options, f"no timestep is left: they run from min_timestep {first} to below max_timestep {end}"
    options = "lr_scheduler lr_scheduler_type"
    constant = c.lr_scheduler == "constant" or c.lr_scheduler.startswith("adafactor")
    if c.lr_warmup_steps and (constant or c.lr_scheduler_type):
        name = c.lr_scheduler_type or c.lr_scheduler
        yield (
            f"lr_warmup_steps {options}",
            f"{name} has no warm-up: leave this out, or use constant_with_warmup",
        )
    if c.lr_scheduler_type:
        return
    if (
        c.lr_scheduler == "cosine_with_min_lr"
        and c.lr_scheduler_min_lr_ratio is None
        and "min_lr" not in c.lr_scheduler_args
    ):
        yield f"{options} lr_scheduler_min_lr_ratio", "needs lr_scheduler_min_lr_ratio, as 0.1"
    if c.lr_scheduler == "piecewise_constant" and "step_rules" not in c.lr_scheduler_args:
        yield f"{options} lr_scheduler_args", "needs lr_scheduler_args = [\"step_rules='1:50,0.5:100,0.1'\"]"
    if c.lr_scheduler.startswith("adafactor") and c.optimizer_type.lower() != "adafactor":
        yield f"{options} optimizer_type", 'goes with optimizer_type = "Adafactor" only'


def _buckets(c: Config) -> Findings:
    if not c.enable_bucket:
        return
    shortest, longest = sorted(c.resolution or (c.min_bucket_reso, c.max_bucket_reso))
    if c.bucket_reso_steps % 32:
        yield "bucket_reso_steps enable_bucket", "must be a multiple of 32 with enable_bucket, as 32 or 64"
    if c.min_bucket_reso > shortest:
        options = "min_bucket_reso resolution enable_bucket"
        yield options, f"must be at most the resolution's shorter side, {shortest}"
    if c.max_bucket_reso < longest:
        options = "max_bucket_reso resolution enable_bucket"
        yield options, f"must be at least the resolution's longer side, {longest}"
    if c.min_bucket_reso < c.bucket_reso_steps:
        options = "min_bucket_reso bucket_reso_steps enable_bucket"
        yield options, f"must be at least bucket_reso_steps, {c.bucket_reso_steps}"


def _output(c: Config) -> Findings:
    if c.log_with in ("tensorboard", "all") and c.logging_dir is None:
        yield "log_with logging_dir", 'needs logging_dir, the folder for logs, as "logs"'
    if c.log_with in ("wandb", "all") and importlib.util.find_spec("wandb") is None:
        yield "log_with", "needs the package wandb: pip install wandb"
    if c.output_name and set(c.output_name) & set("/\\"):
        yield "output_name", "must be a file name without folders; the folder is output_dir"
    for option in ("output_dir", "logging_dir", "cache_dir"):
        if not _writable(getattr(c, option)):
            yield option, "cannot be made or written to: give a folder that can"


def _files(c: Config) -> Findings:
    for option in ("pretrained_model_name_or_path", "vae"):
        path = getattr(c, option)
        if path and not path.exists():
            yield (
                option,
                f"no such file or folder (nothing is downloaded; the working directory is {Path.cwd()})",
            )
    for option in ("sample_prompts", "log_tracker_config", "in_json", "dataset_config"):
        path = getattr(c, option)
        if path and not path.is_file():
            yield option, f"no such file (the working directory is {Path.cwd()})"
    picture = c.metadata_thumbnail
    if picture and not picture.startswith("data:") and not Path(picture).is_file():
        yield "metadata_thumbnail", "no such file, and not a data URL"
    if c.dataset_config:
        return
    for option in ("reg_data_dir",) if c.in_json else ("train_data_dir", "reg_data_dir"):
        folder = getattr(c, option)
        problem = find_folders(folder).problem if folder else None
        if problem:
            yield option, problem
    if c.in_json and c.train_data_dir and not c.train_data_dir.is_dir():
        yield "train_data_dir", f"no such folder (the working directory is {Path.cwd()})"


def _writable(folder: Path | None) -> bool:
    """Whether `folder` is one, or can be made, and can be written to."""
    if folder is None:
        return True
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK)
