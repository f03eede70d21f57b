"""Makes the small SDXL that draws: python -m scripts.toy.make_model [--folder toy] [any options of sdxl-train]

Draws captioned pictures of the toy world, trains a small VAE on such pictures, and then, with sdxl-train and
configs/toy.toml, U-Net and both text encoders from random weights until they follow captions. Every part goes on where
it was interrupted, and what is done is not done again. At the end toy_judge says how well the model follows captions
that it has never seen. The same machine and versions give the same model.
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

from scripts.toy.judge import follows
from scripts.toy.world import SIZE, Scene, caption, draw, scenes
from sdxl_finetune.commands.model import main as model_tool
from sdxl_finetune.files import atomic_path
from sdxl_finetune.model.architecture import Architecture, vae_config
from sdxl_finetune.model.random_model import build_random_model, text_size
from sdxl_finetune.model.save import save_checkpoint

CONFIG = Path(__file__).parents[2] / "configs" / "toy.toml"
BUILT = Architecture(
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
"""13 million parameters, five of them the vocabulary: 26 MB in fp16."""
VAE_BATCH, VAE_RATE = 8, 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("toy"))
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--vae_steps", type=int, default=5000, help="of encoder and decoder together")
    parser.add_argument("--decoder_steps", type=int, default=2500, help="of the decoder alone, after them")
    parser.add_argument("--keep_every", type=int, default=250, help="VAE steps, from which an interrupted one goes on")
    parser.add_argument("--judged", type=int, default=200, help="captions to draw at the end")
    arguments, options = parser.parse_known_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_pictures(folder / "pictures", islice(scenes(0, kept=True), arguments.pictures))
    if not (folder / "base.safetensors").exists():
        vae = train_vae(folder, arguments.vae_steps, arguments.decoder_steps, arguments.keep_every)
        model, _ = build_random_model(BUILT, seed=0)
        with atomic_path(folder / "base.safetensors") as path:
            save_checkpoint(path, model, vae, save_as="safetensors", dtype=None, metadata={})
    command = [sys.executable, "-m", "sdxl_finetune", "--config", str(CONFIG), "--resume", "auto"]
    places = ["--in_json", "pictures.jsonl", "--train_data_dir", "pictures"]
    subprocess.run([*command, *places, *options], check=True, cwd=folder)
    done = folder / "out" / "toy.safetensors"
    assert model_tool(["convert", str(done), str(folder / "toy.safetensors"), "--overwrite"]) == 0
    print(follows(folder / "toy.safetensors", arguments.judged))


def write_pictures(folder: Path, wanted: "islice[Scene]") -> None:
    """The pictures, and their captions in a metadata file beside the folder."""
    listed = folder.with_suffix(".jsonl")
    if listed.exists():
        return
    folder.mkdir(exist_ok=True)
    lines = []
    for number, scene in enumerate(wanted):
        name = f"{number:05d}.png"
        draw(scene, random.Random(f"picture {number}")).save(folder / name)
        lines.append(json.dumps({"image_path": name, "caption": caption(scene)}))
    with atomic_path(listed) as path:
        path.write_text("\n".join(lines) + "\n")


def train_vae(folder: Path, steps: int, decoder_steps: int, keep_every: int) -> AutoencoderKL:
    """A VAE of the toy world, whose latents have mean 0 and the deviation of SDXL's: both halves on all pictures, and
    then the decoder alone on clean ones, of which noise takes its attention before.
    """
    torch.manual_seed(0)
    vae = AutoencoderKL(**vae_config(BUILT)).to(memory_format=torch.channels_last)
    train_part(vae, vae, folder / "vae.pt", steps, keep_every)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder])
    train_part(vae, decoder, folder / "decoder.pt", decoder_steps, keep_every, clean=True)
    return normalised(vae.eval().requires_grad_(False).to(memory_format=torch.contiguous_format))


def train_part(
    vae: AutoencoderKL, part: nn.Module, kept: Path, steps: int, keep_every: int, *, clean: bool = False
) -> None:
    """Trains one part of the VAE on pictures of every kind, or mostly clean ones; goes on from the file `kept`."""
    optimizer = torch.optim.AdamW(part.parameters(), lr=VAE_RATE, betas=(0.9, 0.99), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, VAE_RATE, total_steps=steps + 1, pct_start=0.05)
    parts = {"vae": vae, "optimizer": optimizer, "schedule": schedule}
    start = 0
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        start = state.pop("step")
        for name, one in parts.items():
            one.load_state_dict(state[name])
    progress = tqdm(range(start, steps), initial=start, total=steps, desc=kept.stem)
    for step in progress:
        pixels = vae_batch(step + 1_000_000 * clean, clean=clean)
        noise = torch.randn(VAE_BATCH, 4, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(step))
        found = vae.encode(pixels).latent_dist
        drawn = vae.decode(found.mean + found.std * noise).sample
        difference = drawn - pixels
        error = difference.abs().mean() + difference.square().mean()
        loss = error + 1e-5 * found.kl().mean() / pixels[0].numel() * 64
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(error=f"{error.item():.4f}", refresh=False)
        if (step + 1) % keep_every == 0 or step + 1 == steps:
            with atomic_path(kept) as path:
                torch.save({name: one.state_dict() for name, one in parts.items()} | {"step": step + 1}, path)


def vae_batch(step: int, *, clean: bool = False) -> torch.Tensor:
    """Pictures of any kind, framed ones too: the VAE must not be what a fine-tuning has to teach."""
    pictures = []
    for number, scene in enumerate(islice(scenes(10_000_000 + step, kept=True, two=0.5), VAE_BATCH)):
        rng = random.Random(f"VAE {step} {number}")
        quality = "best" if clean and number % 4 else scene.quality
        changed = replace(scene, quality=quality, framed=rng.random() < 0.25)
        pictures.append(np.asarray(draw(changed, rng)))
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def normalised(vae: AutoencoderKL) -> AutoencoderKL:
    """The same VAE with latents of mean 0 and deviation 1 / scaling_factor in each channel."""
    latents = torch.cat([vae.encode(vae_batch(1_000_000 + number)).latent_dist.mean for number in range(32)])
    mean = latents.mean((0, 2, 3))
    scale = 1 / (latents.std((0, 2, 3)) * vae.config.scaling_factor)
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight /= scale[None, :, None, None]
    quant.weight[:4] *= scale[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) * scale
    quant.bias[4:] += 2 * scale.log()  # of the variance
    return vae


if __name__ == "__main__":
    main()
