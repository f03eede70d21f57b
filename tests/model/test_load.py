"""Loading from every layout, and error messages that name what a file is if it is not SDXL."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxl_finetune.errors import UserError
from sdxl_finetune.model.architecture import vae_config
from sdxl_finetune.model.load import inspect_checkpoint, load_checkpoint
from sdxl_finetune.model.random_model import TINY, build_random_model, text_size
from sdxl_finetune.model.save import save_checkpoint

LITTLE = dataclasses.replace(
    TINY,
    unet_widths=(32, 32, 32),
    unet_layers=(1, 1, 1),
    te1=dataclasses.replace(text_size(32, 2), vocabulary=50),
    te2=dataclasses.replace(text_size(32, 2), vocabulary=50),
    vae_widths=(32, 32),
)
"""A very small model. Its vocabulary is cut, for speed."""
UNET, VAE = "model.diffusion_model.", "first_stage_model."


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    model, vae = build_random_model(LITTLE, seed=0)
    save_checkpoint(path, model, vae, save_as="safetensors", dtype=torch.float16, metadata={})
    return path


@pytest.fixture
def tensors(tiny_path: Path) -> dict[str, Tensor]:
    return load_file(tiny_path)


def refusal(tensors: dict[str, Tensor], folder: Path, **options: object) -> str:
    path = folder / "model.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    with pytest.raises(UserError) as error:
        load_checkpoint(path, dtype=torch.float32, **options)
    assert str(path) in str(error.value)
    return str(error.value)


def test_weights_have_the_requested_dtype_or_the_file_s(tiny_path: Path) -> None:
    for requested, expected in (
        (None, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
    ):
        loaded = load_checkpoint(tiny_path, dtype=requested)
        assert {parameter.dtype for parameter in loaded.model.parameters()} == {expected}
        assert {parameter.dtype for parameter in loaded.vae.parameters()} == {torch.float32}
        assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.format == "safetensors"
    assert loaded.model.architecture == LITTLE


def test_loaded_weights_do_not_change_with_the_file(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    """The file may be replaced while the model is in use."""
    path = tmp_path / "m.safetensors"
    save_file(tensors, path)
    loaded = load_checkpoint(path, dtype=None)
    kept = {name: parameter.clone() for name, parameter in loaded.model.named_parameters()}
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert all(torch.equal(parameter, kept[name]) for name, parameter in loaded.model.named_parameters())
    assert all(tensor.isfinite().all() for tensor in loaded.model.unused.values())


def with_lora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"lora_unet_mid_block.lora_up.weight": torch.ones(2, 2)}


def with_input_channels(channels: int):
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        key = f"{UNET}input_blocks.0.0.weight"
        return {**tensors, key: torch.zeros(32, channels, 3, 3)}

    return change


def with_key(*keys: str):
    return lambda tensors: {key: torch.ones(2, 2) for key in keys}


def with_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.to(torch.float8_e4m3fn) for key, tensor in tensors.items()}


def without(prefix: str):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)}


def only(prefix: str):
    return lambda tensors: {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


FOREIGN = {
    "a LoRA": with_lora,
    "inpainting": with_input_channels(9),
    "InstructPix2Pix": with_input_channels(8),
    "5 input channels": with_input_channels(5),
    "fp8": with_fp8,
    "Stable Diffusion 1.x": with_key("cond_stage_model.transformer.text_model.final_layer_norm.weight"),
    "Stable Diffusion 2.x": with_key("cond_stage_model.model.ln_final.weight"),
    "the SDXL refiner": with_key("conditioner.embedders.0.model.ln_final.weight", f"{UNET}out.2.weight"),
    "Flux": with_key("model.diffusion_model.double_blocks.0.img_attn.qkv.weight"),
    "Stable Diffusion 3": with_key("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"),
    "a ControlNet": with_key("control_model.input_blocks.0.0.weight"),
    "AnimateDiff": with_key("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"),
    "Stable Video": with_key("model.diffusion_model.input_blocks.1.1.time_stack.0.norm1.weight"),
    "quantised": with_key("model.diffusion_model.out.2.weight.absmax"),
    "textual inversion": with_key("clip_l", "clip_g"),
    "Stable Diffusion 1.x or 2.x U-Net": without(f"{UNET}label_emb."),
    "U-Net alone": only(UNET),
    "VAE alone": only(VAE),
    "text encoder alone": only("conditioner.embedders.0.transformer."),
    "no VAE": without(VAE),
    "no second text encoder": without("conditioner.embedders.1."),
    "no kind that is known here": with_key("some.weight"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_kinds_of_models_are_refused_by_name(name: str, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    changed = FOREIGN[name](tensors)
    assert name in refusal(changed, tmp_path)
    assert name in (inspect_checkpoint(tmp_path / "model.safetensors").kind or "")


def test_missing_tensors_and_wrong_shapes_are_listed(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    for n in range(6):
        del tensors[f"{UNET}output_blocks.{n}.0.in_layers.0.bias"]
    tensors[f"{UNET}out.2.bias"] = torch.zeros(5)
    message = refusal(tensors, tmp_path)
    assert f"{UNET}output_blocks.0.0.in_layers.0.bias" in message
    assert "and 2 more missing" in message
    assert f"{UNET}out.2.bias is [5], not [4]" in message


def test_unets_that_are_not_sdxl_s_are_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    middle = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{UNET}middle_block.1.")}
    assert "SSD-1B" in refusal(middle, tmp_path)
    prefix = f"{UNET}output_blocks.0.1.transformer_blocks.1."
    uneven = {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)}
    assert "transformer layers of level 2 is not the same" in refusal(uneven, tmp_path)


def test_a_complete_model_may_hold_other_tensors(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({**tensors, "cond_stage_model.transformer.x": torch.ones(1)}, tmp_path / "m.safetensors")
    assert inspect_checkpoint(tmp_path / "m.safetensors").architecture == LITTLE


def test_unknown_tensors_are_left_out_with_one_warning(
    tmp_path: Path, tensors: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "m.safetensors"
    # Old files hold position_ids. All programs ignore them without a warning.
    tensors["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, path)
    with caplog.at_level(logging.WARNING):
        load_checkpoint(path, dtype=None)
        assert not caplog.records
        save_file({**tensors, "denoiser.sigmas": torch.ones(1000), "foreign": torch.ones(0)}, path)
        load_checkpoint(path, dtype=None)
    assert len(caplog.records) == 1
    assert "2 tensors" in caplog.text
    assert "denoiser.sigmas" in caplog.text


def test_a_missing_file_is_not_downloaded(tiny_path: Path) -> None:
    with pytest.raises(UserError, match="never downloaded"):
        load_checkpoint(Path("stabilityai/stable-diffusion-xl-base-1.0"), dtype=None)
    with pytest.raises(UserError, match="never downloaded"):
        load_checkpoint(tiny_path, dtype=None, vae_path=Path("madebyollin/sdxl-vae-fp16-fix"))


@pytest.fixture(scope="module")
def other_vae() -> AutoencoderKL:
    torch.manual_seed(5)
    return AutoencoderKL(**vae_config(LITTLE))


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames tensors as diffusers wrote them before 0.17."""
    for new, old in OLD.items():
        state = {key.replace(f".{new}.", f".{old}."): tensor for key, tensor in state.items()}
    return state


