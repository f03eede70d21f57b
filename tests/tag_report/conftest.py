"""A small dataset of styles, and a denoiser whose loss is known in closed form."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from sdxl_finetune.batch import TextOutputs, Tokens
from sdxl_finetune.config import Config, load_config, load_datasets
from sdxl_finetune.data.index import Index, build_index
from sdxl_finetune.data.loader import TrainingDataset
from sdxl_finetune.data.unchanged import no_noise, no_timesteps
from sdxl_finetune.diffusion.loss_weights import UNWEIGHTED
from sdxl_finetune.diffusion.objective import build_objective
from sdxl_finetune.tag_report.measure import Subject, fixed_dataset

CAPTIONS = {
    "a0": "best, style_a, cat", "a1": "best, style_a, dog", "a2": "(style_a:1.2), bird", "b0": "best, Style B, cat",
    "b1": "best, style_b, dog", "c0": "best, style_c, style_b", "d0": "best, style_d, cat", "e0": "best, cat",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, in which the test stands, with images of the captions above."""
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "images"
    images.mkdir()
    for number, (name, text) in enumerate(CAPTIONS.items()):
        Image.new("RGB", (64, 64), (number * 30, 90, 160)).save(images / f"{name}.png")
        (images / f"{name}.txt").write_text(text)
    return tmp_path


OPTIONS = ["--pretrained_model_name_or_path", "images", "--train_data_dir", "images", "--resolution", "64"]
OPTIONS += ["--caption_extension", ".txt", "--output_dir", "out", "--train_batch_size", "2", "--cache_latents"]
OPTIONS += ["--tag_report_every_n_epochs", "1"]


def options(*more: str) -> Config:
    """The config of the small dataset and further options."""
    config = load_config([*OPTIONS, *more], program="sdxl-train")
    assert config is not None
    return config


def index_of(config: Config) -> Index:
    return build_index(load_datasets(config), config.cache_folder, "stop")


class Encoder(nn.Module):
    device = torch.device("cpu")


class KnownDenoiser(nn.Module):
    """Predicts (1 - k) times the target, for a caption's number k. Its loss is k^2 times the mean square of the target.

    All latents must be 1, because then the noisy latents show the noise.
    """

    def __init__(self, numbers: Callable[[str], float], predicts_v: bool = False) -> None:
        super().__init__()
        self.unet, self.te1, self.te2 = nn.Linear(1, 1), Encoder(), Encoder()
        self.numbers, self.predicts_v = numbers, predicts_v
        self.objective = build_objective("velocity" if predicts_v else "noise", zero_terminal_snr=predicts_v)
        self.encoded: list[str] = []
        self.zero_cond = False
        self.passes = 0

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        (caption,) = captions
        self.encoded.append(caption)
        ids = torch.zeros(1, 1, 77, dtype=torch.int64)
        ids[0, 0, 0] = round(self.numbers(caption) * 1e6)
        return Tokens(ids, ids)

    def encode_text(self, tokens: Tokens) -> TextOutputs:
        number = tokens.ids1[:, 0, 0] / 1e6
        return TextOutputs(number[:, None, None].float(), number[:, None].float())

    def forward(self, noisy: Tensor, timesteps: Tensor, text: TextOutputs, *_sizes: Tensor) -> Tensor:
        self.passes += len(noisy)
        alpha = self.objective.schedule.alphas_cumprod[timesteps][:, None, None, None]
        noise = (noisy - alpha.sqrt()) / (1 - alpha).sqrt()
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() if self.predicts_v else noise
        return (1 - text.pooled[:, :, None, None]) * target


def subject_of(model: KnownDenoiser, config: Config) -> Subject:
    return Subject(
        sdxl=model,
        vae=AutoencoderKL(block_out_channels=(4,), norm_num_groups=1, scaling_factor=1.0),
        tokenize=model.tokenize,
        objective=model.objective,
        loss=config.model_copy(update=UNWEIGHTED),
        autocast=nullcontext,
        device=torch.device("cpu"),
    )


def dataset_of(index: Index, model: KnownDenoiser) -> TrainingDataset:
    """All latents are 1."""
    return fixed_dataset(
        TrainingDataset(
            index=index,
            read_latents=lambda rows, _flips: np.ones((len(rows), 4, 8, 8), np.float16),
            tokenize=lambda captions: Tokens(*(torch.zeros(len(captions), 1, 77, dtype=torch.int64),) * 2),
            draw_noise=no_noise,
            draw_timesteps=no_timesteps,
            seed=0,
            max_steps=1,
        )
    )


def by_tag(numbers: Mapping[str, float], otherwise: float) -> Callable[[str], float]:
    """The number of the first text that a caption holds."""
    return lambda caption: next((number for text, number in numbers.items() if text in caption), otherwise)
