"""sdxl-model merge: sums are exact, models that do not fit are refused, and averages of saves approximate an EMA."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdxl_finetune.commands.model import auto_v2, main
from sdxl_finetune.errors import UserError
from sdxl_finetune.model.averaging import exponential_profile, power_exponent, power_profile
from sdxl_finetune.model.declared import read_declared
from sdxl_finetune.model.load import load_checkpoint, open_weights

UNET, TE1, TE2 = "model.diffusion_model.", "conditioner.embedders.0.", "conditioner.embedders.1."
VAE = "first_stage_model."
PARTS = {"unet": UNET, "te1": TE1, "te2": TE2, "vae": VAE}
MARK = torch.tensor([])


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three small models in fp16 with different weights, a, b and c."""
    folder = tmp_path_factory.mktemp("three")
    paths = [folder / f"{name}.safetensors" for name in "abc"]
    for seed, path in enumerate(paths):
        main(["init", str(path), "--seed", str(seed)])
    return paths


def merge(*arguments: object) -> dict[str, torch.Tensor]:
    """Runs the command into `m.safetensors` beside the first model, and returns the tensors."""
    words = [str(argument) for argument in arguments]
    output = Path(words[0]).parent / "m.safetensors"
    main(["merge", "--output", str(output), "--overwrite", *words])
    return load_file(output)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def expect(merged, models, weights) -> None:
    """Compares all tensors with the sum in float64. `weights` is a function of the key."""
    for key, tensor in merged.items():
        total = sum(weight * model[key].double() for weight, model in zip(weights(key), models, strict=True))
        assert torch.equal(tensor, total.half()), key


def part_of(key: str) -> str:
    return next(part for part, prefix in PARTS.items() if key.startswith(prefix))


def test_an_average_has_the_shares_of_each_part_and_block_rounded_once(three) -> None:
    models = [load_file(path) for path in three]
    own = ["--weights", "1,1,2", "--te1_weights", "0,1,0", "--vae_weights", "0,1,3"]
    blocks = ["--block_weights", "output_blocks=1,0,0", "--block_weights", "output_blocks.1=0,0,5"]
    merged = merge(*three, *own, *blocks)

    def weights(key: str) -> tuple[float, ...]:
        if key.startswith(f"{UNET}output_blocks.1."):
            return 0, 0, 1
        if key.startswith(f"{UNET}output_blocks."):
            return 1, 0, 0
        return {"te1": (0, 1, 0), "vae": (0, 0.25, 0.75)}.get(part_of(key), (0.25, 0.25, 0.5))

    assert merged.keys() == models[0].keys()
    expect(merged, models, weights)
    assert f"{UNET}output_blocks.1.0.in_layers.0.weight" in merged


def test_the_vae_is_that_of_the_first_model_and_shares_are_equal_by_default(three) -> None:
    models = [load_file(path) for path in three[:2]]
    merged = merge(*three[:2])
    expect(merged, models, lambda key: (1, 0) if part_of(key) == "vae" else (0.5, 0.5))


def test_add_difference_adds_what_b_has_learned_since_c(three) -> None:
    models = [load_file(path) for path in three]
    merged = merge(*three, "--add_difference", "0.7", "--te2_weights", "0.1")
    weights = {"te2": (1, 0.1, -0.1), "vae": (1, 0, 0)}
    expect(merged, models, lambda key: weights.get(part_of(key), (1, 0.7, -0.7)))
    same = merge(three[0], three[1], three[1], "--add_difference", "0.5")
    assert all(torch.equal(tensor, models[0][key]) for key, tensor in same.items())


