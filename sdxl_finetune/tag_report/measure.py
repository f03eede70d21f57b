"""Computes the losses of a report: each caption of each image at each timestep, with the same noise.

The noise is a function of the image's file name and the timestep, so that figures of several checkpoints compare. The
forward passes of an image form batches of their own. A loss therefore does not depend on the number of processes.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import AutoencoderKL

from sdxl_finetune.batch import Batch, Position, TextOutputs, Tokens
from sdxl_finetune.config import LossOptions
from sdxl_finetune.data.batch_plan import MicroBatch
from sdxl_finetune.data.index import Entry
from sdxl_finetune.data.loader import TrainingDataset, load_batches
from sdxl_finetune.data.unchanged import image_id, unchanged
from sdxl_finetune.diffusion.image_loss import image_losses
from sdxl_finetune.diffusion.objective import Objective
from sdxl_finetune.model.sdxl import SDXL, evaluating
from sdxl_finetune.model.vae import batch_latents
from sdxl_finetune.progress import duration, track
from sdxl_finetune.runtime.signals import StopRequest
from sdxl_finetune.seeding import position_normal
from sdxl_finetune.tag_report.choice import Choice, Unit
from sdxl_finetune.tag_report.finished import Finished, Losses

logger = logging.getLogger(__name__)

ROUND = 8
"""Images that each process measures before the processes join their results."""
REMEMBERED = 128
"""Captions whose encoded form is kept, at most 1 MB each in bfloat16 at 225 tokens."""


class MeasurementFailed(Exception):
    """A process could not measure its share."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to measure, and how it computes."""

    sdxl: SDXL
    vae: AutoencoderKL
    tokenize: Callable[[Sequence[str]], Tokens]
    objective: Objective
    loss: LossOptions
    """Options without loss weights."""
    autocast: Callable[[], AbstractContextManager[Any]]
    device: torch.device


def fixed_dataset(training: TrainingDataset) -> TrainingDataset:
    """The images of a training dataset, unchanged. Captions, noise and timesteps of its batches are not used."""
    return replace(unchanged(training), read_text=None)


def measure(
    subject: Subject,
    choice: Choice,
    dataset: TrainingDataset,
    accelerator: Accelerator,
    finished: Finished,
    stop: StopRequest | None = None,
) -> dict[int, Losses] | None:
    """The losses of each unit of a choice, by its number, on all processes; None if one of them was asked to stop.

    All processes call this together and share the units out. `dataset` is that of `fixed_dataset`. What was computed is
    kept in `finished`. Unreadable images are left out. Raises MeasurementFailed on all processes if one of them fails.
    """
    losses = finished.share()
    left = [number for number in range(len(choice.units)) if number not in losses]
    rank, ranks = accelerator.process_index, accelerator.num_processes
    began, is_timed = time.monotonic(), False
    with (
        torch.no_grad(),
        evaluating(subject.sdxl),
        _text_encoders_on(subject),
        track("measuring tags", len(left), "images", shown=rank == 0) as progress,
    ):
        encode = _Encoder(subject)
        for start in range(0, len(left), ranks * ROUND):
            numbers = left[start : start + ranks * ROUND]
            own, failure = _attempt(subject, choice, numbers[rank::ranks], encode, dataset)
            parts = gather_object([(own, failure, stop is not None and stop.cause is not None)])
            new = {number: values for part, _, _ in parts for number, values in part.items()}
            finished.add(new)
            losses |= new
            progress.update(len(numbers))
            if not is_timed and len(left) > len(numbers):
                is_timed = True
                seconds = (time.monotonic() - began) / len(numbers) * (len(left) - len(numbers))
                logger.info("tag report: about %s left, judged by the first %d images", duration(seconds), len(numbers))
            if reasons := [reason for _, reason, _ in parts if reason]:
                raise MeasurementFailed(reasons[0])
            if any(is_stopped for _, _, is_stopped in parts):
                return None
    return {number: losses[number] for number in sorted(losses) if np.isfinite(losses[number]).any()}


def _attempt(
    subject: Subject, choice: Choice, numbers: Sequence[int], encode: "_Encoder", dataset: TrainingDataset
) -> tuple[dict[int, Losses], str | None]:
    """The losses of these units, and the reason why the rest is missing.

    An exception would leave the other processes waiting, so that its text goes to all of them.
    """
    done: dict[int, Losses] = {}
    try:
        for number, batch in _batches(dataset, choice.units, numbers, subject.device):
            done[number] = unit_losses(subject, choice, number, batch, encode, dataset)
            if not np.isfinite(done[number]).all() and batch.weights.any():
                return done, "the model gives values that are infinite or not a number"
    except Exception as error:
        return done, f"{type(error).__name__}: {error}"
    return done, None


