"""Config: every option of a run, one flat frozen model. Names, meanings and defaults are the reference's.

An attribute's name is the option's name in a config file and on the command line. Nothing writes to a Config
after it was made; what one option implies for another is settled in `_imply`.
"""

from typing import Any

from pydantic import model_validator

from sdxl_finetune.config import data_options, output_options, training_options
from sdxl_finetune.config.fields import Options

SECRETS = frozenset({"wandb_api_key", "huggingface_token"})
"""Options that are never printed or saved."""


class Config(
    training_options.ModelOptions,
    data_options.DataOptions,
    data_options.CaptionOptions,
    data_options.AugmentationOptions,
    data_options.BucketOptions,
    data_options.LatentOptions,
    training_options.LengthOptions,
    training_options.OptimizerOptions,
    training_options.LrOptions,
    training_options.EmaOptions,
    training_options.NoiseOptions,
    training_options.LossOptions,
    training_options.ValidationOptions,
    training_options.HardwareOptions,
    output_options.SavingOptions,
    output_options.ResumeOptions,
    output_options.MetadataOptions,
    output_options.PreviewOptions,
    output_options.LoggingOptions,
):
    """Every option of a run."""

    @model_validator(mode="before")
    @classmethod
    def _imply(cls, values: Any) -> Any:
        """What one option says about another, as in the reference."""
        values = dict(values)
        if values.get("caption_extention"):
            values["caption_extension"] = values["caption_extention"]
        if values.get("cache_latents_to_disk") is True:
            values["cache_latents"] = True
        if values.get("logging_dir") and not values.get("log_with"):
            values["log_with"] = "tensorboard"
        return values


GROUPS: tuple[type[Options], ...] = Config.__bases__
"""The groups, in the order in which help and documentation show them."""
