"""sdxl-model init, convert and info: new models load, converted models are equal, and descriptions are right."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_finetune.commands.model import auto_v2, main
from sdxl_finetune.errors import UserError
from sdxl_finetune.model.load import load_checkpoint


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tool") / "tiny.safetensors"
    assert main(["init", str(path), "--seed", "7"]) == 0
    return path


def test_init_makes_the_same_model_for_the_same_seed(tiny_path: Path, tmp_path: Path) -> None:
    same, other = tmp_path / "same.safetensors", tmp_path / "other.safetensors"
    main(["init", str(same), "--seed", "7"])
    main(["init", str(other), "--seed", "8"])
    assert same.read_bytes() == tiny_path.read_bytes() != other.read_bytes()
    assert {tensor.dtype for tensor in load_file(tiny_path).values()} == {torch.float16}


def test_init_makes_models_of_given_sizes(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    sizes = ["--unet_widths", "32,64", "--unet_layers", "1,2", "--transformer_layers", "1,1", "--vae_widths", "32,32"]
    main(["init", str(path), *sizes, "--te1", "32,2", "--te2", "64,2", "--save_precision", "float"])
    built = load_checkpoint(path, dtype=None).model.architecture
    assert (built.unet_widths, built.unet_layers, built.transformer_layers) == ((32, 64), (1, 2), (1, 1))
    assert (built.te1.width, built.te2.width, built.te2.projection, built.vae_widths) == (32, 64, 64, (32, 32))


def test_init_reports_all_problems_with_sizes_at_once(tmp_path: Path) -> None:
    arguments = ["--unet_widths", "30,64", "--te1", "64", "--transformer_layers", "0,1,0"]
    with pytest.raises(UserError) as error:
        main(["init", str(tmp_path / "m.safetensors"), *arguments])
    for part in ("WIDTH,LAYERS", "one number per level", "no multiple of 32", "last level needs attention"):
        assert part in str(error.value)
    with pytest.raises(UserError, match="width of 200, which is not divisible by its 3 attention heads"):
        main(["init", str(tmp_path / "m.safetensors"), "--te2", "200,2"])
    with pytest.raises(SystemExit):
        main(["init", str(tmp_path / "m.safetensors"), "--te2", "64,0"])
    assert not list(tmp_path.iterdir())


def test_converting_to_ckpt_and_back_gives_the_same_file(tiny_path: Path, tmp_path: Path) -> None:
    ckpt, back = tmp_path / "m.ckpt", tmp_path / "back.safetensors"
    main(["convert", str(tiny_path), str(ckpt)])
    main(["convert", str(ckpt), str(back)])
    assert back.read_bytes() == tiny_path.read_bytes()


def test_convert_changes_precision_and_format(tiny_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    main(["convert", str(tiny_path), str(folder), "--save_precision", "bf16"])
    first, second = load_checkpoint(tiny_path, dtype=torch.bfloat16), load_checkpoint(folder, dtype=None)
    assert second.format == "diffusers"
    assert next(second.model.parameters()).dtype == torch.bfloat16
    expected = first.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in second.model.state_dict().items())


def test_convert_replaces_the_vae(tiny_path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    main(["init", str(other), "--seed", "9"])
    main(["convert", str(tiny_path), str(tmp_path / "m.safetensors"), "--vae", str(other)])
    mixed, base, vae = (load_file(path) for path in (tmp_path / "m.safetensors", tiny_path, other))
    for key, tensor in mixed.items():
        assert torch.equal(tensor, (vae if key.startswith("first_stage_model.") else base)[key])


def test_convert_refuses_values_that_are_too_large_for_fp16(tiny_path: Path, tmp_path: Path) -> None:
    tensors = {key: tensor.float() for key, tensor in load_file(tiny_path).items()}
    key = "model.diffusion_model.out.2.bias"
    tensors[key] = torch.full((4,), 1e5)
    save_file(tensors, tmp_path / "big.safetensors")
    with pytest.raises(UserError, match=r"unet\.conv_out\.bias"):
        main(
            ["convert", str(tmp_path / "big.safetensors"), str(tmp_path / "m.safetensors"), "--save_precision", "fp16"]
        )
    assert not (tmp_path / "m.safetensors").exists()


def test_an_existing_output_is_kept_without_overwrite(tiny_path: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.safetensors"
    output.write_text("another file")
    with pytest.raises(UserError, match="exists already"):
        main(["convert", str(tiny_path), str(output)])
    assert output.read_text() == "another file"
    main(["convert", str(tiny_path), str(output), "--overwrite"])
    assert output.read_bytes() == tiny_path.read_bytes()


def test_info_describes_models_and_loras(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["info", str(tiny_path)])
    output = capsys.readouterr().out
    for part in ("an SDXL base model", auto_v2(tiny_path), "U-Net: 8,666,692 parameters", "float16", "unet_widths"):
        assert part in output
    save_file({"lora_te1.lora_up.weight": torch.ones(1, 1)}, tmp_path / "l.safetensors", {"ss_network_dim": "4"})
    main(["info", str(tmp_path / "l.safetensors")])
    output = capsys.readouterr().out
    assert "a LoRA" in output
    assert "ss_network_dim: 4" in output


def test_info_cuts_long_values_of_the_metadata_unless_asked(tiny_path: Path, tmp_path: Path, capsys) -> None:
    model, value = tmp_path / "m.safetensors", "x" * 1000
    save_file(load_file(tiny_path), model, {"long": value, "short": "y" * 160})
    main(["info", str(model)])
    output = capsys.readouterr().out
    assert "xxx... (1,000 characters, --all shows them)" in output and value not in output and "y" * 160 in output
    main(["info", str(model), "--all"])
    assert f"metadata long: {value}" in capsys.readouterr().out.splitlines()


def test_info_counts_the_characters_that_it_shows(tiny_path: Path, tmp_path: Path, capsys) -> None:
    """A control character is shown as four."""
    save_file(load_file(tiny_path), tmp_path / "m.safetensors", {"long": "\x1b" * 100, "\n" * 200: "x"})
    main(["info", str(tmp_path / "m.safetensors")])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("metadata ")]
    assert lines == [
        f"metadata {chr(92)}n{f'{chr(92)}n' * 79}: x",
        f"metadata long: {(chr(92) + 'x1b') * 40}... (100 characters, --all shows them)",
    ]


def test_auto_v2_is_the_start_of_the_sha256_hash(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert auto_v2(tmp_path / "f") == "BA7816BF8F"


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from sdxl_finetune.commands.model import build_parser; build_parser().format_help();"
        "print(sorted({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_convert_keeps_the_precision_of_sdxl_s_own_weights(tiny_path: Path, tmp_path: Path) -> None:
    """Markers and foreign tensors in float32, a float32 VAE and logit_scale do not make the file larger."""
    tensors = load_file(tiny_path) | {"v_pred": torch.tensor([]), "foreign.weight": torch.ones(3)}
    for key in tensors:
        if key.startswith("first_stage_model.") or key.endswith("logit_scale"):
            tensors[key] = tensors[key].float()
    save_file(tensors, tmp_path / "mixed.safetensors")
    main(["convert", str(tmp_path / "mixed.safetensors"), str(tmp_path / "same.safetensors")])
    converted = load_file(tmp_path / "same.safetensors")
    assert converted.pop("v_pred").shape == (0,)
    assert {tensor.dtype for tensor in converted.values()} == {torch.float16}
    assert converted.keys() == load_file(tiny_path).keys()
    tensors["model.diffusion_model.out.2.bias"] = tensors["model.diffusion_model.out.2.bias"].float()
    save_file(tensors, tmp_path / "mixed.safetensors")
    main(["convert", str(tmp_path / "mixed.safetensors"), str(tmp_path / "float.safetensors")])
    assert {tensor.dtype for tensor in load_file(tmp_path / "float.safetensors").values()} == {torch.float32}
