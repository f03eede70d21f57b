"""The watch of a run: messages on steps whose numbers went wrong, and loss spikes."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from sdxl_finetune.config import Config
from sdxl_finetune.optim.meter import GRADIENT_NORMS, IMAGE_LOSSES
from sdxl_finetune.output.spikes import QUIET, Spikes
from sdxl_finetune.output.watch import (
    RANK_DIFFERENCES,
    NonFiniteLoss,
    RanksDiffer,
    Watch,
)

PARAMETERS = [
    "text_encoder1.text_model.a",
    "unet.model.diffusion_model.output_blocks.2.x",
    "unet.model.diffusion_model.output_blocks.10.x",
    "unet.model.diffusion_model.middle_block.0.x",
    "unet.model.diffusion_model.time_embed.0.x",
]
FINE = {"loss": 0.5, "grad_norm": 1.0}
BROKEN = {"loss": math.nan, "grad_norm": math.nan}


class Source:
    """Four images a step, and dumps that are only counted."""

    def __init__(self) -> None:
        self.dumped: list[int] = []

    def images(self, step: int) -> list[str]:
        return [f"{step}-{place}.png" for place in range(4)]

    def dump(self, step: int, losses: Sequence[float]) -> str | None:
        self.dumped.append(step)
        return "a dump"


def vectors(losses: Sequence[float], norms: Sequence[float] = (1, 1, 1, 1, 1)) -> dict[str, Sequence[float]]:
    return {IMAGE_LOSSES: losses, GRADIENT_NORMS: norms}


def test_the_message_names_images_without_a_finite_loss_and_the_first_gradient_of_the_backward_pass() -> None:
    watch = Watch(Config(), source := Source(), PARAMETERS)
    timesteps = [10.0, 200.0, 300.5, 999.0]
    watch.check(1, FINE, timesteps, vectors([0.1, 0.2, 0.3, 0.4]))
    with pytest.raises(NonFiniteLoss) as caught:
        watch.check(2, BROKEN, timesteps, vectors([0.1, math.nan, 0.3, math.inf], [math.nan, 1, 1, math.nan, math.inf]))
    message = str(caught.value)
    assert message.startswith("the loss of step 2 is nan; nothing was saved after it; images without a finite loss: ")
    assert "2-1.png (timestep 200, loss nan), 2-3.png (timestep 999, loss inf); " in message
    assert (
        "3 of 5 gradients are not finite, the first in unet.model.diffusion_model.middle_block.0.x; a dump: " in message
    )
    watch.check(3, BROKEN, timesteps, vectors([math.nan] * 4))  # already on its way when step 2 was seen
    assert source.dumped == [2]
    watch = Watch(Config(), Source(), PARAMETERS)
    with pytest.raises(NonFiniteLoss, match=r"first in unet\.model\.diffusion_model\.output_blocks\.10\.x"):
        watch.check(3, BROKEN, timesteps, vectors([math.nan] * 4, [math.nan] * 5))
    watch = Watch(Config(), Source(), PARAMETERS)
    with pytest.raises(NonFiniteLoss, match=r"the first in text_encoder1\.text_model\.a"):
        watch.check(3, BROKEN, timesteps, vectors([math.nan] * 4, [math.inf, 1, 1, 1, 1]))


@pytest.mark.parametrize(
    ("first", "advice"), [(4, "no step of this run had changed the weights"), (3, "lower learning")]
)
def test_numbers_that_are_wrong_from_the_first_step_on_point_at_the_model(first: int, advice: str) -> None:
    """Also if steps were left out before. Nothing that this run did has changed the weights then."""
    watch = Watch(Config(non_finite_steps="skip", max_non_finite_steps=1), Source(), PARAMETERS, first_step=first)
    for step in range(first + 1, 5):
        watch.check(step, FINE, [1.0] * 4)
    watch.check(5, {"loss": 0.5, "grad_norm": math.inf, "loss_scale": 2.0**15}, [1.0] * 4)  # left out by fp16
    watch.check(6, BROKEN, [1.0] * 4)
    with pytest.raises(NonFiniteLoss, match=advice):
        watch.check(7, BROKEN, [1.0] * 4)


def test_a_gradient_that_overflows_names_all_images_of_the_step() -> None:
    watch = Watch(Config(), Source(), PARAMETERS)
    with pytest.raises(NonFiniteLoss, match="the gradient norm of step 7 is inf") as caught:
        watch.check(7, {"loss": 0.5, "grad_norm": math.inf}, [1.0] * 4, vectors([0.1] * 4, [1, math.inf, 1, 1, 1]))
    assert "its images: 7-0.png (timestep 1), 7-1.png" in str(caught.value)


def test_skipped_steps_are_counted_in_a_row(caplog) -> None:
    watch = Watch(Config(non_finite_steps="skip", max_non_finite_steps=2), Source(), PARAMETERS)
    for step, scalars in enumerate([BROKEN, BROKEN, FINE, BROKEN, {"loss": math.inf, "grad_norm": 1.0}], start=1):
        watch.check(step, scalars, [1.0] * 4)
    assert caplog.text.count("it was left out") == 3
    assert "the loss of step 5 is inf; its gradients are finite, so it was made" in caplog.text
    with pytest.raises(NonFiniteLoss, match="3 such steps in a row are more than max_non_finite_steps allows"):
        watch.check(6, BROKEN, [1.0] * 4)


def test_an_overflow_at_a_high_loss_scale_is_no_fault_under_either_policy(caplog) -> None:
    for policy in ("stop", "skip"):
        watch = Watch(Config(non_finite_steps=policy, max_non_finite_steps=1))
        with caplog.at_level("INFO"):
            for step in range(1, 4):
                watch.check(step, {"loss": 0.5, "grad_norm": math.inf, "loss_scale": 1024.0})
    assert caplog.text.count("its gradients overflowed") == 6


def test_ranks_that_differ_end_the_run_and_the_message_says_since_when() -> None:
    watch = Watch(Config(), None, PARAMETERS, first_step=30)
    with pytest.raises(RanksDiffer, match=r"after step 40: 2 parameters, first unet.*last found equal after step 30"):
        watch.check(40, FINE, vectors={RANK_DIFFERENCES: [0, 1, 0, 0, 1]})
    watch = Watch(Config(), None, PARAMETERS, first_step=30)
    watch.check(50, FINE, vectors={RANK_DIFFERENCES: [0, 0, 0, 0, 0]})
    watch.check(51, FINE)
    with pytest.raises(RanksDiffer, match="last found equal after step 50"):
        watch.check(60, FINE, vectors={RANK_DIFFERENCES: [0, 1, 0, 0, 1]})


def usual_losses(rng: np.random.Generator, timesteps: np.ndarray) -> np.ndarray:
    """Losses as those of training: 100 times as high at timestep 0 as at the end, and spread around that."""
    return 10.0 ** (-2 * timesteps / 1000) * rng.lognormal(0, 0.5, len(timesteps))


def test_usual_losses_are_no_spikes_and_a_broken_image_is_one_at_any_timestep() -> None:
    rng = np.random.default_rng(3)
    spikes = Spikes(10.0)
    for _ in range(3000):
        timesteps = rng.integers(0, 1000, 2)
        assert not spikes.add(timesteps.tolist(), usual_losses(rng, timesteps).tolist())
    for at in (5, 500, 990):
        losses = usual_losses(rng, np.array([100, at, 600]))
        losses[1] *= 300
        assert list(spikes.add([100.0, float(at), 600.0], losses.tolist())) == [1]
        for _ in range(QUIET - 1):  # no other spike is reported for a while
            assert not spikes.add([float(at)], [1e6])
    assert not Spikes(0.0).add([5.0], [1.0])


def test_a_spike_is_warned_of_with_its_images(caplog) -> None:
    watch = Watch(Config(loss_spike_factor=4.0), Source(), PARAMETERS)
    for step in range(1, 20):
        watch.check(step, FINE, [500.0] * 4, vectors([0.1, 0.11, 0.09, 0.0]))
    watch.check(20, FINE, [500.0] * 4, vectors([0.1, 3.0, 0.0, 0.1]))
    (record,) = caplog.records
    assert record.getMessage() == (
        "the loss of step 20 is a spike, compared with the running median for its timesteps: 20-1.png (timestep 500, 30"
        " times)"
    )
