"""Shared by all tests: shapes and types of annotated functions are checked at run time, and the golden data."""

import gzip
import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from jaxtyping import install_import_hook

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# Tests run side by side; threads that wait for one another on too few cores make them many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "1")

# Only the layers whose values are tensors: pydantic checks the config by itself.
CHECKED = ["batch", "diffusion", "data", "latents", "model", "optim", "report"]
install_import_hook([f"sdxl_finetune.{name}" for name in CHECKED], "beartype.beartype")

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402  (after the hook)
import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from hypothesis import settings  # noqa: E402
from PIL import Image  # noqa: E402

from scripts.toy.photos import write_photos  # noqa: E402
from sdxl_finetune.commands.model import main as model_tool  # noqa: E402
from sdxl_finetune.storage import Address, delete, list_files, objects  # noqa: E402
from tests.hub_server import HubServer  # noqa: E402
from tests.s3_server import S3Server, environment, running_server  # noqa: E402

torch.set_num_threads(1)  # a plugin may have imported torch before the variable was set

settings.register_profile("any machine", deadline=None)  # no test depends on the speed of the machine
settings.load_profile("any machine")

GOLDEN = Path(__file__).parent / "golden"


@cache
def _load(name: str):
    data = (GOLDEN / name).read_bytes()
    return json.loads(gzip.decompress(data) if name.endswith(".gz") else data)


@pytest.fixture(scope="session")
def golden():
    """golden(name): the parsed JSON of a file in tests/golden; golden.path is the folder."""
    _load.path = GOLDEN
    return _load


@pytest.fixture
def write_images() -> Callable[..., None]:
    """write_images(folder, {name: (width, height)}, seed=0): smooth colourful pictures, each its own."""

    def write(folder: Path, sizes: dict[str, tuple[int, int]], seed: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for number, (name, size) in enumerate(sizes.items(), seed):
            small = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
            Image.fromarray(cv2.resize(small, size, interpolation=cv2.INTER_CUBIC)).save(folder / name)

    return write


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Escapes file names that are not UTF-8 in captured output. Parallel test processes cannot send them otherwise."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    """accelerate keeps what a process has been set up for; each test sets it up anew."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A small model with random weights."""
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    assert model_tool(["init", str(path), "--seed", "3"]) == 0
    return path


@pytest.fixture
def hub(tmp_path_factory, monkeypatch) -> Iterator[HubServer]:
    """A hub on this machine that the client uses. The client knows no token but that of the test."""
    with HubServer() as server:
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf_home")))
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        yield server


@pytest.fixture
def work(tmp_path, monkeypatch, base) -> Path:
    """A user's folder, in which the test stands: photographs and a base model."""
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "images")
    (tmp_path / "base.safetensors").symlink_to(base)
    return tmp_path


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[S3Server]:
    with running_server() as server:
        yield server


@pytest.fixture
def s3(_s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A running S3 server with an empty bucket named `bucket`, which this process finds through the environment."""
    for name, value in environment(_s3_server.port).items():
        monkeypatch.setenv(name, value)
    objects.forget_stores()
    for found in list_files(Address("s3://bucket")):
        delete(Address("s3://bucket") / found.name)
    _s3_server.clear()
    yield _s3_server
    objects.forget_stores()
