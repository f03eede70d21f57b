"""Caches written by earlier versions of the program are used again, and caches of newer versions are left alone.

`caches.tar.xz` holds the cache of the images of `state_format_1.tar.xz` as two earlier versions wrote it: `scan_1` with
the first format of scans and with shards that call their encoder "vae", and `scan_4` as it was before there were
catalogues. Only shards cost time to make. Scans and indexes of other formats are made anew.
"""

import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from sdxl_finetune.commands.cache import cache
from sdxl_finetune.config import load_config
from sdxl_finetune.latents.catalogue import CATALOGUE

FIXTURES = Path(__file__).parents[1] / "training" / "fixtures"


@pytest.fixture
def work(tmp_path: Path, monkeypatch) -> Path:
    """A folder with images, a model, and the caches of earlier versions."""
    monkeypatch.chdir(tmp_path)
    for name in ("state_format_1", "caches"):
        with tarfile.open(FIXTURES / f"{name}.tar.xz") as archive:
            archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return tmp_path


def fill(folder: str) -> None:
    config = load_config(["--config", "old.toml", "--cache_latents_to_disk", "--cache_dir", folder], program="x")
    assert config is not None and cache(config) == 0


def latents(folder: str) -> dict[bytes, np.ndarray]:
    """All latents of a folder by cache key."""
    found = {}
    for path in Path(folder).rglob("*.latents"):
        tensors = load(path.read_bytes())
        found |= dict(zip([row.tobytes() for row in tensors["keys"]], tensors["latents"], strict=True))
    return found


def test_latents_of_earlier_versions_are_found_and_none_is_encoded_again(work, caplog) -> None:
    fill("fresh")
    expected = latents("fresh")
    assert len(expected) == 4
    for folder in ("scan_1", "scan_4"):
        before = latents(folder)
        # Other processors round otherwise in the last bit.
        assert before.keys() == expected.keys()
        for key, value in before.items():
            np.testing.assert_allclose(value.astype(float), expected[key].astype(float), atol=2e-2)
        caplog.clear()
        with caplog.at_level("INFO"):
            fill(folder)
        assert re.search(f"latents of images in {folder}/.*: 4 (there already|found again)\n", caplog.text), caplog.text
        assert not [record for record in caplog.records if record.levelname == "WARNING"]
        assert latents(folder).keys() == before.keys()
        assert not list(Path(folder).rglob("*.damaged")) and list(Path(folder).rglob(CATALOGUE))


def test_shards_of_a_newer_version_stay_and_are_named(work, caplog) -> None:
    (path,) = Path("scan_4").rglob("*.latents")
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about = header["__metadata__"] | {"format": "sdxl_finetune latents 2"}
    newer = save(load(data), about)
    path.write_bytes(newer)
    fill("scan_4")
    assert f'{path}: it has the format "sdxl_finetune latents 2" of a newer version' in caplog.text
    assert path.read_bytes() == newer and not list(Path("scan_4").rglob("*.damaged"))
    assert len(list(path.parent.glob("*.latents"))) == 2, "its images are encoded into a shard of this version"
