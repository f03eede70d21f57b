"""sdxl-model card: the page says what run and author know, asks for the rest, and gives nothing private away."""

import hashlib
import json
import re
import shutil
from datetime import datetime
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdxl_finetune.card.facts import all_stages, load_facts
from sdxl_finetune.card.samples import Sample, find_previews
from sdxl_finetune.commands.model import main
from sdxl_finetune.errors import UserError
from sdxl_finetune.output.previews import save_image
from sdxl_finetune.output.prompts import PreviewFiles
from sdxl_finetune.output.stages import Stage, StageRecord, hardware_name, stages_of
from sdxl_finetune.tag_report.schema import IMAGES, TAGS, Facts, Report, save_report
from tests.browser import CHROMIUM, Page
from tests.training.toy_runs import run

ROOT = Path(__file__).parents[2]
NO_CONFIG = {"sdxl_finetune.step": "4", "sdxl_finetune.epoch": "1"}
HOSTILE = "a </code></pre><script>alert(1)</script> ```` | **b** `c` <img src=x onerror=alert(2)>"


def with_metadata(base: Path, path: Path, metadata: dict[str, str]) -> Path:
    save_file(load_file(base), path, metadata)
    return path


def write_card(model: Path, folder: Path, *options: str) -> dict[str, str]:
    """The texts of the written files by name."""
    assert main(["card", str(model), "--output", str(folder), *options]) == 0
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir() if path.is_file()}


