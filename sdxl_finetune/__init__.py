"""Full fine-tuning of Stable Diffusion XL: U-Net and both text encoders, from one TOML file."""

__version__ = "0.1.0"
