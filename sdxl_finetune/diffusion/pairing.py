"""Pairing: which noise each image of a micro-batch is trained with.

Noise is drawn first, and is then given to images so that noise and image are near each other. Noise is still drawn
independently of captions. Without pairing, image i has noise i.

    flow_use_ot        the permutation with the least squared distance      Pooladian et al., arXiv 2304.14772
    immiscible_noise   n noises for k images, the least sum of distances    Li et al., arXiv 2406.12303
    knn_noise_k        the nearest of k noises for each image               Li et al., arXiv 2505.18521

All functions work on the images of all ranks. Each rank computes the same pairing and takes its own images.
"""

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sdxl_finetune.batch import Position
from sdxl_finetune.config import NoiseOptions, PairingOptions
from sdxl_finetune.diffusion.noise import draw_base, draw_noise, mix_noise
from sdxl_finetune.seeding import position_rng

Noise = tuple[Float32[Tensor, "k c h w"], Float32[Tensor, "k c h w"] | None]


def draw_paired_noise(
    options: NoiseOptions,
    pairing: PairingOptions,
    seed: int,
    position: Position,
    shape: tuple[int, int, int, int],
    latents: Float[Tensor, "k c h w"] | None = None,
) -> Noise:
    """Draws noise and input noise of k images as `draw_noise` does, and pairs them with the images by `pairing`.

    A pairing needs the `latents` of the k images of all ranks, scaled as the U-Net sees them. Noise that is given to
    another image takes its offset, its layers and its input noise with it. Two things stay with the image: the strength
    of `adaptive_noise_scale`, and everything that is added to the noise of `knn_noise_k`.
    """
    if not pairing.pairings:
        return draw_noise(options, seed, position, shape, latents)
    assert latents is not None, "pairing needs the latents"
    if pairing.knn_noise_k > 1:
        base = nearest_noise(draw_base(seed, position, shape), latents, pairing.knn_noise_k, seed, position)
        return mix_noise(options, seed, position, base, latents)
    is_adaptive = options.adaptive_noise_scale is not None
    fixed = options.model_copy(update={"adaptive_noise_scale": None}) if is_adaptive else options
    count = max(shape[0], pairing.immiscible_noise or 0)
    noise, input_noise = draw_noise(fixed, seed, position, (count, *shape[1:]))
    order = transport_order(latents, noise) if pairing.flow_use_ot else immiscible_order(latents, noise)
    if is_adaptive:
        return draw_noise(options, seed, position, shape, latents, slots=order.tolist())
    return noise[order], None if input_noise is None else input_noise[order]


def transport_order(latents: Float[Tensor, "k c h w"], noise: Float[Tensor, "k c h w"]) -> Int64[np.ndarray, " k"]:
    """The noise of each image in the optimal transport between noise and images: a permutation.

    It minimises the sum of |latents_i - noise_j|^2 over all pairs. The squared norms of latents and noise have the same
    sum for each permutation. The pairs therefore maximise the sum of the inner products. Source: Pooladian et al.,
    arXiv 2304.14772 (BatchOT). Forks of sd-scripts divide the inner products by the norms, which makes
    images of low contrast count as much as others and does not minimise the distance.
    """
    products = latents.float().flatten(1) @ noise.float().flatten(1).T
    return linear_sum_assignment(products.numpy(), maximize=True)[1]


def immiscible_order(latents: Float[Tensor, "k c h w"], noise: Float[Tensor, "n c h w"]) -> Int64[np.ndarray, " k"]:
    """The noise of each image, a different one for each, with the least sum of distances |latents_i - noise_j|.

    n is at least k. Source: Li et al., arXiv 2406.12303. Forks compute distances in float16.
    """
    distances = torch.cdist(latents.float().flatten(1), noise.float().flatten(1), compute_mode="use_mm_for_euclid_dist")
    return linear_sum_assignment(distances.numpy())[1]


def nearest_noise(
    noise: Float32[Tensor, "k c h w"], latents: Float[Tensor, "k c h w"], candidates: int, seed: int, position: Position
) -> Float32[Tensor, "k c h w"]:
    """The noise of each image that is nearest to it among `candidates` noises, of which `noise` has the first.

    Only one noise is drawn. Standard normal noise e has a length z along the direction of the latents, and a rest at
    right angles to them. z is a standard normal number, and the squared norm s of the rest is chi-squared. The distance
    to latents of norm r is sqrt((z - r)^2 + s). The direction of the rest does not change the distance. Drawing z and s
    for each candidate therefore gives the same distribution as drawing whole noises, at a cost that does not grow with
    `candidates`. Source: Li et al., arXiv 2505.18521, which draws whole noises.
    """
    flat, images = noise.flatten(1), latents.float().flatten(1)
    norm = images.norm(dim=1, keepdim=True)
    direction = images / norm.clamp(min=torch.finfo(torch.float32).tiny)
    length = (flat * direction).sum(1, keepdim=True)
    rest = flat - length * direction
    square = rest.square().sum(1, keepdim=True)
    place = position.step, position.micro_batch
    rngs = [position_rng(seed, "nearest noise", *place, slot) for slot in range(len(flat))]
    drawn = [(rng.standard_normal(candidates - 1), rng.chisquare(flat.shape[1] - 1, candidates - 1)) for rng in rngs]
    lengths, squares = (
        torch.cat([own, torch.from_numpy(np.stack(others)).float()], 1)
        for own, others in zip((length, square), zip(*drawn, strict=True), strict=True)
    )
    nearest = ((lengths - norm) ** 2 + squares).argmin(1, keepdim=True)
    factor = (squares.gather(1, nearest) / square).sqrt()
    return (factor * rest + lengths.gather(1, nearest) * direction).reshape(noise.shape)