def rows(text: str) -> list[list[str]]:
    """The rows of all tables of a Markdown text."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not re.fullmatch(r"[| :-]+", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def parameters(text: str) -> list[str]:
    """The lines of the page's block of TOML."""
    return re.findall(r"^```toml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[0].splitlines()


def test_the_page_of_the_published_release(base: Path, tmp_path: Path) -> None:
    """The facts of the release that this project must be able to reproduce, from configs/style.toml and the example."""
    model = with_metadata(base, tmp_path / "style.safetensors", {})
    config, facts = str(ROOT / "configs" / "style.toml"), str(ROOT / "docs" / "release-card.toml")
    text = write_card(model, tmp_path / "card", "--config", config, "--facts", facts)["card.md"]
    assert text.startswith("# Anime Style XL\n") and "Version 1.0, published 2024-10-05." in text
    found = rows(text)
    short_hash = hashlib.sha256(model.read_bytes()).hexdigest()[:10].upper()
    for row in (
        ["AutoV2 hash", f"`{short_hash}`"],
        ["precision", "float16"],
        ["prediction type", "epsilon"],
        ["name", "another SDXL checkpoint"],
        ["captioned images", "5,000,000"],
        ["style tags", "more than 2,000"],
        ["score > 0.75", "`masterpiece`"],
        ["0.6 < score ≤ 0.75", "`high quality`"],
        ["0.5 < score ≤ 0.6", "`normal quality`"],
        ["0.3 < score ≤ 0.5", "`low quality`"],
        ["score ≤ 0.3", "`worst quality`"],
        ["stage 1", "2 x A40 (48 GB)", "400 h", "", "", ""],
        ["stage 2, completing the base", "1 x RTX 4090 (24 GB)", "1,104 h", "", "", ""],
        ["stage 3, style training", "2 x A100 (80 GB)", "504 h", "", "", ""],
    ):
        assert row in found, row
    assert "- Trained on captions of up to 225 tokens." in text
    assert "Guidance (CFG scale): at most 5." in text and "- Some tags are still underfitted." in text
    assert "`masterpiece`, `best quality` or `high quality` before all other tags" in text
    published = (ROOT / "configs" / "style.toml").read_text().partition("# ---- the release's parameters")[2]
    lines = [line for line in published.splitlines() if re.match(r"\w+ =", line)]
    lines = [line for line in lines if not line.startswith(("output_dir", "logging_dir"))]
    assert len(lines) == 36 and parameters(text) == ['output_name = "style"', *lines]
    assert len(re.findall(r"\(to be filled in by the author: ", text)) == 4  # author, two licences, pictures


def test_both_languages_have_the_same_structure(base: Path, tmp_path: Path) -> None:
    model = with_metadata(base, tmp_path / "style.safetensors", {})
    facts = str(ROOT / "docs" / "release-card.toml")
    files = write_card(model, tmp_path / "card", "--facts", facts, "--prompt", "a cat", "--seed", "1", *SMALL)
    assert sorted(files) == ["card.html", "card.md", "card.zh-CN.html", "card.zh-CN.md"]
    marks = [re.findall(r"^(#+|\||- |```|!\[)", files[name], re.MULTILINE) for name in ("card.md", "card.zh-CN.md")]
    assert marks[0] == marks[1]
    assert (
        files["card.zh-CN.md"].startswith("# 动漫画风 XL\n")
        and "| 第一阶段 | 2 x A40 (48 GB) | 400 小时 |" in files["card.zh-CN.md"]
    )
    for english in ("## Training", "to be filled", "score", "Seed"):
        assert english in files["card.md"] and english not in files["card.zh-CN.md"]


SMALL = ["--width", "64", "--height", "64", "--steps", "2"]


def test_the_page_of_a_flow_says_what_users_set(base: Path, tmp_path: Path) -> None:
    for number, (options, english, chinese) in enumerate(
        [
            ({}, "with shift 1. In reForge", "shift 设为 1。"),
            ({"flow_uniform_static_ratio": 2.5}, "with shift 2.5. In reForge", "shift 设为 2.5。"),
            ({"flow_uniform_shift": True}, "the square root of (width × height / 1048576)", "1048576) 的平方根"),
        ]
    ):
        said = {"modelspec.prediction_type": "flow", "sdxl_finetune.config": json.dumps({"flow_model": True} | options)}
        model = with_metadata(base, tmp_path / f"{number}.safetensors", said)
        files = write_card(model, tmp_path / f"card{number}")
        assert ["prediction type", "flow matching (rectified flow)"] in rows(files["card.md"])
        assert "node ModelSamplingSD3" in files["card.md"] and english in files["card.md"]
        assert "加入节点 ModelSamplingSD3" in files["card.zh-CN.md"] and chinese in files["card.zh-CN.md"]


def test_the_page_says_other_latents_and_empty_captions(base: Path, tmp_path: Path) -> None:
    said = {
        "sdxl_finetune.latents": json.dumps({"channels": 16, "shift": [0.1], "scale": [0.4], "padding": "zeros"}),
        "sdxl_finetune.config": json.dumps({"use_zero_cond": True}),
    }
    files = write_card(with_metadata(base, tmp_path / "m.safetensors", said), tmp_path / "card")
    for name, latents in (("card.md", "latents of 16 channels"), ("card.zh-CN.md", "latent（16 通道）")):
        assert latents in files[name] and "ConditioningZeroOut" in files[name]
    plain = write_card(base, tmp_path / "plain")["card.md"]
    assert "latents" not in plain and "ConditioningZeroOut" not in plain


def test_stages_follow_the_model_from_run_to_run(work: Path) -> None:
    """A run, its resumed rest, and a second run from its result. The card tells both, and no path."""
    quality = ["--quality_tags", "masterpiece > 0.5, low quality", "--quality_scores", "scores.csv"]
    images = sorted(Path("images").glob("*.jpg"))
    Path("scores.csv").write_text(
        "".join(["path,score\n", *(f"{path.name},{place / 8}\n" for place, path in enumerate(images))])
    )
    first = ["--output_name", "first", "--save_state", "--save_every_n_steps", "2", *quality]
    run(*first, "--max_train_steps", "2")
    before = metadata_stages(Path("out/first.safetensors"))
    run(*first, "--max_train_steps", "4", "--resume", "out/first-state")
    (stage,) = metadata_stages(Path("out/first.safetensors"))
    seconds = [each.seconds["CPU"] for each in (before[0], stage)]
    assert 0 < seconds[0] < seconds[1] and (before[0].steps, stage.steps) == (2, 4)
    assert (stage.images, stage.epochs, stage.base.name, stage.unrecorded_steps) == (len(images), 1, "base", 0)
    assert stage.started == stage.ended or datetime.now().hour == 0
    above = sum(place / 8 > 0.5 for place in range(len(images)))
    assert stage.quality == {"masterpiece": above, "low quality": len(images) - above}
    captions = [path.with_suffix(".txt").read_text().strip().split(", ") for path in images]
    assert stage.tags["1"] == len({tag for tags in captions for tag in tags}) and stage.tags["1000"] == 0
    # A checkpoint tells the stages to the run that resumes from it as well.
    (middle,) = metadata_stages(Path("out/first-step00000002.safetensors"))
    run(*first, "--max_train_steps", "4", "--resume", "out/first-step00000002.safetensors")
    (again,) = metadata_stages(Path("out/first.safetensors"))
    assert again.steps == 4 and again.seconds["CPU"] > middle.seconds["CPU"] > 0
    second = ["--output_name", "second", "--pretrained_model_name_or_path", "out/first.safetensors"]
    run(*second, "--metadata_license", "MIT", "--max_train_steps", "2")
    told = metadata_stages(Path("out/second.safetensors"))
    assert told[0] == again and (told[1].name, told[1].base.name, told[1].steps) == ("second", "first", 2)
    with safe_open("out/second.safetensors", "pt") as file:
        assert str(work) not in json.dumps(file.metadata())
    text = write_card(Path("out/second.safetensors"), Path("card"))["card.md"]
    assert [row[0] for row in rows(text) if row[1:2] == ["CPU"]] == ["first", "second"]
    assert ["name", "base"] in rows(text) and ["licence", "MIT"] in rows(text)
    assert ["captioned images", str(len(images))] in rows(text)
    assert ["different tags", str(stage.tags["1"])] in rows(text)


def metadata_stages(path: Path) -> tuple[Stage, ...]:
    with safe_open(path, "pt") as file:
        return stages_of(file.metadata())


def test_a_state_of_an_older_version_has_unknown_hours() -> None:
    """The page then says that the time is a lower bound."""
    record = StageRecord((), Stage(name="m", unrecorded_steps=3), "CPU", dict)
    (stage,) = record.stages(steps=5, epochs=1.256)
    assert stage.epochs == 1.26 and stage.steps == 5
    shown = all_stages(load_facts(None), [Stage(name="m", seconds={"CPU": 7200.0}, unrecorded_steps=3)])[0]
    assert shown.at_least and shown.hours == 2


def test_stages_of_other_files() -> None:
    """sd-scripts writes ss_* fields; older versions of this program told step and epoch alone; damage tells nothing."""
    reference = {
        "ss_output_name": "style",
        "ss_training_started_at": "1728000000.0",
        "ss_training_finished_at": "1728007200.0",
        "ss_sd_model_name": "C:\\models\\base.safetensors",
        "ss_num_train_images": "500",
        "ss_num_epochs": "4",
        "ss_steps": "250",
        "ss_learning_rate": "None",
    }
    (stage,) = stages_of(reference)
    assert (stage.name, stage.program, stage.base.name, stage.started) == ("style", "sd-scripts", "base", "2024-10-04")
    assert (sum(stage.seconds.values()), stage.images_with_repeats, stage.epochs, stage.steps) == (7200, 500, 4, 250)
    (running,) = stages_of(reference | {"ss_training_finished_at": "None"})
    assert not running.seconds and running.ended is None
    (old,) = stages_of({**NO_CONFIG, "modelspec.title": "old", "sdxl_finetune.version": "0.1.0"})
    assert (old.name, old.steps, old.epochs, old.program) == ("old", 4, 1, "sdxl_finetune 0.1.0")
    assert stages_of({}) == stages_of({"sdxl_finetune.stages": "{"}) == stages_of({"sdxl_finetune.stages": "[1]"}) == ()
    assert stages_of({"ss_tag_frequency": "{}"}) == ()
    assert hardware_name(["NVIDIA A40", "NVIDIA A40"]) == "2 x NVIDIA A40" and hardware_name(["CPU"]) == "CPU"


def test_facts_correct_the_recorded_stage_they_name(tmp_path: Path) -> None:
    path = tmp_path / "facts.toml"
    path.write_text(
        '[[stages]]\nname = "before"\nhours = 3\nhardware = "A40"\n'
        '[[stages]]\nname = {en = "style", zh = "画风"}\nrecorded = "anime"\nhours = 504\n'
    )
    known = [Stage(name="anime", seconds={"2 x A100": 3600.0}, images=5, unrecorded_steps=1)]
    before, style = all_stages(load_facts(path), known)
    assert (before.name, before.hours) == ("before", 3)
    assert (style.name.zh, style.hours, style.hardware, style.images, style.at_least) == (
        "画风",
        504,
        "2 x A100",
        5,
        False,
    )


def test_mistakes_in_the_facts_are_named(tmp_path: Path) -> None:
    path = tmp_path / "facts.toml"
    path.write_text(
        'guidence = 5\nlicense = 3\nguidance = -1\n[data]\nquality_tags = "a > 0.1, b > 0.5"\n[[stages]]\nhours = 4\n'
    )
    with pytest.raises(UserError) as caught:
        load_facts(path)
    said = {problem.key: problem.message for problem in caught.value.problems}
    assert "did you mean guidance?" in said["guidence"] and "must be text" in said["license"]
    assert "greater than 0" in said["guidance"] and "fall" in said["data.quality_tags"] and "stages.0.name" in said
    path.write_text("title = ")
    with pytest.raises(UserError, match="no TOML file"):
        load_facts(path)
    with pytest.raises(UserError, match="No such file"):
        load_facts(tmp_path / "none.toml")


def test_wrong_arguments_are_refused_before_anything_is_written(base: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wrong.toml").write_text("learnig_rate = 1e-5\n")
    Path("empty").mkdir()
    save_file({"lora_unet_a.lora_up.weight": torch.zeros(2, 2)}, "lora.safetensors")
    for arguments, said in (
        ([str(base), "--config", "wrong.toml"], "did you mean learning_rate"),
        ([str(base), "--samples", "empty"], "no PNG file"),
        ([str(base), "--samples", "empty", "--prompt", "a cat"], "either from a folder or from prompts"),
        (["none.safetensors"], "no such file"),
        (["lora.safetensors"], "not an SDXL base model"),
        ([str(base), "--tags", "none.parquet"], "tag report cannot be read"),
    ):
        with pytest.raises(UserError, match=said):
            main(["card", *arguments, "--output", "card"])
    assert not Path("card").exists()
    assert (
        "tokens" not in write_card(base, Path("card"))["card.md"]
    )  # the default of the option says nothing of this model
    with pytest.raises(UserError, match="--overwrite"):
        write_card(base, Path("card"))
    write_card(base, Path("card"), "--overwrite")


def test_the_parameters_are_those_of_the_run_and_hold_nothing_private(base: Path, tmp_path: Path, monkeypatch) -> None:
    """Lines stay as they are. The command line's changes are in, and paths, names, keys and comments are out."""
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(
        "# on host secret-host\n[model]\n"
        'pretrained_model_name_or_path = "/home/secret/base.safetensors"\n'
        'train_data_dir = "/home/secret/images" # private\noutput_dir = "secret"\noutput_name = "anime"\n'
        "learning_rate = 0.00003 # by secret\nmax_train_epochs = 20\nlowram = false\n"
        'optimizer_args = [\n  "eps=1e-8", # secret\n  "weight_decay=0.01",\n]\n[hub]\n'
        'huggingface_repo_id = "secret/model"\nhuggingface_token = "hf_secret"\nmetadata_author = "A # B"\n'
        'caption_separator = "#" # secret\nlogging_dir = "./secret"\n'
    )
    recorded = {
        "output_name": "anime",
        "learning_rate": 3e-5,
        "max_train_epochs": 8,
        "seed": 7,
        "caption_separator": "#",
    }
    recorded |= {"optimizer_args": ["eps=1e-8", "weight_decay=0.01"], "huggingface_repo_id": "secret/model"}
    model = with_metadata(base, tmp_path / "m.safetensors", {"sdxl_finetune.config": json.dumps(recorded)})
    files = write_card(model, tmp_path / "card", "--config", "run.toml")
    assert "secret" not in "".join(files.values())
    assert parameters(files["card.md"]) == [
        "[model]",
        'output_name = "anime"',
        "learning_rate = 0.00003",
        "max_train_epochs = 8",
        "lowram = false",
        'optimizer_args = [ "eps=1e-8", "weight_decay=0.01",]',
        "[hub]",
        'caption_separator = "#"',
        "seed = 7",
    ]
    assert "Author: A # B." in files["card.md"]
    alone = write_card(model, tmp_path / "alone")["card.md"]
    assert "max_train_epochs = 8" in parameters(alone) and "lowram" not in alone and "secret" not in alone


def test_previews_of_the_models_step_become_samples(base: Path, tmp_path: Path, monkeypatch) -> None:
    """The newest picture of each prompt, and none of another step."""
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text('output_dir = "out"\noutput_name = "m"\n')
    model = with_metadata(base, tmp_path / "m.safetensors", NO_CONFIG)
    said = 'Steps: 3, Sampler: Euler a, CFG scale: 4.5, Seed: 9, Size: 64x96, Model: "a, b"'
    for epoch, index, minute, shade in ((1, 1, 0, 10), (1, 0, 0, 20), (1, 0, 5, 30), (2, 0, 6, 40)):
        files = PreviewFiles(
            folder=Path("out/sample"), output_name="m", epoch=epoch, step=4, time=datetime(2026, 1, 1, 0, minute)
        )
        picture, text = Image.new("RGB", (64, 96), (shade,) * 3), f"{HOSTILE}\nNegative prompt: bad\n{said}"
        save_image(files.path(index, None), picture, text)
    assert len(find_previews(Path("out/sample"), "m", step=4, epoch=1)) == 2
    assert find_previews(Path("out/sample"), "other", step=4, epoch=1) == []
    files = write_card(model, tmp_path / "card", "--config", "run.toml")
    shown = [Image.open(path).getpixel((0, 0))[0] for path in sorted((tmp_path / "card" / "images").iterdir())]
    assert shown == [30, 10]
    assert "Seed 9, Steps 3, Sampler Euler a, CFG scale 4.5, Size 64x96" in files["card.md"]
    assert "Negative prompt:" in files["card.md"] and "反向提示词" in files["card.zh-CN.md"]


def test_a_sample_says_how_it_was_drawn() -> None:
    picture = Image.new("RGB", (8, 8))
    sample = Sample(picture, 'a: cat,\nSteps: no\nNegative prompt: dog\nSteps: 3, Seed: 5, Model: "x, Seed: 7"')
    assert sample.prompt == "a: cat,\nSteps: no" and sample.negative_prompt == "dog"
    assert sample.settings["Seed"] == "5" and sample.settings["Model"] == '"x, Seed: 7"'
    assert Sample(picture, "only words").prompt == "only words" and Sample(picture, "").settings == {}


def test_the_page_shows_the_tag_report_of_the_model(base: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text('output_dir = "out"\noutput_name = "m"\n')
    model = with_metadata(base, tmp_path / "m.safetensors", NO_CONFIG)
    states = {"a|b": "learned", "`c`": "underfitted", "d": "contradictory"}
    for step, gain in ((2, 0.5), (4, 0.25)):
        tags = [
            {"tag": tag, "images": 8, "held_out": 0, "exposures": 1200, "gain": gain, "accuracy": 0.5, "chance": 0.125}
            | {"state": state}
            for tag, state in states.items()
        ]
        facts = Facts(model="m.safetensors", step=step, options={}, bounds={})
        save_report(Path("out/tags"), Report(facts, TAGS.empty_table().from_pylist(tags, TAGS), IMAGES.empty_table()))
    files = write_card(model, tmp_path / "card", "--config", "run.toml")
    text = files["card.md"]
    assert "| `` `c` `` | underfitted | 1,200 | 25.0% | 50% | 12% |" in text and "50.0%" not in text
    assert (
        "### Learned tags\n\n`a|b`\n" in text and ["style tags", "3"] in rows(text) and ["learned", "1"] in rows(text)
    )
    assert "1 of 3 measured tags is underfitted: `` `c` ``." in text and "欠拟合" in files["card.zh-CN.md"]
    shutil.rmtree("out/tags")
    assert "## Tags" not in write_card(model, tmp_path / "other", "--config", "run.toml")["card.md"]


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_html_page_loads_nothing_and_runs_nothing(base: Path, tmp_path: Path) -> None:
    """Hostile texts are shown as text. Pictures show, in light and dark, and nothing is wider than a phone."""
    save_image(tmp_path / "samples" / "a.png", Image.new("RGB", (640, 480), "red"), f"{HOSTILE}\nSteps: 1, Seed: 2")
    metadata = {"modelspec.title": HOSTILE, "modelspec.author": HOSTILE, "modelspec.license": "<b>x</b>"}
    model = with_metadata(base, tmp_path / "m.safetensors", metadata)
    write_card(model, tmp_path / "card", "--samples", str(tmp_path / "samples"))
    colours = set()
    with Page() as page:
        for name, dark, width in (("card.html", False, 1280), ("card.zh-CN.html", True, 400)):
            page.open(tmp_path / "card" / name, dark=dark, width=width)
            assert page.evaluate("document.images.length") == 1
            assert page.evaluate("document.images[0].naturalWidth") == 640
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert HOSTILE in page.evaluate("document.querySelector('.sample pre').innerText")
            assert page.evaluate("document.querySelectorAll('script, b').length") == 0
            assert page.evaluate("document.querySelectorAll('mark').length") >= 5
            colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.evaluate("document.querySelector('nav a').click()")
        page.wait_for("document.documentElement?.lang == 'en'")
        assert len(colours) == 2 and page.errors == []
        assert {request.rpartition("/")[2] for request in page.requests} == {"card.html", "card.zh-CN.html"}
