"""Configuration: one typed schema, read from a TOML file and the command line, and checked as a whole."""

from sdxl_finetune.config.addresses import with_options
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
from sdxl_finetune.config.downloads import with_local_models
from sdxl_finetune.config.flow_options import FlowOptions
from sdxl_finetune.config.load import FaultyConfig, load_config
from sdxl_finetune.config.numbers_options import NumbersOptions
from sdxl_finetune.config.options import Config, to_toml
from sdxl_finetune.config.output_options import (
    ColourOptions,
    HubOptions,
    LoggingOptions,
    MetadataOptions,
    PreviewOptions,
    ResumeOptions,
    SavingOptions,
)
from sdxl_finetune.config.pairing_options import PairingOptions
from sdxl_finetune.config.quality_options import ImageWeightOptions, QualityOptions
from sdxl_finetune.config.storage_options import StorageOptions
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
from sdxl_finetune.config.vae_options import VaeOptions
from sdxl_finetune.config.weight_options import LearnedWeightOptions

__all__ = [
    "AugmentationOptions", "BucketOptions", "CaptionOptions", "ColourOptions", "Config", "DataOptions", "Dataset",
    "EmaOptions", "FaultyConfig", "FlowOptions", "HardwareOptions", "HoldOutOptions", "HubOptions",
    "ImageWeightOptions", "LatentOptions", "LearnedWeightOptions", "LengthOptions", "LoggingOptions", "LossOptions",
    "LrOptions", "MaskOptions", "MetadataOptions", "ModelOptions", "NoiseOptions", "NumbersOptions", "OptimizerOptions",
    "PairingOptions", "PreviewOptions", "QualityOptions", "ResumeOptions", "SavingOptions", "StorageOptions", "Subset",
    "VaeOptions", "ValidationOptions", "load_config", "load_datasets", "to_toml", "with_local_models", "with_options",
]  # fmt: skip
