"""All mistakes are told at the first start, and sdxl-train, sdxl-check and the config agree about them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_finetune.commands.cache import cache
from sdxl_finetune.commands.check import check
from sdxl_finetune.config import FaultyConfig, load_config, to_toml
from sdxl_finetune.errors import UserError
from sdxl_finetune.training.checks import find_further_problems
from sdxl_finetune.training.loop import train

OPTIONS = ["--pretrained_model_name_or_path", "base.safetensors", "--train_data_dir", "images", "--output_dir", "out"]
OPTIONS += ["--resolution", "64", "--max_train_steps", "1", "--caption_extension", ".txt", "--cache_latents"]
OPTIONS += ["--max_data_loader_n_workers", "0", "--seed", "1"]
WRONG = ["--optimizer_type", "AdamX", "--lr_scheduler_type", "StepLR", "--sample_prompts", "prompts.json"]
WRONG += ["--pretrained_model_name_or_path", "other.safetensors"]
WRONG_WORDS = ("AdamX", "StepLR", "prompts.json", "other.safetensors", "broken.png")
"""A word of the problem of each wrong option and image."""


@pytest.fixture
def work(work) -> Path:
    (work / "prompts.json").write_text("[{]")
    (work / "other.safetensors").write_bytes(b"nothing that one could load" * 10)
    (work / "images" / "broken.png").write_bytes(b"not a picture")
    (work / "images" / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (work / "images" / "latin.png").write_bytes((work / "images" / "chelsea.jpg").read_bytes())
    return work


def config(program: str, *more: str):
    loaded = load_config([*OPTIONS, *more], program=program)
    assert loaded is not None
    return loaded


def test_training_and_the_dry_run_name_all_mistakes_at_once(work, capsys) -> None:
    with pytest.raises(UserError) as caught:
        train(config("sdxl-train", *WRONG))
    told = [str(problem) for problem in caught.value.problems]
    for word in (*WRONG_WORDS, "latin.txt"):
        assert sum(word in one for one in told) == 1, (word, told)
    assert check(config("sdxl-check", *WRONG)) == 2
    shown = "".join(capsys.readouterr().out.partition("\nproblems")[2].split())
    assert all("".join(one.split()) in shown for one in told)


def test_mistakes_of_a_resume_are_told_with_the_others(work) -> None:
    Path("nowhere-state").mkdir()
    with pytest.raises(UserError) as caught:
        train(config("sdxl-train", "--resume", "nowhere-state", "--optimizer_type", "AdamX"))
    told = str(caught.value)
    assert "nowhere-state" in told and "AdamX" in told and "broken.png" in told


@pytest.mark.parametrize("arguments", [["--optimizer_args", "betaz=1"], ["--optimizer_type", "prodigyopt.Prodigy"]])
def test_a_wrong_argument_of_the_optimizer_is_told_with_the_images(work, arguments: list[str]) -> None:
    pytest.importorskip("prodigyopt")
    rates = ["--learning_rate", "1", "--train_text_encoder", "--learning_rate_te1", "0.5"]
    with pytest.raises(UserError) as caught:
        train(config("sdxl-train", *arguments, *rates))
    assert "broken.png" in str(caught.value) and (
        "betaz" in str(caught.value) or "one learning rate" in str(caught.value)
    )


@pytest.mark.parametrize(
    "mistakes",
    [
        ["--resolution", "big"],
        ["--resolution", ""],
        ["--max_train_steps", "-3"],
        ["--keep_tokenz", "3"],
        ["--cache_latents", "--color_aug"],
        ["--output_dir", "/dev/null/out"],
        ["--output_dir", ""],
        ["--metadata_thumbnail", "nowhere.png"],
    ],
)
def test_a_mistake_in_the_config_hides_no_other_mistake(work, mistakes: list[str]) -> None:
    with pytest.raises(FaultyConfig) as caught:
        config("sdxl-train", *WRONG, *mistakes)
    further = [str(problem) for problem in find_further_problems(caught.value.config, caught.value.faulty)]
    told = [*map(str, caught.value.problems), *further]
    for word in (*WRONG_WORDS, "latin.txt"):
        assert sum(word in one for one in told) == 1, (word, told)
    assert sum(mistakes[0].removeprefix("--") in one or "color_aug" in one for one in told) >= 1
    assert len(told) == len(WRONG_WORDS) + 2, told


def test_what_depends_on_a_mistake_is_not_judged(work) -> None:
    with pytest.raises(FaultyConfig) as caught:
        config("sdxl-train", "--train_data_dir", "nowhere", "--pretrained_model_name_or_path", "none.safetensors")
    assert find_further_problems(caught.value.config, caught.value.faulty) == []


def test_the_program_prints_them_all_and_ends_with_2(work) -> None:
    command = [sys.executable, "-m", "sdxl_finetune", *OPTIONS, *WRONG, "--max_train_steps", "many"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, ACCELERATE_USE_CPU="1"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for word in (*WRONG_WORDS, "latin.txt", "max_train_steps"):
        assert sum(word in line for line in errors) == 1, (word, done.stderr)


def test_images_that_cannot_be_decoded_are_told_together(work) -> None:
    for name in ("broken.png", "latin.txt", "latin.png"):
        (work / "images" / name).unlink()
    whole = (work / "images" / "chelsea.jpg").read_bytes()
    for number in range(3):
        (work / "images" / f"half{number}.jpg").write_bytes(whole[: 3000 + number])
    with pytest.raises(UserError) as caught:
        train(config("sdxl-train"))
    assert sorted(Path(problem.file).name for problem in caught.value.problems) == [
        "half0.jpg", "half1.jpg", "half2.jpg",
    ]  # fmt: skip


NOT_UTF_8 = "日本".encode("shift-jis")


def test_a_folder_of_images_need_not_be_utf_8_but_other_paths_must_be(work) -> None:
    for name in ("broken.png", "latin.txt", "latin.png"):
        (work / "images" / name).unlink()
    folder = work / os.fsdecode(NOT_UTF_8)
    (work / "images").rename(folder)
    options = ["--train_data_dir", str(folder), "--cache_latents_to_disk"]
    loaded = load_config([*OPTIONS, *options], program="sdxl-cache")
    assert loaded is not None and cache(loaded) == 0
    assert "\\udc93" in to_toml(loaded)
    for option in ("--output_dir", "--logging_dir", "--vae", "--output_name", "--caption_prefix"):
        with pytest.raises(UserError, match=f"{option[2:]} = .*is not UTF-8"):
            load_config([*OPTIONS, option, str(folder)], program="sdxl-train")


def test_the_report_of_a_folder_that_is_not_utf_8_can_be_printed(work) -> None:
    folder = work / os.fsdecode(NOT_UTF_8)
    (work / "images").rename(folder)
    command = [sys.executable, "-c", "from sdxl_finetune import cli; cli.check()", *OPTIONS]
    environment = dict(os.environ, ACCELERATE_USE_CPU="1", PYTHONIOENCODING="ascii")
    done = subprocess.run([*command, "--train_data_dir", str(folder)], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "broken.png" in done.stdout
