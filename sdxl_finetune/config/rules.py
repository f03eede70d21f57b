"""Checks over several options, and of the files that a config names. No check needs torch.

A finding names all options that it is about. It is left out if one of them has a value that was refused before.
Checks that need the device, the model or the class of the optimizer are where these are built.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from sdxl_finetune.config.dataset import (
    Dataset,
    Subset,
    caption_conflicts,
    find_folders,
    is_metadata,
    is_text,
    mark_problems,
    not_found,
    split_tars,
)
from sdxl_finetune.config.fields import LR_SCHEDULES, OnlyWith
from sdxl_finetune.config.hub import AUTO, hub_problems, hub_remarks
from sdxl_finetune.config.name_rules import name_problems
from sdxl_finetune.config.noise_rules import noise_problems, noise_remarks
from sdxl_finetune.config.numbers_rules import numbers_problems
from sdxl_finetune.config.options import Config
from sdxl_finetune.config.timestep_rules import timestep_problems, timestep_remarks
from sdxl_finetune.config.training_options import LrOptions
from sdxl_finetune.files import is_same_folder

Findings = Iterator[tuple[str, str]]
"""Pairs: names of options, separated by spaces; what is wrong with the first option, and what to do."""

REQUIRED = {
    "pretrained_model_name_or_path": "the SDXL checkpoint to start from",
    "train_data_dir": "the folder of images",
    "resolution": 'the training size in pixels, as "1024,1024"',
    "output_dir": "the folder for saved files",
}
NEEDS: dict[str, tuple[str, ...]] = {
    "scale_v_pred_loss_like_noise_pred": ("v_parameterization",),
    "adaptive_noise_scale": ("noise_offset",),
}
"""Options that are wrong without others."""
EXCLUDES = {
    "v_pred_like_loss": ("v_parameterization", "flow_model"),
    "flow_model": ("v_parameterization",),
    "min_snr_gamma": ("soft_min_snr_gamma",),
    "use_8bit_adam": ("use_lion_optimizer", "optimizer_type"),
    "use_lion_optimizer": ("optimizer_type",),
    "full_fp16": ("full_bf16",),
    "ema_decay": ("ema_half_life",),
    "tag_report_tags": ("tag_report_tags_file", "tag_report_min_images"),
    "tag_report_tags_file": ("tag_report_min_images",),
}
FIXED_WEIGHTS = (
    *("min_snr_gamma", "soft_min_snr_gamma", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss"),
    *("debiased_estimation_loss", "loss_multiplier"),
)
"""Options that weight the loss by a fixed function of the timestep."""
ANY_BYTES = (
    *("train_data_dir", "reg_data_dir", "in_json", "dataset_config", "sample_prompts", "protected_tags_file"),
    *("image_weights", "quality_scores", "tag_report_tags_file"),
)
"""Options whose files this program opens by itself. The libraries for weights and logs open only paths in UTF-8."""
FILES = (
    "sample_prompts",
    "log_tracker_config",
    "dataset_config",
    "protected_tags_file",
    "caption_tag_dropout_groups",
    "tag_report_tags_file",
)
SHAPES = ("linear", "cosine", "1-sqrt")
"""Shapes of rise and fall of the schedule warmup_stable_decay."""
LR_END = 1e-7
"""Learning rate at which the polynomial schedule ends by default, as in the reference."""


def find_problems(config: Config) -> Findings:
    """Yields everything that prevents training with this config."""
    yield from find_conflicts(config)
    yield from _output(config)
    yield from _files(config)


def find_conflicts(config: Config) -> Findings:
    """Yields options that are missing or cannot be used together. Looks at no file, because folders may be large."""
    # The images' own buckets in a metadata file can replace the resolution. The index checks whether they do.
    replaced = {"train_data_dir", "resolution"} if config.in_json or config.dataset_config else set()
    for option, meaning in REQUIRED.items():
        if getattr(config, option) is None and option not in replaced:
            yield option, f"is needed: set it to {meaning}"
    for option, others in NEEDS.items():
        for other in others:
            if getattr(config, option) and not getattr(config, other):
                yield f"{option} {other}", f"needs {other}: set {other}, or remove {option}"
    for option, others in EXCLUDES.items():
        for other in others:
            if getattr(config, option) and getattr(config, other):
                yield f"{option} {other}", f"cannot be used with {other}: keep one of them"
    yield from noise_problems(config)
    yield from numbers_problems(config)
    yield from _training(config)
    yield from _text_outputs(config)
    yield from schedule_problems(config)
    yield from _buckets(config)
    yield from hub_problems(config)


def find_remarks(config: Config) -> Findings:
    """Yields what is allowed but may surprise the user."""
    for option in ("train_data_dir", "reg_data_dir", "in_json"):
        if config.dataset_config and getattr(config, option):
            yield option, "has no effect, because dataset_config names the images"
    if config.in_json and config.reg_data_dir and not config.dataset_config:
        yield "reg_data_dir", "has no effect with in_json, as in the reference: use dataset_config for both"
    if (config.full_bf16 or config.full_fp16) and not config.exact_masters:
        message = "weights are rounded after each step, as in the reference, so small updates are lost"
        if config.full_fp16:
            message += ", and optimizer states in fp16 overflow or vanish, with which AdamW divides by zero"
        yield "exact_masters", f"{message}: true keeps the updates, for 2 bytes per weight"
    yield from _without_effect(config)
    if config.cache_dir_local_gb and config.copies is None:
        yield "cache_dir_local_gb", "has no effect, because neither cache_dir nor output_dir is an address"
    if config.alpha_mask and config.conditioning_data_dir and config.masked_loss and not config.dataset_config:
        yield "alpha_mask", "has no effect with conditioning_data_dir, as in the reference"
    for option in ("ddp_gradient_as_bucket_view", "ddp_static_graph"):
        if getattr(config, option) and (config.is_fused or config.keeps_masters):
            yield option, "has no effect, because gradients are averaged tensor by tensor, without DDP"
    if config.is_fused and config.max_grad_norm:
        message = "limits each tensor's gradient separately with fused_backward_pass, as in the reference"
        yield "max_grad_norm", f"{message}: 0 turns the limit off"
    yield from timestep_remarks(config)
    if config.zero_terminal_snr and config.flow_model:
        yield "zero_terminal_snr", "has no effect with flow_model, which always ends in pure noise"
    elif config.zero_terminal_snr and not config.v_parameterization:
        message = "ends in pure noise, of which a noise prediction learns nothing"
        yield "zero_terminal_snr", f"{message}: set v_parameterization, or remove zero_terminal_snr"
    yield from noise_remarks(config)
    for option in FIXED_WEIGHTS if config.edm2_loss_weighting else ():
        if getattr(config, option):
            message = "has hardly any effect with edm2_loss_weighting, whose learned weights cancel it"
            yield option, f"{message}: keep one of them"
    yield from _rate_remarks(config)
    for option in ("initial_step", "initial_epoch"):
        if config.resume and getattr(config, option):
            yield option, "has no effect if resume finds something, because it says its own step"
    if config.enable_wildcard and config.cache_text_encoder_outputs and config.text_encoder_outputs_variants == 1:
        message = "draws once for each caption, because cache_text_encoder_outputs encodes a caption once"
        yield "enable_wildcard", f"{message}: text_encoder_outputs_variants = 8 draws 8 times"
    sources = config.caption_sources or ()
    if len(sources) > 1 and config.cache_text_encoder_outputs and config.text_encoder_outputs_variants == 1:
        message = "gives each image one of its texts for the whole run, because cache_text_encoder_outputs encodes one"
        yield "caption_sources", f"{message}: text_encoder_outputs_variants = 8 draws 8 times"
    for option, direction in (("min_bucket_reso", "down"), ("max_bucket_reso", "up")):
        is_used = config.enable_bucket and not config.bucket_no_upscale
        if is_used and getattr(config, option) % config.bucket_reso_steps:
            yield option, f"is rounded {direction} to a multiple of bucket_reso_steps, {config.bucket_reso_steps}"
    yield from hub_remarks(config)


def _without_effect(config: Config) -> Findings:
    """Yields each changed option that has no effect, because another option is off or on. The schema names the pairs.

    A `dataset_config` file may switch on what an option of the config needs. Its options are therefore left out.
    """
    in_file = {*Dataset.model_fields, *Subset.model_fields} if config.dataset_config else set()
    for name, field in Config.model_fields.items():
        if getattr(config, name) == field.get_default(call_default_factory=True) or name in in_file:
            continue
        conditions = [note for note in field.metadata if isinstance(note, OnlyWith)]
        reasons = [
            condition.remark()
            for condition in conditions
            if not condition.holds(config) and in_file.isdisjoint(condition.options.split())
        ]
        if name in LrOptions.model_fields and config.is_relative_step:
            reasons = []  # one remark says that no rate and schedule has an effect
        elif name in LrOptions.model_fields and config.is_schedule_free:
            reasons = [f"has no effect, because {config.optimizer_name} has no schedule"]
        elif name in LrOptions.model_fields and config.lr_scheduler_type:
            replaced = name not in ("lr_scheduler_type", "lr_scheduler_args")
            reasons = ["has no effect with lr_scheduler_type"] if replaced else []
        if reasons:
            yield name, reasons[0] + _remedy(config, name)


def _remedy(config: Config, option: str) -> str:
    """Returns advice on an option without effect, if the other option's name does not say it."""
    match option:
        case "lr_warmup_steps" if config.is_schedule_free:
            return ': use optimizer_args = ["warmup_steps=100"]'
        case "lr_warmup_steps":
            return ": for a warm-up set lr_scheduler to constant_with_warmup"
        case "masked_loss":
            return ": set conditioning_data_dir to a folder of masks, or alpha_mask = true"
    return ""


