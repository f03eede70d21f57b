"""sdxl-model generate and compare: an image depends on model, prompt and seed, and its file says how it was drawn."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdxl_finetune.commands.generate import trained_size
from sdxl_finetune.commands.model import auto_v2, main
from sdxl_finetune.errors import UserError
from sdxl_finetune.model.load import open_base_model

SMALL = ["--width", "64", "--height", "96", "--steps", "3"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    paths = [folder / f"{name}.safetensors" for name in ("one", "two")]
    for seed, path in enumerate(paths):
        assert main(["init", str(path), "--seed", str(seed)]) == 0
    return paths


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def size_and_parameters(path: Path) -> tuple[tuple[int, int], str]:
    with Image.open(path) as image:
        return image.size, image.info["parameters"]


def draw(model: Path, folder: Path, *options: str) -> list[Path]:
    """Returns the images that one call of `sdxl-model generate` has written."""
    before = set(folder.glob("*"))
    assert main(["generate", str(model), "--output", str(folder), *SMALL, *options]) == 0
    return sorted(set(folder.glob("*")) - before)


def test_an_image_depends_only_on_its_prompt_and_seed(models, tmp_path: Path) -> None:
    wanted = ["--prompt", "a cat", "--prompt", "a dog, (red:1.3)", "--seed", "5", "--images", "3"]
    single = draw(models[0], tmp_path / "single", *wanted)
    batched = draw(models[0], tmp_path / "batched", *wanted, "--batch_size", "4")
    names = [f"{number:05d}-{seed}.png" for number, seed in enumerate([5, 6, 7, 5, 6, 7])]
    assert [path.name for path in single] == [path.name for path in batched] == names
    for one, other in zip(single, batched, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1
        assert size_and_parameters(one) == size_and_parameters(other)
    distinct = {pixels(path).tobytes() for path in single}
    assert len(distinct) == 6
    (later,) = draw(models[0], tmp_path / "single", "--prompt", "a dog, (red:1.3)", "--seed", "6")
    assert later.name == "00006-6.png" and (pixels(later) == pixels(single[4])).all()


def test_an_image_file_says_how_it_was_drawn(models, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --n blurry --w 64 --h 64 --s 2 --l 3 --d 11 --ss euler\nrocket\n")
    first, second = draw(
        models[0], tmp_path / "out", "--prompts", str(prompts), "--seed", "4", "--negative_prompt", "low"
    )
    model = f"Model hash: {auto_v2(models[0]).lower()}, Model: one"
    said = "Steps: 2, Sampler: Euler, CFG scale: 3.0, Seed: 11, Size: 64x64"
    assert size_and_parameters(first) == ((64, 64), f"a cat\nNegative prompt: blurry\n{said}, {model}")
    said = "Steps: 3, Sampler: Euler a, CFG scale: 5.0, Seed: 4, Size: 64x96"
    assert size_and_parameters(second) == ((64, 96), f"rocket\nNegative prompt: low\n{said}, {model}")


@pytest.mark.parametrize(
    ("said", "size"), [("64x128", (64, 128)), ("1024x1024", (1024, 1024)), ("9x9", (1024, 1024)), (None, (1024, 1024))]
)
def test_the_size_is_that_of_the_training_unless_asked_otherwise(models, tmp_path: Path, said, size) -> None:
    model = tmp_path / "m.safetensors"
    save_file(load_file(models[0]), model, {"modelspec.resolution": said} if said else {})
    assert trained_size(open_base_model(model)[0]) == size


@pytest.mark.parametrize(
    ("said", "size", "remarks"),
    [
        ("9999x9999", (1024, 1024), 1), ("2056x1024", (1024, 1024), 1), ("16x1024", (1024, 1024), 1),
        ("99999x99999", (1024, 1024), 1), ("-64x64", (1024, 1024), 1), ("a\x1b[2J", (1024, 1024), 1),
        ("2048x64", (2048, 64), 0), ("1000x1000", (1000, 1000), 0), (None, (1024, 1024), 0),
    ],
)  # fmt: skip
def test_only_a_usual_size_is_believed(models, tmp_path: Path, caplog, said, size, remarks: int) -> None:
    """An image of 9999x9999 pixels would take all memory."""
    model = tmp_path / "m.safetensors"
    save_file(load_file(models[0]), model, {"modelspec.resolution": said} if said else {})
    assert trained_size(open_base_model(model)[0]) == size
    assert [record.levelname for record in caplog.records] == ["WARNING"] * remarks
    assert not remarks or ("is not believed" in caplog.text and "1024x1024" in caplog.text)


def test_a_flow_is_drawn_in_its_size_and_only_a_sampler_that_is_asked_for_is_remarked(models, tmp_path, caplog) -> None:
    model = tmp_path / "m.safetensors"
    marks = {"flow_model": torch.empty(0)}
    save_file(load_file(models[0]) | marks, model, {"modelspec.resolution": "64x128"})
    for asked, remarks in (([], 0), (["--sampler", "euler_a"], 1)):
        main(["generate", str(model), "--output", str(tmp_path / "o"), "--prompt", "a cat", "--steps", "2", *asked])
        assert caplog.text.count("are drawn with Euler instead") == remarks
    assert [size_and_parameters(path)[0] for path in sorted((tmp_path / "o").iterdir())] == [(64, 128)] * 2


def test_long_prompts_are_used_to_the_end(models, tmp_path: Path, caplog) -> None:
    long = ", ".join(["word"] * 100)
    caplog.set_level("WARNING")
    drawn = [draw(models[0], tmp_path, "--prompt", f"{long}, {end}", "--seed", "1")[0] for end in ("cat", "dog")]
    assert (pixels(drawn[0]) != pixels(drawn[1])).any()
    assert "tokens are used" not in caplog.text
    short = ["--seed", "1", "--max_token_length", "75"]
    drawn = [draw(models[0], tmp_path, "--prompt", f"{long}, {end}", *short)[0] for end in ("cat", "dog")]
    assert (pixels(drawn[0]) == pixels(drawn[1])).all()


def test_a_prompt_that_is_too_long_is_reported(models, tmp_path: Path, caplog) -> None:
    draw(models[0], tmp_path, "--prompt", "(cat:1.2), " * 30, "--seed", "1", "--max_token_length", "75")
    assert "tokens are used" not in caplog.text
    draw(models[0], tmp_path, "--prompt", "(cat:1.2), " * 40, "--seed", "1", "--max_token_length", "75")
    assert "only the first 75 of 80 tokens are used of the prompt: (cat:1.2)" in caplog.text


def test_break_starts_the_next_chunk_of_a_prompt(models, tmp_path: Path, caplog) -> None:
    texts = ["a cat BREAK a dog", "a cat", "a cat break a dog"]
    pictures = [
        draw(models[0], tmp_path, "--prompt", text, "--seed", "1", "--max_token_length", "75") for text in texts
    ]
    one, alone, word = (pixels(path) for (path,) in pictures)
    assert (one == alone).all() and (one != word).any()
    assert "only the first 2 of 4 tokens are used of the prompt: a cat BREAK a dog" in caplog.text
    longer = draw(models[0], tmp_path, "--prompt", texts[0], "--seed", "1", "--max_token_length", "300")
    assert (pixels(longer[0]) != one).any()
    with pytest.raises(SystemExit):
        draw(models[0], tmp_path, "--prompt", "a cat", "--max_token_length", "100")


def test_a_model_name_with_a_comma_is_quoted(models, tmp_path: Path) -> None:
    model = tmp_path / "one, two: three.safetensors"
    model.symlink_to(models[0])
    (path,) = draw(model, tmp_path / "out", "--prompt", "a cat", "--seed", "1")
    assert size_and_parameters(path)[1].endswith('Model: "one, two: three"')


def test_prediction_type_and_zero_terminal_snr_come_from_the_metadata(models, tmp_path: Path) -> None:
    asked = ["--prompt", "a cat", "--seed", "1"]
    plain, v, zero = (
        draw(models[0], tmp_path / "a", *asked, *more)[0]
        for more in ([], ["--v_parameterization"], ["--v_parameterization", "--zero_terminal_snr"])
    )
    told = {"modelspec.prediction_type": "v", "sdxl_finetune.config": json.dumps({"zero_terminal_snr": True})}
    for count, expected in ((1, v), (2, zero)):
        path = tmp_path / f"{count}.safetensors"
        save_file(load_file(models[0]), path, dict(list(told.items())[:count]))
        (found,) = draw(path, tmp_path / "b", *asked)
        assert (pixels(found) == pixels(expected)).all() and (pixels(found) != pixels(plain)).any()


def test_another_vae_replaces_a_missing_one(models, tmp_path: Path) -> None:
    bare = {key: value for key, value in load_file(models[0]).items() if not key.startswith("first_stage_model.")}
    save_file(bare, tmp_path / "bare.safetensors")
    asked = ["--prompt", "a cat", "--seed", "1"]
    with pytest.raises(UserError, match="VAE"):
        draw(tmp_path / "bare.safetensors", tmp_path / "out", *asked)
    (found,) = draw(tmp_path / "bare.safetensors", tmp_path / "out", *asked, "--vae", str(models[0]))
    assert (pixels(found) == pixels(draw(models[0], tmp_path / "out", *asked)[0])).all()


def test_the_page_shows_the_same_prompts_for_each_checkpoint(models, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a <cat> & dog --d 3\nrocket --d 4\n")
    asked = ["compare", *map(str, models), "--prompts", str(prompts), "--output", str(page), *SMALL, "--images", "2"]
    assert main(asked) == 0
    text = page.read_text()
    HTMLParser().feed(text)
    assert all(str(model) in text for model in models) and "a &lt;cat&gt; &amp; dog" in text
    pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)", text)]
    assert len(pictures) == 2 * 2 * 2 and {picture.size for picture in pictures} == {(64, 96)}
    for column, model in enumerate(models):
        drawn = draw(model, tmp_path / model.stem, "--prompts", str(prompts), "--images", "2")
        for row, path in enumerate(drawn):
            assert (np.asarray(pictures[2 * row + column]) == pixels(path)).all()


def test_wrong_arguments_and_models_are_refused(models, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prompt: is missing.*--prompt or --prompts"):
        main(["generate", str(models[0])])
    with pytest.raises(UserError, match=r"none\.safetensors"):
        main(["generate", str(tmp_path / "none.safetensors"), "--prompt", "a"])
    for wrong in (["--width", "100"], ["--width", "64,96"], ["--images", "0"], ["--seed", "x"]):
        with pytest.raises(SystemExit):
            main(["generate", str(models[0]), "--prompt", "a", *wrong])
    for wrong in (["--seed", str(2**64)], ["--sampler", "pndm", "--steps", "3"], ["--steps", "1001"]):
        with pytest.raises(UserError, match="must be"):
            main(["generate", str(models[0]), "--prompt", "a", *wrong])
    with pytest.raises(UserError, match=r"cannot be made.*--output"):
        main(["generate", str(models[0]), "--prompt", "a", "--output", str(models[1])])
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(UserError, match="no prompt"):
        main(["generate", str(models[0]), "--prompts", str(tmp_path / "empty.txt")])
    tensors = load_file(models[0])
    tensors["model.diffusion_model.out.2.bias"][0] = torch.nan
    with safe_open(models[0], "pt") as file:
        metadata = file.metadata()
    save_file(tensors, tmp_path / "nan.safetensors", metadata)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "1girl-2.png").touch()
    with pytest.raises(UserError, match=r"/nan\.safetensors: the model gave .*not a number: use another model"):
        draw(tmp_path / "nan.safetensors", tmp_path / "out", "--prompt", "a")
    tensors = load_file(models[0])
    tensors["first_stage_model.decoder.conv_out.bias"][0] = torch.nan
    save_file(tensors, tmp_path / "vae.safetensors", metadata)
    with pytest.raises(UserError, match=r"/vae\.safetensors: the VAE gave .*not a number"):
        draw(tmp_path / "vae.safetensors", tmp_path / "out", "--prompt", "a")


def test_compare_checks_all_models_and_the_output_before_it_draws(models, tmp_path: Path, monkeypatch) -> None:
    """A wrong last checkpoint or an output that cannot be written must not cost hours of drawing."""
    monkeypatch.chdir(tmp_path)
    asked = ["--prompt", "a", "--seed", "1", *SMALL]
    (tmp_path / "a.txt").write_text("no model")
    monkeypatch.setattr("sdxl_finetune.commands.generate.load_checkpoint", None)  # would fail if anything were drawn
    with pytest.raises(UserError, match=r"none\.safetensors") as caught:
        main(["compare", str(models[0]), "none.safetensors", "a.txt", *asked])
    assert len(caught.value.problems) == 2
    for output, said in ((tmp_path, "exists"), (tmp_path / "a.txt", "exists"), (models[0] / "page.html", "be made")):
        with pytest.raises(UserError, match=said):
            main(["compare", str(models[0]), *asked, "--output", str(output)])
    with pytest.raises(UserError, match="is a folder"):
        main(["compare", str(models[0]), *asked, "--output", str(tmp_path), "--overwrite"])
    assert (tmp_path / "a.txt").read_text() == "no model"


def test_compare_reports_a_checkpoint_of_nan_in_its_column(models, tmp_path: Path) -> None:
    tensors = load_file(models[0])
    tensors["model.diffusion_model.out.2.bias"][0] = torch.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    page = tmp_path / "page.html"
    models = [str(tmp_path / "nan.safetensors"), str(models[1])]
    assert main(["compare", *models, "--prompt", "a", "--seed", "1", "--output", str(page), *SMALL]) == 0
    text = page.read_text()
    assert text.count("not a number") == 1 and text.count("base64,") == 1
