"""Config: every option of a run in one flat, frozen model. Names, meanings and defaults are the reference's.

An attribute has the name of its option in a config file and on the command line. Nothing changes a Config after it is
built. `_imply` settles what one option implies for another.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import toml
from pydantic import model_validator

from sdxl_finetune.config import (
    data_options,
    flow_options,
    limit_options,
    numbers_options,
    output_options,
    pairing_options,
    quality_options,
    storage_options,
    tag_options,
    training_options,
    vae_options,
    weight_options,
)
from sdxl_finetune.config.fields import Options, plain
from sdxl_finetune.printable import encodable
from sdxl_finetune.redaction import known_secrets, replaced
from sdxl_finetune.storage import Address, LocalCopies, Location

SECRETS = frozenset({"wandb_api_key", "huggingface_token"})
"""Options that are never printed or saved."""


class Config(
    training_options.ModelOptions,
    vae_options.VaeOptions,
    data_options.DataOptions,
    data_options.CaptionOptions,
    quality_options.QualityOptions,
    quality_options.ImageWeightOptions,
    data_options.AugmentationOptions,
    data_options.MaskOptions,
    data_options.BucketOptions,
    data_options.LatentOptions,
    training_options.LengthOptions,
    training_options.OptimizerOptions,
    training_options.LrOptions,
    training_options.EmaOptions,
    training_options.NoiseOptions,
    flow_options.FlowOptions,
    pairing_options.PairingOptions,
    training_options.LossOptions,
    weight_options.LearnedWeightOptions,
    training_options.ValidationOptions,
    tag_options.TagReportOptions,
    numbers_options.NumbersOptions,
    training_options.HardwareOptions,
    output_options.SavingOptions,
    output_options.ResumeOptions,
    storage_options.StorageOptions,
    limit_options.LimitOptions,
    output_options.HubOptions,
    output_options.MetadataOptions,
    output_options.PreviewOptions,
    output_options.ColourOptions,
    output_options.LoggingOptions,
):
    """Every option of a run."""

    @model_validator(mode="before")
    @classmethod
    def _imply(cls, values: Any) -> Any:
        """Sets the options that other options imply, as the reference does."""
        values = dict(values)
        if values.get("caption_extention"):
            values["caption_extension"] = values["caption_extention"]
        if values.get("cache_latents_to_disk") is True or pairing_options.with_latents(values):
            values["cache_latents"] = True
        if values.get("cache_text_encoder_outputs_to_disk") is True:
            values["cache_text_encoder_outputs"] = True
        if values.get("flow_timestep_distribution") in (None, ""):
            laplace = (values.get("laplace_timestep_sampling_mu"), values.get("laplace_timestep_sampling_b"))
            if all(type(number) in (int, float) for number in laplace):
                values["flow_timestep_distribution"] = "laplace"
            elif values.get("flow_model") is True:
                values["flow_timestep_distribution"] = "logit_normal"
        if values.get("logging_dir") and not values.get("log_with"):
            values["log_with"] = "tensorboard"
        return values

    @property
    def with_latents(self) -> list[str]:
        """Names of the options that are on and for which the data loader reads latents of other images."""
        return pairing_options.with_latents(vars(self))

    @property
    def noise_needs_latents(self) -> bool:
        """True if the noise of an image, or its loss, depends on latents of the images of all ranks."""
        return self.adaptive_noise_scale is not None or bool(self.with_latents)

    @property
    def cached_for(self) -> str:
        """Name of the option that a user changes so that latents are not cached."""
        return [*self.with_latents, "cache_latents"][0]

    @property
    def cache_location(self) -> Location:
        """Folder or address of what is cached: `cache_dir`, or `cache` in `output_dir`."""
        if self.cache_dir is not None:
            return self.cache_dir
        assert self.output_dir is not None
        return self.output_dir / "cache"

    @property
    def cache_folder(self) -> Path:
        """Local folder of the dataset index: `cache_location`, or a folder for it in `local_folder`."""
        return self._local(self.cache_location)

    @property
    def output_folder(self) -> Path:
        """Local folder in which files are saved: `output_dir`, or a folder for it in `local_folder`."""
        assert self.output_dir is not None
        return self._local(self.output_dir)

    @property
    def model_path(self) -> Path:
        """`pretrained_model_name_or_path` on this machine. `with_local_models` has downloaded an address."""
        assert isinstance(self.pretrained_model_name_or_path, Path)
        return self.pretrained_model_name_or_path

    @property
    def vae_path(self) -> Path | None:
        """`vae` on this machine."""
        assert not isinstance(self.vae, Address)
        return self.vae

    @property
    def save_folders(self) -> list[Path]:
        """Local folders that saves may stand in: `output_folder`, and `save_fallback_dir` if it is set."""
        return [self.output_folder, *([self.save_fallback_dir] if self.save_fallback_dir else [])]

    @property
    def output_address(self) -> Address | None:
        """`output_dir` if it is an address, to which finished files are uploaded."""
        return self.output_dir if isinstance(self.output_dir, Address) else None

    @property
    def uploads_saves(self) -> bool:
        """True if saves are uploaded, to an object store or to the Hugging Face hub."""
        return bool(self.output_address or self.huggingface_repo_id)

    @property
    def local_folder(self) -> Path:
        """Local folder for parts of what is kept at addresses."""
        return self.cache_dir_local or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sdxl_finetune")

    @property
    def copies(self) -> LocalCopies | None:
        """Local copies of shards at an address; None if there are none."""
        limit = int(self.cache_dir_local_gb * 1e9)
        in_store = limit and self.output_dir and isinstance(self.cache_location, Address)
        return LocalCopies(self.local_folder / "shards", limit) if in_store else None

    def _local(self, location: Location) -> Path:
        if isinstance(location, Path):
            return location
        digest = hashlib.blake2b(str(location).encode(), digest_size=4).hexdigest()
        return self.local_folder / f"{location.name}-{digest}"


GROUPS: tuple[type[Options], ...] = Config.__bases__
"""The option groups, in the order in which help and documentation show them."""


def secrets_of(options: Options) -> tuple[str, ...]:
    """The secrets in these options and in the environment, the longest first."""
    return known_secrets(getattr(options, name, None) for name in SECRETS)


def to_toml(config: Config, *, changed_only: bool = False) -> str:
    """Returns the text of a config file that loads as the same config, here and in the reference.

    Secrets are left out, and replaced by *** in the values of other options. With `changed_only`, options at their
    defaults are left out too.
    """
    secrets = secrets_of(config)
    tables: dict[str, dict[str, Any]] = {}
    for group in GROUPS:
        title = re.sub(r"(?<=.)(?=[A-Z])", "_", group.__name__.removesuffix("Options")).lower()
        tables[title] = {
            name: replaced(plain(value), secrets)
            for name, field in group.model_fields.items()
            if (value := getattr(config, name)) is not None
            and name not in SECRETS
            and not (changed_only and value == field.get_default(call_default_factory=True))
        }
    encoder: Any = toml.TomlEncoder()
    # The library writes control characters wrongly. JSON writes text as TOML wants it, except for DEL.
    encoder.dump_funcs[str] = lambda text: json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
    text = toml.dumps({title: table for title, table in tables.items() if table}, encoder)
    # TOML has no way to write a path that is not UTF-8. Its bytes are shown for a reader.
    return encodable(text)
