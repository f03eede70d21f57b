"""Measures what a step of the training loop costs in addition to the bare model.

    python -m scripts.benchmarks.step [--steps 50] [--preset small]

The script takes turns between two kinds of steps, in one process, with the same modules and the same batch:

- a step of the real training loop: loader, random numbers, objective, clipping, learning rate, optimizer, log
- a bare step: forward pass, backward pass, optimizer step

It prints the median time of each, and their ratio. Latents are cached, as in real runs.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from scripts.toy.photos import write_photos
from sdxl_finetune.commands.model import main as model_tool
from sdxl_finetune.config import load_config
from sdxl_finetune.model.vae import batch_latents
from sdxl_finetune.runtime.signals import StopRequest
from sdxl_finetune.training.learner import Learner
from sdxl_finetune.training.loop import training_steps
from sdxl_finetune.training.setup import Run, build_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="steps of each kind (default: 50)")
    parser.add_argument("--preset", default="tiny", choices=("tiny", "small"), help="size of the model (default: tiny)")
    parser.add_argument("--resolution", type=int, default=256, help="pixels (default: 256)")
    parser.add_argument("--train_batch_size", type=int, default=4, help="images (default: 4)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, build_run(prepare(Path(folder), arguments)) as run:
        loop, bare = measure(run, arguments.steps)
    print(
        f"loop {loop * 1000:.1f} ms, bare {bare * 1000:.1f} ms, ratio {loop / bare:.3f} (medians of {arguments.steps})"
    )


def prepare(folder: Path, arguments: argparse.Namespace):
    """Writes photographs and a model, and returns a config with enough steps and with a log, as in a real run."""
    write_photos(folder / "photos")
    model_tool(["init", str(folder / "model.safetensors"), "--preset", arguments.preset])
    options = {
        "pretrained_model_name_or_path": folder / "model.safetensors",
        "train_data_dir": folder / "photos",
        "output_dir": folder / "out",
        "logging_dir": folder / "logs",
        "resolution": arguments.resolution,
        "train_batch_size": arguments.train_batch_size,
        "caption_extension": ".txt",
        "max_train_steps": arguments.steps + 6,
        "learning_rate": 3e-5,
        "learning_rate_te1": 1e-6,
        "learning_rate_te2": 1e-6,
        "min_snr_gamma": 5,
        "multires_noise_iterations": 8,
        "max_token_length": 225,
        "max_data_loader_n_workers": 2,
        "seed": 0,
    }
    flags = ["--cache_latents", "--train_text_encoder", "--shuffle_caption"]
    config = load_config(
        [text for key, value in options.items() for text in (f"--{key}", str(value))] + flags, program=""
    )
    assert config is not None
    return config


def measure(run: Run, count: int) -> tuple[float, float]:
    """Returns the median seconds of a step of the loop and of a bare step. The first five of each are left out."""
    batch = next(iter(run.batches())).to(run.accelerator.device)
    learner = run.learner
    latents = batch_latents(batch, learner.vae)
    loop_times, bare_times = [], []
    steps = training_steps(learner, run.batches(), StopRequest())
    for number in range(count + 5):
        started = time.perf_counter()
        run.log.record(next(steps))
        synchronize(learner)
        middle = time.perf_counter()
        bare_step(learner, batch, latents)
        synchronize(learner)
        if number >= 5:
            loop_times.append(middle - started)
            bare_times.append(time.perf_counter() - middle)
    return statistics.median(loop_times), statistics.median(bare_times)


def bare_step(learner: Learner, batch, latents: torch.Tensor) -> None:
    """Makes a forward pass, a backward pass and an optimizer step, and nothing else."""
    prediction = learner.model(
        latents,
        batch.timesteps,
        batch.text,
        batch.original_size,
        batch.crop_top_left,
        batch.target_size,
    )
    torch.nn.functional.mse_loss(prediction, batch.noise).backward()
    learner.update.optimizer.step()
    learner.update.optimizer.zero_grad(set_to_none=True)


def synchronize(learner: Learner) -> None:
    if learner.accelerator.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
