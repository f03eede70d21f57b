"""sdxl-cache from the command line: what it makes, what it finds again, several processes, interruptions."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from sdxl_finetune.commands.cache import cache
from sdxl_finetune.commands.model import main as model_tool
from sdxl_finetune.config import load_config
from sdxl_finetune.errors import UserError
from sdxl_finetune.latents.npz import noted_crop
from sdxl_finetune.latents.preparing import prepare
from sdxl_finetune.latents.store import LatentStore
from sdxl_finetune.model.load import load_checkpoint, load_vae
from sdxl_finetune.model.vae import encode, vae_identity
from sdxl_finetune.runtime.signals import Interrupt, StopRequest
from sdxl_finetune.training.setup import shared_index
from sdxl_finetune.training.vae_encoder import VaeEncoder

OPTIONS = ["--pretrained_model_name_or_path", "base.safetensors", "--train_data_dir", "images", "--output_dir", "out"]
OPTIONS += ["--resolution", "96", "--enable_bucket", "--min_bucket_reso", "64", "--max_bucket_reso", "128"]
OPTIONS += ["--cache_latents_to_disk", "--caption_extension", ".txt"]


def config(*more: str):
    loaded = load_config([*OPTIONS, *more], program="sdxl-cache")
    assert loaded is not None
    return loaded


def said(caplog) -> str:
    """What became of the images, in the last run."""
    lines = [record.getMessage() for record in caplog.records if "latents of images" in record.getMessage()]
    return lines[-1].partition(": ")[2]


def shards() -> list[Path]:
    return sorted(Path("out/cache/latents").glob("*/*.latents"))


def store(*more: str) -> LatentStore:
    asked = config(*more)
    accelerator = Accelerator()
    index = shared_index(asked, accelerator)
    encoder = VaeEncoder(load_vae(Path("base.safetensors")), accelerator.device)
    return prepare(index, encoder, asked, accelerator)[1]


def test_it_encodes_once_and_finds_again(work, caplog) -> None:
    caplog.set_level("INFO")
    assert cache(config()) == 0
    assert said(caplog) == "8 encoded"
    before = [(path.name, path.stat().st_mtime_ns) for path in shards()]
    assert before and cache(config()) == 0
    assert said(caplog) == "8 there already"
    assert before == [(path.name, path.stat().st_mtime_ns) for path in shards()]
    assert cache(config("--flip_aug")) == 0
    assert said(caplog) == "8 encoded"
    assert [path.name for path in Path("out").iterdir()] == ["cache"]


def test_latents_on_the_disk_are_those_in_memory_and_of_the_vae(work) -> None:
    disk, memory = store("--vae_batch_size", "3"), store("--no-cache_latents_to_disk", "--cache_latents")
    vae = load_vae(Path("base.safetensors"))
    for row in range(len(disk.index)):
        latent = disk.read([row], [False])
        np.testing.assert_allclose(latent, memory.read([row], [False]), atol=0.02)
        entry = disk.index[row]
        left_top = tuple(
            (r - b) // 2 for r, b in zip(entry.resized, (entry.bucket.width, entry.bucket.height), strict=True)
        )
        pixels = torch.from_numpy(entry.load(left_top)[None]).permute(0, 3, 1, 2).float() / 127.5 - 1
        deviation = encode(vae, pixels, torch.ones(1, *latent.shape[1:])) - encode(vae, pixels)
        error = (torch.from_numpy(latent).float() - encode(vae, pixels)) / deviation
        assert 0.9 < error.square().mean().sqrt() < 1.1


def test_another_vae_has_latents_of_its_own(work, caplog) -> None:
    caplog.set_level("INFO")
    assert cache(config()) == 0
    assert model_tool(["init", "other.safetensors", "--seed", "4"]) == 0
    assert cache(config("--vae", "other.safetensors")) == 0
    assert said(caplog) == "8 encoded" and len({path.parent for path in shards()}) == 2
    assert cache(config()) == 0 and said(caplog) == "8 there already"


def test_only_the_vae_is_loaded_and_is_the_checkpoints(work) -> None:
    whole = load_checkpoint(Path("base.safetensors"), dtype=None).vae
    alone = load_vae(Path("base.safetensors"))
    assert vae_identity(alone) == vae_identity(whole) and not alone.training
    with torch.no_grad():
        next(alone.parameters()).flatten()[0] += 1e-3
    assert vae_identity(alone) != vae_identity(whole)
    with pytest.raises(UserError, match="no such file"):
        load_vae(Path("nothing.safetensors"))
    Path("unet.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="empty"):
        load_vae(Path("base.safetensors"), Path("unet.safetensors"))


def test_a_damaged_shard_is_named_and_made_again(work, caplog) -> None:
    caplog.set_level("INFO")
    assert cache(config()) == 0
    first = store()
    first_latents = [first.read([row], [False]) for row in range(8)]
    hurt = shards()[0]
    with hurt.open("r+b") as file:
        file.seek(-9, os.SEEK_END)
        file.write(b"\x55" * 9)
    assert cache(config()) == 0
    assert str(hurt) in caplog.text and hurt.with_suffix(".damaged").exists()
    encoded, kept = (int(part.split()[0]) for part in said(caplog).split(", "))
    assert 1 <= encoded <= 8 and encoded + kept == 8
    again = store()
    assert all(np.array_equal(first_latents[row], again.read([row], [False])) for row in range(8)), (
        "the same, made again"
    )


def test_files_of_the_reference(work, caplog) -> None:
    """Taken when they are of this VAE, all refused when one is of another, which is said."""
    caplog.set_level("INFO")
    made = store("--flip_aug")
    for row in range(8):
        entry = made.index[row]
        arrays = {"latents": made.read([row], [False])[0].astype(np.float32), "original_size": np.array(entry.size)}
        arrays["latents_flipped"] = made.read([row], [True])[0].astype(np.float32)
        bucket = (entry.bucket.width, entry.bucket.height)
        arrays["crop_ltrb"] = np.array(noted_crop(entry.size, bucket))
        np.savez(entry.path.with_name(f"{entry.path.stem}_{entry.size[0]:04d}x{entry.size[1]:04d}_sdxl.npz"), **arrays)
    rocket = next(Path("images").glob("rocket_*.npz"))
    good = rocket.read_bytes()
    rocket.write_bytes(good[:-500])
    assert cache(config("--cache_dir", "fresh", "--flip_aug")) == 0
    assert said(caplog) == "1 encoded, 7 taken from .npz files"
    assert "1 .npz files of the reference are not used: damaged" in caplog.text and "rocket_" in caplog.text
    copied = store("--cache_dir", "fresh", "--flip_aug")
    rows = [row for row in range(8) if made.index[row].path.stem != "rocket"]
    assert all(np.array_equal(made.read([row], [True]), copied.read([row], [True])) for row in rows)
    caplog.clear()
    assert model_tool(["init", "other.safetensors", "--seed", "4"]) == 0
    assert cache(config("--vae", "other.safetensors", "--cache_dir", "fresh")) == 0
    assert said(caplog) == "8 encoded"
    assert "was made by another VAE or of another image: none of the reference's .npz files is used" in caplog.text


class Stopped(StopRequest):
    """Asked to stop when it is looked at for the third time."""

    looks = 0

    @property
    def number(self):
        self.looks += 1
        return signal.SIGTERM if self.looks > 3 else None

    @number.setter
    def number(self, value) -> None: ...


def test_a_stop_keeps_what_is_encoded(work, caplog) -> None:
    caplog.set_level("INFO")
    asked, accelerator = config(), Accelerator()
    index = shared_index(asked, accelerator)
    encoder = VaeEncoder(load_vae(Path("base.safetensors")), accelerator.device)
    with pytest.raises(Interrupt) as caught:
        prepare(index, encoder, asked, accelerator, Stopped())
    assert caught.value.exit_status == 143
    prepare(index, encoder, asked, accelerator)
    encoded, kept = (int(part.split()[0]) for part in said(caplog).split(", "))
    assert 1 <= encoded <= 6 and encoded + kept == 8


def test_without_a_place_to_keep_them_there_is_nothing_to_do(work) -> None:
    with pytest.raises(UserError, match="cache_latents_to_disk = False"):
        cache(config("--no-cache_latents_to_disk"))


LAUNCHED = """
from sdxl_finetune import cli
from sdxl_finetune.latents import together

