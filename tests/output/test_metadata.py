"""Metadata of checkpoints: the fields of sd-scripts, our own fields, and neither paths nor secrets."""

import base64
import importlib.metadata
import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

import sdxl_finetune
from sdxl_finetune.config import Config
from sdxl_finetune.config.options import SECRETS
from sdxl_finetune.errors import UserError
from sdxl_finetune.output.metadata import build_metadata, load_thumbnail, modelspec, shareable, versions

NOW = datetime(2023, 11, 14, 22, 13, 20, 250_000, tzinfo=timezone.utc)
VERSION = f"sdxl_finetune/{sdxl_finetune.__version__}"


def build_config(options: list[str]) -> Config:
    """Builds the config of a golden command line. By default it has an output name and a resolution."""
    given = {"output_name": "my_model", "resolution": "1024,1024"}
    match options:
        case ["(no output_name)"]:
            del given["output_name"]
        case ["(no resolution)"]:
            del given["resolution"]
        case ["--v_parameterization"]:
            given["v_parameterization"] = True
        case [first, *_] if first.startswith("--"):
            pairs = zip(options[::2], options[1::2], strict=True)
            given |= {
                name[2:]: int(value) if "timestep" in name else value for name, value in pairs if name != "--clip_skip"
            }
    return Config(**given)


def test_modelspec_is_golden(golden) -> None:
    """differences.md: modelspec.implementation_version names this package.

    The config refuses clip_skip, which SDXL does not have, so modelspec.encoder_layer is never written.
    """
    examples = golden("checkpoint_keys.json.gz")["metadata"]["examples"]
    assert len(examples) == 11
    for example in examples:
        wanted = example["metadata"] | {"modelspec.implementation_version": VERSION}
        if "--clip_skip" in example["cli"]:
            del wanted["modelspec.encoder_layer"]
        assert modelspec(build_config(example["cli"]), now=NOW) == wanted


def test_the_date_is_local_time() -> None:
    local = NOW.astimezone(timezone(timedelta(hours=9)))
    fields = modelspec(Config(), now=local)
    assert fields["modelspec.date"] == "2023-11-15T07:13:20"
    assert fields["modelspec.title"] == "Checkpoint@1700000000.25"


def test_our_fields_hold_epoch_step_seed_and_config() -> None:
    config = Config(output_name="m", resolution="832,1216", learning_rate=3e-5)
    metadata = build_metadata(config, epoch=2, step=40, seed=7, now=NOW)
    assert all(isinstance(value, str) for value in metadata.values())
    assert {name.split(".")[0] for name in metadata} == {"modelspec", "sdxl_finetune"}
    assert [metadata[f"sdxl_finetune.{name}"] for name in ("epoch", "step", "seed")] == ["2", "40", "7"]
    assert metadata["sdxl_finetune.version"] == sdxl_finetune.__version__
    assert json.loads(metadata["sdxl_finetune.versions"])["torch"] == importlib.metadata.version("torch")
    kept = json.loads(metadata["sdxl_finetune.config"])
    assert kept["resolution"] == "832,1216" and kept["learning_rate"] == 3e-5
    assert Config(**kept) == config


def test_metadata_contains_neither_secrets_nor_paths(tmp_path: Path) -> None:
    """Sets every option that may hold a path or a secret, and finds none of the values in the metadata."""
    secret = "do-not-save"
    paths = {
        name: tmp_path / secret / name
        for name, field in Config.model_fields.items()
        if "Path" in str(field.annotation) + str(field.metadata)
    }
    assert {"output_dir", "pretrained_model_name_or_path", "train_data_dir", "sample_prompts"} <= paths.keys()
    secrets = dict.fromkeys(SECRETS & Config.model_fields.keys(), secret)
    assert "wandb_api_key" in secrets
    thumbnail = tmp_path / secret / "thumbnail.png"
    scores = str(tmp_path / secret / "scores.csv")
    config = Config(
        **paths, **secrets, metadata_thumbnail=str(thumbnail), quality_tags="a", quality_scores=scores, log_with="all"
    )
    saved = json.dumps(build_metadata(config, epoch=1, step=1, seed=1, now=NOW))
    assert secret not in saved and str(tmp_path) not in saved
    assert shareable(config)["log_with"] == "all"


def test_a_thumbnail_is_a_file_or_a_data_url(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    (tmp_path / "a.unheard_of").write_bytes(b"\x00")
    url = load_thumbnail(str(tmp_path / "a.png"))
    assert url == "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()
    assert load_thumbnail(url) == url
    assert load_thumbnail(None) is None
    assert load_thumbnail(str(tmp_path / "a.unheard_of")) == "data:application/octet-stream;base64,AA=="
    assert modelspec(Config(), now=NOW, thumbnail=url)["modelspec.thumbnail"] == url
    with pytest.raises(UserError, match="metadata_thumbnail"):
        load_thumbnail(str(tmp_path / "none.png"))


def test_versions_include_python_and_the_main_libraries() -> None:
    assert {"python", "sdxl_finetune", "torch", "diffusers", "transformers"} <= versions().keys()