def _rate_remarks(config: Config) -> Findings:
    """Yields what optimizers with rates of their own make of the given rates."""
    if config.is_relative_step:
        message = (
            "have no effect, because Adafactor's relative_step sets its own rates: each step moves a tensor by up to"
        )
        remedy = 'optimizer_args = ["relative_step=False", "scale_parameter=False"] uses yours'
        yield "learning_rate", f"rates and schedule {message} 1 % of its size. {remedy}"
    rates = [config.learning_rate]
    if config.train_text_encoder:
        rates += [rate for rate in (config.learning_rate_te1, config.learning_rate_te2) if rate is not None]
    if config.estimates_rate and (far := [rate for rate in rates if rate and not 0.1 < rate <= 10]):
        message = f"{config.optimizer_name} multiplies the rate by its own estimate, so it should be near 1"
        yield "learning_rate", f"{message}, but is {far[0]:g}: set 1, and watch lr/d*lr in the log"
    own = (config.learning_rate_te1, config.learning_rate_te2)
    encoders = [config.learning_rate if rate is None else rate for rate in own]
    if config.train_text_encoder and not any(encoders) and (config.learning_rate or config.block_lr):
        message = "trains no text encoder, because both of their learning rates are 0"
        yield (
            "train_text_encoder",
            f"{message}: set learning_rate_te1 or learning_rate_te2",
        )


