"""Watches the numbers of each step: loss and gradients that are not finite, loss spikes, ranks whose weights differ.

The numbers arrive from the device some steps late. A check that ends the run therefore raises on all ranks at the same
step, because all ranks see the same numbers. `Log.flush` passes on all numbers before anything is saved.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from sdxl_finetune.config import NumbersOptions
from sdxl_finetune.errors import counted, listed
from sdxl_finetune.optim.meter import GRADIENT_NORMS, IMAGE_LOSSES
from sdxl_finetune.output.spikes import Spikes

logger = logging.getLogger(__name__)

SMALLEST_LOSS_SCALE = 2.0**-10
"""Gradients that overflow in float16 at this loss scale would be above 6e7, which is no training."""
RANK_DIFFERENCES = "rank_differences"
"""Name of the vector that has 1 for each trained parameter in which the ranks differ."""
NAMED = 5
"""Images that a message names. The dump of the step names all of them."""


class WrongNumbers(ArithmeticError):
    """The numbers of a run went wrong, and nothing more can be trained or saved."""


class NonFiniteLoss(WrongNumbers):
    """The loss of `step`, or the norm of its gradients, is infinite or NaN."""

    def __init__(
        self, step: int, value: float, name: str = "loss", details: Sequence[str] = (), *, has_trained: bool = True
    ) -> None:
        """`has_trained` is False if no earlier step of this run has changed the weights."""
        self.step = step
        advice = "resume from the last checkpoint with a lower learning rate, or look for broken images"
        if not has_trained:
            advice = "no step of this run had changed the weights before: look for a broken model, or broken images"
        text = "".join(f"; {detail}" for detail in details)
        super().__init__(f"the {name} of step {step} is {value}; nothing was saved after it{text}: {advice}")


class RanksDiffer(WrongNumbers):
    """The processes of a run train different weights."""

    def __init__(self, step: int, last: int, names: Sequence[str]) -> None:
        self.step = step
        since = f"after step {last}" if last else "at the start of this run"
        super().__init__(
            f"the weights of the processes differ after step {step}: {counted(len(names), 'parameter')}, first"
            f" {names[0]}. They were last found equal {since}: resume from a training state that is not newer."
            " If it happens again, look for a faulty GPU or a random operation in the optimizer"
        )


class StepSource(Protocol):
    """Tells what stands behind the numbers of a step. Steps are counted from 1."""

    def images(self, step: int) -> Sequence[str]:
        """Names of the step's images, over all micro-batches and ranks."""
        ...

    def dump(self, step: int, losses: Sequence[float]) -> str | None:
        """Writes what `--reproduce` needs to run the step again. Returns a sentence on this, or None."""
        ...


