"""Configuration: one typed schema, read from a TOML file and the command line, checked as a whole."""

from sdxl_finetune.config.dataset import Dataset, Subset
from sdxl_finetune.config.datasets import load_datasets
from sdxl_finetune.config.load import load_config, to_toml
from sdxl_finetune.config.options import Config

__all__ = ["Config", "Dataset", "Subset", "load_config", "load_datasets", "to_toml"]