def _training(config: Config) -> Findings:
    if not config.max_train_steps and not config.max_train_epochs:
        yield "max_train_steps max_train_epochs", "no step is left to train: set it, or max_train_epochs"
    if config.loss_type in ("huber", "smooth_l1") and not config.huber_c:
        yield "huber_c loss_type", f"must be above 0 for loss_type {config.loss_type}"
    if config.full_bf16 and config.mixed_precision != "bf16":
        yield "full_bf16 mixed_precision", 'needs mixed_precision = "bf16"'
    if config.full_fp16 and config.mixed_precision != "fp16":
        yield "full_fp16 mixed_precision", 'needs mixed_precision = "fp16"'
    for option in ("fused_backward_pass", "fused_optimizer_groups"):
        if getattr(config, option) and config.mixed_precision == "fp16":
            message = "cannot be used with fp16, which checks all gradients before a step: use bf16"
            yield f"{option} mixed_precision", message
    yield from timestep_problems(config)


def _text_outputs(config: Config) -> Findings:
    """Yields what cannot be done with cached text encoder outputs. A `dataset_config` file is checked by subset."""
    if not config.cache_text_encoder_outputs:
        return
    rates = (config.learning_rate_te1, config.learning_rate_te2)
    if config.train_text_encoder and any(config.learning_rate if rate is None else rate for rate in rates):
        message = "cannot be used with cache_text_encoder_outputs, because outputs change as the encoders are trained"
        yield "train_text_encoder cache_text_encoder_outputs", f"{message}: keep one of them"
    if not config.dataset_config:
        for option, message in caption_conflicts(config, config.text_encoder_outputs_variants):
            yield f"{option} cache_text_encoder_outputs text_encoder_outputs_variants", message


