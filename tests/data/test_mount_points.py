"""An index of one machine on another one, which has the same images at another path."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sdxl_finetune.config import Config, load_datasets
from sdxl_finetune.data.index import Index, build_index
from sdxl_finetune.data.mount_points import with_folders_of_this_machine
from sdxl_finetune.errors import UserError


@pytest.fixture
def machines(tmp_path: Path, write_images) -> Callable[..., tuple[Index, Config]]:
    """machines(**options): the index of a machine whose images are gone, and the config of one that has a copy."""
    for name in ("2_cat", "3_dog"):
        write_images(tmp_path / "first" / name, {"a.png": (64, 64), "b.png": (96, 64)}, seed=len(name))
    shared = {"resolution": 64, "min_bucket_reso": 32, "bucket_reso_steps": 32, "enable_bucket": True}

    def build(**options: object) -> tuple[Index, Config]:
        first = Config(train_data_dir=tmp_path / "first", **shared)
        index = build_index(load_datasets(first), tmp_path / "cache", "stop")
        shutil.copytree(tmp_path / "first", tmp_path / "mnt" / "second")  # keeps modification times, as rsync -t
        shutil.rmtree(tmp_path / "first")
        return index, Config(train_data_dir=tmp_path / "mnt" / "second", **{**shared, **options})

    return build


def test_the_folders_of_this_machine_take_the_place_of_the_first_machine_s(machines, tmp_path: Path) -> None:
    index, config = machines()
    here = with_folders_of_this_machine(index, config)
    for row in range(4):
        assert here[row].path == tmp_path / "mnt" / "second" / index[row].path.relative_to(tmp_path / "first")
        assert here[row].load((0, 0), here[row].read(unchanged=True)).size
    assert here.facts() == index.facts() and np.array_equal(here.stat_hashes, index.stat_hashes), "one cache for both"
    assert with_folders_of_this_machine(here, config) is here


def test_other_folders_or_options_are_refused_with_both_paths(machines, tmp_path: Path) -> None:
    index, config = machines(flip_aug=True)
    paths = rf"first machine reads images from {tmp_path / 'first' / '2_cat'}.*names {tmp_path / 'mnt' / 'second'}"
    with pytest.raises(UserError, match=paths):
        with_folders_of_this_machine(index, config)
    same = config.model_copy(update={"flip_aug": False})
    assert with_folders_of_this_machine(index, same).path == index.path
    (tmp_path / "mnt" / "second" / "3_dog").rename(tmp_path / "mnt" / "second" / "3_cow")
    with pytest.raises(UserError, match=paths):
        with_folders_of_this_machine(index, same)
