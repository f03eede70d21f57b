"""Runs sdxl-train as `python -m sdxl_finetune`, for example under `accelerate launch -m sdxl_finetune`."""

from sdxl_finetune.cli import train

if __name__ == "__main__":
    train()