def schedule_problems(config: Config) -> Findings:
    """Yields the problems of the learning-rate schedule. An optimizer that ignores the schedule has none.

    Only a class of `lr_scheduler_type` is checked later, by optim.lr, which imports it.
    """
    if config.is_schedule_free or config.is_relative_step:
        return
    name, arguments = config.lr_scheduler.partition(":")[0], config.lr_scheduler_args
    options = "lr_scheduler lr_scheduler_type"
    if config.lr_scheduler_type:
        return
    if name == "adafactor":
        if not config.optimizer_name.lower().endswith("adafactor"):
            yield f"{options} optimizer_type", 'works with optimizer_type = "Adafactor" only: choose another schedule'
        elif config.lr_scheduler == "adafactor":
            message = f"needs a rate with relative_step=False: use adafactor:{config.learning_rate:g}"
            yield f"{options} optimizer_args", f"{message}, or remove relative_step=False"
    elif unknown := sorted(set(arguments) - set(LR_SCHEDULES[name])):
        takes = f"takes only {', '.join(LR_SCHEDULES[name])}" if LR_SCHEDULES[name] else "takes no arguments"
        message = f"{name} {takes}: remove {', '.join(unknown)}"
        yield f"lr_scheduler_args {options}", f"{message}; cycles, power and lowest rate are options of their own"
    elif problem := _argument_problem(config, name):
        yield f"{options} lr_scheduler_args lr_scheduler_min_lr_ratio learning_rate", problem


def _argument_problem(config: Config, name: str) -> str | None:
    arguments = config.lr_scheduler_args
    if name == "warmup_stable_decay":
        wrong = [value for value in arguments.values() if value not in SHAPES]
        return f"warmup_type and decay_type must be one of {', '.join(SHAPES)}, not {wrong[0]!r}" if wrong else None
    if name == "piecewise_constant":
        try:
            step_rules(arguments["step_rules"])
        except (KeyError, AttributeError, TypeError, ValueError):
            example = "lr_scheduler_args = [\"step_rules='1:100,0.5:200,0.1'\"]"
            return f"needs factors, each with the step at which it ends, and a last factor: {example}"
        return None
    if not all(isinstance(value, int | float) for value in arguments.values()):
        return f"the values of lr_scheduler_args must be numbers, not {arguments}"
    if name == "cosine_with_min_lr" and (config.lr_scheduler_min_lr_ratio is None) == ("min_lr" not in arguments):
        return "needs its lowest rate, given once: set lr_scheduler_min_lr_ratio, as 0.1, or the argument min_lr"
    lowest = arguments.get("lr_end", LR_END) if name == "polynomial" else arguments.get("min_lr")
    if lowest is not None and config.learning_rate <= lowest:
        return f"ends at {lowest}: learning_rate, now {config.learning_rate}, must be higher"
    return None


def step_rules(text: str) -> list[tuple[float, float]]:
    """Returns pairs (step at which it ends, factor) in order, of text such as `1:100,0.5:200,0.1`.

    The last factor has no end. Raises ValueError, TypeError or AttributeError for anything else.
    """
    *timed, last = (rule.split(":") for rule in text.split(","))
    return [*sorted((float(end), float(factor)) for factor, end in timed), (float("inf"), float(*last))]


