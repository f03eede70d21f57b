"""Loading and saving gives the same file; every layout holds the same model; diffusers opens saved checkpoints."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from sdxl_finetune.errors import UserError
from sdxl_finetune.files import atomic_path
from sdxl_finetune.low_bits import split
from sdxl_finetune.model.architecture import Architecture, TextSize
from sdxl_finetune.model.declared import marker_tensors
from sdxl_finetune.model.load import Loaded, load_checkpoint
from sdxl_finetune.model.random_model import TINY, build_random_model, text_size
from sdxl_finetune.model.save import SaveAs, saturated, save_checkpoint
from sdxl_finetune.model.sdxl import SDXL

WIDTHS = st.sampled_from([32, 64, 96])
TEXT = st.tuples(st.sampled_from([32, 48, 64]), st.integers(1, 3), st.sampled_from([16, 64]))
SPECS = st.integers(1, 3).flatmap(
    lambda levels: st.fixed_dictionaries(
        {
            "unet_widths": st.lists(WIDTHS, min_size=levels, max_size=levels),
            "unet_layers": st.lists(st.integers(1, 2), min_size=levels, max_size=levels),
            "transformer_layers": st.lists(st.integers(0, 2), min_size=levels, max_size=levels),
            "middle": st.integers(1, 2),
            "time_width": st.sampled_from([None, 64]),
            "size_width": st.sampled_from([32, 256]),
            "te1": TEXT,
            "te2": TEXT,
            "projection": st.sampled_from([None, 24]),
            "vae_widths": st.lists(st.sampled_from([32, 64]), min_size=1, max_size=3),
            "vae_layers": st.integers(1, 2),
        }
    )
)


def architecture_of(spec: dict) -> Architecture:
    """Builds a small architecture. Its vocabulary is cut, because no test here depends on it."""
    te1, te2 = (
        TextSize(width=width, layers=layers, mlp_width=mlp, projection=width, vocabulary=50)
        for width, layers, mlp in (spec["te1"], spec["te2"])
    )
    return Architecture(
        unet_widths=tuple(spec["unet_widths"]),
        unet_layers=tuple(spec["unet_layers"]),
        transformer_layers=tuple(spec["transformer_layers"]),
        middle_transformer_layers=spec["transformer_layers"][-1] or spec["middle"],
        time_width=spec["time_width"] or 4 * spec["unet_widths"][0],
        size_width=spec["size_width"],
        te1=te1,
        te2=dataclasses.replace(te2, projection=spec["projection"] or te2.width),
        vae_widths=tuple(spec["vae_widths"]),
        vae_layers=spec["vae_layers"],
    )


@settings(max_examples=8, deadline=None)
@given(SPECS, st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_loading_and_saving_a_file_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, spec: dict, dtype: torch.dtype
) -> None:
    folder, architecture = tmp_path_factory.mktemp("round"), architecture_of(spec)
    first, second = folder / "a.safetensors", folder / "b.safetensors"
    metadata = {"modelspec.title": "x"}
    model, vae = build_random_model(architecture, seed=1)
    save_checkpoint(first, model, vae, save_as="safetensors", dtype=dtype, metadata=metadata)
    loaded = load_checkpoint(first, dtype=None)
    assert loaded.model.architecture == architecture
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {dtype}
    assert {parameter.dtype for parameter in loaded.vae.parameters()} == {torch.float32}
    assert loaded.metadata == metadata
    save_checkpoint(second, loaded.model, loaded.vae, save_as="safetensors", dtype=dtype, metadata=loaded.metadata)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("stored", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("save_as", ["safetensors", "ckpt", "diffusers_safetensors"])
def test_a_bf16_model_with_master_weights_saves_the_file_s_exact_values(
    little: tuple[SDXL, AutoencoderKL], tmp_path: Path, stored: torch.dtype, save_as: SaveAs
) -> None:
    """The values are exact in the file's precision and in float32. Without master weights they are rounded to bf16."""
    first = tmp_path / "first"
    save_checkpoint(first, *little, save_as="safetensors", dtype=stored, metadata={})
    loaded = load_checkpoint(first, dtype=torch.bfloat16, exact=True)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert bool(loaded.model.masters.tensors()) == (stored != torch.bfloat16)
    for dtype in (stored, torch.float32):
        again = tmp_path / f"again {dtype}"
        with atomic_path(again) as path:
            save_checkpoint(path, loaded.model, loaded.vae, save_as=save_as, dtype=dtype, metadata={})
        first_state, again_state = (
            load_checkpoint(path, dtype=torch.float32).model.state_dict() for path in (first, again)
        )
        assert all(torch.equal(first_state[name], again_state[name]) for name in first_state)
    rounded = load_checkpoint(first, dtype=torch.bfloat16).model
    assert not rounded.masters.tensors()
    if stored != torch.bfloat16:
        assert not torch.equal(rounded.unet.conv_in.weight.float(), first_state["unet.conv_in.weight"])


