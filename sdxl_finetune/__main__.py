"""`python -m sdxl_finetune`, and so `accelerate launch -m sdxl_finetune`, is sdxl-train."""

from sdxl_finetune.cli import train

if __name__ == "__main__":
    train()
