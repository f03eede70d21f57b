"""Makes the small SDXL model that draws: python -m scripts.toy.make_model [--folder toy] [any options of sdxl-train]

The script works in four steps:

1. It writes captioned images of the toy world (world.py).
2. It trains a small VAE on such images.
3. With sdxl-train and configs/toy.toml it trains the U-Net and both text encoders, from random weights.
4. It prints how well the model follows captions that were held out (judge.py).

If the script was interrupted, it continues where it stopped and keeps what is done. The same machine and library
versions give the same model.
"""

import argparse
import json
import random
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from tqdm import tqdm

from scripts.toy.judge import judge_checkpoint
from scripts.toy.world import SIZE, Scene, caption, draw, scenes
from sdxl_finetune.commands.model import main as model_tool
from sdxl_finetune.files import atomic_path
from sdxl_finetune.model.architecture import Architecture, vae_config
from sdxl_finetune.model.random_model import build_random_model, text_size
from sdxl_finetune.model.save import save_checkpoint

CONFIG = Path(__file__).parents[2] / "configs" / "toy.toml"
ARCHITECTURE = Architecture(
    unet_widths=(64, 128),
    unet_layers=(2, 2),
    transformer_layers=(1, 2),
    middle_transformer_layers=2,
    time_width=256,
    te1=text_size(32, 2),
    te2=text_size(64, 2),
    vae_widths=(32, 32, 64, 64),
    vae_layers=1,
)
"""13 million parameters, 26 MB in fp16. The text encoders' vocabulary takes five million of them."""
VAE_BATCH = 8
"""Images."""
VAE_LEARNING_RATE = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("toy"), help="folder to work in (toy)")
    parser.add_argument("--pictures", type=int, default=20_000, help="images to train on (20000)")
    parser.add_argument("--vae_steps", type=int, default=5000, help="steps that train encoder and decoder (5000)")
    parser.add_argument(
        "--decoder_steps", type=int, default=2500, help="steps that then train the decoder alone (2500)"
    )
    parser.add_argument("--keep_every", type=int, default=250, help="save the VAE every N steps (250)")
    parser.add_argument("--judged", type=int, default=200, help="captions to draw at the end (200)")
    arguments, options = parser.parse_known_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_pictures(folder / "pictures", islice(scenes(0, for_training=True), arguments.pictures))
    if not (folder / "base.safetensors").exists():
        vae = train_vae(folder, arguments.vae_steps, arguments.decoder_steps, arguments.keep_every)
        model, _ = build_random_model(ARCHITECTURE, seed=0)
        with atomic_path(folder / "base.safetensors") as path:
            save_checkpoint(path, model, vae, save_as="safetensors", dtype=None, metadata={})
    command = [sys.executable, "-m", "sdxl_finetune", "--config", str(CONFIG), "--resume", "auto"]
    dataset = ["--in_json", "pictures.jsonl", "--train_data_dir", "pictures"]
    subprocess.run([*command, *dataset, *options], check=True, cwd=folder)
    trained = folder / "out" / "toy.safetensors"
    assert model_tool(["convert", str(trained), str(folder / "toy.safetensors"), "--overwrite"]) == 0
    print(judge_checkpoint(folder / "toy.safetensors", arguments.judged))


def write_pictures(folder: Path, scenes_to_draw: "islice[Scene]") -> None:
    """Draws scenes into `folder`, and writes their captions into a metadata file beside the folder."""
    metadata_file = folder.with_suffix(".jsonl")
    if metadata_file.exists():
        return
    folder.mkdir(exist_ok=True)
    lines = []
    for number, scene in enumerate(scenes_to_draw):
        name = f"{number:05d}.png"
        draw(scene, random.Random(f"picture {number}")).save(folder / name)
        lines.append(json.dumps({"image_path": name, "caption": caption(scene)}))
    with atomic_path(metadata_file) as path:
        path.write_text("\n".join(lines) + "\n")


def train_vae(folder: Path, steps: int, decoder_steps: int, keep_every: int) -> AutoencoderKL:
    """Trains a VAE for the toy world. Its latents have mean 0 and the standard deviation of SDXL's latents.

    First the encoder and the decoder are trained on images of all qualities. Noisy images dominate the loss there, so
    the decoder is then trained alone on mostly clean images.
    """
    torch.manual_seed(0)
    vae = AutoencoderKL(**vae_config(ARCHITECTURE)).to(memory_format=torch.channels_last)
    train_part(vae, vae, folder / "vae.pt", steps, keep_every)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder])
    train_part(vae, decoder, folder / "decoder.pt", decoder_steps, keep_every, clean=True)
    return normalise_latents(vae.eval().requires_grad_(False).to(memory_format=torch.contiguous_format))


def train_part(
    vae: AutoencoderKL, part: nn.Module, checkpoint: Path, steps: int, keep_every: int, *, clean: bool = False
) -> None:
    """Trains `part` of the VAE. It saves its state in `checkpoint` and continues from there if the file exists.

    If `clean`, three of four images have the best quality. Otherwise all qualities are used.
    """
    optimizer = torch.optim.AdamW(part.parameters(), lr=VAE_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, VAE_LEARNING_RATE, total_steps=steps + 1, pct_start=0.05)
    parts = {"vae": vae, "optimizer": optimizer, "schedule": schedule}
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        start = state.pop("step")
        for name, stateful in parts.items():
            stateful.load_state_dict(state[name])
    progress = tqdm(range(start, steps), initial=start, total=steps, desc=checkpoint.stem)
    for step in progress:
        pixels = vae_batch(step + 1_000_000 * clean, clean=clean)
        noise = torch.randn(VAE_BATCH, 4, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(step))
        latents = vae.encode(pixels).latent_dist
        decoded = vae.decode(latents.mean + latents.std * noise).sample
        difference = decoded - pixels
        error = difference.abs().mean() + difference.square().mean()
        loss = error + 1e-5 * latents.kl().mean() / pixels[0].numel() * 64
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(error=f"{error.item():.4f}", refresh=False)
        if (step + 1) % keep_every == 0 or step + 1 == steps:
            with atomic_path(checkpoint) as path:
                torch.save({name: stateful.state_dict() for name, stateful in parts.items()} | {"step": step + 1}, path)


def vae_batch(step: int, *, clean: bool = False) -> torch.Tensor:
    """Draws images of shape (8, 3, 64, 64) with values from -1 to 1.

    A quarter of them has a frame, so that fine-tuning on the new style does not need a better VAE.
    """
    images = []
    for number, scene in enumerate(islice(scenes(10_000_000 + step, for_training=True, pair_share=0.5), VAE_BATCH)):
        rng = random.Random(f"VAE {step} {number}")
        quality = "best" if clean and number % 4 else scene.quality
        changed = replace(scene, quality=quality, framed=rng.random() < 0.25)
        images.append(np.asarray(draw(changed, rng)))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL) -> AutoencoderKL:
    """Changes the VAE so that each latent channel has mean 0 and standard deviation 1 / scaling_factor.

    The decoder undoes the change, so that decoded images stay the same. Returns the VAE.
    """
    latents = torch.cat([vae.encode(vae_batch(1_000_000 + number)).latent_dist.mean for number in range(32)])
    mean = latents.mean((0, 2, 3))
    scale = 1 / (latents.std((0, 2, 3)) * vae.config.scaling_factor)
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight /= scale[None, :, None, None]
    quant.weight[:4] *= scale[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) * scale
    quant.bias[4:] += 2 * scale.log()  # these channels are the log of the variance
    return vae


if __name__ == "__main__":
    main()