def test_master_weights_are_rounded_once_to_fp16(little: tuple[SDXL, AutoencoderKL], tmp_path: Path) -> None:
    """The result is the nearest fp16 number. Rounding to bf16 first would give another one."""
    model = load_with_master_weights(little, tmp_path)
    parameter = model.unet.conv_in.bias
    value = torch.full_like(parameter, 1 + 3 / 1024, dtype=torch.float32)
    with torch.no_grad():
        high, low = split(value)
        model.masters.add(parameter, low)
        parameter.copy_(high)
    save_checkpoint(tmp_path / "half", model, little[1], save_as="safetensors", dtype=torch.float16, metadata={})
    saved = load_checkpoint(tmp_path / "half", dtype=None).model.unet.conv_in.bias
    assert torch.equal(saved, value.half()) and not torch.equal(saved, value.bfloat16().half())


def test_saturated_finds_master_weights_beyond_float16(little: tuple[SDXL, AutoencoderKL], tmp_path: Path) -> None:
    model = load_with_master_weights(little, tmp_path)
    parameter = model.unet.conv_in.bias
    for value, beyond in ((65_504.0, False), (65_530.0, True)):  # in bf16 both are 65,536
        with torch.no_grad():
            high, low = split(torch.full_like(parameter, value, dtype=torch.float32))
            model.masters.add(parameter, low)
            parameter.copy_(high)
        assert saturated(model, little[1], torch.float16) == (["unet.conv_in.bias"] if beyond else [])


def load_with_master_weights(little: tuple[SDXL, AutoencoderKL], folder: Path) -> SDXL:
    save_checkpoint(folder / "initial", *little, save_as="safetensors", dtype=torch.float32, metadata={})
    return load_checkpoint(folder / "initial", dtype=torch.bfloat16, exact=True).model


@settings(max_examples=3, deadline=None)
@given(SPECS)
def test_a_diffusers_folder_holds_the_same_model(tmp_path_factory: pytest.TempPathFactory, spec: dict) -> None:
    folder, architecture = tmp_path_factory.mktemp("folder") / "model", architecture_of(spec)
    model, vae = build_random_model(architecture, seed=1)
    save_checkpoint(folder, model, vae, save_as="diffusers_safetensors", dtype=None, metadata={})
    loaded = load_checkpoint(folder, dtype=torch.float32)
    assert loaded.model.architecture == architecture
    assert_same(loaded, model, vae)


@pytest.fixture(scope="module")
def little() -> tuple[SDXL, AutoencoderKL]:
    """A very small model. Tests share it, and a test that changes it makes a copy."""
    te1, te2 = (dataclasses.replace(text_size(32, 2), vocabulary=50) for _ in range(2))
    architecture = dataclasses.replace(TINY, unet_layers=(1, 1, 1), te1=te1, te2=te2, vae_widths=(32, 32))
    return build_random_model(architecture, seed=2)


def assert_same(loaded: Loaded, model: torch.nn.Module, vae: torch.nn.Module) -> None:
    for ours, theirs in ((loaded.model, model), (loaded.vae, vae)):
        expected = theirs.state_dict()
        assert ours.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("save_as", ["safetensors", "ckpt", "diffusers", "diffusers_safetensors"])
