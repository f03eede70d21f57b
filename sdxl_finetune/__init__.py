"""Full fine-tuning of Stable Diffusion XL: U-Net and both text encoders, from one TOML file."""

__version__ = "0.1.0"
OFFLINE_BY_DEFAULT = "SDXL_FINETUNE_OFFLINE"
"""Environment variable that is set if HF_HUB_OFFLINE was set by this program and not by the user."""
