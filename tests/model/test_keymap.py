"""The key map equals the reference's key maps, and the full-size model's keys and shapes those of its saved file."""

import pytest
import torch
from diffusers import AutoencoderKL

from sdxl_finetune.model.architecture import FULL, read_architecture, vae_config
from sdxl_finetune.model.keymap import KeyMap, Place, module_name, put
from sdxl_finetune.model.named_tensors import NamedTensors
from sdxl_finetune.model.random_model import text_size
from sdxl_finetune.model.save import single_file_tensors
from sdxl_finetune.model.sdxl import SDXL
from sdxl_finetune.model.tensorfile import Source
from sdxl_finetune.model.vae_file import read_vae

KEYMAP = KeyMap(FULL.layout)


def file_of(golden) -> dict[str, Source]:
    """Builds the reference's saved file from its header."""
    return {
        key: Source(shape=tuple(shape), dtype=getattr(torch, dtype), read=torch.Tensor)
        for key, shape, dtype in golden("checkpoint_keys.json.gz")["keys_fp16"]
    }


def test_unet_keys_are_the_reference_s(golden) -> None:
    for name, key in golden("checkpoint_keys.json.gz")["key_maps"]["unet_diffusers_to_checkpoint"].items():
        assert KEYMAP.place(f"unet.{name}") == Place(key)


def test_text_encoder_1_keys_are_the_reference_s(golden) -> None:
    for name, key in golden("checkpoint_keys.json.gz")["key_maps"]["te1_hf_to_checkpoint"].items():
        assert KEYMAP.place(f"te1.{name}") == Place(key)
        # Newer transformers' modules have no prefix.
        assert module_name("te1", name.removeprefix("text_model.")) == module_name("te1", name) == f"te1.{name}"


def test_text_encoder_2_keys_are_the_reference_s(golden) -> None:
    for key, name in golden("checkpoint_keys.json.gz")["key_maps"]["te2_checkpoint_to_hf"].items():
        if "in_proj" not in key:
            assert KEYMAP.place("te2." + name.split(" ")[0]).key == key
    for third, part in enumerate("qkv"):
        place = KEYMAP.place(f"te2.text_model.encoder.layers.31.self_attn.{part}_proj.bias")
        key = "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_bias"
        assert place == Place(key, third=third)


def test_vae_keys_are_the_reference_s(golden) -> None:
    maps = golden("checkpoint_keys.json.gz")["key_maps"]
    reshaped = maps["vae_rank_changes_[diffusers,checkpoint]"]
    for name, key in maps["vae_diffusers_to_checkpoint"].items():
        place = KEYMAP.place(f"vae.{name}")
        assert place.key == key
        if name in reshaped:
            assert place.shape((5, 7, 1, 1)) == (5, 7)


def test_unknown_names_raise_key_error() -> None:
    for name in ("unet.nothing.weight", "te2.text_model.encoder.layers.32.mlp.fc1.weight", "lora"):
        with pytest.raises(KeyError):
            KEYMAP.place(name)


def test_differs_from_reference_text_projection_is_transposed_in_files(golden) -> None:
    """Entry "Text encoder 2's projection" of docs/differences.md."""
    map_ = golden("checkpoint_keys.json.gz")["key_maps"]["te2_text_projection"]
    assert map_ == {"to_checkpoint_transposed": False, "from_checkpoint_transposed": False}
    matrix = torch.arange(6).reshape(2, 3)
    place = KEYMAP.place("te2.text_projection.weight")
    assert torch.equal(place.take(matrix), matrix.t())
    assert torch.equal(put([(place, matrix.t())]), matrix)


def test_put_is_the_inverse_of_take() -> None:
    fused = torch.randn(6, 2)
    places = [KEYMAP.place(f"te2.text_model.encoder.layers.0.self_attn.{part}_proj.weight") for part in "qkv"]
    parts = [(place, place.take(fused)) for place in places]
    assert torch.equal(put(reversed(parts)), fused)
    assert all(tuple(part.shape) == place.shape((6, 2)) for place, part in parts)
    conv = torch.randn(2, 2, 1, 1)
    place = KEYMAP.place("vae.decoder.mid_block.attentions.0.to_out.0.weight")
    assert place.take(conv).shape == place.shape((2, 2, 1, 1)) == (2, 2)
    assert torch.equal(put([(place, place.take(conv))]), conv)


def test_full_size_architecture_is_read_from_the_reference_s_file(golden) -> None:
    named = NamedTensors(file_of(golden))
    assert read_architecture(named, read_vae(named, {})) == FULL


def test_full_size_model_has_the_reference_s_keys_and_shapes(golden) -> None:
    with torch.device("meta"):
        model, vae = SDXL(FULL), AutoencoderKL(**vae_config(FULL))
    expected = {key: (source.shape, source.dtype) for key, source in file_of(golden).items()}
    named = NamedTensors(file_of(golden))
    model.unused = {name: torch.empty(named.shape(name), device="meta") for name in model.unused_names()}
    ours = single_file_tensors(model, vae, torch.float16)
    assert {key: (source.shape, source.dtype) for key, source in ours.items()} == expected
    assert len(ours) == golden("checkpoint_keys.json.gz")["n_keys"]
    # From a diffusers folder: without logit_scale.
    del model.unused["te2.logit_scale"]
    missing = golden("checkpoint_keys.json.gz")["without_logit_scale"]["missing"]
    assert sorted(expected.keys() - single_file_tensors(model, vae, None).keys()) == missing
    assert text_size(768, 12) == FULL.te1
