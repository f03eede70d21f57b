"""Two launches that stand for two machines: separate folders, one object store (or one shared folder)."""

import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdxl_finetune.storage import Address, list_files, write
from tests.s3_server import S3Server, environment

CACHE = Address("s3://bucket/project/cache")
MODEL = ["--pretrained_model_name_or_path", "base.safetensors", "--seed", "3"]
MODEL += ["--resolution", "96", "--enable_bucket", "--min_bucket_reso", "64", "--max_bucket_reso", "128"]
MODEL += ["--cache_latents_to_disk", "--caption_extension", ".txt", "--max_data_loader_n_workers", "0"]
IMAGES = ["--train_data_dir", "images"]
TRAIN = ["--optimizer_type", "adamw", "--learning_rate", "1e-4", "--max_train_steps", "4", "--train_batch_size", "1"]
TRAIN += ["--save_every_n_steps", "2", "--save_state", "--output_name", "toy"]
QUICK = "import sdxl_finetune.latents.together as t; t.ROUND = 0.3; "


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def start(program: str, machines: Sequence[list[str]], s3: S3Server, *, quick: bool = False) -> list[subprocess.Popen]:
    """Starts one launch for each machine, with its own options."""
    port = free_port()
    Path(f"{program}.py").write_text(f"{QUICK if quick else ''}from sdxl_finetune.cli import {program}\n{program}()\n")
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"]
    launcher += [
        "--num_machines",
        str(len(machines)),
        "--main_process_ip",
        "127.0.0.1",
        "--main_process_port",
        str(port),
    ]
    env = {**os.environ, **environment(s3.port), "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [*launcher, "--machine_rank", str(rank), f"{program}.py", *MODEL, *options],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, options in enumerate(machines)
    ]  # fmt: skip


def outputs(running: list[subprocess.Popen]) -> list[str]:
    said = [process.communicate(timeout=300)[0] for process in running]
    for process, text in zip(running, said, strict=True):
        assert process.returncode == 0, text
    return said


def local(name: str, *more: str) -> list[str]:
    return [
        *IMAGES,
        "--output_dir",
        f"{name}/out",
        "--cache_dir",
        str(CACHE),
        "--cache_dir_local",
        f"{name}/local",
        *more,
    ]


def stored() -> list[str]:
    return [found.name for found in list_files(CACHE) if found.name.endswith(".latents")]


def counts(text: str) -> str:
    return re.findall(r"latents of images in \S+ (.*)", text)[-1]


def test_machines_that_share_only_a_store_divide_the_work(work, s3: S3Server) -> None:
    said = outputs(start("cache", [local("one"), local("two")], s3))
    assert counts(said[0]) == "8 encoded"
    assert {Path(name).name.split("-")[1] for name in stored()} == {"00000", "00001"}
    assert not list(Path().glob("*/local/**/*.latents")), "the shards stand in the store"
    s3.clear()
    again = outputs(start("cache", [local("three"), local("four")], s3))
    assert counts(again[0]) == "8 there already", "machines that never saw these latents find them"
    assert sum(method == "PUT" and path.endswith(".latents") for method, path in s3.paths) == 0


def test_machines_that_share_a_folder_divide_the_work(work, s3: S3Server) -> None:
    shared = [*IMAGES, "--output_dir", "out", "--cache_dir", "shared"]
    assert counts(outputs(start("cache", [shared, shared], s3))[0]) == "8 encoded"
    assert {path.name.split("-")[1] for path in Path("shared").glob("latents/*/*.latents")} == {"00000", "00001"}
    assert counts(outputs(start("cache", [shared, shared], s3))[0]) == "8 there already"


def test_a_machine_that_dies_costs_what_it_had_not_written(work, s3: S3Server) -> None:
    for number in range(400):
        Image.new("RGB", (100, 80), (number % 256, number // 256, 7)).save(work / "images" / f"{number}.png")
    running = start("cache", [local("one"), local("two")], s3, quick=True)
    while not {"00000", "00001"} <= {Path(name).name.split("-")[1] for name in stored()}:
        assert all(process.poll() is None for process in running)
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(running[1].pid)], capture_output=True, text=True).stdout.split()
    for process in (running[1].pid, *map(int, children)):
        os.kill(process, signal.SIGKILL)
    for process in running:
        process.communicate(timeout=300)
    before = set(stored())
    done = outputs(start("cache", [local("one"), local("three")], s3))[0]
    encoded, kept = (int(number) for number in re.findall(r"(\d+) (?:encoded|there already)", counts(done)))
    assert encoded + kept == 408 and kept > 0 and before <= set(stored()) and "damaged" not in done


