"""Configuration: one typed schema, read from a TOML file and the command line, checked as a whole."""

from sdxl_finetune.config.dataset import Dataset, Subset
from sdxl_finetune.config.datasets import load_datasets
from sdxl_finetune.config.load import load_config, to_toml
from sdxl_finetune.config.options import Config
from sdxl_finetune.config.output_options import LoggingOptions, PreviewOptions, ResumeOptions, SavingOptions
from sdxl_finetune.config.training_options import (
    HardwareOptions,
    LengthOptions,
    LossOptions,
    NoiseOptions,
    ValidationOptions,
)

__all__ = [
    "Config",
    "Dataset",
    "HardwareOptions",
    "LengthOptions",
    "LoggingOptions",
    "LossOptions",
    "NoiseOptions",
    "PreviewOptions",
    "ResumeOptions",
    "SavingOptions",
    "Subset",
    "ValidationOptions",
    "load_config",
    "load_datasets",
    "to_toml",
]