def test_metadata_says_what_was_merged(three, tmp_path: Path) -> None:
    first = tmp_path / "first.safetensors"
    kept = {"modelspec.author": "me", "modelspec.license": "CC0-1.0", "modelspec.architecture": "sdxl"}
    stale = {
        "modelspec.title": "first",
        "modelspec.thumbnail": "x",
        "sdxl_finetune.step": "5",
        "sdxl_finetune.resume": "{}",
    }
    save_file(load_file(three[0]), first, {**kept, **stale})
    merge(first, three[1], "--weights", "3,1")
    said = metadata_of(tmp_path / "m.safetensors")
    assert said.items() >= kept.items()
    assert said["modelspec.title"] == "m" and said["modelspec.merged_from"] == "first, b"
    assert said["modelspec.prediction_type"] == "epsilon" and "modelspec.thumbnail" not in said
    assert "sdxl_finetune.step" not in said and "sdxl_finetune.resume" not in said
    recipe = json.loads(said["sdxl_finetune.merge"])
    assert [model["hash"] for model in recipe["models"]] == [auto_v2(first), auto_v2(three[1])]
    assert recipe["method"] == "average" and recipe["weights"]["unet"] == [0.75, 0.25]


def test_layouts_and_precisions_mix(three, tmp_path: Path) -> None:
    folder, wide = tmp_path / "folder", tmp_path / "wide.ckpt"
    main(["convert", str(three[0]), str(folder)])
    main(["convert", str(three[1]), str(wide), "--save_precision", "float"])
    main(["merge", str(folder), str(wide), "--output", str(tmp_path / "out"), "--save_precision", "float"])
    models = [load_file(path) for path in three[:2]]
    merged = load_checkpoint(tmp_path / "out", dtype=None).model.state_dict()
    key = f"{TE2}model.text_projection"
    expected = (models[0][key].double() + models[1][key].double()).float() / 2
    assert torch.equal(merged["te2.text_projection.weight"], expected.t())


@pytest.mark.parametrize(
    ("marked", "arguments", "result"),
    [
        ("ab", [], {"v_pred", "ztsnr"}),
        ("", [], set()),
        ("a", ["--weights", "1,0"], {"v_pred", "ztsnr"}),
        ("a", ["--unet_weights", "1,0"], {"v_pred", "ztsnr"}),
        ("abc", ["--add_difference", "0.3"], {"v_pred", "ztsnr"}),
        ("a", ["--add_difference", "0.3"], {"v_pred", "ztsnr"}),
        ("b", ["--add_difference", "1"], {"v_pred", "ztsnr"}),
        ("bc", ["--add_difference", "0.3"], set()),
        ("a", [], None),
        ("b", ["--add_difference", "0.5"], None),
        ("c", ["--add_difference", "1"], None),
        ("ab", ["--add_difference", "1"], None),
        ("a", ["--unet_weights", "1,0", "--block_weights", "middle_block=0,1"], None),
    ],
)
def test_models_with_and_without_v_prediction_mix_only_where_the_sum_has_one_objective(
    three, tmp_path: Path, marked: str, arguments: list[str], result: set[str] | None
) -> None:
    paths = []
    for path in three[: 3 if "--add_difference" in arguments else 2]:
        marks = {"v_pred": MARK, "ztsnr": MARK} if path.stem in marked else {}
        paths.append(tmp_path / path.name)
        save_file(load_file(path) | marks, paths[-1])
    if result is None:
        with pytest.raises(UserError, match=r"has no v-prediction, but .* has: .*sdxl-model convert FILE NEW --v_para"):
            merge(*paths, *arguments)
        assert not (tmp_path / "m.safetensors").exists()
        return
    merged = merge(*paths, *arguments)
    assert {key for key in merged if "." not in key} == result
    prediction = metadata_of(tmp_path / "m.safetensors")["modelspec.prediction_type"]
    assert prediction == ("v" if result else "epsilon")


def test_a_sum_with_two_objectives_is_refused(three, tmp_path: Path) -> None:
    marks = {"a": {"v_pred": MARK}, "b": {"flow_model": MARK}, "c": {}}
    paths = [tmp_path / path.name for path in three]
    for path, marked in zip(paths, three, strict=True):
        save_file(load_file(marked) | marks[path.stem], path)
    with pytest.raises(UserError, match="their sum would be a flow and have v-prediction"):
        merge(*paths, "--add_difference", "1")


