"""Metadata of checkpoints: what the model is, and how it was made.

The `modelspec.*` fields equal those of sd-scripts (Stability's ModelSpec 1.0.1; golden checkpoint_keys.json.gz), except
that `implementation_version` names this package. The `sdxl_finetune.*` fields hold what a resumed run needs: step,
epoch, seed, library versions and the config. The config is saved without paths and without secrets. All values are
text, as safetensors requires.
"""

import base64
import importlib.metadata
import json
import mimetypes
import platform
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any

import sdxl_finetune
from sdxl_finetune.config import Config, MetadataOptions
from sdxl_finetune.config.fields import plain
from sdxl_finetune.config.options import SECRETS, secrets_of
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.model.declared import MODELSPEC, SDXL_SIZE
from sdxl_finetune.output.stages import Stage, stages_json
from sdxl_finetune.redaction import replaced

PREFIX = "sdxl_finetune."
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "bitsandbytes", "numpy", "pydantic")
"""Libraries whose version can change a result."""
TEXT_PATHS = {"metadata_thumbnail", "quality_scores"}
"""Options with text values that may be paths. All other paths have the type Path."""


def build_metadata(
    config: Config,
    *,
    epoch: int,
    step: int,
    seed: int,
    now: datetime,
    thumbnail: str | None = None,
    resume: str = "{}",
    stages: Sequence[Stage] = (),
) -> dict[str, str]:
    """Builds the metadata of a checkpoint that is saved after `step` optimizer steps and `epoch` whole epochs.

    `now` is the time of saving, with its time zone. `thumbnail` is the result of `load_thumbnail`. `resume` is JSON
    text that a resumed run needs (TrainingState.to_metadata). `stages` are the stages of training.
    """
    fields = {
        "version": sdxl_finetune.__version__,
        "step": str(step),
        "epoch": str(epoch),
        "seed": str(seed),
        "versions": json.dumps(versions(), sort_keys=True),
        "config": json.dumps(shareable(config), sort_keys=True, ensure_ascii=False),
        "resume": resume,
    }
    if stages:
        fields["stages"] = json.dumps(stages_json(stages), sort_keys=True, ensure_ascii=False)
    return modelspec(config, now=now, thumbnail=thumbnail) | {PREFIX + name: value for name, value in fields.items()}


def modelspec(config: Config, *, now: datetime, thumbnail: str | None = None) -> dict[str, str]:
    """Builds the fields of sd-scripts. Fields without a value are left out.

    `modelspec.date` is written without the time zone, as sd-scripts does.
    """
    width, height = config.resolution or SDXL_SIZE
    fields = {name.removeprefix("metadata_"): getattr(config, name) for name in MetadataOptions.model_fields} | {
        "sai_model_spec": "1.0.1",
        "architecture": "stable-diffusion-xl-v1-base",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "implementation_version": f"sdxl_finetune/{sdxl_finetune.__version__}",
        "title": config.metadata_title or config.output_name or f"Checkpoint@{now.timestamp()}",
        "date": now.replace(microsecond=0, tzinfo=None).isoformat(),
        "resolution": f"{width}x{height}",
        "prediction_type": MODELSPEC[config.objective],
        "thumbnail": thumbnail,
    }
    if config.min_timestep is not None or config.max_timestep is not None:
        fields["timestep_range"] = ",".join(map(str, config.timestep_range))
    secrets = secrets_of(config)
    return {f"modelspec.{name}": replaced(value, secrets) for name, value in fields.items() if value is not None}


def load_thumbnail(thumbnail: str | None) -> str | None:
    """Returns a thumbnail as a data URL. `thumbnail` is an image file, or a data URL already.

    It is called when a run starts, so that a wrong path is reported at once. Raises UserError if the file cannot be
    read.
    """
    if thumbnail is None or thumbnail.startswith("data:"):
        return thumbnail
    path = Path(thumbnail)
    try:
        content = path.read_bytes()
    except OSError as error:
        message = f"the file cannot be read ({error.strerror}). Give an image file or a data URL"
        raise UserError(Problem(message, key="metadata_thumbnail", value=thumbnail)) from error
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def shareable(config: Config) -> dict[str, Any]:
    """Returns the options that are set, with values as in a config file, but without secrets, paths and addresses.

    A secret that stands in the value of another option, for example in a description, is replaced by ***.
    """
    secrets = secrets_of(config)
    return {
        name: replaced(plain(value), secrets)
        for name, value in config
        if value is not None and not isinstance(value, PurePath) and name not in SECRETS | TEXT_PATHS
    }


def versions() -> dict[str, str]:
    """Returns the versions of Python, this package and the installed libraries, without importing the libraries."""
    found = {"python": platform.python_version(), "sdxl_finetune": sdxl_finetune.__version__}
    for library in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[library] = importlib.metadata.version(library)
    return found
