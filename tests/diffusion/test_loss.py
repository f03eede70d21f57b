"""Losses and Huber thresholds are the reference's."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from sdxl_finetune.batch import Batch, Position
from sdxl_finetune.config import LossOptions
from sdxl_finetune.data.masks import latent_mask
from sdxl_finetune.diffusion.image_loss import image_losses
from sdxl_finetune.diffusion.loss import elementwise_loss, huber_threshold
from sdxl_finetune.diffusion.loss_weights import loss_weight
from sdxl_finetune.diffusion.objective import build_objective

LOSS_TYPES = ("l2", "l1", "huber", "smooth_l1")
HUBER = {"loss_type": "l2", "huber_schedule": "snr", "huber_c": 0.1, "huber_scale": 1.0}


@pytest.fixture(scope="session")
def inputs(golden) -> dict[str, torch.Tensor]:
    golden("loss.json")
    return load_file(golden.path / "loss_inputs.safetensors")


def loss_options(entry: dict) -> LossOptions:
    options = {key: entry[key] for key in HUBER if entry.get(key) is not None}
    return LossOptions.model_construct(**{**HUBER, **options})


def test_huber_thresholds_are_the_reference_s(golden) -> None:
    entries = golden("loss.json")["huber_thresholds"]
    assert len(entries) == 23
    for entry in entries:
        if "raised" in entry:
            assert entry["huber_schedule"] == "bogus"
            with pytest.raises(AssertionError):
                huber_threshold(
                    loss_options(entry), build_objective("noise").schedule, torch.tensor(entry["timesteps"])
                )
            continue
        terminal_snr = entry["scheduler"] == "zero_terminal_snr"
        schedule = build_objective("noise", zero_terminal_snr=terminal_snr).schedule
        actual = huber_threshold(loss_options(entry), schedule, torch.tensor(entry["timesteps"]))
        if entry["out"] is None:
            assert actual is None
        else:
            torch.testing.assert_close(actual, torch.tensor(entry["out"]), rtol=5e-6, atol=0)


def test_elementwise_losses_are_the_reference_s(golden, inputs) -> None:
    entries = golden("loss.json")["conditional_loss"]
    assert len(entries) == 11
    schedule = build_objective("noise").schedule
    for entry in entries:
        if "raised" in entry:
            with pytest.raises((AssertionError, TypeError)):
                elementwise_loss(inputs["pred"], inputs["target"], entry["loss_type"], None)
            continue
        threshold = huber_threshold(loss_options(entry), schedule, torch.tensor(entry["timesteps"]))
        if threshold is not None:
            torch.testing.assert_close(threshold, torch.tensor(entry["huber_threshold"]), rtol=2e-6, atol=0)
        actual = elementwise_loss(inputs["pred"], inputs["target"], entry["loss_type"], threshold)
        assert list(actual.shape) == entry["none_shape"]
        first = torch.tensor(entry["none_first8"])
        torch.testing.assert_close(actual.flatten()[:8], first, rtol=1e-5, atol=1e-6)
        means = torch.tensor(entry["none_per_sample_mean"])
        torch.testing.assert_close(actual.mean(dim=(1, 2, 3)), means, rtol=1e-5, atol=0)
        assert actual.mean().item() == pytest.approx(entry["mean"], rel=1e-5)
        assert actual.sum().item() == pytest.approx(entry["sum"], rel=1e-5)


def test_weighted_losses_are_the_reference_s(golden, inputs) -> None:
    """The reference takes the loss of each element, times the mask, the mean per image, all weightings, and the mean
    over images.

    One case with masks is left out: without masked_loss and loss weights the reference does not apply them.
    """
    cases = golden("loss.json")["chain"]
    entries = [entry for entry in cases if entry["args"] or not entry["alpha_masks_in_batch"]]
    assert (len(entries), len(cases), sum(entry["alpha_masks_in_batch"] for entry in entries)) == (15, 16, 3)
    for entry in entries:
        options = LossOptions.model_construct(**{**HUBER, **entry["args"]})
        timesteps = torch.tensor(entry["timesteps"])
        objective = build_objective(options.objective)
        threshold = huber_threshold(options, objective.schedule, timesteps)
        loss = elementwise_loss(inputs["pred"], inputs["target"], options.loss_type, threshold)
        if entry["alpha_masks_in_batch"]:
            loss = loss * masks_of_latents(inputs)[:, None]
        per_image = loss.mean(dim=(1, 2, 3)) * loss_weight(options, objective, timesteps)
        assert per_image.mean().item() == pytest.approx(entry["loss"], rel=1e-5), entry["args"]
        if entry["per_sample"] is not None:
            torch.testing.assert_close(per_image, torch.tensor(entry["per_sample"]), rtol=1e-5, atol=1e-7)


class Answer(torch.nn.Module):
    """A model that always predicts the same."""

    def __init__(self, prediction: torch.Tensor) -> None:
        super().__init__()
        self.prediction = prediction

    def forward(self, *_inputs: object) -> torch.Tensor:
        return self.prediction


@pytest.mark.parametrize("number", [0, 3])
def test_masked_losses_are_averaged_over_all_pixels_as_the_reference_s(golden, inputs, number: int) -> None:
    """Golden case 0 has masks, and case 3 has none."""
    expected = golden("loss.json")["masked_loss"][number]
    noise, sizes = inputs["target"], torch.full((4, 2), 48)
    batch = Batch(
        position=Position(epoch=0, step=0, micro_batch=0, micro_batches_in_step=1),
        latents=torch.zeros_like(noise),
        images=None,
        encoding_noise=None,
        noise=noise,
        input_noise=None,
        timesteps=torch.tensor([5, 250, 600, 990]),
        tokens1=torch.zeros((4, 1, 77), dtype=torch.int64),
        tokens2=torch.zeros((4, 1, 77), dtype=torch.int64),
        original_size=sizes,
        crop_top_left=sizes,
        target_size=sizes,
        mask=masks_of_latents(inputs) if number == 0 else None,
        weights=torch.ones(4),
    )
    answer = Answer(inputs["pred"])
    losses = image_losses(answer, batch, torch.zeros_like(noise), build_objective("noise"), LossOptions())
    torch.testing.assert_close(losses, torch.tensor(expected["per_sample_mean"]), rtol=1e-5, atol=0)
    assert (losses.sum() * 4 * 6 * 5).item() == pytest.approx(expected["sum"], rel=1e-5)


def masks_of_latents(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The golden masks, averaged over the pixels of each latent. Masks of files have 8 bits, and these have 24."""
    masks = (inputs["alpha_masks"] * 255).round().to(torch.uint8).numpy()
    rounded = torch.from_numpy(np.stack([latent_mask(mask, 8) for mask in masks]))
    exact = torch.nn.functional.interpolate(inputs["alpha_masks"][:, None], size=(6, 5), mode="area")[:, 0]
    torch.testing.assert_close(rounded, exact, rtol=0, atol=5e-4)
    return exact


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_half_precision_predictions_are_compared_in_float32(loss_type) -> None:
    prediction, target = torch.randn(2, 2, 4, 3, 3).to(torch.bfloat16)
    threshold = torch.tensor([0.1, 0.5])
    actual = elementwise_loss(prediction, target, loss_type, threshold)
    assert torch.equal(actual, elementwise_loss(prediction.float(), target.float(), loss_type, threshold))


