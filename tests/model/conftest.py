"""The golden model: a small SDXL whose weights follow the rule of golden/forward.json, as a single file."""

import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_finetune.model.load import Loaded, load_checkpoint


def _weight(key: str, shape: list[int]) -> np.ndarray:
    if key.endswith("logit_scale"):
        return np.array(4.6055, dtype=np.float32)
    drawn = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        return np.float32(1) + np.float32(0.1) * drawn if key.endswith("weight") else np.float32(0.02) * drawn
    return drawn * np.float32(0.02) if "embedding" in key else drawn / np.float32(math.sqrt(math.prod(shape[1:])))


@pytest.fixture(scope="session")
def golden_path(golden, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = golden("forward.json")["shapes"]
    path = tmp_path_factory.mktemp("golden") / "golden.safetensors"
    save_file({key: torch.from_numpy(_weight(key, shape)) for key, shape in shapes.items()}, path)
    return path


@pytest.fixture(scope="session")
def golden_model(golden_path: Path) -> Loaded:
    """The golden model. Tests share it, and a test that changes it makes a copy."""
    return load_checkpoint(golden_path, dtype=torch.float32)


@pytest.fixture(scope="session")
def golden_tensors(golden) -> dict[str, torch.Tensor]:
    """Inputs and outputs of the reference's modules."""
    golden("forward.json")
    return load_file(golden.path / "forward.safetensors")
