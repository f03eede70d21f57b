"""Scale, shift, channels and padding of VAEs, as files say them, against diffusers."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import tomllib
import torch
from diffusers import AutoencoderKLFlux2, Flux2Pipeline
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdxl_finetune.commands.latent_stats import describe, moments_of
from sdxl_finetune.commands.model import main
from sdxl_finetune.config import Config, VaeOptions
from sdxl_finetune.errors import UserError
from sdxl_finetune.model.architecture import VaeArchitecture
from sdxl_finetune.model.keymap import KeyMap
from sdxl_finetune.model.latent_scale import LatentScale, scale_of_config
from sdxl_finetune.model.load import load_vae, open_vae_alone
from sdxl_finetune.model.vae import build_vae, encode, latent_scale, latent_size, vae_identity

numbers = st.floats(-4, 4)
factors = st.floats(0.05, 4)
LITTLE = VaeArchitecture(vae_widths=(32, 32), vae_layers=1)
CONFIG = {
    "block_out_channels": [32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}


@given(st.lists(numbers, min_size=3, max_size=3), st.lists(factors, min_size=3, max_size=3), st.booleans())
def test_a_scale_is_undone_and_survives_diffusers_config(shifts: list[float], scales: list[float], one: bool) -> None:
    scale = LatentScale(shift=tuple(shifts[:1] if one else shifts), scale=tuple(scales[:1] if one else scales))
    latents = torch.linspace(-8, 8, 2 * 3 * 4).view(2, 3, 2, 2)
    expected = (latents.double() - torch.tensor(shifts[:1] if one else shifts).double().view(-1, 1, 1)) * torch.tensor(
        scales[:1] if one else scales
    ).double().view(-1, 1, 1)
    assert torch.allclose(scale.scaled(latents).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(scale.unscaled(scale.scaled(latents)), latents, rtol=1e-5, atol=1e-5)
    again = scale_of_config(json.loads(json.dumps(scale.to_config(3))))
    assert np.allclose(again.per_channel(3), scale.per_channel(3), rtol=1e-14, atol=0)


@given(st.lists(numbers, min_size=3, max_size=3), st.lists(factors, min_size=3, max_size=3))
def test_diffusers_pipelines_of_sdxl_undo_the_scale_of_the_config(shifts: list[float], scales: list[float]) -> None:
    scale = LatentScale(shift=tuple(shifts), scale=tuple(scales))
    written, latents = scale.to_config(3), torch.linspace(-8, 8, 12).view(1, 3, 2, 2)
    mean, deviation = (torch.tensor(written[f"latents_{name}"]).view(1, 3, 1, 1) for name in ("mean", "std"))
    # StableDiffusionXLPipeline.__call__
    decoded = scale.scaled(latents) * deviation / written["scaling_factor"] + mean
    assert torch.allclose(decoded, latents, rtol=1e-5, atol=1e-5)


def test_the_batch_norm_of_flux_2_gives_each_channel_mean_0_and_deviation_1(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(**CONFIG, latent_channels=8)
    place = torch.randn(1, 8, 2, 2)  # patches of 2 x 2 differ by place, as the four statistics of a channel do
    latents = torch.randn(64, 8, 16, 16) * torch.linspace(0.3, 3, 8).view(-1, 1, 1) + place.repeat(1, 1, 8, 8)
    vae.bn.momentum = None
    vae.bn.train()(Flux2Pipeline._patchify_latents(latents))
    vae.save_pretrained(tmp_path / "folder")
    opened = open_vae_alone(tmp_path / "folder").architecture
    assert opened.latent_channels == 8 and opened.latent_scale is not None
    scaled = opened.latent_scale.scaled(latents)
    assert scaled.mean((0, 2, 3)).abs().max() < 1e-4
    assert (scaled.std((0, 2, 3)) - 1).abs().max() < 2e-3
    # As a single file, without its config.
    save_file({key: tensor.contiguous() for key, tensor in vae.state_dict().items()}, tmp_path / "flux2.safetensors")
    assert open_vae_alone(tmp_path / "flux2.safetensors").architecture == opened
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(load_vae(tmp_path, tmp_path / "folder").encode(image)[0].mean, vae.eval().encode(image)[0].mean)


LAYOUTS = {
    "checkpoint": lambda tensors: {f"first_stage_model.{key}": tensor for key, tensor in tensors.items()},
    "bare": lambda tensors: tensors,
    "prefixed": lambda tensors: {f"vae.{key}": tensor for key, tensor in tensors.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("quant_conv", [True, False])
def test_single_files_of_16_channels_load_once_their_scale_is_given(
    layout: str, quant_conv: bool, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    vae = build_vae(dataclasses.replace(LITTLE, latent_channels=16, vae_quant_conv=quant_conv))
    vae.save_pretrained(tmp_path / "folder")
    opened = open_vae_alone(tmp_path / "folder")
    keymap = KeyMap(opened.named.layout)
    old: dict[str, Tensor] = {}
    for name, tensor in vae.state_dict().items():
        place = keymap.place(f"vae.{name}")
        stored = tensor[:, :, None, None] if place.pointwise and tensor.ndim == 2 else tensor
        old[place.key.removeprefix("first_stage_model.")] = stored
    path = tmp_path / "ae.safetensors"
    save_file(LAYOUTS[layout](old), path)
    with pytest.raises(UserError, match=r"ae.safetensors: this VAE has 16 latent channels, and nothing says .*0\.3611"):
        load_vae(tmp_path, path)
    loaded = load_vae(tmp_path, path, VaeOptions(vae_custom_scale=(0.3611,), vae_custom_shift=(0.1159,)))
    assert latent_size(loaded).channels == 16 and latent_size(loaded).pixels == 2
    assert latent_scale(loaded) == LatentScale(shift=(0.1159,), scale=(0.3611,))
    assert all(torch.equal(tensor, vae.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_reflection_padding_pads_as_torch_s_module_does_and_changes_the_identity() -> None:
    torch.manual_seed(2)
    zeros = build_vae(LITTLE)
    reflected = build_vae(dataclasses.replace(LITTLE, vae_reflection_padding=True))
    reflected.load_state_dict(zeros.state_dict())
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    by_hand = build_vae(LITTLE)
    by_hand.load_state_dict(zeros.state_dict())
    for parent in list(by_hand.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.Conv2d) and module.padding == (1, 1):
                module.padding = (0, 0)
                setattr(parent, name, nn.Sequential(nn.ReflectionPad2d(1), module))
    assert torch.allclose(encode(reflected, images), by_hand.encode(images).latent_dist.mean, atol=1e-6)
    assert not torch.allclose(encode(reflected, images), encode(zeros, images), atol=1e-3)
    assert vae_identity(reflected) != vae_identity(zeros)


def test_scale_and_shift_do_not_change_the_identity_of_cached_latents_and_sdxl_s_stays() -> None:
    torch.manual_seed(3)
    vae = build_vae(LITTLE)
    scaled = build_vae(dataclasses.replace(LITTLE, latent_scale=LatentScale(shift=(1.0,), scale=(2.0, 1.0, 1.0, 1.0))))
    scaled.load_state_dict(vae.state_dict())
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)} ".encode() + tensor.numpy().tobytes())
    assert vae_identity(scaled) == vae_identity(vae) == digest.hexdigest()


def test_options_that_do_not_fit_the_vae_are_refused(tmp_path: Path) -> None:
    build_vae(LITTLE).save_pretrained(tmp_path / "vae")

    def message(**options: object) -> str:
        with pytest.raises(UserError) as error:
            load_vae(tmp_path, tmp_path / "vae", VaeOptions(**options))
        return str(error.value)

    assert "holds 3 numbers, but the VAE has 4 latent channels" in message(vae_custom_scale="1,2,3")
    assert "the VAE has 4 latent channels, not 16" in message(latent_channels=16)
    assert "the VAE has 4 latent channels, not 32" in message(vae_type="flux2")
    config = tmp_path / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "AutoencoderDC"}))
    assert "this VAE is of the class AutoencoderDC" in message()


def test_forks_names_set_what_the_fork_sets() -> None:
    flux = VaeOptions(vae_type="flux")
    assert (flux.given_channels, flux.given_scale, flux.given_shift) == (16, (0.3611,), (0.0,))
    own = VaeOptions(vae_type="flux2", vae_custom_scale=0.128, vae_custom_shift=[0.1] * 32)
    assert (own.given_channels, own.given_scale, own.given_shift) == (32, (0.128,), (0.1,) * 32)
    plain = VaeOptions()
    assert (plain.given_channels, plain.given_scale, plain.given_shift) == (None, None, None)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "a", "", "1,,2"])
def test_a_scale_that_is_no_positive_number_is_refused(value: str) -> None:
    if value == "":
        assert Config(vae_custom_scale=value).vae_custom_scale is None
        return
    with pytest.raises(ValueError, match="vae_custom_scale"):
        Config(vae_custom_scale=value)


def test_adapted_channels_are_zero_or_copied(tmp_path: Path) -> None:
    assert main(["init", str(tmp_path / "old.safetensors"), "--save_precision", "float"]) == 0
    build_vae(dataclasses.replace(LITTLE, latent_channels=6)).save_pretrained(tmp_path / "vae")
    for kind in ("zero", "copy"):
        command = ["adapt-latents", str(tmp_path / "old.safetensors"), str(tmp_path / f"{kind}.safetensors")]
        assert main([*command, "--vae", str(tmp_path / "vae"), "--new_channels", kind]) == 0
    old, zero, copy = (load_file(tmp_path / f"{name}.safetensors") for name in ("old", "zero", "copy"))
    first, last = "model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.out.2"
    assert torch.equal(zero[first][:, :4], old[first]) and not zero[first][:, 4:].any()
    for name in (f"{last}.weight", f"{last}.bias"):
        assert torch.equal(zero[name][:4], old[name]) and not zero[name][4:].any()
        assert torch.equal(copy[name], old[name][[0, 1, 2, 3, 0, 1]])
    assert torch.allclose(copy[first][:, [2, 3]], old[first][:, [2, 3]])
    assert torch.allclose(copy[first][:, [0, 1, 4, 5]], old[first][:, [0, 1, 0, 1]] / 2**0.5)
    others = [key for key in old if not key.startswith("first_stage_model.") and key != first and last not in key]
    assert all(torch.equal(old[key], zero[key]) and torch.equal(old[key], copy[key]) for key in others)
    # Narrowed again, to the old VAE, it is the old model.
    narrow = tmp_path / "narrow.safetensors"
    vae = str(tmp_path / "old.safetensors")
    assert main(["adapt-latents", str(tmp_path / "zero.safetensors"), str(narrow), "--vae", vae]) == 0
    assert narrow.read_bytes() == (tmp_path / "old.safetensors").read_bytes()


def test_moments_and_their_errors_agree_with_repeated_draws() -> None:
    rng = np.random.default_rng(0)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        brightness = rng.normal(0.5, 0.8, (count, 1, 2))  # the values of an image depend on one another
        values = brightness + rng.normal(0, [1.0, 2.0], (count, 50, 2))
        return values.mean(1), np.square(values).mean(1)

    repeats = [moments_of(*draw(200)) for _ in range(400)]
    truth = np.sqrt(0.8**2 + np.square([1.0, 2.0]))
    for name, true in (("mean", 0.5), ("deviation", truth)):
        found = np.array([getattr(each, name) for each in repeats])
        said = np.array([getattr(each, f"{name}_error") for each in repeats]).mean(0)
        assert np.allclose(found.mean(0), true, atol=0.02)
        assert np.allclose(said / found.std(0), 1, atol=0.15)
    lines = list(describe(repeats[0], 200))
    given = VaeOptions(**tomllib.loads("\n".join(lines)))
    assert np.allclose(given.vae_custom_shift or (), repeats[0].mean, rtol=1e-4)
    assert np.allclose(given.vae_custom_scale or (), 1 / repeats[0].deviation, rtol=1e-4)
