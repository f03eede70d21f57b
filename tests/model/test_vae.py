"""Encoding and decoding by the VAE are the reference's, and samples have the right deviation."""

import numpy as np
import pytest
import torch
from torch import Tensor

from sdxl_finetune.batch import LatentSize
from sdxl_finetune.model.load import Loaded
from sdxl_finetune.model.vae import decode, encode, latent_size


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_encode_and_decode_are_the_reference_s(golden_model: Loaded, golden_tensors: dict[str, Tensor]) -> None:
    mean = encode(golden_model.vae, golden_tensors["vae.image"])
    assert relative_error(mean, golden_tensors["vae.latent_mean"]) < 1e-4
    decoded = decode(golden_model.vae, golden_tensors["vae.latent_mean"])
    assert relative_error(decoded, golden_tensors["vae.decoded"]) < 1e-4


def test_a_sample_is_the_mean_plus_deviation_times_noise(
    golden_model: Loaded, golden_tensors: dict[str, Tensor]
) -> None:
    image, vae = golden_tensors["vae.image"], golden_model.vae
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 4, 8, 12), dtype=np.float32))
    mean = encode(vae, image)
    torch.testing.assert_close(encode(vae, image, noise) - mean, mean - encode(vae, image, -noise))
    deviation = vae.encode(image).latent_dist.std
    torch.testing.assert_close(encode(vae, image, noise), mean + deviation * noise)


def test_autocast_does_not_change_the_vae_s_precision(golden_model: Loaded, golden_tensors: dict[str, Tensor]) -> None:
    plain = encode(golden_model.vae, golden_tensors["vae.image"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encode(golden_model.vae, golden_tensors["vae.image"]), plain)


def test_scaling_factor_and_latent_size(golden_model: Loaded) -> None:
    assert latent_size(golden_model.vae) == LatentSize(8, 4)
    assert golden_model.vae.config.scaling_factor == pytest.approx(0.13025)
    assert not any(parameter.requires_grad for parameter in golden_model.vae.parameters())