def test_every_format_holds_the_same_model(little: tuple[SDXL, AutoencoderKL], tmp_path: Path, save_as: SaveAs) -> None:
    model, vae = little
    path, metadata = tmp_path / "model", {"modelspec.title": "t"}
    with atomic_path(path) as temporary:
        save_checkpoint(temporary, model, vae, save_as=save_as, dtype=None, metadata=metadata, epoch=2, global_step=30)
    loaded = load_checkpoint(path, dtype=torch.float32)
    assert_same(loaded, model, vae)
    # As in the reference, a diffusers folder has no logit_scale, and only a .ckpt knows epoch and step.
    kept = {name for name in model.unused if "diffusers" not in save_as or "logit" not in name}
    assert loaded.model.unused.keys() == kept
    assert all(torch.equal(loaded.model.unused[name], model.unused[name]) for name in kept)
    assert (loaded.epoch, loaded.global_step) == ((2, 30) if save_as == "ckpt" else (None, None))
    assert loaded.metadata == (metadata if "safetensors" in save_as else {})


def test_ckpt_has_the_reference_s_structure(little: tuple[SDXL, AutoencoderKL], tmp_path: Path) -> None:
    for save_as in ("ckpt", "safetensors"):
        path, precision = tmp_path / f"m.{save_as}", torch.float16
        save_checkpoint(path, *little, save_as=save_as, dtype=precision, metadata={}, epoch=1, global_step=2)
    content = torch.load(tmp_path / "m.ckpt", weights_only=True)
    assert content.keys() == {"state_dict", "epoch", "global_step"}
    expected = load_file(tmp_path / "m.safetensors")
    assert content["state_dict"].keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in content["state_dict"].items())


