"""Configuration: one typed schema, read from a TOML file and the command line, and checked as a whole."""

from sdxl_finetune.config.data_options import (
    AugmentationOptions,
    BucketOptions,
    CaptionOptions,
    DataOptions,
    HoldOutOptions,
    LatentOptions,
    MaskOptions,
)
from sdxl_finetune.config.dataset import Dataset, Subset
from sdxl_finetune.config.datasets import load_datasets
from sdxl_finetune.config.load import FaultyConfig, load_config
from sdxl_finetune.config.options import Config, to_toml
from sdxl_finetune.config.output_options import (
    HubOptions,
    LoggingOptions,
    MetadataOptions,
    PreviewOptions,
    ResumeOptions,
    SavingOptions,
)
from sdxl_finetune.config.training_options import (
    EmaOptions,
    HardwareOptions,
    LengthOptions,
    LossOptions,
    LrOptions,
    ModelOptions,
    NoiseOptions,
    OptimizerOptions,
    ValidationOptions,
)

__all__ = [
    "AugmentationOptions", "BucketOptions", "CaptionOptions", "Config", "DataOptions", "Dataset", "EmaOptions",
    "FaultyConfig", "HardwareOptions", "HoldOutOptions", "HubOptions", "LatentOptions", "LengthOptions",
    "LoggingOptions", "LossOptions", "LrOptions", "MaskOptions", "MetadataOptions", "ModelOptions", "NoiseOptions",
    "OptimizerOptions", "PreviewOptions", "ResumeOptions", "SavingOptions", "Subset", "ValidationOptions",
    "load_config", "load_datasets", "to_toml",
]  # fmt: skip