def _buckets(config: Config) -> Findings:
    if not config.enable_bucket:
        return
    shortest, longest = sorted(config.resolution or (config.min_bucket_reso, config.max_bucket_reso))
    if config.bucket_reso_steps % 32 or not config.bucket_reso_steps:
        yield "bucket_reso_steps enable_bucket", "must be a multiple of 32 with enable_bucket, as 32 or 64"
    if config.bucket_no_upscale:  # buckets then follow the sizes of images
        return
    if config.min_bucket_reso > shortest:
        message = f"must be at most {shortest}, resolution's shorter side, and is {config.min_bucket_reso}"
        yield "min_bucket_reso resolution enable_bucket", message + _default_remedy(config, "min_bucket_reso", shortest)
    if config.max_bucket_reso < longest:
        message = f"must be at least {longest}, resolution's longer side, and is {config.max_bucket_reso}"
        yield "max_bucket_reso resolution enable_bucket", message + _default_remedy(config, "max_bucket_reso", longest)
    if config.min_bucket_reso < config.bucket_reso_steps:
        message = f"must be at least bucket_reso_steps, now {config.bucket_reso_steps}"
        yield "min_bucket_reso bucket_reso_steps enable_bucket", message


def _default_remedy(config: Config, option: str, value: int) -> str:
    """Tells a user who has not set the option what to set, because the message shows an option without a value."""
    return "" if option in config.model_fields_set else f" by default: set {option} = {value}"


def _output(config: Config) -> Findings:
    if config.log_with in ("tensorboard", "all") and config.logging_dir is None:
        yield "log_with logging_dir", 'needs logging_dir, the folder for logs, as "logs"'
    for option, value in config:
        if isinstance(value, str | Path) and not is_text(str(value)) and option not in ANY_BYTES:
            yield option, "is not UTF-8, which only folders of images may be: rename it, or choose another"
        if "\0" in str(value):
            yield option, "holds a null character, which no name and no text has: remove it"
    yield from name_problems(config)
    fallback = config.save_fallback_dir
    if fallback and config.output_dir and is_same_folder(fallback, config.output_folder):
        yield "save_fallback_dir output_dir", "is output_dir: name a folder on another disk, or remove it"
    for option in ("output_dir", "logging_dir", "cache_dir", "cache_dir_local", "save_fallback_dir"):
        folder = getattr(config, option)
        if isinstance(folder, Path) and (reason := _not_writable(folder)):
            yield option, f"cannot be created or written to ({reason}): name another folder, or change its permissions"


def _files(config: Config) -> Findings:
    for option in ("pretrained_model_name_or_path", "vae"):
        path = getattr(config, option)
        if isinstance(path, Path) and not path.exists():
            yield option, f"{not_found(path, 'file or folder')}; nothing is downloaded"
    resume = config.resume
    if isinstance(resume, Path) and resume != AUTO and not config.resume_from_huggingface and not resume.exists():
        yield "resume", not_found(resume, "training state or checkpoint")
    for option in FILES:
        path = getattr(config, option)
        if isinstance(path, Path) and not path.is_file():
            yield option, not_found(path, "file")
    if config.in_json and not is_metadata(config.in_json):
        yield "in_json", not_found(config.in_json, "file")
    thumbnail = config.metadata_thumbnail
    if thumbnail and not thumbnail.startswith("data:") and not Path(thumbnail).is_file():
        yield "metadata_thumbnail", f"neither a data URL nor a file; {not_found(Path(thumbnail), 'file')}"
    if config.dataset_config:
        return
    yield from mark_problems(config, config, config)
    masks = config.conditioning_data_dir
    if config.masked_loss and isinstance(masks, Path) and not masks.is_dir():
        yield "conditioning_data_dir", not_found(masks, "folder")
    for option in ("reg_data_dir",) if config.in_json else ("train_data_dir", "reg_data_dir"):
        folder, tars = split_tars(getattr(config, option) or Path())
        if getattr(config, option) and (message := None if tars else find_folders(folder).problem):
            yield option, message
    images = split_tars(config.train_data_dir or Path())[0]
    if config.in_json and isinstance(images, Path) and not images.is_dir():
        yield "train_data_dir", not_found(images, "folder")


def _not_writable(folder: Path) -> str | None:
    """Returns why nothing can be written to the folder, or to the folder in which it has to be created; else None.

    A file without a name is written, because permissions say too little: root has all of them in /proc, too.
    """
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            return f"{existing} is a file"
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return error.strerror or str(error)
