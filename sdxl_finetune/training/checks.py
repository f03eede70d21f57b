"""Checks everything that a run needs, as far as no image is decoded and no weight is read, and reports all mistakes at
once.

`sdxl-train` and `sdxl-check` call the same function. The programs also call it after a mistake in the config, for the
parts that the mistake leaves intact. A user then sees all mistakes at the first start.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import Parameter

from sdxl_finetune.config import (
    AugmentationOptions,
    BucketOptions,
    CaptionOptions,
    Config,
    DataOptions,
    HoldOutOptions,
    ImageWeightOptions,
    LatentOptions,
    LearnedWeightOptions,
    LrOptions,
    MaskOptions,
    OptimizerOptions,
    QualityOptions,
    load_datasets,
    with_local_models,
)
from sdxl_finetune.config.tag_options import TagReportOptions
from sdxl_finetune.data.index import Index, build_index
from sdxl_finetune.data.masks import remark_on_alpha, without_bad_masks
from sdxl_finetune.data.remarks import report_bad_images
from sdxl_finetune.data.scan import scan
from sdxl_finetune.data.tags import check_tag_rules
from sdxl_finetune.data.tokens import Tokenizer, tokenizer_of
from sdxl_finetune.data.unusable import load_undecodable
from sdxl_finetune.errors import Problem, Problems, Tally, UserError
from sdxl_finetune.model.compilation import check_compiler
from sdxl_finetune.model.diffusers_folder import open_vae
from sdxl_finetune.model.load import Inspected, check_latents, inspect_checkpoint
from sdxl_finetune.model.sdxl import SDXL
from sdxl_finetune.optim.lr import build_lr
from sdxl_finetune.optim.optimizer import build_optimizer
from sdxl_finetune.optim.parameters import Group, trained_parameters
from sdxl_finetune.optim.update import check_update
from sdxl_finetune.output.metadata import load_thumbnail
from sdxl_finetune.output.prompts import Prompt, load_prompts
from sdxl_finetune.runtime.processes import check_precision
from sdxl_finetune.tag_report.choice import Choice, choose
from sdxl_finetune.training.learned_weights import check_learned_weights

OPTIMIZER = {*OptimizerOptions.model_fields, "mixed_precision", "full_bf16"}
SOURCES = {"train_data_dir", "reg_data_dir", "in_json", "dataset_config"}
"""Options without which no image can be found."""
DATA = {
    name
    for group in (
        DataOptions,
        CaptionOptions,
        AugmentationOptions,
        MaskOptions,
        BucketOptions,
        HoldOutOptions,
        LatentOptions,
        QualityOptions,
        ImageWeightOptions,
    )
    for name in group.model_fields
} | {"output_dir"}


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A model without its weights, from the header of its file."""

    inspected: Inspected
    parts: Mapping[str, Mapping[str, Parameter]]
    """Parameters by part and name, on the meta device."""
    groups: Sequence[Group]
    """The parameters to train."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that a run reads before the weights and the pixels; None for what has a mistake."""

    tokenizer: Tokenizer | None
    prompts: Sequence[Prompt] | None
    thumbnail: str | None
    """Data URL of the picture in the metadata."""
    model: Outline | None
    index: Index | None
    choice: Choice | None
    """Measurements of tag reports. None also without reports."""


def read_inputs(
    config: Config,
    device: torch.device,
    problems: Problems,
    *,
    weights: Path | None = None,
    share: Callable[[Callable[[], Index]], Index] | None = None,
    faulty: Set[str] = frozenset(),
) -> Inputs:
    """Runs all checks, each on its own, and adds their problems to `problems`.

    `weights` is the file or folder of the model, by default `pretrained_model_name_or_path`. `share` passes the index
    of the first process on to the others. A check that reads one of the `faulty` options is left out.
    """

    def intact(*options: str) -> bool:
        return faulty.isdisjoint(options)

    if intact("mixed_precision"):
        problems.attempt(check_precision, config, device)
    if intact(*LrOptions.model_fields, "optimizer_type", "learning_rate"):
        problems.attempt(build_lr, config, total_steps=1)  # no mistake depends on the number of steps
    if config.torch_compile and intact("torch_compile", "dynamo_backend"):
        problems.attempt(check_compiler, config.dynamo_backend, device)
    if intact("pretrained_model_name_or_path", "vae"):
        config = problems.attempt(with_local_models, config) or config
    path = weights or config.pretrained_model_name_or_path
    if isinstance(config.vae, Path) and intact("vae") and problems.attempt(open_vae, config.vae) is None:
        config = config.model_copy(update={"vae": None})  # the other checks go on without it
    model = None
    if isinstance(path, Path) and intact("pretrained_model_name_or_path"):
        model = problems.attempt(outline_model, config, path)
    if intact(*OPTIMIZER):
        problems.attempt(check_optimizer, config, device, model.groups if model else ())
        problems.attempt(check_update, config, device)
    if intact(*LearnedWeightOptions.model_fields):
        problems.attempt(check_learned_weights, config, device)
    index, choice = _read_images(config, problems, share, faulty), None
    if index is not None and config.tag_report_every_n_epochs and intact(*TagReportOptions.model_fields):
        choice = problems.attempt(choose, config, index)
    return Inputs(
        tokenizer=problems.attempt(tokenizer_of, config) if intact("tokenizer_cache_dir") else None,
        prompts=problems.attempt(load_prompts, config.sample_prompts)
        if config.sample_prompts and intact("sample_prompts")
        else (),
        thumbnail=problems.attempt(load_thumbnail, config.metadata_thumbnail) if intact("metadata_thumbnail") else None,
        model=model,
        index=index,
        choice=choice,
    )


