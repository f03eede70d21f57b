"""A small user's folder for trials with damaged files, and a way to run the programs in it with bounded memory.

The folder holds images, captions, tar files, metadata, models, configs, caches, and a run that has saved a training
state. It is made once. Each trial gets a copy at the same path, because caches know images by their paths.
"""

import json
import multiprocessing
import os
import resource
import shutil
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

LINKED = 1 << 18
"""Bytes: larger files are linked and not copied. No program writes into such a file."""
ADDRESS_SPACE = 3 << 30
"""Bytes that a program may ask for beyond what its imports have taken."""
MOST_SECONDS = 60
"""Seconds of processor time after which a program is ended."""
PATIENCE = 1800
"""Seconds after which a program that waits for something is ended. A machine that does much else may be so slow."""
CAPTIONS = ("1girl, red hair, smile", "a (small:1.2) dog {in|under} a box", "landscape, BREAK, no humans")
IMAGES = {"a.png": (64, 64), "b.jpg": (96, 64), "c.webp": (64, 96), "d.bmp": (80, 80), "e.png": (70, 64)}
MODEL = ["--pretrained_model_name_or_path", "base.safetensors"]
DATA = ["--train_data_dir", "images", "--caption_extension", ".txt", "--resolution", "64", "--seed", "5"]
DATA += ["--enable_bucket", "--bucket_reso_steps", "32", "--min_bucket_reso", "32", "--max_bucket_reso", "128"]
RUN = ["--output_dir", "out", "--logging_dir", "logs", "--output_name", "run", "--max_data_loader_n_workers", "0"]
RUN += ["--max_train_steps", "2", "--save_precision", "fp16", "--save_state", "--no_memory"]
OPTIONS = [*MODEL, *DATA, *RUN, "--cache_latents_to_disk", "--train_batch_size", "2"]


@dataclass(frozen=True)
class Ended:
    """A program that has ended."""

    status: int
    """Exit status; negative: the signal that ended it."""
    text: str
    """Everything that it printed."""
    seconds: float
    """Processor time in seconds."""
    bytes: int
    """Most memory in use, beyond that of the imports."""


def run_program(program: str, words: Sequence[str], folder: Path) -> Ended:
    """Runs a program of `sdxl_finetune.cli` in a folder, in a process that is forked with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scripts.benchmarks.torture_imports"])
    out = folder.parent / f"{folder.name}.out"
    used = folder.parent / f"{folder.name}.used"
    used.unlink(missing_ok=True)
    process = context.Process(target=_run, args=(program, list(words), folder, out, used))
    process.start()
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()
    seconds, size = json.loads(used.read_text()) if used.exists() else (0.0, 0)
    assert process.exitcode is not None
    return Ended(process.exitcode, out.read_text("utf-8", "backslashreplace"), seconds, size)


def _run(program: str, words: list[str], folder: Path, out: Path, used: Path) -> None:
    from sdxl_finetune import cli

    descriptor = os.open(out, os.O_WRONLY | os.O_TRUNC | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.chdir(folder)
    os.environ |= {"HOME": str(folder), "ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""}
    sys.argv = [program, *words]
    began, before = _seconds(), _memory("VmRSS")
    limit = _memory("VmSize") + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS))
    try:
        getattr(cli, program.removeprefix("sdxl-"))()
    finally:
        used.write_text(json.dumps([_seconds() - began, _memory("VmHWM") - before]))


def _seconds() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))


def fresh_copy(folder: Path) -> Path:
    """The user's folder as new. It is made at the first call."""
    kept, trial = folder / "world", folder / "trial"
    if not kept.exists():
        shutil.rmtree(trial, ignore_errors=True)
        trial.mkdir(parents=True)
        _make(trial)
        trial.rename(kept)
    shutil.rmtree(trial, ignore_errors=True)
    shutil.copytree(kept, trial, symlinks=True, copy_function=_copy)
    return trial


