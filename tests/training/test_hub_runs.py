"""Whole runs with a hub on this machine: what a run uploads, resumes from the hub, and leaves when there is none."""

import logging
from pathlib import Path

from safetensors.torch import load_file

from scripts.benchmarks.interrupt import read_metrics
from tests.hub_server import TOKEN, HubServer
from tests.training.test_resume import run

LENGTH = ["--max_train_steps", "4", "--save_every_n_steps", "2", "--save_every_n_epochs", ""]
LENGTH += ["--optimizer_type", "Lion", "--ema_half_life", "", "--save_precision", "fp16"]
UPLOAD = ["--huggingface_repo_id", "user/repo", "--huggingface_path_in_repo", "run", "--huggingface_token", TOKEN]
STATE = "style-step00000002-state"


def files_of(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path.parent)): file.read_bytes() for file in files}


def test_a_run_uploads_what_it_saves_and_another_machine_resumes_from_it(work, hub: HubServer, caplog) -> None:
    hub.faults = [500, 500]
    assert run("one", *LENGTH, *UPLOAD, "--save_state_to_huggingface", "--save_last_n_steps", "1") == 0
    assert "Training starts, and uploads are tried at each save" in caplog.text  # the hub failed at first
    names = sorted(path.name for path in Path("one/out").iterdir() if path.name.startswith("style"))
    assert names == ["style-state", "style-step00000004-state", "style-step00000004.safetensors", "style.safetensors"]
    arrived = hub.repositories["user/repo"].files  # with those that were deleted, but only after their upload
    assert {path.split("/")[1] for path in arrived} == {*names, STATE, "style-step00000002.safetensors"}
    for name in names:
        for file, content in files_of(Path("one/out") / name).items():
            assert arrived[f"run/{file}"] == content

    caplog.set_level(logging.INFO)
    resumed = ["--resume", f"user/repo/run/{STATE}:main:model", "--resume_from_huggingface"]
    assert run("other", *LENGTH, *resumed, "--huggingface_token", TOKEN) == 0
    assert "resuming after step 2" in caplog.text
    assert read_metrics(Path("other")) == read_metrics(Path("one"))[2:]
    for name in ("style.safetensors", "style-state/weights.safetensors"):
        one, other = (load_file(f"{folder}/out/{name}") for folder in ("one", "other"))
        assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one), name
    assert TOKEN not in caplog.text
    assert not [path for path in work.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_a_run_without_its_hub_ends_well_and_the_next_start_uploads(work, hub: HubServer, monkeypatch, caplog) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    options = [*LENGTH, "--no-save_state", *UPLOAD, "--resume", "auto"]
    assert run("one", *options) == 0
    saved = ["style-step00000002.safetensors", "style-step00000004.safetensors", "style.safetensors"]
    assert f"not uploaded: {saved[0]}, " in caplog.text and f"hf upload user/repo one/out/{saved[0]}" in caplog.text
    assert (Path("one/out") / "style-uploads.json").exists()
    assert len([record for record in caplog.records if "was not uploaded" in record.getMessage()]) == 1
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    assert run("one", *options) == 0
    arrived = hub.repositories["user/repo"].files
    assert {path: content == (Path("one/out") / Path(path).name).read_bytes() for path, content in arrived.items()} == {
        f"run/{name}": True for name in saved
    }
    assert not (Path("one/out") / "style-uploads.json").exists()