together.ROUND = 0.5
cli.cache()
"""
"""Processes meet and write twice a second."""


def command(*program: str) -> list[str]:
    Path("cache.py").write_text(LAUNCHED)
    return [*program, "cache.py", *OPTIONS]


def environment() -> dict[str, str]:
    return {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}


def run(*asked: str) -> str:
    """What a command says that ends well."""
    done = subprocess.run(asked, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_two_processes_share_the_work_and_a_bad_image_is_named_once(work, caplog) -> None:
    (work / "images" / "bad.png").write_bytes((work / "images" / "chelsea.jpg").read_bytes()[:5000])
    two = [str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"]
    done = run(*command(*two, "--main_process_port", "0"), "--on_bad_image", "skip")
    assert ": 8 encoded\n" in done and done.count("bad.png: not readable") == 1, done
    assert {path.name.split("-")[1] for path in shards()} == {"00000", "00001"}
    caplog.set_level("INFO")
    assert cache(config("--on_bad_image", "skip")) == 0 and said(caplog) == "8 there already"


def test_killed_and_stopped_while_encoding(work, caplog) -> None:
    """kill -9 loses what is not written yet; SIGTERM loses nothing that was finished, and ends with 143."""
    for number in range(1200):
        Image.new("RGB", (100, 80), (number % 256, number // 256, 7)).save(work / "images" / f"{number}.png")
    asked, written = command(sys.executable), 0
    for sent, status in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        process = subprocess.Popen(
            asked, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        while len(shards()) < written + 2:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(sent)
        assert process.communicate(timeout=300)[0] and process.returncode == status
        written = len(shards())
    caplog.set_level("INFO")
    assert cache(config()) == 0
    encoded, kept = (int(part.split()[0]) for part in said(caplog).split(", "))
    assert kept > 0 < encoded and encoded + kept == 1208 and "damaged" not in caplog.text