def _copy(source: str, target: str) -> None:
    if os.stat(source).st_size > LINKED:  # noqa: PTH116
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def _make(folder: Path) -> None:
    _make_images(folder / "images", IMAGES)
    _make_images(folder / "masks", IMAGES)
    _make_metadata(folder)
    tars = folder / "tars"
    tars.mkdir()
    with tarfile.open(tars / "data.tar", "w") as tar:
        for path in sorted((folder / "images").iterdir()):
            tar.add(path, path.name)
    _make_texts(folder)
    tiny = ["--unet_widths", "32,32,32", "--unet_layers", "1,1,1", "--transformer_layers", "0,1,1", "--te1", "16,2"]
    tiny += ["--te2", "16,2", "--vae_widths", "32,32,32,32", "--vae_layers", "1"]
    _expect(folder, "sdxl-model", "init", "float.safetensors", *tiny)
    for name in ("base.safetensors", "base.ckpt"):
        _expect(folder, "sdxl-model", "convert", "float.safetensors", name, "--save_precision", "fp16")
    _expect(
        folder, "sdxl-model", "convert", "base.safetensors", "diffusers", "--save_model_as", "diffusers_safetensors",
        "--save_precision", "fp16",
    )  # fmt: skip
    _expect(folder, "sdxl-cache", *OPTIONS, "--cache_text_encoder_outputs_to_disk")
    _expect(folder, "sdxl-train", *OPTIONS, "--save_every_n_steps", "1")
    _expect(folder, "sdxl-check", *OPTIONS, "--train_data_dir", "tars")


def _expect(folder: Path, program: str, *words: str) -> None:
    ended = run_program(program, words, folder)
    if ended.status:
        raise RuntimeError(f"{program} {' '.join(words)}: {ended.status}\n{ended.text}")


def _make_images(folder: Path, sizes: dict[str, tuple[int, int]]) -> None:
    folder.mkdir()
    for number, (name, size) in enumerate(sizes.items()):
        small = np.random.default_rng(number).integers(0, 256, (5, 5, 3), np.uint8)
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(folder / name)
        text = CAPTIONS[number % len(CAPTIONS)]
        (folder / name).with_suffix(".txt").write_text(text + "\n")
        (folder / name).with_suffix(".json").write_text(json.dumps({"caption": text, "tags": ["a", "b"], "score": 5}))


def _make_metadata(folder: Path) -> None:
    entries = {
        name: {"caption": CAPTIONS[0], "tags": "a, b", "image_size": list(size), "score": 0.5}
        for name, size in IMAGES.items()
    }
    (folder / "meta.json").write_text(json.dumps(entries))
    rows = [{"image_path": name, **entry} for name, entry in entries.items()]
    (folder / "meta.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pa.parquet.write_table(pa.Table.from_pylist(rows), folder / "meta.parquet")
    (folder / "scores.json").write_text(json.dumps({name: 0.1 * place for place, name in enumerate(IMAGES)}))
    (folder / "scores.csv").write_text("path,score\n" + "".join(f"{name},0.5\n" for name in IMAGES))


def _make_texts(folder: Path) -> None:
    (folder / "config.toml").write_text(
        "pretrained_model_name_or_path = 'base.safetensors'\n[data]\ntrain_data_dir = 'images'\n"
        "resolution = '64,64'\nenable_bucket = true\nmin_bucket_reso = 32\nbucket_reso_steps = 32\n"
        "caption_extension = '.txt'\n[optimizer]\nlearning_rate = 1e-5\noutput_name = 'run'\n"
        "optimizer_args = ['eps=1e-7', 'betas=(0.9, 0.99)']\nlr_scheduler_num_cycles = 3\n"
    )
    (folder / "dataset.toml").write_text(
        "[general]\nresolution = 64\ncaption_extension = '.txt'\n[[datasets]]\nbatch_size = 2\n"
        "[[datasets.subsets]]\nimage_dir = 'images'\nnum_repeats = 2\nkeep_tokens = 1\n"
    )
    (folder / "prompts.txt").write_text(
        "a dog --n bad --w 64 --h 64 --s 1 --d 5\n# remark\na cat --l 7.5 --w 64 --h 64 --s 1\n"
    )
    (folder / "prompts.toml").write_text(
        "[prompt]\nwidth = 64\nheight = 64\nsample_steps = 1\n[[prompt.subset]]\nprompt = 'a dog'\nseed = 1\n"
    )
    (folder / "prompts.json").write_text(
        json.dumps([{"prompt": "a dog", "width": 64, "height": 64, "sample_steps": 1}])
    )
    (folder / "groups.json").write_text(json.dumps({"a": ["b", "c"]}))
    (folder / "groups.toml").write_text("a = ['b', 'c']\n'red hair' = ['smile']\n")
    (folder / "protected.txt").write_text("1girl\nred *\n")
    (folder / "weights.toml").write_text(
        "[tags]\n'1girl' = { repeats = 2, loss_weight = 0.5 }\n[paths]\n'a.*' = { repeats = 3 }\n"
    )
    (folder / "weights.csv").write_text("path,repeats,loss_weight\na.png,2,0.5\n")
