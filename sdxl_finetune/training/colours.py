"""The colour check: pictures drawn for the captions of a few fixed images, beside these images.

The images are held out, if any are, and else images of the training. Each check draws the same captions from the same
noise, in the images' sizes and without guidance, because guidance makes pictures harsher and more colourful. The images
are decoded from their own latents, so that the VAE changes both sides alike. The check draws no random number that the
training uses, and leaves the model as it was.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from accelerate.utils import gather_object
from jaxtyping import Float, Int32
from torch import Tensor

from sdxl_finetune.batch import TIMESTEPS, Batch, Position, TextOutputs
from sdxl_finetune.config import Config
from sdxl_finetune.config.flow_options import shift_ratio
from sdxl_finetune.data.batch_plan import MicroBatch
from sdxl_finetune.data.index import Index
from sdxl_finetune.data.loader import TrainingDataset, load_batches
from sdxl_finetune.data.unchanged import image_id, unchanged
from sdxl_finetune.model.sdxl import evaluating
from sdxl_finetune.model.vae import batch_latents, decode, latent_scale, latent_size
from sdxl_finetune.output.colours import Drift, compare, measure
from sdxl_finetune.output.previews import moved_to
from sdxl_finetune.output.samplers import build_sampler, denoise
from sdxl_finetune.training.learner import Learner
from sdxl_finetune.training.validation import batches_of, draw_validation_noise, validation_timesteps

logger = logging.getLogger(__name__)

IMAGES = 16
"""Default of `colour_check_images`."""
BOUND = 0.08
"""Default of `colour_check_bound`. docs/proof.md shows what sound and broken runs of the small model give."""
STEPS = 20
"""Sampling steps of a picture. More of them change its colours little."""
CAUSES = (
    "Likely causes: zero_terminal_snr or v_parameterization differ from how the model was trained before; noise_offset"
    " or multires noise is too strong; the learning rate is too high; the VAE is not the model's"
)
BEFORE_TRAINING = "Before the first step, a style or an objective that the model has yet to learn may also explain it"


@dataclass(kw_only=True)
class ColourCheck:
    """This rank's share of the pictures to draw, and what the check remembers."""

    dataset: TrainingDataset
    batches: Sequence[Int32[np.ndarray, " k"]]
    """Rows of the index, of one bucket each."""
    seeds: Sequence[Sequence[int]]
    """For each image, the seed of the noise that some samplers add."""
    config: Config
    warned: set[bool] = field(default_factory=set)
    """True after the warning of a trained model, and False after that of an untrained one."""

    @torch.no_grad()
    def __call__(self, learner: Learner) -> list[Drift]:
        """Draws the pictures and returns the drift of each figure over all ranks; empty if nothing could be drawn.

        A failure is logged and does not end the run, as with previews.
        """
        device = learner.accelerator.device
        drawn: list[Tensor] = []
        expected: list[Tensor] = []
        with evaluating(learner.sdxl), moved_to(device, learner.vae):
            try:
                for batch in self._load(pin_memory=device.type == "cuda"):
                    batch = batch.to(device)
                    latents = batch_latents(batch, learner.vae, drawn=False)
                    pictures = self._draw(learner, batch)
                    usable = (batch.weights > 0) & pictures.flatten(1).isfinite().all(1)
                    if (~usable).any():
                        logger.error("colours: the model gave values that are infinite or not a number")
                    for values, figures in ((pictures, drawn), (latents, expected)):
                        figures += [self._figures(learner, value[None]) for value in values[usable]]
            except Exception as error:
                reason = str(error).strip().partition("\n")[0]
                logger.error("no colour check: %s: %s", type(error).__name__, reason)
        count = min(len(drawn), len(expected))
        pairs = gather_object([(a.tolist(), b.tolist()) for a, b in zip(drawn[:count], expected[:count], strict=True)])
        return compare(*np.asarray(pairs, np.float64).transpose(1, 0, 2)) if pairs else []

    def warning(self, drifts: Sequence[Drift], *, step: int) -> str | None:
        """The warning about a drift beyond `colour_check_bound`; None without one, and after an earlier warning."""
        bound, is_trained = self.config.colour_check_bound or BOUND, step > 0
        beyond = [drift for drift in drifts if drift.is_beyond(bound)]
        if not beyond or is_trained in self.warned:
            return None
        self.warned.add(is_trained)
        what = f"drawn pictures are {', '.join(map(str, beyond))} than the images of the same captions"
        text = f"colours after step {step}: {what}, beyond colour_check_bound = {bound:g}. {CAUSES}"
        return text if is_trained else f"{text}. {BEFORE_TRAINING}"

    def _load(self, *, pin_memory: bool) -> Sequence[Batch]:
        micro_batches = [
            MicroBatch(Position(epoch=0, step=0, micro_batch=number, micro_batches_in_step=1), rows)
            for number, rows in enumerate(self.batches)
        ]
        return list(load_batches(self.dataset, micro_batches, workers=0, pin_memory=pin_memory, on_bad_image="skip"))

    def _draw(self, learner: Learner, batch: Batch) -> Float[Tensor, "k c h w"]:
        """Latents of pictures for the batch's captions and sizes, scaled as the U-Net sees them."""
        sdxl, device = learner.sdxl, batch.noise.device
        sizes = torch.cat([batch.original_size, batch.crop_top_left, batch.target_size], dim=1)
        pixels = batch.noise[0, 0].numel() * latent_size(learner.vae).pixels ** 2
        shift = shift_ratio(self.config, pixels)
        sampler = build_sampler(self.config.sample_sampler, learner.objective, shift)
        seeds = self.seeds[batch.position.micro_batch]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with learner.autocast():
            text = batch.text if isinstance(batch.text, TextOutputs) else sdxl.encode_text(batch.text)
            hidden, pooled = (part.to(device) for part in text)

            def predict(latents: Tensor, timestep: Tensor) -> Tensor:
                return sdxl.predict(latents, timestep.to(device).expand(len(latents)), hidden, pooled, sizes)

            return denoise(predict, sampler, STEPS, batch.noise, generators)

    def _figures(self, learner: Learner, latents: Float[Tensor, "1 c h w"]) -> Float[Tensor, " 3"]:
        return measure(decode(learner.vae, latent_scale(learner.vae).unscaled(latents.float())))[0].cpu()


def build_colour_check(config: Config, training: TrainingDataset) -> ColourCheck | None:
    """The colour check of a run; None if the options ask for none."""
    if not (config.colour_check_every_n_epochs or config.colour_check_every_n_steps):
        return None
    count = config.colour_check_images or IMAGES
    batches = batches_of(training.index, _chosen_rows(training.index, count))
    most = max(1, count // training.ranks)
    batches = [rows[start : start + most] for rows in batches for start in range(0, len(rows), most)]
    batches = batches[training.rank :: training.ranks]
    image_ids = [[image_id(training.index[row]) for row in rows.tolist()] for rows in batches]
    dataset = unchanged(
        training,
        draw_noise=partial(draw_validation_noise, [TIMESTEPS], image_ids),
        draw_timesteps=partial(validation_timesteps, [TIMESTEPS]),
        seed=config.validation_seed,
    )
    seeds = [[name for _, name in ids] for ids in image_ids]
    return ColourCheck(dataset=dataset, batches=batches, seeds=seeds, config=config)


def _chosen_rows(index: Index, count: int) -> Int32[np.ndarray, " n"]:
    """The rows of up to `count` images, evenly spread over the held-out images, or over those of the training."""
    rows = np.flatnonzero(index.held_out)
    if not len(rows):
        rows = np.flatnonzero(index.used)
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))].astype(np.int32)
