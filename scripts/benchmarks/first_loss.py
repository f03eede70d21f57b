"""How far the loss of the first step differs from that of sd-scripts, because two inputs of the model are corrected.

    python -m scripts.benchmarks.first_loss [--model FILE] [--data FOLDER]

prints the mean loss with the inputs of this program. It then replaces the crop by the letter-box offset of sd-scripts,
the pooled embedding by that of sd-scripts, and both. Images, noise and timesteps stay the same. The default is the
small model of tests/toy, on pictures of its world that do not have the shape of their bucket.
"""

import argparse
import tempfile
from itertools import islice
from pathlib import Path
from statistics import mean, stdev

import torch
from PIL import Image

from scripts.benchmarks.letter_box import letter_box_view
from scripts.benchmarks.proof_models import transpose_projection
from sdxl_finetune.config import load_config
from sdxl_finetune.data import loader
from sdxl_finetune.data.views import draw_view
from sdxl_finetune.diffusion.image_loss import image_losses
from sdxl_finetune.model.vae import batch_latents
from sdxl_finetune.training.setup import build_run

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "tests" / "toy" / "toy.safetensors"
IMAGES = 8
STEPS = 64
"""Optimizer steps whose batches are measured."""


def write_pictures(folder: Path) -> None:
    """Writes pictures of the small model's world, each a little wider or higher than its bucket."""
    import random

    from scripts.toy.style import save_pair
    from scripts.toy.world import caption, draw, scenes

    folder.mkdir()
    for number, scene in enumerate(islice(scenes(7, for_training=False), 64)):
        image = draw(scene, random.Random(number))
        width, height = image.size
        more = 16 if number % 2 else 0
        picture = image.resize((width + more, height + 16 - more), Image.Resampling.LANCZOS)
        save_pair(folder, number, picture, caption(scene))


def losses(model: Path, arguments: list[str], *, letter_box: bool) -> list[float]:
    """Returns the loss of each image, with the crop that was made or the letter-box offset of sd-scripts."""
    loader.draw_view = letter_box_view if letter_box else draw_view  # this process does nothing else
    config = load_config(["--pretrained_model_name_or_path", str(model), *arguments], program="sdxl-train")
    assert config is not None
    found: list[float] = []
    with build_run(config) as run, torch.no_grad():
        for batch in run.batches():
            batch = batch.to(run.accelerator.device)
            latents = batch_latents(batch, run.learner.vae)
            with run.accelerator.autocast():
                found += image_losses(run.learner.model, batch, latents, run.learner.objective, config).tolist()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TOY)
    parser.add_argument("--data", type=Path, help="folder of images with .txt captions")
    parser.add_argument("options", nargs="*", metavar="--option VALUE", help="further options of sdxl-train, after --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if given.data is None:
            write_pictures(folder / "images")
        arguments = [
            *("--train_data_dir", str(given.data or folder / "images")),
            *("--output_dir", str(folder / "out"), "--resolution", "64", "--caption_extension", ".txt", "--seed", "1"),
            *("--max_train_steps", str(STEPS), "--train_batch_size", str(IMAGES), "--max_data_loader_n_workers", "0"),
            *("--cache_latents", "--learning_rate", "1e-6", *given.options),
        ]
        transposed = transpose_projection(given.model, folder / "transposed.safetensors")
        base = losses(given.model, arguments, letter_box=False)
        print(f"{len(base)} images, each with its own noise and timestep")
        print(f"this program                      {mean(base):.4f}")
        for name, model, letter_box in (
            ("the reference's crop", given.model, True),
            ("the reference's pooled embedding", transposed, False),
            ("both", transposed, True),
        ):
            others = losses(model, arguments, letter_box=letter_box)
            changes = [other - own for other, own in zip(others, base, strict=True)]
            error = stdev(changes) / len(changes) ** 0.5
            change, margin = 100 * mean(changes) / mean(base), 200 * error / mean(base)
            print(f"{name:33} {mean(others):.4f}  {change:+.2f} % (95 % interval ± {margin:.2f})")


if __name__ == "__main__":
    main()
