"""Measurements of a training step."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch.nn import Parameter

from sdxl_finetune.batch import Batch, Position
from sdxl_finetune.config import Config
from sdxl_finetune.low_bits import MasterWeights
from sdxl_finetune.optim.meter import SAMPLE, Meter
from sdxl_finetune.optim.parameters import Group, TrainedParameters
from sdxl_finetune.optim.update import PlainUpdate, total_norm


def random_parameters() -> TrainedParameters:
    torch.manual_seed(0)
    parts = {"unet": (3, 5), "text_encoder1": (7,)}
    groups = [
        Group(name, {f"{name}{at}": Parameter(torch.randn(shape)) for at in range(3)}, 1e-3)
        for name, shape in parts.items()
    ]
    return TrainedParameters(groups, MasterWeights())


def batch_of(timesteps: list[int], weights: list[float], **values) -> Batch:
    """A batch of which the meter reads timesteps, weights and the places of the images."""
    size, noise = torch.zeros(len(weights), 2, dtype=torch.int64), torch.zeros(len(weights), 4, 1, 1)
    places = {"images_in_step": len(weights), **values}
    return Batch(
        position=Position(0, 0, 0, 1), latents=noise, images=None, encoding_noise=None, noise=noise, input_noise=None,
        timesteps=torch.tensor(timesteps), original_size=size, crop_top_left=size, target_size=size,
        weights=torch.tensor(weights), **places,
    )  # fmt: skip


def test_losses_of_images_stand_at_their_places_among_all_ranks() -> None:
    """Three ranks share two images of one micro-batch. The third rank stands in with an image that does not count."""
    sums = []
    for rank, slot in enumerate([0, 1, None]):
        meter = Meter(random_parameters(), torch.device("cpu"), ranks=3)
        losses = torch.tensor([math.nan if rank == 1 else 5.0 + rank])
        meter.add_losses(losses, batch_of([10], [1.5 if rank < 2 else 0.0], images_in_step=2, first_slot=slot))
        sums.append(meter.sums)
    first, second = meter.vectors(torch.stack(sums).mean(0), torch.zeros(1))["image_losses"].tolist()
    assert first == 5.0 and math.isnan(second)


def test_losses_are_measured_by_range_of_timesteps() -> None:
    meter = Meter(random_parameters(), torch.device("cpu"))
    losses, timesteps = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 249, 250, 999])
    meter.add_losses(losses, batch_of(timesteps.tolist(), [1.0] * 4))
    meter.add_losses(torch.tensor([100.0, 6.0]), batch_of([500, 999], [0.0, 0.2]))
    vectors = meter.vectors(meter.sums, torch.tensor([7.0]))
    assert vectors["image_losses"].tolist() == [*losses.tolist(), 0.0, 6.0]
    assert vectors["gradient_norms"].tolist() == [7.0]
    found = {name: value.item() for name, value in meter.take(meter.sums).items()}
    assert math.isnan(found.pop("loss/t500-749")), "no image was there"
    assert found == {"loss/t000-249": 1.5, "loss/t250-499": 4.0, "loss/t750-999": 7.0}
    assert all(math.isnan(value) for value in meter.take(meter.sums).values())


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e9])
def test_gradients_are_clipped_together_and_their_norms_measured_by_group(max_norm: float) -> None:
    parameters, expected = random_parameters(), random_parameters()
    for number, (group, other) in enumerate(zip(parameters.groups, expected.groups, strict=True)):
        for one, same in zip(group.parameters.values(), other.parameters.values(), strict=True):
            one.grad = torch.full_like(one, number + 1.0)
            same.grad = one.grad.clone()
    parameters.groups[0].parameters["unet0"].grad = expected.groups[0].parameters["unet0"].grad = None
    every = [[parameter for _, parameter in side.named()] for side in (parameters, expected)]
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.SGD(every[0], lr=1.0))
    config = Config(max_grad_norm=max_norm)
    norms = PlainUpdate(config, parameters, torch.nn.Module(), optimizer, accelerator).step()
    total = torch.nn.utils.clip_grad_norm_(every[1], max_norm or math.inf).item()
    assert total_norm(norms).item() == pytest.approx(total, rel=1e-6)
    torch.optim.SGD(every[1], lr=1.0).step()
    for one, same in zip(*every, strict=True):
        assert one.grad is None and torch.allclose(one, same, rtol=1e-6)
    assert norms["unet"] == pytest.approx(math.sqrt(30)) and norms["text_encoder1"] == pytest.approx(math.sqrt(4 * 21))


def test_updates_are_measured_relative_to_the_weights() -> None:
    parameters = random_parameters()
    meter = Meter(parameters, torch.device("cpu"))
    meter.begin_step()
    for one in parameters.groups[0].parameters.values():
        one.data *= 1.01
    meter.end_step({"unet": torch.tensor(3.0)})
    found = meter.take(meter.sums)
    assert found["grad_norm/unet"] == 3
    assert found["update/unet"] == pytest.approx(0.01, rel=1e-4) and found["update/text_encoder1"] == 0


def test_of_a_group_of_large_tensors_one_tensor_is_measured() -> None:
    group = Group("unet", {str(at): Parameter(torch.ones(SAMPLE + 1 + at)) for at in range(3)}, 1e-3)
    meter = Meter(TrainedParameters([group], MasterWeights()), torch.device("cpu"))
    meter.begin_step()
    group.parameters["0"].data += 1
    meter.end_step({})
    assert meter.take(meter.sums)["update/unet"] == pytest.approx(1.0)