@pytest.mark.parametrize(
    ("configs", "said"),
    [((True, True), True), ((False, False), False), ((True, False), None), ((True, None), None), ((None, None), None)],
)
def test_a_merge_says_the_meaning_of_empty_captions_that_all_models_say(
    three, tmp_path: Path, capsys, configs, said
) -> None:
    paths = [tmp_path / path.name for path in three[:2]]
    for path, source, zero_cond in zip(paths, three, configs, strict=False):
        config = {} if zero_cond is None else {"sdxl_finetune.config": json.dumps({"use_zero_cond": zero_cond})}
        save_file(load_file(source), path, config)
    merge(*paths)
    assert ("zeros for empty captions" in capsys.readouterr().out) == (True in configs and said is None)
    assert read_declared(open_weights(tmp_path / "m.safetensors").file).zero_cond is said
    merge(tmp_path / "m.safetensors", paths[0], "--output", tmp_path / "n.safetensors")
    assert read_declared(open_weights(tmp_path / "n.safetensors").file).zero_cond is said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["b"], "give at least two models"),
        (["a", "missing"], "there is no such file or folder"),
        (["a", "small"], r"has another size than .*a.safetensors: unet_widths is \(32, 64\), not \(32, 64, 128\)"),
        (["a", "vae"], "not an SDXL base model"),
        (["a", "edm"], "is an EDM model"),
        (["a", "nan"], r"nan.safetensors: unet.conv_out.bias holds infinite values or NaN"),
        (
            ["big", "big", "a", "--add_difference", "9"],
            "save_precision: the merge of unet.conv_out.bias holds values b",
        ),
        (["a", "b", "--weights", "1"], "weights = '1': must be 2 numbers, one for each model"),
        (["a", "b", "--weights", "2,-1"], "use --add_difference to subtract"),
        (["a", "b", "--weights", "0,0"], "one of them more"),
        (["a", "b", "--add_difference", "1"], "needs three models"),
        (["a", "b", "c", "--add_difference", "1", "--weights", "1,1,1"], "weights: has no effect"),
        (["a", "b", "c", "--add_difference", "1", "--te1_weights", "1,1,1"], "must be one number, which replaces M"),
        (["a", "b", "--block_weights", "output_block=1,1"], "block_weights = 'output_block': the U-Net has no such"),
        (["a", "b", "--ema", "0.1"], "does not say at which step it was saved"),
        (["a", "b", "--ema", "0.1", "--steps", "5"], "must be 2 numbers"),
        (["a", "b", "--ema", "0.1", "--steps", "5,5"], "need different steps, not 5, 5"),
        (["a", "b", "--ema", "0.5", "--steps", "5,6"], "must be above 0 and at most 0.28"),
        (["a", "--ema", "0.1", "--steps", "5"], "needs at least two checkpoints"),
        (["a", "b", "--ema", "0.1", "--ema_half_life", "5"], "ema_half_life: has no effect with --ema"),
        (["a", "b", "--ema_half_life", "9", "--unet_weights", "1,1"], "unet_weights: has no effect with --ema_half"),
    ],
)
def test_what_cannot_be_merged_is_refused_with_one_message(three, tmp_path: Path, arguments, message) -> None:
    tensors = load_file(three[0])
    key = f"{UNET}out.2.bias"
    files = {
        "nan": {**tensors, key: torch.full((4,), math.nan).half()},
        "big": {**tensors, key: torch.full((4,), 6e4).half()},
        "edm": {**tensors, "edm_mean": torch.zeros(4), "edm_std": torch.ones(4)},
        "vae": {key: tensor for key, tensor in tensors.items() if key.startswith(VAE)},
    }
    for name, content in files.items():
        if name in arguments:
            save_file(content, tmp_path / f"{name}.safetensors")
    if "small" in arguments:
        sizes = ["--unet_widths", "32,64", "--unet_layers", "2,2", "--transformer_layers", "0,1"]
        main(["init", str(tmp_path / "small.safetensors"), *sizes])
    for path in three:
        (tmp_path / path.name).symlink_to(path)
    words = [str(tmp_path / f"{word}.safetensors") if word.isalpha() else word for word in arguments]
    with pytest.raises(UserError, match=message) as error:
        main(["merge", *words, "--output", str(tmp_path / "m.safetensors")])
    assert len(error.value.problems) == 1
    assert not (tmp_path / "m.safetensors").exists()


