"""Pairing gives images the nearest noise by scipy's minimum, and keeps the noise of a micro-batch as it was drawn."""

import itertools
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.stats import ks_2samp
from torch import Tensor

from sdxl_finetune.batch import Position
from sdxl_finetune.config import NoiseOptions, PairingOptions
from sdxl_finetune.diffusion.noise import draw_base, draw_noise
from sdxl_finetune.diffusion.pairing import draw_paired_noise, immiscible_order, nearest_noise, transport_order

EVERYTHING = {"noise_offset": 0.1, "multires_noise_iterations": 4, "ip_noise_gamma": 0.1}
PLACE = Position(epoch=0, step=3, micro_batch=1, micro_batches_in_step=2)
IMAGES = st.integers(1, 7)
SEEDS = st.integers(0, 2**32)


def known(count: int, seed: int = 9, shape: tuple[int, ...] = (4, 3, 5)) -> Tensor:
    """Latents of images that differ in their contrast and mean."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.empty(count, *shape).normal_(generator=generator)
    return (
        latents * torch.linspace(0.2, 2, count)[:, None, None, None] + torch.linspace(-1, 1, count)[:, None, None, None]
    )


def paired(pairing: dict, latents: Tensor, options: dict | None = None, seed: int = 5) -> tuple[Tensor, Tensor | None]:
    shape = tuple(latents.shape)
    return draw_paired_noise(NoiseOptions(**options or {}), PairingOptions(**pairing), seed, PLACE, shape, latents)


def rows(noise: Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in noise}


def costs(latents: Tensor, noise: Tensor, metric: str) -> np.ndarray:
    """Costs of all pairs in float64, by scipy."""
    return cdist(latents.flatten(1).double().numpy(), noise.flatten(1).double().numpy(), metric)


def test_without_pairing_the_noise_is_that_of_draw_noise() -> None:
    options, latents = NoiseOptions(**EVERYTHING), known(3)
    for pairing in ({}, {"immiscible_noise": 0}, {"knn_noise_k": 0}, {"knn_noise_k": 1}):
        for drawn, plain in zip(
            paired(pairing, latents, EVERYTHING), draw_noise(options, 5, PLACE, tuple(latents.shape)), strict=True
        ):
            assert torch.equal(drawn, plain)


@given(SEEDS, IMAGES, st.sampled_from([{"flow_use_ot": True}, {"immiscible_noise": 1}]))
@settings(max_examples=40, deadline=None)
def test_pairing_never_changes_the_set_of_noises_of_a_micro_batch(seed: int, images: int, pairing: dict) -> None:
    latents = known(images, seed)
    noise, input_noise = paired(pairing, latents, EVERYTHING, seed)
    plain, plain_input = draw_noise(NoiseOptions(**EVERYTHING), seed, PLACE, tuple(latents.shape))
    assert rows(noise) == rows(plain) and len(rows(noise)) == images
    assert rows(input_noise) == rows(plain_input)
    order = [next(slot for slot in range(images) if torch.equal(plain[slot], row)) for row in noise]
    assert torch.equal(input_noise, plain_input[order]), "input noise goes with its noise"


@given(SEEDS, IMAGES, st.integers(0, 12))
@settings(max_examples=40, deadline=None)
def test_immiscible_noise_gives_each_image_another_of_the_noises_drawn(seed: int, images: int, count: int) -> None:
    latents = known(images, seed)
    noise, _ = paired({"immiscible_noise": count}, latents, seed=seed)
    drawn = draw_noise(NoiseOptions(), seed, PLACE, (max(count, images), *latents.shape[1:]))[0]
    assert rows(noise) <= rows(drawn) and len(rows(noise)) == images


@given(SEEDS, st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_transport_has_scipys_least_squared_distance(seed: int, images: int) -> None:
    latents, noise = known(images, seed), known(images, seed + 1).flip(0)
    order, cost = transport_order(latents, noise), costs(latents, noise, "sqeuclidean")
    assert sorted(order.tolist()) == list(range(images))
    least = cost[linear_sum_assignment(cost)].sum()
    assert cost[range(images), order].sum() == pytest.approx(least, rel=1e-6)
    assert least <= np.trace(cost) * (1 + 1e-12)


@given(SEEDS, st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_transport_is_the_best_of_all_permutations(seed: int, images: int) -> None:
    latents, noise = known(images, seed), known(images, seed + 1)
    cost = costs(latents, noise, "sqeuclidean")
    best = min(sum(cost[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(images)))
    assert cost[range(images), transport_order(latents, noise)].sum() == pytest.approx(best, rel=1e-6)


@given(SEEDS, IMAGES, st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_immiscible_noise_has_scipys_least_distance(seed: int, images: int, more: int) -> None:
    latents, noise = known(images, seed), known(images + more, seed + 1)
    order, cost = immiscible_order(latents, noise), costs(latents, noise, "euclidean")
    assert len(set(order.tolist())) == images
    assert cost[range(images), order].sum() == pytest.approx(cost[linear_sum_assignment(cost)].sum(), rel=1e-6)


def test_cosine_distance_is_another_pairing_with_a_larger_cost() -> None:
    """docs/differences.md: forks divide by the norms, which weighs a faint image as much as a strong one."""
    differs = 0
    for seed in range(20):
        latents, noise = known(8, seed), known(8, seed + 100)
        cost, cosine = costs(latents, noise, "sqeuclidean"), linear_sum_assignment(costs(latents, noise, "cosine"))[1]
        order = transport_order(latents, noise)
        assert cost[range(8), order].sum() <= cost[range(8), cosine].sum() * (1 + 1e-6)
        differs += order.tolist() != cosine.tolist()
    assert differs > 5


@pytest.mark.parametrize("pairing", [{"flow_use_ot": True}, {"immiscible_noise": 12}], ids=str)
def test_the_strength_of_adaptive_noise_stays_with_the_image(pairing: dict) -> None:
    """The other random numbers of a noise, also those of its offset, go to the image that the noise is given to."""
    latents = known(6)
    fixed, adaptive = {"noise_offset": 0.1}, {"noise_offset": 0.1, "adaptive_noise_scale": 0.7}
    base = draw_base(5, PLACE, (12, *latents.shape[1:]))
    candidates = draw_noise(NoiseOptions(**fixed), 5, PLACE, (12, *latents.shape[1:]))[0]
    plain, noise = paired(pairing, latents, fixed)[0], paired(pairing, latents, adaptive)[0]
    for image in range(6):
        slot = next(slot for slot in range(12) if torch.equal(candidates[slot], plain[image]))
        strength = 0.1 + 0.7 * latents[image].mean(dim=(1, 2), keepdim=True).abs()
        expected = base[slot] + strength * (candidates[slot] - base[slot]) / 0.1
        torch.testing.assert_close(noise[image], expected, rtol=1e-4, atol=1e-4)


def nearest_of_whole_noises(latents: Tensor, candidates: int) -> Tensor:
    """The nearest of whole noises, one image after the other."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.empty(len(latents), candidates, *latents.shape[1:]).normal_(generator=generator)
    nearest = (drawn - latents[:, None]).flatten(2).norm(dim=2).argmin(1)
    return drawn[torch.arange(len(latents)), nearest]


