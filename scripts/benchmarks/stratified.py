"""Measures how much `stratified_timesteps` lowers the variance of a step's loss and gradient.

    python -m scripts.benchmarks.stratified [--steps 300] [--batch 4 16] [--model FILE] [-- --flow_model]

No weight changes: each step is an independent estimate of the same mean loss and of the same gradient. The script makes
the estimates of many steps with independent timesteps and with stratified timesteps. Images, captions and noise are
random in both, and the same. It prints the variance of the loss, and that of the gradient, which is the mean squared
distance from the mean gradient. The ratio of both has a standard error from 200 bootstrap samples of the steps.

The default model is the small model of tests/toy, on pictures of its world. It predicts noise.
"""

import argparse
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from scripts.toy.style import save_pair
from scripts.toy.world import caption, draw, scenes
from sdxl_finetune.config import load_config
from sdxl_finetune.diffusion.image_loss import image_losses
from sdxl_finetune.model.vae import batch_latents
from sdxl_finetune.training.setup import build_run

TOY = Path(__file__).resolve().parents[2] / "tests" / "toy" / "toy.safetensors"
PICTURES = 256
BOOTSTRAPS = 200
SKETCH = 256
"""Numbers to which each gradient is reduced, as random signed sums that keep squared distances on average."""


@dataclass(frozen=True)
class Estimates:
    """Loss of each step, and its reduced gradient."""

    losses: NDArray[np.float64]
    gradients: NDArray[np.float64]

    def variances(self, steps: NDArray[np.int64]) -> NDArray[np.float64]:
        """Variance of the loss and of the gradient over these steps."""
        return np.array([self.losses[steps].var(ddof=1), self.gradients[steps].var(axis=0, ddof=1).sum()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TOY)
    parser.add_argument("--steps", type=int, default=300, help="steps of each kind (default: 300)")
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16], help="images of a step (default: 4 and 16)")
    parser.add_argument("options", nargs="*", metavar="--option VALUE", help="further options of sdxl-train, after --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_pictures(folder / "images")
        for batch in given.batch:
            common = [
                *("--pretrained_model_name_or_path", str(given.model), "--train_data_dir", str(folder / "images")),
                *("--output_dir", str(folder / "out"), "--resolution", "64", "--caption_extension", ".txt"),
                *("--seed", "1", "--max_train_steps", str(given.steps), "--train_batch_size", str(batch)),
                *("--max_data_loader_n_workers", "0", "--cache_latents", "--learning_rate", "1e-6", *given.options),
            ]
            independent, stratified = (estimate([*common, *more]) for more in ([], ["--stratified_timesteps"]))
            report(batch, independent, stratified)


def write_pictures(folder: Path) -> None:
    """Writes pictures of the small model's world with their captions."""
    import random

    folder.mkdir()
    for number, scene in enumerate(islice(scenes(7, for_training=False), PICTURES)):
        save_pair(folder, number, draw(scene, random.Random(number)), caption(scene))


def estimate(arguments: list[str]) -> Estimates:
    """Returns the loss and the reduced gradient of each step of a run, without changing a weight."""
    config = load_config(arguments, program="sdxl-train")
    assert config is not None
    losses: list[float] = []
    gradients = []
    with build_run(config) as run:
        parameters = [parameter for group in run.learner.parameters.groups for parameter in group.parameters.values()]
        sketch = Sketch(parameters)
        loss = 0.0
        for batch in run.batches():
            batch = batch.to(run.accelerator.device)
            latents = batch_latents(batch, run.learner.vae)
            each = image_losses(run.learner.model, batch, latents, run.learner.objective, config)
            part = (each * batch.weights).sum()
            part.backward()
            loss += part.item()
            if batch.position.is_last_micro_batch:
                losses.append(loss)
                gradients.append(sketch.take())
                loss = 0.0
    return Estimates(np.array(losses), np.array(gradients))


class Sketch:
    """Reduces gradients to a few numbers: each element is added to one of them at random, with a random sign.

    The expected squared norm of the numbers is that of the gradient (Charikar et al., 2002, count sketch).
    """

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self._parameters = parameters
        generator = torch.Generator().manual_seed(0)
        self._place: list[torch.Tensor] = []
        self._sign: list[torch.Tensor] = []
        for parameter in parameters:
            self._place.append(torch.randint(SKETCH, (parameter.numel(),), generator=generator))
            self._sign.append(torch.randint(2, (parameter.numel(),), generator=generator).float() * 2 - 1)

    def take(self) -> NDArray[np.float64]:
        """Returns signed sums of the gradient's elements in random groups, and clears the gradients."""
        total = torch.zeros(SKETCH)
        for parameter, place, sign in zip(self._parameters, self._place, self._sign, strict=True):
            if parameter.grad is not None:
                total.index_add_(0, place, parameter.grad.flatten().float() * sign)
                parameter.grad = None
        return total.double().numpy()


def report(batch: int, independent: Estimates, stratified: Estimates) -> None:
    steps = len(independent.losses)
    rng = np.random.default_rng(0)
    whole = np.arange(steps)
    before, after = independent.variances(whole), stratified.variances(whole)
    samples = rng.integers(steps, size=(BOOTSTRAPS, steps))
    ratios = np.array([stratified.variances(sample) / independent.variances(sample) for sample in samples])
    print(f"{batch} images in a step, {steps} steps of each kind")
    for index, name in enumerate(("loss", "gradient")):
        ratio, error = after[index] / before[index], ratios[:, index].std()
        print(f"  {name:9} {before[index]:.3g} -> {after[index]:.3g}, ratio {ratio:.2f} ± {error:.2f}")


if __name__ == "__main__":
    main()