@pytest.mark.parametrize("resumed", ["auto", "address"])
def test_training_on_two_machines_resumes_from_the_store(work, s3: S3Server, resumed: str) -> None:
    """States go to the store; machines with empty folders resume, and end with the weights of an unbroken run."""
    out = "s3://bucket/project/out"

    def machine(name: str, *more: str) -> list[str]:
        own = ["--cache_dir_local", f"{name}/local", "--cache_dir_local_gb", "1"]
        return [*IMAGES, "--output_dir", out, *own, *TRAIN, *more]

    outputs(start("train", [machine("one"), machine("two")], s3))
    names = {found.name for found in list_files(Address(out)) if not found.name.startswith("cache/")}
    assert {"toy.safetensors", "toy-step00000002.safetensors", "toy-step00000002-state/manifest.json"} <= names
    whole = _weights(out, work / "whole")
    for name in names:
        if not name.startswith("toy-step00000002"):
            _delete(f"{out}/{name}")
    where = "auto" if resumed == "auto" else f"{out}/toy-step00000002-state"
    said = outputs(start("train", [machine("three", "--resume", where), machine("four", "--resume", where)], s3))
    assert "resuming after step 2" in said[0]
    again = _weights(out, work / "again")
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)


def test_tars_in_a_store_on_two_machines_train_as_a_folder_on_one(work, s3: S3Server) -> None:
    """Quality tags come from a Parquet column. Both runs have two processes, and end with the same bits."""
    names = sorted(path.name for path in Path("images").iterdir() if path.suffix != ".txt")
    for part in range(2):
        with tarfile.open(f"{part}.tar", "w") as tar:
            for name in names[part * len(names) // 2 : (part + 1) * len(names) // 2]:
                for member in (name, f"{Path(name).stem}.txt"):
                    tar.add(f"images/{member}", member)
        write(Address(f"s3://bucket/project/tars/{part}.tar"), Path(f"{part}.tar"))
    scores = pa.table({"file_name": names, "score": np.linspace(0, 1, len(names), dtype=np.float32)})
    pa.parquet.write_table(scores, "scores.parquet")
    write(Address("s3://bucket/project/scores.parquet"), Path("scores.parquet"))
    out, tags = "s3://bucket/project/out", "masterpiece > 0.75, high quality > 0.5, normal quality > 0.25, low quality"
    options = [*TRAIN, "--quality_tags", tags, "--shuffle_caption", "--train_text_encoder"]
    one = [*IMAGES, "--quality_scores", "scores.parquet", "--output_dir", "single", *options]
    (said,) = outputs(start("train", [one], s3))
    assert "masterpiece 2, high quality 2, normal quality 2, low quality 2, none 0" in said
    remote = ["--train_data_dir", "s3://bucket/project/tars", "--in_json", "s3://bucket/project/scores.parquet"]
    remote += ["--cache_dir", str(CACHE), "--output_dir", out, "--cache_dir_local_gb", "1", *options]
    s3.clear()
    said = outputs(start("train", [[*remote, "--cache_dir_local", name] for name in ("first", "second")], s3))[0]
    assert "masterpiece 2, high quality 2, normal quality 2, low quality 2, none 0" in said
    assert counts(said) == "8 encoded"
    assert {Path(name).name.split("-")[1] for name in stored()} == {"00000", "00001"}, "each machine encoded its share"
    single, many = load_file("single/toy.safetensors"), _weights(out, work / "many")
    start_weights = load_file("base.safetensors")
    assert not all(torch.equal(single[name].float(), start_weights[name].float()) for name in single)
    assert single.keys() == many.keys() and all(torch.equal(single[name], many[name]) for name in single)


def _weights(out: str, path: Path) -> dict[str, torch.Tensor]:
    from sdxl_finetune.storage.folders import fetch_to

    fetch_to(Address(f"{out}/toy.safetensors"), path)
    return load_file(path)


def _delete(address: str) -> None:
    from sdxl_finetune.storage import delete

    delete(Address(address))
