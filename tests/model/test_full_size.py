"""A file of SDXL's real size is recognised by its header, and diffusers opens it with the configs that we write.

The file is sparse (all zeros) and takes no disk space. diffusers maps it, which takes no memory.
"""

import json
import struct
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from sdxl_finetune.model.architecture import FULL
from sdxl_finetune.model.diffusers_folder import save_configs
from sdxl_finetune.model.load import inspect_checkpoint


@pytest.fixture(scope="module")
def full_path(golden, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("full") / "sdxl.safetensors"
    header, end = {}, 0
    for key, shape, _ in golden("checkpoint_keys.json.gz")["keys_fp16"]:
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def test_architecture_is_read_from_the_header_alone(full_path: Path) -> None:
    inspected = inspect_checkpoint(full_path)
    assert inspected.kind is None
    assert inspected.architecture == FULL


def test_diffusers_opens_a_full_size_file_offline(
    full_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_configs(tmp_path, FULL, {})
    pipeline = StableDiffusionXLPipeline.from_single_file(
        full_path, config=str(tmp_path), local_files_only=True, torch_dtype=torch.float16
    )
    assert sum(parameter.numel() for parameter in pipeline.unet.parameters()) == 2_567_463_684
    assert pipeline.text_encoder_2.config.num_hidden_layers == 32
    assert pipeline.vae.config.scaling_factor == 0.13025
    assert pipeline.tokenizer("a cat").input_ids == [49406, 320, 2368, 49407]
