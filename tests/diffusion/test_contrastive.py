"""The loss of contrastive flow matching, and input noise and noise offsets with a flow, against plain formulas."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sdxl_finetune.batch import Batch, Position
from sdxl_finetune.config import LossOptions, NoiseOptions
from sdxl_finetune.diffusion.image_loss import image_losses
from sdxl_finetune.diffusion.noise import draw_noise
from sdxl_finetune.diffusion.objective import build_objective

SHAPE = (3, 4, 5, 6)


class Recorder(nn.Module):
    """A model that keeps its input and answers with a fixed prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.prediction, self.seen = draw(8), torch.zeros(SHAPE)

    def forward(self, noisy: Tensor, *_inputs: object) -> Tensor:
        self.seen = noisy
        return self.prediction


def draw(seed: int) -> Tensor:
    return torch.empty(SHAPE).normal_(generator=torch.Generator().manual_seed(seed))


def batch(timesteps: list[float], **values: object) -> Batch:
    sizes, tokens = torch.full((3, 2), 48), torch.zeros((3, 1, 77), dtype=torch.int64)
    defaults = {"latents": draw(1), "images": None, "encoding_noise": None, "noise": draw(2), "input_noise": None}
    defaults |= {"tokens1": tokens, "tokens2": tokens, "weights": torch.ones(3)}
    defaults |= {"original_size": sizes, "crop_top_left": sizes, "target_size": sizes}
    position = Position(epoch=0, step=0, micro_batch=0, micro_batches_in_step=1)
    return Batch(position=position, timesteps=torch.tensor(timesteps), **(defaults | values))


def negatives(one: Batch) -> dict[str, Tensor]:
    """The image in the slot before."""
    return {"negative_latents": one.latents.roll(1, 0), "negative_noise": one.noise.roll(1, 0)}


FLOW, VELOCITY = [250.0, 600.5, 1000.0], [0, 400, 999]


@pytest.mark.parametrize("kind", ["flow", "velocity"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_the_contrast_is_subtracted_as_a_plain_formula_says(kind, masked: bool, share: float) -> None:
    model = Recorder()
    one = batch(FLOW if kind == "flow" else VELOCITY, mask=torch.rand(3, 5, 6) if masked else None)
    options = LossOptions(contrastive_flow_matching=True, cfm_lambda=share)
    losses = image_losses(model, replace(one, **negatives(one)), one.latents, build_objective(kind), options)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    latents, noise, prediction = (part.double().numpy() for part in (one.latents, one.noise, model.prediction))
    for image in range(3):
        if kind == "flow":
            target, negative = (noise[other] - latents[other] for other in (image, image - 1))
        else:
            kept = np.cumprod(1 - betas)[VELOCITY[image]]
            target, negative = (
                kept**0.5 * noise[other] - (1 - kept) ** 0.5 * latents[other] for other in (image, image - 1)
            )
        error = (prediction[image] - target) ** 2 - share * (prediction[image] - negative) ** 2
        if one.mask is not None:
            error = error * one.mask[image].double().numpy()
        assert losses[image].item() == pytest.approx(error.mean(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1", "l1"])
def test_other_losses_measure_both_targets_alike_and_stay_bounded_below(loss_type) -> None:
    """docs/differences.md: forks subtract a squared error from any loss, which has no minimum."""
    model, one = Recorder(), batch(FLOW)
    options = LossOptions(contrastive_flow_matching=True, loss_type=loss_type)
    objective = build_objective("flow")
    contrasted = replace(one, **negatives(one))
    both = image_losses(model, contrasted, one.latents, objective, options)
    swapped = replace(one, latents=one.latents.roll(1, 0), noise=one.noise.roll(1, 0))
    first, second = (image_losses(model, part, part.latents, objective, options) for part in (one, swapped))
    torch.testing.assert_close(both, first - 0.05 * second, rtol=1e-5, atol=1e-6)
    model.prediction = 1e4 * model.prediction
    assert (image_losses(model, contrasted, one.latents, objective, options) > 0).all()


def test_loss_weights_multiply_the_whole_difference() -> None:
    model, one = Recorder(), batch(VELOCITY)
    contrasted, objective = replace(one, **negatives(one)), build_objective("velocity")
    plain = image_losses(model, contrasted, one.latents, objective, LossOptions())
    weighted = image_losses(model, contrasted, one.latents, objective, LossOptions(min_snr_gamma=5.0))
    without = [image_losses(model, one, one.latents, objective, LossOptions(min_snr_gamma=gamma)) for gamma in (5.0, 0)]
    torch.testing.assert_close(weighted / plain, without[0] / without[1])


def test_a_micro_batch_without_negatives_has_the_plain_loss() -> None:
    model, one, objective = Recorder(), batch(FLOW), build_objective("flow")
    options = LossOptions(contrastive_flow_matching=True)
    assert torch.equal(
        image_losses(model, one, one.latents, objective, options),
        image_losses(model, one, one.latents, objective, LossOptions()),
    )


def test_input_noise_changes_the_input_of_a_flow_and_not_its_target() -> None:
    """The input is (1 - t) x_0 + t (e + input noise): Ning et al., arXiv 2301.11706, algorithm 1, on a flow."""
    model, objective, place = Recorder(), build_objective("flow"), batch(FLOW).position
    noise, input_noise = draw_noise(NoiseOptions(ip_noise_gamma=0.1), 3, place, SHAPE)
    one = batch(FLOW, noise=noise, input_noise=input_noise)
    losses = image_losses(model, one, one.latents, objective, LossOptions())
    t = np.array(FLOW)[:, None, None, None] / 1000
    latents, noise, more = (part.double().numpy() for part in (one.latents, noise, input_noise))
    np.testing.assert_allclose(model.seen.numpy(), (1 - t) * latents + t * (noise + more), atol=1e-6)
    expected = ((model.prediction.double().numpy() - (noise - latents)) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-6)
    assert model.seen[2].std().item() == pytest.approx(1.01**0.5, abs=0.15), "at t = 1: noise and input noise alone"


def test_a_flow_with_a_noise_offset_starts_from_the_noise_with_its_offset() -> None:
    model, objective = Recorder(), build_objective("flow")
    noise, _ = draw_noise(NoiseOptions(noise_offset=0.5), 3, batch(FLOW).position, SHAPE)
    one = batch([1000.0] * 3, noise=noise)
    image_losses(model, one, one.latents, objective, LossOptions())
    torch.testing.assert_close(model.seen, noise)
    assert torch.equal(objective.target(one.latents, noise, one.timesteps), noise - one.latents)