@pytest.mark.parametrize("candidates", [2, 9])
def test_the_nearest_noise_is_distributed_as_the_nearest_of_whole_noises(candidates: int) -> None:
    """Its length along the image, its length across it, its distance, and a coordinate: in 6 and in 40 dimensions."""
    for shape in ((1, 2, 3), (4, 2, 5)):
        image = known(2, 3, shape)[1:]
        latents = image.expand(6000, *shape)
        found = nearest_noise(draw_base(2, PLACE, tuple(latents.shape)), latents, candidates, 2, PLACE)
        expected = nearest_of_whole_noises(latents, candidates)
        direction = image.flatten() / image.norm()

        def figures(noise: Tensor, direction: Tensor = direction, image: Tensor = image) -> list[Tensor]:
            flat = noise.flatten(1)
            along = flat @ direction
            return [along, flat.square().sum(1) - along**2, (noise - image).flatten(1).norm(dim=1), flat[:, 1]]

        for left, right in zip(figures(found), figures(expected), strict=True):
            assert ks_2samp(left.numpy(), right.numpy()).pvalue > 1e-4
        plain = figures(draw_base(3, PLACE, tuple(latents.shape)))
        assert ks_2samp(plain[0].numpy(), figures(found)[0].numpy()).pvalue < 1e-6, "plain noise is told apart"


def test_the_nearest_noise_is_never_farther_than_the_first_and_often_is_the_first() -> None:
    latents = known(400)
    base = draw_base(5, PLACE, tuple(latents.shape))
    noise = nearest_noise(base, latents, 3, 5, PLACE)
    before, after = ((one - latents).flatten(1).norm(dim=1) for one in (base, noise))
    assert (after <= before + 1e-4).all()
    kept = (noise - base).abs().flatten(1).amax(1) < 1e-4
    assert 0.2 < kept.float().mean() < 0.47, "one in three"


def test_the_nearest_noise_of_an_image_depends_on_no_other_image() -> None:
    latents = known(5)
    together, alone = (paired({"knn_noise_k": 4}, latents[:count])[0] for count in (5, 2))
    torch.testing.assert_close(together[:2], alone)
    assert torch.isfinite(paired({"knn_noise_k": 4}, torch.zeros(2, 4, 3, 5))[0]).all(), "also of empty latents"


def test_the_nearest_noise_is_given_its_offset_afterwards() -> None:
    latents, options = known(4), {"noise_offset": 0.3}
    with_offset, plain = paired({"knn_noise_k": 4}, latents, options)[0], paired({"knn_noise_k": 4}, latents)[0]
    shift = with_offset - plain
    torch.testing.assert_close(shift, shift[..., :1, :1].expand_as(shift), rtol=0, atol=1e-6)
    assert shift.abs().max() > 0.05


def test_pairing_passes_to_worker_processes_and_needs_latents() -> None:
    latents, pairing = known(4), PairingOptions(flow_use_ot=True)
    call = partial(draw_paired_noise, NoiseOptions(), pairing, 7)
    copy = pickle.loads(pickle.dumps(call))
    assert torch.equal(copy(PLACE, tuple(latents.shape), latents)[0], call(PLACE, tuple(latents.shape), latents)[0])
    with pytest.raises(AssertionError, match="latents"):
        call(PLACE, tuple(latents.shape))