@pytest.mark.parametrize(
    "form",
    ["folder", "bin", "diffusers file", "old diffusers file", "ldm .pt", "ldm nested .ckpt", "checkpoint", "pipeline"],
)
def test_vae_path_replaces_the_vae(
    form: str, tmp_path: Path, tensors: dict[str, Tensor], tiny_path: Path, other_vae: AutoencoderKL
) -> None:
    path, model = tmp_path / "vae.safetensors", load_checkpoint(tiny_path, dtype=None).model
    whole = tmp_path / "whole.safetensors"
    save_checkpoint(whole, model, other_vae, save_as="safetensors", dtype=torch.float32, metadata={})
    ldm = {key.removeprefix(VAE): tensor for key, tensor in load_file(whole).items() if key.startswith(VAE)}
    match form:
        case "folder":
            other_vae.save_pretrained(path)
        case "bin":
            other_vae.save_pretrained(path, safe_serialization=False)
        case "diffusers file":
            save_file(other_vae.state_dict(), path)
        case "old diffusers file":
            save_file(old_names(other_vae.state_dict()), path)
        case "ldm .pt":
            torch.save({**ldm, "loss.logvar": torch.zeros(1)}, path := tmp_path / "vae.pt")
        case "ldm nested .ckpt":
            torch.save({"state_dict": ldm}, path := tmp_path / "vae.ckpt")
        case "checkpoint":
            path = whole
        case "pipeline":
            path = tmp_path / "pipeline"
            save_checkpoint(path, model, other_vae, save_as="diffusers_safetensors", dtype=None, metadata={})
    # With vae_path, the model file needs no VAE.
    bare = tmp_path / "bare.safetensors"
    save_file({key: tensor for key, tensor in tensors.items() if not key.startswith(VAE)}, bare)
    vae = load_checkpoint(bare, dtype=None, vae_path=path).vae
    expected = other_vae.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in vae.state_dict().items())