def test_an_ema_from_saves_of_a_run_keeps_what_the_run_says(three, tmp_path: Path, capsys) -> None:
    """Models are put in the order of their steps, whatever the order on the command line."""
    paths = [tmp_path / path.name for path in three]
    for step, source, path in zip((300, 100, 200), three, paths, strict=True):
        run = {"sdxl_finetune.step": str(step), "sdxl_finetune.config": "{}", "sdxl_finetune.resume": "{}"}
        save_file(load_file(source), path, run)
    merged = merge(*paths, "--ema", "0.15")
    weights = power_profile([100, 200, 300], 0.15).weights
    models = [load_file(three[number]) for number in (1, 2, 0)]
    expect(merged, models, lambda key: (0, 0, 1) if part_of(key) == "vae" else weights)
    printed = capsys.readouterr().out
    assert "approximates the EMA at step 300, from 3 checkpoints" in printed
    assert f"{weights[2]:.4g} x a.safetensors" in printed
    said = metadata_of(tmp_path / "m.safetensors")
    assert said["sdxl_finetune.step"] == "300" and said["sdxl_finetune.config"] == "{}"
    assert "sdxl_finetune.resume" not in said
    assert json.loads(said["sdxl_finetune.merge"])["ema"] == 0.15


def test_an_ema_that_the_saves_cannot_give_is_remarked(three, capsys) -> None:
    merge(*three[:2], "--steps", "100,200", "--ema_half_life", "2")
    assert "shorter than the distance of the checkpoints" in capsys.readouterr().out
    merge(*three[:2], "--steps", "100,120", "--ema_half_life", "500")
    assert "of this EMA lie before the first checkpoint" in capsys.readouterr().out


@given(
    steps=st.lists(st.integers(0, 5000), min_size=2, max_size=8, unique=True).map(sorted),
    length=st.floats(0.03, 0.28),
    half_life=st.floats(20, 5000),
)
def test_profiles_are_averages_and_exact_for_weights_that_move_evenly(steps, length, half_life) -> None:
    """The expected values are means of the profiles, computed by numerical integration."""
    end = steps[-1]
    times = np.linspace(0, end, 200_001)
    path = np.interp(times, steps, np.asarray(steps, float))  # stands still before the first checkpoint
    densities = {
        power_profile(steps, length): times ** power_exponent(length),
        exponential_profile(steps, half_life): np.exp(-math.log(2) / half_life * (end - times)),
    }
    for profile, density in densities.items():
        weights = np.asarray(profile.weights)
        assert weights.sum() == pytest.approx(1) and weights.min() >= -1e-9
        expected = np.trapezoid(path * density, times) / np.trapezoid(density, times)
        if density[0] > 1e-6:  # the exponential profile goes on before step 0, where the path stands still
            missing = math.exp(-math.log(2) / half_life * end)
            expected = (1 - missing) * expected + missing * steps[0] if profile.before else expected
        assert weights @ steps == pytest.approx(expected, rel=1e-3, abs=1e-2 * end)


@given(st.floats(0.02, 0.28))
def test_the_power_profile_has_the_relative_deviation_that_is_asked_for(length: float) -> None:
    gamma = power_exponent(length)
    times = np.linspace(0, 1, 100_001)
    density = times**gamma / np.trapezoid(times**gamma, times)
    mean = np.trapezoid(times * density, times)
    assert math.sqrt(np.trapezoid((times - mean) ** 2 * density, times)) == pytest.approx(length, rel=1e-3)
