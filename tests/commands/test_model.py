"""sdxl-model: what it makes loads, what it converts is the same model, what it says is so."""

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


def test_init_makes_a_model_for_a_seed(tiny_path: Path, tmp_path: Path) -> None:
    same, other = tmp_path / "same.safetensors", tmp_path / "other.safetensors"
    main(["init", str(same), "--seed", "7"])
    main(["init", str(other), "--seed", "8"])
    assert same.read_bytes() == tiny_path.read_bytes() != other.read_bytes()
    assert {tensor.dtype for tensor in load_file(tiny_path).values()} == {torch.float16}


def test_init_makes_other_sizes(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    sizes = ["--unet_widths", "32,64", "--unet_layers", "1,2", "--transformer_layers", "1,1", "--vae_widths", "32,32"]
    main(["init", str(path), *sizes, "--te1", "32,2", "--te2", "64,2", "--save_precision", "float"])
    built = load_checkpoint(path, dtype=None).model.architecture
    assert (built.unet_widths, built.unet_layers, built.transformer_layers) == ((32, 64), (1, 2), (1, 1))
    assert (built.te1.width, built.te2.width, built.te2.projection, built.vae_widths) == (32, 64, 64, (32, 32))


def test_all_that_is_wrong_with_a_size_is_said_at_once(tmp_path: Path) -> None:
    arguments = ["--unet_widths", "30,64", "--te1", "64", "--transformer_layers", "0,1,0"]
    with pytest.raises(UserError) as error:
        main(["init", str(tmp_path / "m.safetensors"), *arguments])
    for part in ("WIDTH,LAYERS", "one number per level", "no multiple of 32", "last level needs attention"):
        assert part in str(error.value)
    with pytest.raises(UserError, match="3 attention heads do not divide"):
        main(["init", str(tmp_path / "m.safetensors"), "--te2", "200,2"])
    with pytest.raises(SystemExit):
        main(["init", str(tmp_path / "m.safetensors"), "--te2", "64,0"])
    assert not list(tmp_path.iterdir())


def test_convert_there_and_back_is_the_same_file(tiny_path: Path, tmp_path: Path) -> None:
    ckpt, back = tmp_path / "m.ckpt", tmp_path / "back.safetensors"
    main(["convert", str(tiny_path), str(ckpt)])
    main(["convert", str(ckpt), str(back)])
    assert back.read_bytes() == tiny_path.read_bytes()


def test_convert_changes_precision_and_layout(tiny_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    main(["convert", str(tiny_path), str(folder), "--save_precision", "bf16"])
    first, second = load_checkpoint(tiny_path, dtype=torch.bfloat16), load_checkpoint(folder, dtype=None)
    assert second.format == "diffusers"
    assert next(second.model.parameters()).dtype == torch.bfloat16
    expected = first.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in second.model.state_dict().items())


def test_convert_takes_another_vae(tiny_path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    main(["init", str(other), "--seed", "9"])
    main(["convert", str(tiny_path), str(tmp_path / "m.safetensors"), "--vae", str(other)])
    mixed, base, vae = (load_file(path) for path in (tmp_path / "m.safetensors", tiny_path, other))
    for key, tensor in mixed.items():
        assert torch.equal(tensor, (vae if key.startswith("first_stage_model.") else base)[key])


def test_convert_refuses_values_that_fp16_does_not_hold(tiny_path: Path, tmp_path: Path) -> None:
    tensors = {key: tensor.float() for key, tensor in load_file(tiny_path).items()}
    key = "model.diffusion_model.out.2.bias"
    tensors[key] = torch.full((4,), 1e5)
    save_file(tensors, tmp_path / "big.safetensors")
    with pytest.raises(UserError, match=r"unet\.conv_out\.bias"):
        main(
            ["convert", str(tmp_path / "big.safetensors"), str(tmp_path / "m.safetensors"), "--save_precision", "fp16"]
        )
    assert not (tmp_path / "m.safetensors").exists()


def test_an_existing_output_is_kept_unless_told_otherwise(tiny_path: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.safetensors"
    output.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        main(["convert", str(tiny_path), str(output)])
    assert output.read_text() == "mine"
    main(["convert", str(tiny_path), str(output), "--overwrite"])
    assert output.read_bytes() == tiny_path.read_bytes()


def test_info_describes(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["info", str(tiny_path)])
    said = capsys.readouterr().out
    for part in ("an SDXL base model", auto_v2(tiny_path), "U-Net: 8,666,692 parameters", "float16", "unet_widths"):
        assert part in said
    save_file({"lora_te1.lora_up.weight": torch.ones(1, 1)}, tmp_path / "l.safetensors", {"ss_network_dim": "4"})
    main(["info", str(tmp_path / "l.safetensors")])
    said = capsys.readouterr().out
    assert "a LoRA" in said
    assert "ss_network_dim: 4" in said


def test_auto_v2_is_the_start_of_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert auto_v2(tmp_path / "f") == "BA7816BF8F"


def test_help_starts_without_torch() -> None:
    code = (
        "import sys; from sdxl_finetune.commands.model import build_parser; build_parser().format_help();"
        "print(sorted({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
