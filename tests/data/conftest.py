"""Folders of generated images, tar files of them, and the datasets over them."""

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from sdxl_finetune.batch import LatentSize
from sdxl_finetune.config import Dataset, Subset
from sdxl_finetune.latents.catalogue import local_shelf
from sdxl_finetune.latents.encoding import Encoding, Report, encode_images
from sdxl_finetune.latents.keys import row_keys
from sdxl_finetune.latents.library import Library
from sdxl_finetune.latents.shards import Kind, Shard, ShardWriter
from sdxl_finetune.latents.store import LatentStore, build_store, find_places, missing_rows

SIZES = {"a.png": (64, 64), "b.jpg": (80, 64), "c.webp": (160, 64), "d.bmp": (64, 160), "e.JPEG": (70, 70)}
"""Images of the fixture `images`."""


@pytest.fixture
def subset() -> Callable[..., Subset]:
    def build(folder: Path, **options: object) -> Subset:
        return Subset(image_dir=folder, **{"num_repeats": 1, "class_tokens": None, **options})

    return build


@pytest.fixture
def dataset() -> Callable[..., Dataset]:
    def build(*subsets: Subset, **options: object) -> Dataset:
        defaults = {
            "resolution": (64, 64),
            "batch_size": 4,
            "enable_bucket": True,
            "min_bucket_reso": 32,
            "max_bucket_reso": 128,
            "bucket_reso_steps": 32,
        }
        return Dataset(**{**defaults, **options}, subsets=subsets)

    return build


@pytest.fixture
def cache_latents(tmp_path: Path) -> Callable[..., tuple[LatentStore, Report, list[Shard]]]:
    """cache_latents(index, encode, folder=None, parts=1, **job): what `prepare` does, on one process."""

    def cache(index, encode, *, folder=None, parts=1, **options):
        kind = Kind("latents", "vae")
        shards = local_shelf(folder, kind).open(check=True) if folder else []
        keys, library = row_keys(index), Library(shards)
        rows = missing_rows(index, find_places(index, keys, library))
        settings = {"latent_size": LatentSize(), "batch_size": 2, "threads": 2, **options}
        job = Encoding(index=index, keys=keys, known=library, encode=encode, **settings)
        for part in range(parts):
            with ShardWriter(folder, kind, part, tmp_path) as writer:
                assert sum(encode_images(job, rows[part::parts], writer)) == len(rows[part::parts])
            shards += writer.shards
        library = Library(sorted(shards, key=lambda shard: shard.path.name))
        places = find_places(index, keys, library)
        store = build_store(index, places, library.files, latent_size=LatentSize(), scratch=tmp_path)
        return store, job.report, shards

    return cache


@pytest.fixture
def pack(tmp_path: Path) -> Callable[..., Path]:
    """pack(name, {member: bytes}, format=GNU): a tar file in the folder `tars`."""

    def pack(name: str, members: Mapping[str, bytes], format: int = tarfile.GNU_FORMAT) -> Path:
        path = tmp_path / "tars" / name
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w", format=format) as tar:
            for member, data in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return pack


@pytest.fixture
def images(tmp_path: Path, write_images) -> dict[str, bytes]:
    """Images and captions by name, as they are in the folder `plain`."""
    write_images(tmp_path / "plain", SIZES)
    for name in SIZES:
        (tmp_path / "plain" / f"{name[0]}.caption").write_text(f" a picture of {name[0]} \n\n another line \n")
    return {path.name: path.read_bytes() for path in sorted((tmp_path / "plain").iterdir())}