def outline_model(config: Config, path: Path) -> Outline:
    """Returns the model of a file or folder. Raises UserError if it cannot be trained.

    It must be an SDXL base model, fit its VAE, and have weights to train.
    """
    inspected = inspect_checkpoint(path, config.vae_path, config)
    if inspected.architecture is None:
        raise UserError(Problem(f"this is {inspected.kind}, not an SDXL base model: choose another", file=str(path)))
    check_latents(path, config.vae_path, config)
    with torch.device("meta"):
        model = SDXL(inspected.architecture)
    parts = model.parameters_by_part()
    return Outline(inspected=inspected, parts=parts, groups=trained_parameters(config, parts, model.masters).groups)


def check_optimizer(options: OptimizerOptions, device: torch.device, groups: Sequence[Group]) -> None:
    """Builds the optimizer of one small tensor for each group. Raises UserError if the optimizer cannot be built."""
    rates = {group.name: group.lr for group in groups} or {"unet": options.learning_rate}
    zeros = torch.zeros(2, 2, device=device)
    build_optimizer(options, [Group(name, {name: Parameter(zeros.clone())}, rate) for name, rate in rates.items()])


def find_further_problems(config: Config, faulty: Set[str]) -> Sequence[Problem]:
    """Returns the problems of everything but the `faulty` options, which were reported before."""
    problems = Problems()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    read_inputs(config, device, problems, faulty=faulty)
    return problems.found


def index_images(config: Config) -> Index:
    """Builds the index of a run, and looks for its lists of tags and its masks. Raises UserError.

    The index is without the images that an earlier run could not decode and that have not changed since then.
    """
    skip, datasets = config.skip_cache_check, load_datasets(config)
    check_tag_rules(subset for dataset in datasets for subset in dataset.subsets)
    try:
        index = build_index(datasets, config.cache_folder, config.on_bad_image, skip_check=skip)
    except BrokenProcessPool:
        message = "a process that reads image files was killed, as the system does when memory runs out"
        raise UserError(f"{message}: end programs that need memory, and start again") from None
    if config.cache_latents:
        index = _without_undecodable(index, config)
    if skip:
        return index
    remark_on_alpha(index)
    return without_bad_masks(index, config.on_bad_image)


def _without_undecodable(index: Index, config: Config) -> Index:
    known = load_undecodable(config.cache_folder, index.stat_hashes)
    bad = {row: Problem(text, file=str(index[row].path)) for row, text in known.items() if index.used[row]}
    report_bad_images(Tally(bad.values()), config.on_bad_image)
    return index.without(bad) if bad else index


def _read_images(
    config: Config, problems: Problems, share: Callable[[Callable[[], Index]], Index] | None, faulty: Set[str]
) -> Index | None:
    """Builds the index. If only its sources can be relied on, scans the images without placing them in buckets."""
    if faulty.isdisjoint(DATA):
        build = lambda: index_images(config)  # noqa: E731
        return problems.attempt(share, build) if share else problems.attempt(build)
    if faulty.isdisjoint(SOURCES):
        problems.attempt(_scan_only, config, None if faulty & {"output_dir", "cache_dir"} else config.cache_folder)
    return None


def _scan_only(config: Config, cache_dir: Path | None) -> None:
    """Raises UserError with the unusable images and captions. Without a `cache_dir` the scan is not kept."""
    subsets = [subset for dataset in load_datasets(config) for subset in dataset.subsets]
    with tempfile.TemporaryDirectory() as scratch:
        _, bad = scan(subsets, cache_dir or Path(scratch))
    report_bad_images(bad, config.on_bad_image)