@given(st.sampled_from(LOSS_TYPES), st.floats(0.01, 2), st.integers(0, 2**32))
def test_losses_are_even_zero_at_zero_and_have_finite_gradients(loss_type, c, seed) -> None:
    error = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(seed))
    error[0, 0, 0, 0] = 0
    threshold = torch.tensor([c])
    prediction = error.clone().requires_grad_()
    loss = elementwise_loss(prediction, torch.zeros_like(error), loss_type, threshold)
    assert torch.equal(loss, elementwise_loss(-error, torch.zeros_like(error), loss_type, threshold))
    assert loss[0, 0, 0, 0] == 0
    assert (loss >= 0).all()
    loss.sum().backward()
    assert prediction.grad.isfinite().all()


def test_huber_approaches_l2_and_l1_at_its_limits() -> None:
    error = torch.tensor([1e-2, 1.0, 1e2]).view(1, 1, 1, 3)
    zero = torch.zeros_like(error)
    near_l2 = elementwise_loss(error, zero, "huber", torch.tensor([1e3]))
    near_l1 = elementwise_loss(error, zero, "smooth_l1", torch.tensor([1e-4]))
    torch.testing.assert_close(near_l2[..., 1:], error[..., 1:] ** 2, rtol=0.1, atol=0)
    torch.testing.assert_close(near_l1, 2 * error.abs(), rtol=0.02, atol=0)