class Watch:
    """Checks the numbers of each step in order."""

    def __init__(
        self,
        options: NumbersOptions,
        source: StepSource | None = None,
        parameters: Sequence[str] = (),
        first_step: int = 0,
    ) -> None:
        """`parameters` are the names of the trained parameters in the order of the vectors of a step.

        `first_step` is the number of steps made before the run began.
        """
        self._options, self._source, self._parameters = options, source, parameters
        self._spikes = Spikes(options.loss_spike_factor)
        self._in_a_row = 0
        self._ranks_agreed_at = first_step
        self._has_raised = self._has_trained = False

    def check(
        self,
        step: int,
        scalars: Mapping[str, float],
        timesteps: Sequence[float] = (),
        vectors: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Checks a step. `scalars` has its loss and grad_norm, and with float16 its loss_scale.

        `timesteps` are those of the step's images over all ranks. Raises WrongNumbers if the run has to end. Steps that
        were already on their way then are not checked, because they follow from the wrong one.
        """
        if self._has_raised:
            return
        vectors = vectors or {}
        self._check_ranks(step, vectors.get(RANK_DIFFERENCES, ()))
        losses = vectors.get(IMAGE_LOSSES, ())
        if math.isfinite(scalars["loss"]) and math.isfinite(scalars["grad_norm"]):
            self._in_a_row, self._has_trained = 0, True
            if found := self._spikes.add(timesteps, losses):
                self._warn_of_spike(step, found, timesteps)
        elif math.isfinite(scalars["loss"]) and scalars.get("loss_scale", 0.0) >= SMALLEST_LOSS_SCALE:
            message = "step %d was skipped, because its gradients overflowed; the loss scale is now %g"
            logger.info(message, step, scalars["loss_scale"])
        else:
            self._not_finite(step, scalars, timesteps, vectors)

    def _check_ranks(self, step: int, differences: Sequence[float]) -> None:
        if any(differences):
            names = [name for name, differs in zip(self._parameters, differences, strict=True) if differs]
            self._has_raised = True
            raise RanksDiffer(step, self._ranks_agreed_at, names)
        if len(differences):
            self._ranks_agreed_at = step

    def _not_finite(
        self,
        step: int,
        scalars: Mapping[str, float],
        timesteps: Sequence[float],
        vectors: Mapping[str, Sequence[float]],
    ) -> None:
        """Warns of a step that is left out. Raises NonFiniteLoss if the options ask for it."""
        name, value = "loss", scalars["loss"]
        if math.isfinite(value):
            name, value = "gradient norm", scalars["grad_norm"]
        losses = vectors.get(IMAGE_LOSSES, ())
        details = [self._images(step, losses, timesteps), self._gradients(vectors.get(GRADIENT_NORMS, ()))]
        details.append(self._source.dump(step, losses) if self._source else None)
        said = [detail for detail in details if detail]
        self._in_a_row += 1
        if self._options.non_finite_steps == "stop" or self._in_a_row > self._options.max_non_finite_steps:
            if self._in_a_row > 1:
                said.append(f"{self._in_a_row} such steps in a row are more than max_non_finite_steps allows")
            self._has_raised = True
            raise NonFiniteLoss(step, value, name, said, has_trained=self._has_trained)
        was_made = math.isfinite(scalars["grad_norm"])
        self._has_trained |= was_made
        text = "its gradients are finite, so it was made" if was_made else "it was left out"
        logger.warning("the %s of step %d is %s; %s", name, step, value, "; ".join([text, *said]))

    def _images(self, step: int, losses: Sequence[float], timesteps: Sequence[float]) -> str | None:
        """Names the images whose loss is not finite, or all images of the step if the loss of each is finite."""
        if self._source is None:
            return None
        images = self._source.images(step)
        broken = [place for place, loss in enumerate(losses) if not math.isfinite(loss)]
        named = [
            f"{images[place]} (timestep {timesteps[place]:g}" + (f", loss {losses[place]:g})" if broken else ")")
            for place in broken or range(len(images))
        ]
        return f"{'images without a finite loss' if broken else 'its images'}: {listed(named, NAMED)}"

    def _gradients(self, norms: Sequence[float]) -> str | None:
        """Names the first parameter in the backward pass whose gradient is not finite."""
        spoiled = [name for name, norm in zip(self._parameters, norms, strict=False) if not math.isfinite(norm)]
        if not spoiled:
            return None
        first = max(reversed(spoiled), key=depth)  # the backward pass begins with the last layer of the U-Net
        return f"{len(spoiled)} of {counted(len(norms), 'gradient')} are not finite, the first in {first}"

    def _warn_of_spike(self, step: int, ratios: Mapping[int, float], timesteps: Sequence[float]) -> None:
        images = (
            self._source.images(step) if self._source else [f"image {place + 1}" for place in range(len(timesteps))]
        )
        named = [f"{images[place]} (timestep {timesteps[place]:g}, {ratios[place]:.3g} times)" for place in ratios]
        message = "the loss of step %d is a spike, compared with the running median for its timesteps: %s"
        logger.warning(message, step, listed(named, NAMED))


def depth(name: str) -> tuple[int, int]:
    """The place of a parameter in the forward pass: text encoders, then the parts of the U-Net, by block number."""
    parts = ("time_embed", "label_emb", "input_blocks", "middle_block", "output_blocks", "out.")
    if not name.startswith("unet."):
        return 0, 0
    part = max((place for place, word in enumerate(parts, 1) if f".{word}" in name), default=0)
    number = re.search(r"_blocks?\.(\d+)", name)
    return part, int(number[1]) if number else 0
