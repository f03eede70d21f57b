"""sdxl-check says what the run then does."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_finetune.commands.check import check
from sdxl_finetune.config import load_config
from sdxl_finetune.errors import UserError
from sdxl_finetune.latents import encoding
from sdxl_finetune.latents.shards import Kind, read_shard
from sdxl_finetune.training.loop import train
from tests.hub_server import TOKEN, HubServer

STYLE = Path(__file__).parents[2] / "configs" / "style.toml"


def config(program: str, *more: str):
    options = ["--config", str(STYLE), "--output_dir", "out", "--seed", "5", "--sample_prompts", ""]
    options += ["--sample_every_n_epochs", "0", "--max_data_loader_n_workers", "0", "--resolution", "64"]
    options += ["--min_bucket_reso", "64", "--max_bucket_reso", "128", "--mixed_precision", "no", "--no-full_bf16"]
    loaded = load_config([*options, *more], program=program)
    assert loaded is not None
    return loaded


def test_it_says_what_the_run_does(work, capsys) -> None:
    asked = [
        "--max_train_epochs",
        "4",
        "--train_batch_size",
        "2",
        "--save_every_n_epochs",
        "1",
        "--save_last_n_epochs",
        "2",
    ]
    asked += ["--lr_scheduler_num_cycles", "2"]
    assert check(config("sdxl-check", *asked)) == 0
    said = capsys.readouterr().out
    assert not list(Path("out").glob("*.safetensors"))
    assert train(config("sdxl-train", *asked)) == 0
    (log,) = work.glob("logs/*/metrics.jsonl")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert f"{len(rows) // 4} steps an epoch, {len(rows)} steps in all (4 epochs)" in said
    for step, unet, encoder in re.findall(r"step (\d+) .*unet (\S+), text_encoder1 (\S+),", said):
        assert float(unet) == pytest.approx(rows[int(step) - 1]["lr"]["unet"], rel=1e-2, abs=1e-12)
        assert float(encoder) == pytest.approx(rows[int(step) - 1]["lr"]["text_encoder1"], rel=1e-2, abs=1e-12)
    assert re.search(r"\ncaptions      max_token_length = \d+ cuts off ", said)
    assert "3 numbered weights (style-000001, style-000002, style-000003) and style at the end" in said
    sizes = {path.name: path.stat().st_size for path in Path("out").glob("*.safetensors")}
    assert len(sizes) == 3 and "3 kept" in said
    each = re.search(r"([\d.]+) MiB each", said)
    assert each and float(each[1]) == pytest.approx(sizes["style.safetensors"] / 2**20, rel=0.02)
    assert (
        "unet 8.7 million at 3e-05, text_encoder1 3.3 million at 1e-06" in said and "problems      none found" in said
    )


def test_all_problems_at_once(work, capsys) -> None:
    Path("images/broken.png").write_bytes(b"not a picture")
    Path("other.safetensors").write_bytes(b"nothing that one could load" * 10)
    asked = ["--optimizer_type", "AdamX", "--pretrained_model_name_or_path", "other.safetensors"]
    Path("prompts.json").write_text("[{]")
    asked += ["--lr_scheduler_type", "StepLR", "--sample_prompts", "prompts.json"]
    assert check(config("sdxl-check", *asked)) == 2
    said = capsys.readouterr().out.partition("\nproblems")[2]
    for word in ("broken.png", "other.safetensors", "prompts.json", "StepLR", "AdamX"):
        assert word in said, said


def test_an_image_that_would_stop_training_is_not_called_skipped(work, capsys, caplog) -> None:
    Path("images/broken.png").write_bytes(b"not a picture")
    assert check(config("sdxl-check", "--learning_rate_te1", "0", "--no_memory")) == 2
    seen = capsys.readouterr()
    said = seen.out
    assert "1 not usable, so training would stop" in said and "skipped" not in said + seen.err + caplog.text
    assert "broken.png" in said.partition("\nproblems")[2]


def test_what_training_refuses_of_the_machine_is_a_problem(work, capsys) -> None:
    asked = config("sdxl-check", "--mixed_precision", "fp16", "--no_memory")
    try:
        train(asked.model_copy(update={"max_train_epochs": 1}))
        refused = False
    except UserError:
        refused = True
    assert (check(asked) == 2) == refused


def test_a_disk_that_is_too_small_is_a_problem(work, capsys, monkeypatch) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 10))
    assert check(config("sdxl-check", "--no_memory", "--cache_latents_to_disk")) == 2
    problems = capsys.readouterr().out.partition("\nproblems")[2]
    assert "output_dir" in problems and "save_last_n_epochs" in problems and "cache_dir" in problems


@pytest.mark.parametrize("kind", ["latents", "text_outputs", "store"])
def test_a_full_disk_is_no_problem_for_what_is_cached_already(work, capsys, monkeypatch, kind: str) -> None:
    option = "cache_latents_to_disk" if kind == "latents" else "cache_text_encoder_outputs_to_disk"
    asked = ["--no_memory", f"--{option}", "--no-train_text_encoder", "--no-shuffle_caption"]
    if kind == "store":
        asked += ["--cache_dir", "s3://bucket/cache", "--cache_dir_local", "local"]
    else:
        Path(f"out/cache/{kind}").mkdir(parents=True)
        with Path(f"out/cache/{kind}/a.{kind}").open("wb") as file:
            file.truncate(1 << 40)
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 10))
    check(config("sdxl-check", *asked))
    said, _, problems = capsys.readouterr().out.partition("\nproblems")
    assert option not in problems and ("at s3://bucket/cache" in said) == (kind == "store")


def test_no_memory_leaves_out_the_estimate(work, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sdxl_finetune.commands.check.describe", lambda *_: pytest.fail("it was estimated"))
    assert check(config("sdxl-check", "--no_memory")) == 0
    said = capsys.readouterr().out
    assert "\nmemory" not in said and re.search(r"optimizer +AdamW, [\d.]+ MiB of states in each process", said)


def test_skipped_images_are_named(work, caplog, capsys) -> None:
    Path("images/broken.png").write_bytes(b"not a picture")
    assert check(config("sdxl-check", "--on_bad_image", "skip", "--learning_rate_te1", "0")) == 0
    assert "1 skipped" in capsys.readouterr().out and "broken.png" in caplog.text


def test_cached_text_encoder_outputs(work, capsys) -> None:
    """The number of different captions and the bytes of their outputs are those of the cache that a run makes."""
    asked = ["--cache_text_encoder_outputs_to_disk", "--no-train_text_encoder", "--no-shuffle_caption"]
    asked += ["--max_train_epochs", "", "--max_train_steps", "1"]
    assert check(config("sdxl-check", *asked)) == 0
    found = re.search(r"text outputs +(\d+) different captions: ([\d.]+) KiB in out/cache", capsys.readouterr().out)
    assert found and train(config("sdxl-train", *asked)) == 0
    (shard,) = Path("out/cache/text_outputs").glob("*/*.text_outputs")
    kind = Kind("text_outputs", shard.parent.name)
    tables = read_shard(shard, kind, shard.stat().st_size)
    count, size = len(tables.keys), tables.size
    assert int(found[1]) == count and float(found[2]) == pytest.approx(count * size / 2**10, abs=0.06)


def test_frozen_parts_and_another_objective_are_shown(work, capsys) -> None:
    save_file(load_file("base.safetensors") | {"v_pred": torch.tensor([])}, "marked.safetensors")
    base = ["--pretrained_model_name_or_path", "marked.safetensors"]
    assert check(config("sdxl-check", "--learning_rate_te1", "0", *base)) == 0
    said = capsys.readouterr().out
    assert re.search(r"frozen +text_encoder1 3.3 million, VAE", said)
    assert re.search(r"remarks +v_parameterization = False: marked.safetensors says that it predicts velocity", said)


def test_it_says_where_uploads_go_and_asks_for_a_token(work, hub: HubServer, monkeypatch, capsys) -> None:
    asked = ["--huggingface_repo_id", "user/repo", "--huggingface_path_in_repo", "runs/1/"]
    assert check(config("sdxl-check", *asked)) == 2
    said = capsys.readouterr().out
    assert f"checkpoints to the model repository user/repo/runs/1 at {hub.url}" in said and "(private)" in said
    assert "there is no token" in said.partition("\nproblems")[2]
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert check(config("sdxl-check", *asked)) == 0
    assert TOKEN not in capsys.readouterr().out and not hub.repositories


def test_what_a_run_would_resume_from_is_looked_at(work, capsys) -> None:
    """The check of a resumed run names its place, or the mistake that would stop it."""
    short = ["--no_memory", "--max_train_epochs", "", "--max_train_steps", "3", "--save_every_n_epochs", ""]
    assert train(config("sdxl-train", *short, "--save_state")) == 0
    capsys.readouterr()
    assert check(config("sdxl-check", *short)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "remarks out/style.safetensors exists and is replaced at the end of this run" in said
    resumed = [*short, "--max_train_steps", "30", "--resume"]
    assert check(config("sdxl-check", *resumed, "out/style-state")) == 0
    said = capsys.readouterr().out
    assert re.search(r"resumes +after step 3 \(in epoch 2\), from out/style-state", said) and "remarks" not in said
    assert "learning rate step 1 " in said
    Path("empty").mkdir()
    assert check(config("sdxl-check", *resumed, "empty")) == 2
    assert "this is not a complete training state" in capsys.readouterr().out.partition("\nproblems")[2]
    shutil.copy(min(Path("images").glob("*.jpg")), "images/new.jpg")
    assert check(config("sdxl-check", *resumed, "out/style-state", "--optimizer_type", "Adafactor")) == 2
    problems = capsys.readouterr().out.partition("\nproblems")[2]
    assert "the order of images has changed" in problems and "holds the state of AdamW" in problems


def test_a_resumed_run_without_undecodable_images_is_no_other_run(work, capsys, monkeypatch) -> None:
    """An image whose header can be read and whose pixels cannot: the run drops it, and then the check does too."""
    Path("images/broken.jpg").write_bytes(min(Path("images").glob("*.jpg")).read_bytes()[:9000])
    short = ["--no_memory", "--max_train_epochs", "", "--max_train_steps", "2", "--save_every_n_epochs", ""]
    short += ["--on_bad_image", "skip"]
    assert train(config("sdxl-train", *short, "--save_state")) == 0
    resumed = [*short, "--max_train_steps", "4", "--resume", "out/style-state"]
    capsys.readouterr()
    assert check(config("sdxl-check", *resumed)) == 0
    assert "1 skipped" in (said := capsys.readouterr().out) and "more than before" not in said
    assert check(config("sdxl-check", *resumed, "--on_bad_image", "stop")) == 2
    assert "broken.jpg: not readable as an image" in capsys.readouterr().out.partition("\nproblems")[2]
    shutil.rmtree("out/cache/unusable")
    assert check(config("sdxl-check", *resumed)) == 0
    assert "1 image more than before: the run decodes them" in capsys.readouterr().out
    assert train(config("sdxl-train", *resumed)) == 0  # the latent of the broken image is tried again, and noted
    decoded: list[str] = []
    monkeypatch.setattr(encoding, "_read_image", lambda job, row: decoded.append(job.index[row].path.name))
    assert train(config("sdxl-train", *resumed, "--max_train_steps", "5")) == 0 and not decoded


@pytest.mark.parametrize(
    ("options", "said"), [((), True), (("--lr_warmup_steps", "1"), False), (("--lr_scheduler", "constant"), False)]
)
def test_a_warm_up_longer_than_the_run_is_named(work, capsys, options, said) -> None:
    settings = {"lr_scheduler": "cosine", "lr_warmup_steps": 100, "max_train_epochs": 1}
    given = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    check(config("sdxl-check", *given, *options))
    printed = " ".join(capsys.readouterr().out.split())
    assert ("lr_warmup_steps = 100: the warm-up lasts longer than the run of" in printed) == said


def test_counts_of_one_are_singular(work, capsys) -> None:
    Path("prompts.txt").write_text("a cat")
    asked = ["--max_train_epochs", "1", "--train_batch_size", "100", "--sample_every_n_epochs", "1", "--no_memory"]
    assert check(config("sdxl-check", *asked, "--sample_prompts", "prompts.txt", "--learning_rate_te1", "0")) == 0
    said = capsys.readouterr().out
    assert re.search(r"1 step in all \(1 epoch\) on 1 process", said) and "1 round of previews" in said
    assert "no numbered weights and style at the end" in said
    assert not re.search(r"(?<![\d.])1 (batches|steps|rounds|buckets|images|processes)\b", said)
