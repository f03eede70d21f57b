"""Everything that a release page says, in one value, and where it comes from.

The author's facts win over the config, the config over the model's metadata. What none of them knows is None, and the
page then asks its author for it.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdxl_finetune.card.escaping import escape
from sdxl_finetune.card.facts import Count, Facts, StageFacts, Text, all_stages
from sdxl_finetune.card.samples import Sample
from sdxl_finetune.config import Config
from sdxl_finetune.config.fields import Refused
from sdxl_finetune.config.quality_options import QualityTag, parse_quality_tags
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.model.declared import CONFIG, Declared, read_declared
from sdxl_finetune.model.keymap import TE1, TE2, UNET, VAE
from sdxl_finetune.model.load import inspect_checkpoint
from sdxl_finetune.output.stages import Stage, stages_of
from sdxl_finetune.parsing import parse_json
from sdxl_finetune.tag_report.schema import Report

PARTS = {"U-Net": (UNET, "unet."), "text encoder 1": (TE1, "te1."), "text encoder 2": (TE2, "te2."), "VAE": (VAE,)}
"""Prefixes of the keys of each part's tensors, in single files and in diffusers folders."""


MOST_DIGITS = 18
"""Digits of a number of steps or epochs at most. A longer number is none that a run has written."""


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """The file that is released."""

    name: str
    size: int
    """Bytes."""
    auto_v2: str | None
    """None for a diffusers folder, which has no hash."""
    precision: str
    parameters: Mapping[str, int]
    """Parameters of each part."""
    declared: Declared
    metadata: Mapping[str, str]

    @property
    def options(self) -> dict[str, Any]:
        """The options of the run that saved the file; empty if the file does not say them."""
        try:
            options = parse_json(self.metadata.get(CONFIG, "{}"))
        except ValueError:
            return {}
        return options if isinstance(options, dict) else {}

    def number(self, name: str) -> int | None:
        """A number in this program's metadata, `step` or `epoch`; None if the file does not say it."""
        text = self.metadata.get(f"sdxl_finetune.{name}", "")
        return int(text) if text.isdecimal() and len(text) <= MOST_DIGITS else None


@dataclass(frozen=True, kw_only=True)
class Card:
    """The contents of a page. None, or an empty sequence, stands for what is not known."""

    file: ModelFile
    facts: Facts
    title: Text
    author: str | None
    license: Text | None
    description: Text | None
    usage_hint: Text | None
    trigger: str | None
    base_name: Text | None
    base_author: str | None
    base_license: Text | None
    base_hash: str | None
    stages: Sequence[StageFacts]
    images: Count | None
    held_out: int | None
    tag_counts: Mapping[str, int]
    quality: Sequence[QualityTag]
    quality_images: Mapping[str, int]
    quality_first: Sequence[str]
    guidance: float | None
    resolution: str | None
    has_buckets: bool
    max_tokens: int | None
    parameters: str | None
    samples: Sequence[Sample] = ()
    tags: Report | None = None
    tag_states: Mapping[str, int] = field(default_factory=dict)


def read_model(path: Path, auto_v2: str | None) -> ModelFile:
    """Reads the headers of a model. Raises UserError if it is not an SDXL base model."""
    inspected = inspect_checkpoint(path)
    if inspected.kind:
        message = f"this is {inspected.kind}, not an SDXL base model: choose another file"
        raise UserError(Problem(message, file=str(path)))
    tensors = inspected.file.tensors
    parameters: Counter[str] = Counter()
    types: Counter[str] = Counter()
    for key, source in tensors.items():
        part = next((part for part, prefixes in PARTS.items() if key.startswith(prefixes)), None)
        if part:
            parameters[part] += math.prod(source.shape)
            types[str(source.dtype).removeprefix("torch.")] += math.prod(source.shape)
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return ModelFile(
        name=path.name,
        size=sum(one.stat().st_size for one in files),
        auto_v2=auto_v2,
        precision=types.most_common(1)[0][0],
        parameters={part: parameters[part] for part in PARTS if part in parameters},
        declared=read_declared(inspected.file),
        metadata=inspected.file.metadata,
    )


def collect(
    file: ModelFile, facts: Facts, config: Config, *, parameters: str | None, base_hash: str | None, scale: float | None
) -> Card:
    """Puts the page's contents together, without samples and tags.

    `config` is the config of the command, or empty. `scale` is the guidance scale of the run's preview prompts.
    """
    recorded = stages_of(file.metadata)
    last = recorded[-1] if recorded else Stage()
    first = next((stage for stage in recorded if stage.base.name), last)

    def said(name: str) -> str | None:
        """The author's own Markdown in the config, or else what the file says, without markup."""
        return getattr(config, f"metadata_{name}") or _foreign(file.metadata.get(f"modelspec.{name}"))

    quality = _quality_tags(facts, config, file.options)
    better = [tag.tag for tag in quality[: len(quality) // 2]]
    set_here = config.model_dump(include={"max_token_length", "enable_bucket"}) if config.model_fields_set else {}
    options = set_here | file.options
    max_tokens = options.get("max_token_length")
    return Card(
        file=file,
        facts=facts,
        title=facts.title or said("title") or escape(Path(file.name).stem),
        author=facts.author or said("author"),
        license=facts.license or said("license"),
        description=facts.description or said("description"),
        usage_hint=facts.usage_hint or said("usage_hint"),
        trigger=config.metadata_trigger_phrase or file.metadata.get("modelspec.trigger_phrase"),
        base_name=facts.base.name or _foreign(first.base.name),
        base_author=facts.base.author or _foreign(first.base.author),
        base_license=facts.base.license or _foreign(first.base.license),
        base_hash=base_hash if first is last else None,
        stages=all_stages(facts, recorded),
        images=facts.data.images if facts.data.images is not None else last.images,
        held_out=last.held_out or None,
        tag_counts=last.tags,
        quality=quality,
        quality_images=last.quality,
        quality_first=facts.quality_first if facts.quality_first is not None else better,
        guidance=facts.guidance or scale,
        resolution=_foreign(file.metadata.get("modelspec.resolution")),
        has_buckets=bool(options.get("enable_bucket")),
        max_tokens=max_tokens if type(max_tokens) is int else None,
        parameters=parameters,
    )


def _foreign(text: str | None) -> str | None:
    """Text that another person wrote into a file."""
    return escape(text) if text else None


def _quality_tags(facts: Facts, config: Config, options: Mapping[str, Any]) -> tuple[QualityTag, ...]:
    recorded = options.get("quality_tags")
    found = facts.data.quality_tags or config.quality_tags
    if found or not isinstance(recorded, str):
        return found or ()
    try:
        return parse_quality_tags(recorded)
    except Refused:
        return ()
