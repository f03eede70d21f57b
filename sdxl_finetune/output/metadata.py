"""The metadata of saved weights: what model this is, and how it was made.

The `modelspec.*` fields are the reference's (Stability's ModelSpec 1.0.1; golden checkpoint_keys.json.gz, metadata)
but for implementation_version, which names this package. Under `sdxl_finetune.` stands what a run needs to go on
from the file, and what a reader needs to trust it: step, epoch, seed, versions, and the config without the paths
of the machine and without secrets. Everything is a string, as safetensors wants it.
"""

import base64
import importlib.metadata
import json
import mimetypes
import platform
from datetime import datetime
from pathlib import Path
from typing import Any

import sdxl_finetune
from sdxl_finetune.config import Config, NoiseOptions
from sdxl_finetune.config.fields import plain
from sdxl_finetune.config.options import SECRETS
from sdxl_finetune.errors import Problem, UserError

PREFIX = "sdxl_finetune."
FREE_FIELDS = (
    "author",
    "description",
    "license",
    "tags",
    "usage_hint",
    "merged_from",
    "trigger_phrase",
    "preprocessor",
    "is_negative_embedding",
)
"""The options metadata_x that are written as modelspec.x as they are."""
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "bitsandbytes", "numpy", "pydantic")
LOCAL = {"metadata_thumbnail"}
"""Options that may hold a path as plain text; those that are typed as paths are known by their type."""


def build_metadata(
    config: Config,
    *,
    epoch: int,
    step: int,
    seed: int,
    now: datetime,
    thumbnail: str | None = None,
    resume: str = "{}",
) -> dict[str, str]:
    """The metadata of weights saved after `step` optimizer steps and `epoch` whole epochs, from the start of training.

    `resume` is JSON text that a resumed run needs (TrainingState.to_metadata); `now` is the time of saving, with
    its time zone (modelspec.date is written without it, as in the reference); `thumbnail` is what `load_thumbnail`
    gave.
    """
    own = {
        "version": sdxl_finetune.__version__,
        "step": str(step),
        "epoch": str(epoch),
        "seed": str(seed),
        "versions": json.dumps(versions(), sort_keys=True),
        "config": json.dumps(shareable(config), sort_keys=True, ensure_ascii=False),
        "resume": resume,
    }
    return modelspec(config, now=now, thumbnail=thumbnail) | {PREFIX + name: value for name, value in own.items()}


def modelspec(config: Config, *, now: datetime, thumbnail: str | None = None) -> dict[str, str]:
    """The reference's fields; those that have nothing to say are left out."""
    width, height = config.resolution or (1024, 1024)
    fields: dict[str, str | None] = {
        "sai_model_spec": "1.0.1",
        "architecture": "stable-diffusion-xl-v1-base",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "implementation_version": f"sdxl_finetune/{sdxl_finetune.__version__}",
        "title": config.metadata_title or config.output_name or f"Checkpoint@{now.timestamp()}",
        "date": now.replace(microsecond=0, tzinfo=None).isoformat(),
        "resolution": f"{width}x{height}",
        "prediction_type": "v" if config.v_parameterization else "epsilon",
        "timestep_range": _timestep_range(config),
        "thumbnail": thumbnail,
    } | {name: getattr(config, f"metadata_{name}") for name in FREE_FIELDS}
    return {f"modelspec.{name}": value for name, value in fields.items() if value is not None}


def _timestep_range(config: NoiseOptions) -> str | None:
    if config.min_timestep is None and config.max_timestep is None:
        return None
    highest = 1000 if config.max_timestep is None else config.max_timestep
    return f"{config.min_timestep or 0},{highest}"


def load_thumbnail(thumbnail: str | None) -> str | None:
    """The image as a data URL: `thumbnail` is one already, or the path of a file. Read once, when a run starts, so
    that a wrong path stops it then. Raises UserError if there is no such file.
    """
    if thumbnail is None or thumbnail.startswith("data:"):
        return thumbnail
    path = Path(thumbnail)
    try:
        content = path.read_bytes()
    except OSError as error:
        message = f"cannot be read ({error.strerror}); give an image file or a data: URL"
        raise UserError(Problem(message, key="metadata_thumbnail", value=thumbnail)) from error
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def shareable(config: Config) -> dict[str, Any]:
    """The options that are set, as a config file holds them, without secrets and without places on this machine."""
    return {
        name: plain(value)
        for name, value in config
        if value is not None and not isinstance(value, Path) and name not in SECRETS | LOCAL
    }


def versions() -> dict[str, str]:
    """Of Python and of the libraries whose change can change a result; read without importing them."""
    own = {"python": platform.python_version(), "sdxl_finetune": sdxl_finetune.__version__}
    return own | {name: version for name in LIBRARIES if (version := _version(name))}


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
