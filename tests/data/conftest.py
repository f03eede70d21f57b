"""Folders of generated images, and the datasets over them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sdxl_finetune.config import Dataset, Subset
from sdxl_finetune.latents.catalogue import local_shelf
from sdxl_finetune.latents.encoding import Encoding, Report, encode_images
from sdxl_finetune.latents.keys import row_keys
from sdxl_finetune.latents.library import Library
from sdxl_finetune.latents.shards import Kind, Shard, ShardWriter
from sdxl_finetune.latents.store import LatentStore, build_store, find_places, missing_rows


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
        settings = {"pixels_per_latent": 8, "batch_size": 2, "threads": 2, **options}
        job = Encoding(index=index, keys=keys, known=library, encode=encode, **settings)
        for part in range(parts):
            with ShardWriter(folder, kind, part, tmp_path) as writer:
                assert sum(encode_images(job, rows[part::parts], writer)) == len(rows[part::parts])
            shards += writer.shards
        library = Library(sorted(shards, key=lambda shard: shard.path.name))
        places = find_places(index, keys, library)
        store = build_store(index, places, library.files, pixels_per_latent=8, scratch=tmp_path)
        return store, job.report, shards

    return cache