def test_without_a_dtype_tensors_keep_their_dtype_in_memory(little: tuple[SDXL, AutoencoderKL], tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_checkpoint(first, *little, save_as="safetensors", dtype=torch.float16, metadata={})
    loaded = load_checkpoint(first, dtype=torch.bfloat16)
    save_checkpoint(second, loaded.model, loaded.vae, save_as="safetensors", dtype=None, metadata={})
    with safe_open(second, framework="pt") as file:
        dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    assert {dtype for key, dtype in dtypes.items() if not key.startswith("first_stage_model.")} == {"BF16"}
    assert {dtype for key, dtype in dtypes.items() if key.startswith("first_stage_model.")} == {"F32"}


def test_saturated_finds_values_beyond_float16(little: tuple[SDXL, AutoencoderKL]) -> None:
    model, vae = copy.deepcopy(little)
    assert saturated(model, vae, torch.float16) == []
    with torch.no_grad():
        model.unet.conv_out.bias[0] = 65504.0
        model.te2.text_projection.weight[0, 0] = -70000.0
        model.unet.conv_in.bias[0] = torch.inf
        model.unet.conv_in.bias[1] = torch.nan
    model.unused["te2.logit_scale"] = torch.tensor(1e5)
    assert saturated(model, vae, torch.float16) == ["te2.text_projection.weight", "te2.logit_scale"]
    assert saturated(model, vae, torch.bfloat16) == saturated(model, vae, None) == []


OBJECTIVES = [(False, False), (True, False), (True, True), (False, True)]


@pytest.mark.parametrize(("v_prediction", "zero_terminal_snr"), OBJECTIVES)
@pytest.mark.parametrize("save_as", ["safetensors", "ckpt", "diffusers", "diffusers_safetensors"])
def test_every_format_says_the_objective_and_a_second_save_keeps_it(
    little: tuple[SDXL, AutoencoderKL], tmp_path: Path, save_as: SaveAs, v_prediction: bool, zero_terminal_snr: bool
) -> None:
    """The second save is a .safetensors file that is made of what the first one says."""
    model, vae = copy.deepcopy(little)
    model.markers = marker_tensors("velocity" if v_prediction else "noise", zero_terminal_snr=zero_terminal_snr)
    first, second = tmp_path / f"m.{save_as}", tmp_path / "second.safetensors"
    save_checkpoint(first, model, vae, save_as=save_as, dtype=torch.float16, metadata={})
    loaded = load_checkpoint(first, dtype=None)
    assert (loaded.declared.objective == "velocity") is v_prediction
    assert bool(loaded.declared.zero_terminal_snr) is zero_terminal_snr
    save_checkpoint(second, loaded.model, loaded.vae, save_as="safetensors", dtype=torch.float16, metadata={})
    tensors = load_file(second)
    assert {key for key in tensors if "." not in key} == set(model.markers)
    assert all(tensors[key].shape == (0,) for key in model.markers)
    plain = {key: tensor for key, tensor in tensors.items() if "." in key}
    unmarked = tmp_path / "unmarked.safetensors"
    save_checkpoint(unmarked, *little, save_as="safetensors", dtype=torch.float16, metadata={})
    missing = {key for key in load_file(unmarked) if key not in plain}
    assert missing == ({"conditioner.embedders.1.model.logit_scale"} if save_as.startswith("diffusers") else set())


@pytest.mark.parametrize(("v_prediction", "zero_terminal_snr"), OBJECTIVES)
def test_diffusers_draws_from_a_folder_with_the_objective_of_the_model(
    little: tuple[SDXL, AutoencoderKL], tmp_path: Path, v_prediction: bool, zero_terminal_snr: bool
) -> None:
    model, vae = copy.deepcopy(little)
    model.markers = marker_tensors("velocity" if v_prediction else "noise", zero_terminal_snr=zero_terminal_snr)
    save_checkpoint(tmp_path / "m", model, vae, save_as="diffusers", dtype=torch.float16, metadata={})
    scheduler = EulerDiscreteScheduler.from_pretrained(tmp_path / "m", subfolder="scheduler")
    assert scheduler.config.prediction_type == ("v_prediction" if v_prediction else "epsilon")
    scheduler.set_timesteps(10)
    assert (scheduler.alphas_cumprod[-1] < 1e-6) == zero_terminal_snr
    assert (scheduler.timesteps[0] == 999) == zero_terminal_snr


def test_edm_models_keep_their_markers_and_have_no_folder(little: tuple[SDXL, AutoencoderKL], tmp_path: Path) -> None:
    model, vae = copy.deepcopy(little)
    model.markers = {"edm_vpred.sigma_max": torch.tensor(120.0)}
    save_checkpoint(tmp_path / "m.ckpt", model, vae, save_as="ckpt", dtype=None, metadata={})
    loaded = load_checkpoint(tmp_path / "m.ckpt", dtype=None).model
    assert loaded.markers == {"edm_vpred.sigma_max": torch.tensor(120.0)}
    with pytest.raises(UserError, match=r"a diffusers folder has no place for edm_vpred\.sigma_max"):
        save_checkpoint(tmp_path / "m", loaded, vae, save_as="diffusers", dtype=None, metadata={})


def test_diffusers_opens_saved_folders_and_files_offline(
    golden_model: Loaded, golden_path: Path, golden_tensors: dict, golden, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "model"
    model, vae = golden_model.model, golden_model.vae
    save_checkpoint(folder, model, vae, save_as="diffusers_safetensors", dtype=None, metadata={})
    from_folder = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    from_file = StableDiffusionXLPipeline.from_single_file(golden_path, config=str(folder), local_files_only=True)
    caption = golden("forward.json")["inputs"]["captions"][0]
    for pipeline in (from_folder, from_file):
        for ours, theirs in ((model.unet, pipeline.unet), (vae, pipeline.vae)):
            opened = theirs.state_dict()
            assert all(torch.equal(tensor, opened[name]) for name, tensor in ours.state_dict().items())
        with torch.no_grad():
            hidden, _, pooled, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False)
        torch.testing.assert_close(pooled, golden_tensors["pool2"][:1], rtol=1e-4, atol=1e-4)
        # Up to the end of the text: the pipeline pads otherwise than the reference.
        ours = torch.cat([golden_tensors["hidden_states1"], golden_tensors["hidden_states2"]], dim=-1)
        torch.testing.assert_close(hidden[:, :7], ours[:1, :7], rtol=1e-4, atol=1e-4)