def test_vae_path_wins_over_the_model_s_own_vae(tmp_path: Path, tiny_path: Path, other_vae: AutoencoderKL) -> None:
    save_file(other_vae.state_dict(), tmp_path / "vae.safetensors")
    vae = load_checkpoint(tiny_path, dtype=None, vae_path=tmp_path / "vae.safetensors").vae
    assert torch.equal(vae.state_dict()["quant_conv.weight"], other_vae.state_dict()["quant_conv.weight"])


def test_vaes_of_other_models_are_refused_or_named(
    tmp_path: Path, tiny_path: Path, other_vae: AutoencoderKL, caplog: pytest.LogCaptureFixture
) -> None:
    def message(path: Path) -> str:
        with pytest.raises(UserError) as error:
            load_checkpoint(tiny_path, dtype=None, vae_path=path)
        assert str(path) in str(error.value)
        return str(error.value)

    other_vae.save_pretrained(tmp_path / "sd15")
    config = tmp_path / "sd15" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 0.18215}))
    assert load_checkpoint(tiny_path, dtype=None, vae_path=tmp_path / "sd15").vae.config.scaling_factor == 0.18215
    assert "scale 0.18215, and the model's own VAE shift 0, scale 0.13025" in caplog.text
    flux = AutoencoderKL(**{**vae_config(LITTLE), "latent_channels": 16})
    flux.save_pretrained(tmp_path / "flux")
    assert "has 16: choose its own VAE, or write" in message(tmp_path / "flux")
    save_file({"a": torch.ones(1)}, tmp_path / "no.safetensors")
    assert "no VAE" in message(tmp_path / "no.safetensors")


def test_folders_of_other_pipelines_are_refused(tmp_path: Path) -> None:
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match="FluxPipeline"):
        load_checkpoint(tmp_path, dtype=None)
    index.write_text("{")
    with pytest.raises(UserError, match="no JSON"):
        load_checkpoint(tmp_path, dtype=None)
    index.unlink()
    with pytest.raises(UserError, match="no `unet`"):
        load_checkpoint(tmp_path, dtype=None)
    (tmp_path / "unet").mkdir()
    with pytest.raises(UserError, match="no weights"):
        load_checkpoint(tmp_path, dtype=None)
    (tmp_path / "text_encoder_2").mkdir()
    with pytest.raises(UserError, match="refiner"):
        load_checkpoint(tmp_path, dtype=None)


def test_folders_with_shards_and_fp16_variants_are_loaded(tmp_path: Path, tiny_path: Path) -> None:
    loaded = load_checkpoint(tiny_path, dtype=None)
    folder = tmp_path / "m"
    save_checkpoint(folder, loaded.model, loaded.vae, save_as="diffusers_safetensors", dtype=None, metadata={})
    (folder / "vae/diffusion_pytorch_model.safetensors").rename(folder / "vae/diffusion_pytorch_model.fp16.safetensors")
    whole = folder / "unet/diffusion_pytorch_model.safetensors"
    state = sorted(load_file(whole).items())
    whole.unlink()
    for n, part in enumerate((state[:300], state[300:]), start=1):
        save_file(dict(part), whole.with_name(f"diffusion_pytorch_model-0000{n}-of-00002.safetensors"))
    again = load_checkpoint(folder, dtype=None)
    expected = loaded.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.model.state_dict().items())


@pytest.mark.parametrize("layout", ["safetensors", "ckpt", "diffusers"])
def test_names_that_torch_compile_left_in_a_file_load(tmp_path: Path, tiny_path: Path, layout: str) -> None:
    """A compiled module, as a whole or within another one, has `_orig_mod.` in the names of its tensors."""

    def compiled(key: str) -> str:
        words = key.split(".")
        return ".".join([*words[:2], "_orig_mod", *words[2:-1], "_orig_mod", words[-1]])

    expected = load_checkpoint(tiny_path, dtype=None)
    path = tmp_path / "model"
    if layout == "diffusers":
        save_checkpoint(path, expected.model, expected.vae, save_as="diffusers_safetensors", dtype=None, metadata={})
        for file in path.rglob("*.safetensors"):
            save_file({f"_orig_mod.{key}": value for key, value in load_file(file).items()}, file)
    elif layout == "ckpt":
        torch.save({"state_dict": {compiled(key): value for key, value in load_file(tiny_path).items()}}, path)
    else:
        save_file({compiled(key): value for key, value in load_file(tiny_path).items()}, path)
    loaded = load_checkpoint(path, dtype=None)
    for ours, theirs in ((loaded.model, expected.model), (loaded.vae, expected.vae)):
        tensors = theirs.state_dict()
        assert all(torch.equal(value, tensors[name]) for name, value in ours.state_dict().items())
    dropped = {"te2.logit_scale"} if layout == "diffusers" else set()
    assert loaded.model.unused.keys() == expected.model.unused.keys() - dropped
