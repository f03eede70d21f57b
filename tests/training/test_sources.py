"""The same images train the same weights, from a folder, a metadata file, tar files and an object store."""

import io
import os
import re
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from sdxl_finetune.commands.cache import cache
from sdxl_finetune.config import load_config
from sdxl_finetune.errors import UserError
from sdxl_finetune.storage import Address, write
from sdxl_finetune.storage.objects import _store
from sdxl_finetune.training.loop import train
from tests.s3_server import BUCKET, environment, running_server

OPTIONS = ["--resolution", "64", "--train_batch_size", "2", "--max_train_steps", "1", "--seed", "5", "--flip_aug"]
OPTIONS += ["--min_bucket_reso", "32", "--bucket_reso_steps", "32", "--caption_extension", ".txt", "--enable_bucket"]
OPTIONS += ["--pretrained_model_name_or_path", "base.safetensors", "--random_crop", "--shuffle_caption"]
CACHED = [
    *(option for option in OPTIONS if option != "--random_crop"),
    "--cache_latents_to_disk",
    "--cache_dir",
    "cache",
]


@pytest.fixture
def work(tmp_path, monkeypatch, base, write_images) -> Path:
    """Images with captions in the folder `images`, in two tar files, and a Parquet file of the captions."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.safetensors").symlink_to(base)
    write_images(tmp_path / "images", {f"{number}.png": (64 + 16 * (number % 2), 64) for number in range(6)})
    texts = {f"{number}.png": f"picture number {number}, cat, dog, bird" for number in range(6)}
    Path("tars").mkdir()
    for number, text in enumerate(texts.values()):
        Path(f"images/{number}.txt").write_text(text)
    for part in range(2):
        with tarfile.open(f"tars/{part}.tar", "w") as tar:
            for number in range(3 * part, 3 * part + 3):
                for ending in ("txt", "png"):
                    tar.add(f"images/{number}.{ending}", f"{number}.{ending}")
    pa.parquet.write_table(pa.table({"file_name": list(texts), "text": list(texts.values())}), "meta.parquet")
    return tmp_path


def run(name: str, options: list[str], *more: str) -> dict[str, torch.Tensor]:
    """The weights after a run."""
    config = load_config([*options, "--output_dir", f"out/{name}", *more], program="sdxl-train")
    assert config is not None and train(config) == 0
    return load_file(f"out/{name}/last.safetensors")


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_source_trains_the_same_weights(work: Path, monkeypatch, caplog) -> None:
    with running_server() as server:
        for name, value in environment(server.port).items():
            monkeypatch.setenv(name, value)
        try:
            store = Address(f"s3://{BUCKET}/data")
            for folder in ("images", "tars"):
                for path in Path(folder).iterdir():
                    write(store / folder / path.name, path)
            write(store / "meta.parquet", Path("meta.parquet"))
            folder = run("folder", OPTIONS, "--train_data_dir", "images", "--max_data_loader_n_workers", "0")
            start = load_file("base.safetensors")
            assert not all(torch.equal(folder[name].float(), start[name].float()) for name in folder)
            sources = {
                "metadata": ["--train_data_dir", "images", "--in_json", "meta.parquet"],
                "tars": ["--train_data_dir", "tars/{0..1}.tar", "--max_data_loader_n_workers", "2"],
                "store": ["--train_data_dir", f"{store}/images", "--in_json", f"{store}/meta.parquet"],
                "tars in the store": ["--train_data_dir", f"{store}/tars", "--max_data_loader_n_workers", "2"],
            }
            for name, source in sources.items():
                assert_equal(folder, run(name, OPTIONS, "--max_data_loader_n_workers", "0", *source))
            cached = run("cached", CACHED, "--train_data_dir", "images")
            caplog.clear()
            assert_equal(cached, run("cached tars", CACHED, "--train_data_dir", "tars"))
            assert_equal(cached, run("cached store", CACHED, "--train_data_dir", f"{store}/images"))
            assert len(re.findall(r"latents of images in cache\S*: 6 found again", caplog.text)) == 2
        finally:
            _store.cache_clear()


def test_on_bad_image_decides_about_bad_members(work: Path) -> None:
    with tarfile.open("tars/1.tar", "a") as tar:
        member = tarfile.TarInfo("bad.png")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"bad"))
    data = Path("tars/0.tar").read_bytes()
    Path("tars/0.tar").write_bytes(data[:-12_000])
    options = [*CACHED, "--train_data_dir", "tars", "--output_dir", "out"]
    config = load_config(options, program="sdxl-cache")
    assert config is not None
    with pytest.raises(UserError) as caught:
        cache(config)
    cut, bad = sorted(str(problem) for problem in caught.value.problems)
    assert cut.startswith(f"tars{os.sep}0.tar: the tar file ends within a member")
    assert bad.endswith("1.tar/bad.png: not an image of a known format")
    config = load_config([*options, "--on_bad_image", "skip"], program="sdxl-cache")
    assert config is not None and cache(config) == 0
