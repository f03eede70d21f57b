"""Training states at an address: which one is the newest, and that every machine loads the same one."""

import hashlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdxl_finetune.config import Config
from sdxl_finetune.errors import UserError
from sdxl_finetune.storage import Address
from sdxl_finetune.storage.folders import upload
from sdxl_finetune.training.resume import Start, content_of, find_start, start_here
from sdxl_finetune.training.state import TrainingState, load_state, save_state, time_of_saving
from sdxl_finetune.training.stored_saves import find_stored
from tests.s3_server import S3Server

OUT = Address("s3://bucket/out")


def config(machine: Path) -> Config:
    return Config(output_dir=OUT, cache_dir_local=machine, output_name="toy")


def save(folder: Path, step: int, *, saved_at: float, seed: int = 1) -> Path:
    path = folder / f"toy-step{step:08d}-state"
    save_state(path, TrainingState(step=step, epoch=0, seed=seed, saved_at=saved_at), {}, {})
    return path


def test_the_newest_state_of_a_store_is_the_one_that_was_saved_last(tmp_path: Path, s3: S3Server) -> None:
    """The upload of an older state may be complete after that of a newer one."""
    for step in (20, 10):
        path = save(tmp_path, step, saved_at=100.0 + step)
        upload(path, OUT / path.name)
    stored = find_stored(config(tmp_path), OUT)
    assert stored.states == {"toy-step00000010-state": 110.0, "toy-step00000020-state": 120.0}
    assert not stored.checkpoints and not stored.interrupted


def test_a_machine_does_not_resume_from_the_state_of_an_earlier_run(tmp_path: Path, s3: S3Server) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    path = save(config(first).output_folder, 10, saved_at=200.0, seed=7)
    old = save(config(second).output_folder, 10, saved_at=100.0)
    address = OUT / path.name
    upload(path, address)
    start = Start(path=path, is_state=True, state=load_state(path), address=address, content=content_of(path))
    assert start_here(start, config(first)).path == path
    start = replace(start, path=old)  # the machines have equal paths
    found = start_here(start, config(second)).path
    assert load_state(found).seed == 7 and load_state(old).seed == 1
    assert start_here(start, config(second)).path == found, "it is downloaded once"
    with pytest.raises(UserError, match=r"differs from .* on the first machine: wait until its upload is complete"):
        start_here(replace(start, content="another"), config(second))


@pytest.mark.parametrize("resume", ["auto", "s3://bucket/out/toy-step00000010-state"])
def test_a_state_that_another_machine_saved_later_wins_over_the_local_one(
    tmp_path: Path, s3: S3Server, resume: str
) -> None:
    path = save(tmp_path / "other", 10, saved_at=200.0, seed=7)
    old = save(config(tmp_path).output_folder, 10, saved_at=100.0)
    upload(path, OUT / path.name)
    start = find_start(Config(**dict(config(tmp_path)) | {"resume": resume}))
    assert start and start.state.seed == 7 and load_state(old).seed == 1
    upload(old, OUT / path.name)
    start = find_start(Config(**dict(config(tmp_path)) | {"resume": resume}))
    assert start and start.path == old


@pytest.mark.parametrize("is_later_here", [False, True])
def test_the_later_of_two_checkpoints_of_the_same_name_is_resumed_from(
    tmp_path: Path, s3: S3Server, is_later_here: bool
) -> None:
    def checkpoint(folder: Path, seed: int) -> Path:
        folder.mkdir(parents=True)
        path = folder / "toy-step00000010.safetensors"
        metadata = {"sdxl_finetune.step": "10", "sdxl_finetune.epoch": "1", "sdxl_finetune.seed": str(seed)}
        save_file({"x": torch.zeros(1)}, path, metadata)
        return path

    here = checkpoint(config(tmp_path).output_folder, 1)
    there = checkpoint(tmp_path / "other", 7)
    upload(there, OUT / there.name)
    os.utime(here, (9e9, 9e9) if is_later_here else (100.0, 100.0))
    start = find_start(Config(**dict(config(tmp_path)) | {"resume": "auto"}))
    assert start and start.state.seed == (1 if is_later_here else 7) and (start.path == here) == is_later_here


def test_a_run_that_was_resumed_by_a_machine_whose_clock_is_behind_is_continued(tmp_path: Path, s3: S3Server) -> None:
    """The clock of the first machine was two hours ahead. Later states must not look older than its state."""
    ahead = time.time() + 7200
    first = save(tmp_path / "first", 10, saved_at=ahead)
    upload(first, OUT / first.name)
    begun = load_state(first)
    assert abs(time_of_saving(10, None) - time.time()) < 60 and time_of_saving(10, begun) == ahead
    times = [time_of_saving(step, begun) for step in (11, 12, 10_000_000)]
    assert ahead < times[0] < times[1] < times[2] < ahead + 60
    second = save(tmp_path / "second", 11, saved_at=times[0])
    upload(second, OUT / second.name)
    start = find_start(Config(**dict(config(tmp_path)) | {"resume": "auto"}))
    assert start and start.state.step == 11
    assert abs(time_of_saving(20, replace(begun, saved_at=100.0)) - time.time()) < 60


@pytest.mark.parametrize("wrong", [{"time": None}, {"step": "x"}, {"resume": []}])
def test_a_state_whose_description_has_wrong_values_is_skipped(tmp_path: Path, s3: S3Server, wrong: dict) -> None:
    for step, changes in ((10, {}), (20, wrong)):
        path = save(tmp_path, step, saved_at=100.0)
        values = json.loads((path / "state.json").read_text()) | changes
        (path / "state.json").write_text(json.dumps(values))
        manifest = json.loads((path / "manifest.json").read_text())
        data = (path / "state.json").read_bytes()
        manifest["state.json"] = [len(data), hashlib.sha256(data).hexdigest()]
        (path / "manifest.json").write_text(json.dumps(manifest))
        upload(path, OUT / path.name)
    start = find_start(Config(**dict(config(tmp_path)) | {"resume": "auto"}))
    assert start and start.state.step == 10


def test_a_state_without_a_readable_description_has_the_time_of_its_upload(tmp_path: Path, s3: S3Server) -> None:
    path = save(tmp_path, 10, saved_at=100.0)
    (path / "state.json").write_text(json.dumps({"format": 99}))
    upload(path, OUT / path.name)
    assert find_stored(config(tmp_path), OUT).states[path.name] > 100.0
