"""Previews use the samplers of sd-scripts on the noise schedule of the training. They equal the images of diffusers'
pipeline and leave no trace in the training."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from sdxl_finetune.config import PreviewOptions
from sdxl_finetune.config.output_options import Sampler
from sdxl_finetune.data.tokens import build_tokenizer
from sdxl_finetune.diffusion.objective import build_objective
from sdxl_finetune.model.random_model import TINY, build_random_model
from sdxl_finetune.output.previews import (
    NotFinite,
    PreviewModel,
    draw_latents,
    draw_previews,
    to_image,
)
from sdxl_finetune.output.prompts import PreviewFiles, Prompt
from sdxl_finetune.output.samplers import build_sampler, denoise

# 2026-11: diffusers 0.42 turns torch 2.13 tensors into numpy arrays, and numpy 2.4 warns of how torch does it.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

NAMES = get_args(Sampler)
KINDS = [name for name in NAMES if not name.startswith("k_")]
"""The other names are k_ and one of these."""
NOW = datetime(2026, 1, 2, 3, 4, 5)
SMALL = {"width": 64, "height": 96, "steps": 2}
TOKENIZER = build_tokenizer(max_token_length=None)
NOISE = build_objective("noise")


@pytest.fixture(scope="module")
def tiny() -> PreviewModel:
    model, vae = build_random_model(TINY, seed=0)
    return PreviewModel(
        sdxl=model,
        vae=vae,
        tokenizer=TOKENIZER,
        objective=NOISE,
        autocast=nullcontext,
    )


def draw(model: PreviewModel, folder: Path, prompts: list[Prompt], *, seed=7, options=None, indices=None, **changes):
    """Draws previews of a run called m at step 20. `changes` are fields of PreviewFiles."""
    fields = {"folder": folder / "sample", "output_name": "m", "epoch": None, "step": 20, "time": NOW} | changes
    numbered = [(index, prompts[index]) for index in (range(len(prompts)) if indices is None else indices)]
    return draw_previews(model, numbered, options or PreviewOptions(), PreviewFiles(**fields), seed)


def test_samplers_are_golden(golden) -> None:
    """differences.md: the sampler dpmsolver works; previews do not clip latents."""
    cases = {(case["sampler"], case["v_parameterization"]): case for case in golden("sample_prompts.json")["samplers"]}
    for name in NAMES:
        for v_parameterization in (False, True):
            sampler = build_sampler(name, build_objective("velocity" if v_parameterization else "noise"))
            wanted = dict(cases[name, v_parameterization])
            if name == "dpmsolver":
                assert "raised" in wanted and sampler.config.final_sigmas_type == "sigma_min"
                like = cases["dpmsolver++", v_parameterization]
                different = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
                wanted = {"class": like["class"], "config": like["config"] | different}
            assert type(sampler).__name__ == wanted["class"]
            wanted["config"] = wanted["config"] | ({"clip_sample": False} if "clip_sample" in wanted["config"] else {})
            assert {key: sampler.config[key] for key in wanted["config"]} == wanted["config"], name


@pytest.mark.parametrize("name", KINDS)
def test_samplers_use_the_noise_schedule_of_the_training(name: str) -> None:
    """differences.md: Previews are sampled on the noise schedule of the training."""
    for zero_terminal_snr in (False, True):
        objective = build_objective("velocity", zero_terminal_snr=zero_terminal_snr)
        sampler = build_sampler(name, objective)
        assert sampler.alphas_cumprod[:-1] == pytest.approx(objective.schedule.alphas_cumprod[:-1], rel=1e-3, abs=1e-6)
        sampler.set_timesteps(10)
        assert not zero_terminal_snr or sampler.timesteps[0] == 999


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("v_parameterization", "zero_terminal_snr"), [(False, False), (True, False), (True, True)])
def test_each_sampler_draws_the_only_image_that_a_model_knows(
    name: str, v_parameterization: bool, zero_terminal_snr: bool
) -> None:
    """The model predicts the noise (or velocity) that leads to one flat image."""
    objective = build_objective("velocity" if v_parameterization else "noise", zero_terminal_snr=zero_terminal_snr)
    known = torch.tensor([0.7, -0.3, 0.1, -0.8]).reshape(1, 4, 1, 1)

    def predict(latents, timestep):
        assert timestep.dtype == torch.int64
        signal = objective.schedule.alphas_cumprod[timestep]
        noise = (latents - signal.sqrt() * known) / (1 - signal).sqrt()
        return signal.sqrt() * noise - (1 - signal).sqrt() * known if v_parameterization else noise

    generator = torch.Generator().manual_seed(0)
    sampler = build_sampler(name, objective)
    drawn = denoise(predict, sampler, 20, torch.randn(1, 4, 8, 8, generator=generator), [generator])
    assert (drawn - known).abs().max() < 0.2
    assert (drawn - known).abs().mean() < 0.03


@pytest.mark.parametrize(("name", "scale"), [("ddim", 5.0), ("euler", 1.0)])
@torch.no_grad()
def test_previews_equal_the_images_of_diffusers_pipeline(tiny: PreviewModel, name: str, scale: float) -> None:
    """Compares size conditioning, guidance and the sampling loop with independent code."""
    model, vae = tiny.sdxl.eval(), tiny.vae
    prompt = Prompt(prompt="a cat", negative_prompt="a dog", width=64, height=96, steps=3, scale=scale, sampler=name)
    ours = draw_latents(tiny, name, [prompt], seeds=[5])
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=None,
        text_encoder_2=model.te2,
        tokenizer=None,
        tokenizer_2=None,
        unet=model.unet,
        scheduler=build_sampler(name, NOISE),
    )
    pipeline.set_progress_bar_config(disable=True)
    tokens = TOKENIZER(["a dog", "a cat"])
    hidden, pooled = model.encode_text(tokens)
    theirs = pipeline(
        prompt_embeds=hidden[1:],
        negative_prompt_embeds=hidden[:1],
        pooled_prompt_embeds=pooled[1:],
        negative_pooled_prompt_embeds=pooled[:1],
        height=96,
        width=64,
        num_inference_steps=3,
        guidance_scale=scale,
        latents=torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(5)),
        output_type="latent",
    ).images
    if name == "euler":  # timesteps between two whole ones are rounded
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    image = to_image(vae, ours)
    pixels = pipeline.image_processor.postprocess(vae.decode(ours / vae.config.scaling_factor).sample, output_type="np")
    assert np.abs(np.asarray(image) / 255 - pixels[0]).max() < 0.51 / 255


@torch.no_grad()
def test_previews_without_a_negative_prompt_are_guided_away_from_the_zeros_of_diffusers_pipeline(
    tiny, monkeypatch
) -> None:
    """diffusers sets both embeddings to zero if it is given no negative ones."""
    model = tiny.sdxl.eval()
    prompt = Prompt(prompt="a cat", width=64, height=96, steps=3, scale=5.0, sampler="ddim")
    encoded = draw_latents(tiny, "ddim", [prompt], seeds=[5])
    monkeypatch.setattr(model, "zero_cond", True)
    ours = draw_latents(tiny, "ddim", [prompt], seeds=[5])
    pipeline = StableDiffusionXLPipeline(
        vae=tiny.vae,
        text_encoder=None,
        text_encoder_2=model.te2,
        tokenizer=None,
        tokenizer_2=None,
        unet=model.unet,
        scheduler=build_sampler("ddim", NOISE),
    )
    assert pipeline.config.force_zeros_for_empty_prompt
    pipeline.set_progress_bar_config(disable=True)
    hidden, pooled = model.encode_text(TOKENIZER(["a cat"]))
    theirs = pipeline(
        prompt_embeds=hidden,
        pooled_prompt_embeds=pooled,
        height=96,
        width=64,
        num_inference_steps=3,
        guidance_scale=5.0,
        latents=torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(5)),
        output_type="latent",
    ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - encoded).abs().max() > 1e-2, "the encoded empty text gives another picture"


def test_images_are_saved_under_the_names_of_sd_scripts(tiny, tmp_path: Path) -> None:
    prompts = [
        Prompt(prompt="a (cat:1.2)", negative_prompt="blurry, 日本", seed=42, scale=5.0, **SMALL),
        Prompt(prompt="a dog", sampler="euler_a", **SMALL),
    ]
    previews = draw(tiny, tmp_path, prompts)
    names = ["m_000020_00_20260102030405_42.png", "m_000020_01_20260102030405.png"]
    assert [preview.path.name for preview in previews] == names
    assert sorted(path.name for path in (tmp_path / "sample").iterdir()) == names
    with Image.open(previews[0].path) as image:
        assert image.size == (64, 96)
        assert image.text["parameters"] == (
            "a (cat:1.2)\nNegative prompt: blurry, 日本\n"
            "Steps: 2, Sampler: DDIM, CFG scale: 5.0, Seed: 42, Size: 64x96, Model: m"
        )
        assert np.array_equal(np.asarray(image), np.asarray(previews[0].image))
    with Image.open(previews[1].path) as image:
        assert f"Sampler: Euler a, CFG scale: 7.5, Seed: {previews[1].seed}," in image.text["parameters"]


def test_previews_depend_on_seeds_and_nothing_else(tiny, tmp_path: Path) -> None:
    prompts = [Prompt(prompt="a", seed=3, **SMALL), Prompt(prompt="b", **SMALL), Prompt(prompt="b", **SMALL)]
    pixels = partial(map, lambda preview: np.asarray(preview.image))
    first = draw(tiny, tmp_path, prompts)
    torch.manual_seed(1234)
    again = draw(tiny, tmp_path, prompts)
    assert all(map(np.array_equal, pixels(first), pixels(again)))
    assert first[1].seed != first[2].seed and not np.array_equal(*pixels(first[1:]))
    # Two ranks together draw the same as one rank.
    shares = [draw(tiny, tmp_path, prompts, indices=indices) for indices in ([0, 2], [1])]
    assert [[preview.index for preview in share] for share in shares] == [[0, 2], [1]]
    assert np.array_equal(np.asarray(shares[1][0].image), np.asarray(first[1].image))
    # At another step or with another run seed, a prompt without a seed gets another image.
    later, other = draw(tiny, tmp_path, prompts, step=21), draw(tiny, tmp_path, prompts, seed=8)
    assert later[0].seed == other[0].seed == 3
    assert len({first[1].seed, later[1].seed, other[1].seed}) == 3


def test_previews_do_not_change_the_training(tiny, tmp_path: Path) -> None:
    model, vae = tiny.sdxl, tiny.vae
    model.train()
    model.te1.eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    draw(tiny, tmp_path, [Prompt(prompt="a", sampler="euler_a", **SMALL), Prompt(prompt="", scale=1e39, **SMALL)])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert (vae.device.type, vae.dtype) == ("cpu", torch.float32)
    assert torch.is_grad_enabled()


def test_a_prompt_that_fails_is_reported_in_one_line(tiny, tmp_path: Path, caplog) -> None:
    prompts = [Prompt(prompt="too much", scale=1e39, **SMALL), Prompt(prompt="fine", **SMALL)]
    previews = draw(tiny, tmp_path, prompts)
    assert [preview.index for preview in previews] == [1]
    (record,) = caplog.records
    assert record.getMessage().startswith("no preview of prompt 0 (too much): NotFinite: the model gave values")
    assert "\n" not in record.getMessage()
    assert len(list((tmp_path / "sample").iterdir())) == 1


def test_a_long_prompt_is_encoded_once_in_chunks(tiny, tmp_path: Path) -> None:
    seen = []
    hook = tiny.sdxl.te1.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape))
    try:
        long = Prompt(prompt=", ".join(["a very long prompt"] * 40), width=64, height=64, steps=3)
        draw(replace(tiny, tokenizer=build_tokenizer(max_token_length=225)), tmp_path, [long])
    finally:
        hook.remove()
    assert seen == [(6, 77)]  # prompt and negative prompt, three chunks each


def test_previews_use_the_mixed_precision_of_the_training(tiny, tmp_path: Path) -> None:
    prompts = [Prompt(prompt="a", seed=1, **SMALL)]
    (full,) = draw(tiny, tmp_path, prompts)
    (half,) = draw(replace(tiny, autocast=partial(torch.autocast, "cpu", torch.bfloat16)), tmp_path, prompts)
    difference = np.abs(np.asarray(full.image, dtype=float) - np.asarray(half.image))
    assert 0 < difference.mean() < 5


def test_a_preview_drawn_by_epoch_has_the_epoch_in_its_name(tiny, tmp_path: Path) -> None:
    model = replace(tiny, objective=build_objective("velocity", zero_terminal_snr=True))
    options = PreviewOptions(sample_sampler="dpmsolver++")
    (preview,) = draw(model, tmp_path, [Prompt(prompt="a", **SMALL)], options=options, output_name=None, epoch=3)
    assert preview.path.name == "e000003_00_20260102030405.png"


def test_half_of_a_surrogate_pair_in_a_prompt_is_written_out(tiny, tmp_path: Path, caplog) -> None:
    """A prompt file in JSON may hold it. No PNG file can."""
    (preview,) = draw(tiny, tmp_path, [Prompt(prompt="a \ud83d cat", negative_prompt="\udcff", **SMALL)])
    with Image.open(preview.path) as image:
        text = image.info["parameters"]
    assert text.startswith("a \\ud83d cat\nNegative prompt: \\udcff\nSteps: 2") and not caplog.records


def test_pixels_that_are_not_finite_are_no_image(tiny) -> None:
    """The latents are sound, and the VAE makes NaN of them."""
    broken = copy.deepcopy(tiny.vae)
    torch.nn.init.constant_(broken.decoder.conv_out.bias, torch.nan)
    latents = torch.zeros(1, 4, 8, 8)
    assert to_image(tiny.vae, latents).size == (64, 64)
    with pytest.raises(NotFinite, match="the VAE gave values"):
        to_image(broken, latents)
