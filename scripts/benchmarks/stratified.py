"""Measures how much `stratified_timesteps` lowers the variance of a step's loss and gradient.

    python -m scripts.benchmarks.stratified [--images 1000] [--model FILE] [--train 0] [-- --flow_model]

The script computes the loss of single images, each with its own caption, noise and timestep, and the gradient of this
loss. No weight changes. Let V be the variance of one image, and V_s the variance among images with timesteps in part s
of the distribution. The mean over a step of B images then has the variance

    V / B                     with independent timesteps
    (V_1 + ... + V_B) / B^2   with stratified timesteps (Cochran, Sampling Techniques, 1977, theorem 5.3)

The script prints the ratio of both for steps of 4, 16 and 64 images. The variance of a gradient is its mean squared
distance from the mean gradient. Standard errors are those of 200 bootstrap samples of the images.

The default model is the small model of tests/toy, on pictures of its world. It predicts noise. `--train` first trains
the model for so many steps with the options after --, for example from noise to a flow.
"""

import argparse
import random
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64
from torch.nn import Parameter

from scripts.toy.style import save_pair
from scripts.toy.world import caption, draw, scenes
from sdxl_finetune.config import load_config
from sdxl_finetune.diffusion.image_loss import image_losses
from sdxl_finetune.model.vae import batch_latents
from sdxl_finetune.training.setup import build_run

TOY = Path(__file__).resolve().parents[2] / "tests" / "toy" / "toy.safetensors"
PICTURES = 256
STEPS = (4, 16, 64)
"""Images of a step."""
BOOTSTRAPS = 200
SKETCH = 256
"""Numbers to which each gradient is reduced, as random signed sums that keep squared distances on average."""

Values = Float64[np.ndarray, "images values"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TOY)
    parser.add_argument("--images", type=int, default=1000, help="single images that are measured (default: 1000)")
    parser.add_argument("--train", type=int, default=0, help="steps of 16 images in which the model is trained before")
    parser.add_argument("options", nargs="*", metavar="--option VALUE", help="further options of sdxl-train, after --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_pictures(folder / "images")
        arguments = [
            *("--train_data_dir", str(folder / "images"), "--output_dir", str(folder / "out"), "--resolution", "64"),
            *("--caption_extension", ".txt", "--seed", "1", "--max_data_loader_n_workers", "0", "--cache_latents"),
            *given.options,
        ]
        model = trained(given.model, given.train, arguments) if given.train else given.model
        arguments += ["--max_train_steps", str(given.images), "--train_batch_size", "1"]
        measured = measure(["--pretrained_model_name_or_path", str(model), *arguments])
    timesteps, *quantities = measured
    rng = np.random.default_rng(0)
    samples = rng.integers(given.images, size=(BOOTSTRAPS, given.images))
    for name, values in zip(("loss", "gradient"), quantities, strict=True):
        for images in STEPS:
            ratio = variance_ratio(timesteps, values, images)
            error = np.std([variance_ratio(timesteps[sample], values[sample], images) for sample in samples])
            print(f"{name:9} {images:3} images in a step: variance x {ratio:.2f} (standard error {error:.2f})")


def write_pictures(folder: Path) -> None:
    """Writes pictures of the small model's world with their captions."""
    folder.mkdir()
    for number, scene in enumerate(islice(scenes(7, for_training=False), PICTURES)):
        save_pair(folder, number, draw(scene, random.Random(number)), caption(scene))


def trained(model: Path, steps: int, arguments: list[str]) -> Path:
    """Trains the model in a process of its own, and returns the file of its weights."""
    command = [sys.executable, "-m", "sdxl_finetune", "--pretrained_model_name_or_path", str(model), *arguments]
    command += ["--max_train_steps", str(steps), "--train_batch_size", "16", "--learning_rate", "3e-4"]
    subprocess.run(command, check=True)
    (file,) = Path(arguments[arguments.index("--output_dir") + 1]).glob("*.safetensors")
    return file


def measure(arguments: list[str]) -> tuple[Float64[np.ndarray, " images"], Values, Values]:
    """Returns timestep, loss and reduced gradient of each image of a run, without changing a weight."""
    config = load_config(arguments, program="sdxl-train")
    assert config is not None
    timesteps, losses, gradients = [], [], []
    with build_run(config) as run:
        parameters = [parameter for group in run.learner.parameters.groups for parameter in group.parameters.values()]
        generator = torch.Generator().manual_seed(0)
        signs = [torch.randint(2, (parameter.numel(),), generator=generator) * 2.0 - 1 for parameter in parameters]
        for batch in run.batches():
            latents = batch_latents(batch, run.learner.vae)
            loss = image_losses(run.learner.model, batch, latents, run.learner.objective, config).sum()
            loss.backward()
            timesteps.append(float(batch.timesteps))
            losses.append([loss.item()])
            gradients.append(reduced(parameters, signs).tolist())
    return np.array(timesteps), np.array(losses), np.array(gradients)


def reduced(parameters: list[Parameter], signs: list[torch.Tensor]) -> torch.Tensor:
    """Returns sums of the gradient's elements with random signs, and clears the gradients.

    The expected squared norm of the sums is that of the gradient (Charikar et al., count sketch, 2002).
    """
    total = torch.zeros(SKETCH)
    for parameter, sign in zip(parameters, signs, strict=True):
        if parameter.grad is not None:
            signed = parameter.grad.flatten().float() * sign
            total += torch.nn.functional.pad(signed, (0, -len(signed) % SKETCH)).view(-1, SKETCH).sum(0)
            parameter.grad = None
    return total


def variance_ratio(timesteps: Float64[np.ndarray, " images"], values: Values, images: int) -> float:
    """Variance of a mean over `images` stratified images, divided by that over independent images."""
    parts = np.array_split(np.argsort(timesteps, kind="stable"), images)
    within = np.mean([values[part].var(axis=0, ddof=1).sum() for part in parts])
    return float(within / values.var(axis=0, ddof=1).sum())


if __name__ == "__main__":
    main()