def _batches(
    dataset: TrainingDataset, units: Sequence[Unit], numbers: Sequence[int], device: torch.device
) -> Iterator[tuple[int, Batch]]:
    """Yields the image of each of these units, as a batch on the device."""
    micro_batches = [
        MicroBatch(
            Position(epoch=0, step=0, micro_batch=0, micro_batches_in_step=1), np.array([units[number].row], np.int32)
        )
        for number in numbers
    ]
    pinned = device.type == "cuda"
    batches = load_batches(dataset, micro_batches, workers=0, pin_memory=pinned, on_bad_image="skip")
    for number, batch in zip(numbers, batches, strict=True):
        yield number, batch.to(device)


def unit_losses(
    subject: Subject,
    choice: Choice,
    number: int,
    image: Batch,
    encode: "Callable[[str], TextOutputs]",
    dataset: TrainingDataset,
) -> Losses:
    """The losses of one image with each of its captions at each timestep; NaN for an unreadable image."""
    unit, entry = choice.units[number], dataset.index[choice.units[number].row]
    size, timesteps = dataset.index.datasets[entry.bucket.dataset].batch_size, choice.timesteps
    places = [(time, text) for time in range(len(timesteps)) for text in range(len(unit.captions))]
    if not image.weights.any():
        return np.full((len(timesteps), len(unit.captions)), np.nan, np.float32)
    latents = batch_latents(image, subject.vae, drawn=False)
    drawn = [position_normal(latents.shape[1:], *_noise_seed(entry), timestep) for timestep in timesteps]
    noise = torch.from_numpy(np.stack(drawn)).to(latents.device)
    losses = []
    for start in range(0, len(places), size):
        part = places[start : start + size]
        times = torch.tensor([time for time, _ in part], device=latents.device)
        encoded = [encode(unit.captions[text]) for _, text in part]
        batch = _repeated(
            image,
            len(part),
            noise=noise[times],
            timesteps=torch.tensor([timesteps[time] for time, _ in part], device=latents.device),
            hidden=torch.cat([one.hidden for one in encoded]),
            pooled=torch.cat([one.pooled for one in encoded]),
        )
        with subject.autocast():
            repeated = latents.expand(len(part), -1, -1, -1)
            losses.append(image_losses(subject.sdxl, batch, repeated, subject.objective, subject.loss))
    values: Losses = torch.cat(losses).float().cpu().numpy().reshape(len(timesteps), len(unit.captions))
    return values


def _noise_seed(entry: Entry) -> tuple[int, str, int]:
    seed, name = image_id(entry)
    return seed, "tag report", name


def _repeated(image: Batch, count: int, **own: Any) -> Batch:
    """A batch with the image's sizes and mask `count` times, and with values of its own. Pixels and tokens are left
    out."""
    mask = None if image.mask is None else image.mask.expand(count, -1, -1)
    return replace(
        image,
        latents=None,
        images=None,
        encoding_noise=None,
        tokens1=None,
        tokens2=None,
        token_weights=None,
        original_size=image.original_size.expand(count, -1),
        crop_top_left=image.crop_top_left.expand(count, -1),
        target_size=image.target_size.expand(count, -1),
        mask=mask,
        weights=image.weights.expand(count),
        **own,
    )


class _Encoder:
    """Encodes captions one by one, so that the result does not depend on the others, and remembers the last ones."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._known: OrderedDict[str, TextOutputs] = OrderedDict()

    def __call__(self, caption: str) -> TextOutputs:
        if caption not in self._known:
            tokens = self._subject.tokenize([caption])
            with self._subject.autocast():
                hidden, pooled = self._subject.sdxl.encode_text(tokens)
            device = self._subject.device
            self._known[caption] = TextOutputs(hidden.to(device), pooled.to(device))
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(caption)
        return self._known[caption]


@contextmanager
def _text_encoders_on(subject: Subject) -> Iterator[None]:
    """Within the context, the text encoders are on the device. A run that caches their outputs keeps them elsewhere."""
    encoders = (subject.sdxl.te1, subject.sdxl.te2)
    before = [encoder.device for encoder in encoders]
    for encoder in encoders:
        encoder.to(subject.device)
    try:
        yield
    finally:
        for encoder, device in zip(encoders, before, strict=True):
            encoder.to(device)
