"""Opens TensorBoard's page of a run in Chromium, if Chromium is installed."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdxl_finetune.batch import Position
from sdxl_finetune.config import Config
from sdxl_finetune.output.log import Log, Step
from tests.browser import CHROMIUM, Page

TAGS = ["loss", "loss/t000-249", "grad_norm/unet", "update/unet", "lr/unet", "validation/loss", "previews"]


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """Starts TensorBoard on the logs in `folder` and yields its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0", "--load_fast", "false"]
    with (folder / "server.txt").open("w+") as output:
        server = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=output, stderr=output)
        try:
            for _ in range(3000):
                if match := re.search(r"http://127\.0\.0\.1:\d+/", (folder / "server.txt").read_text()):
                    break
                assert server.poll() is None, (folder / "server.txt").read_text()
                time.sleep(0.1)
            yield match.group()
        finally:
            server.terminate()
            server.wait(timeout=300)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: TensorBoard's page is not opened")
def test_tensorboard_shows_scalars_and_previews_in_a_browser(tmp_path: Path) -> None:
    with Log(Config(logging_dir=tmp_path), tmp_path / "run", rank=0) as log:
        log.begin(steps=4, steps_per_epoch=2)
        for step in range(1, 5):
            log.record(
                Step(
                    position=Position(epoch=0, step=step - 1, micro_batch=0, micro_batches_in_step=1),
                    loss=torch.tensor(1 / step),
                    grad_norm=torch.tensor(1.0),
                    measured={name: torch.tensor(0.5) for name in ("loss/t000-249", "grad_norm/unet", "update/unet")},
                    lr={"unet": 1e-5},
                    images=4,
                    data_wait_seconds=0.1,
                )
            )
        log.validation({"loss": 0.5}, step=4, epoch=2)
        log.previews([(0, Image.new("RGB", (64, 64), "red"), "a red picture")], step=4)
    with tensorboard(tmp_path) as address, Page() as page:
        place = f"{address}?tagFilter=loss%7Cnorm%7Cupdate%7Clr%7Cpreviews#timeseries"
        page.open(place, width=1600, height=6000)
        page.wait_for(f"{json.dumps(TAGS)}.every(tag => document.querySelector(`[title='${{tag}}']`))")
