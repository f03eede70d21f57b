"""Checkpoints: their names and paths, writing them, and removing older ones.

Names are the reference's (golden checkpoint_keys.json.gz: names): `{output_name}-{epoch:06d}`,
`{output_name}-step{step:08d}`, and `{output_name}` at the end. A file exists under its final name only when it is
complete. training/saves.py decides when a checkpoint is due.
"""

import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL

from sdxl_finetune.config import Config, SavingOptions
from sdxl_finetune.files import atomic_path
from sdxl_finetune.model.save import SaveAs, saturated, save_checkpoint
from sdxl_finetune.model.sdxl import SDXL

logger = logging.getLogger(__name__)

PRECISIONS: Mapping[str | None, torch.dtype | None] = {
    None: None,
    "float": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
"""Data type for each value of `save_precision`. None keeps the data type that the model has in memory."""
FLOAT_SUFFIX = "-float"
"""Added to the name of a checkpoint that is saved in float32 because float16 cannot hold its values."""


@dataclass(frozen=True, kw_only=True)
class Save:
    """A checkpoint or training state to save now. Names have no file extension."""

    name: str
    replaces: str | None = None
    """Name of the older one that is removed once this one is complete."""


def epoch_name(options: SavingOptions, epoch: int) -> str:
    """Name, without extension, of the checkpoint saved after `epoch` epochs."""
    return f"{options.output_name or 'epoch'}-{epoch:06d}"


def step_name(options: SavingOptions, step: int) -> str:
    """Name, without extension, of the checkpoint saved after `step` optimizer steps."""
    return f"{options.output_name or 'at'}-step{step:08d}"


def final_name(options: SavingOptions) -> str:
    """Name, without extension, of the checkpoint saved at the end of training."""
    return options.output_name or "last"


def saved_names(options: SavingOptions) -> re.Pattern[str]:
    """A pattern that matches every name, without extension, that a run with these options saves under."""
    name = options.output_name and re.escape(options.output_name)
    alternatives = rf"{name or 'epoch'}-\d{{6,}}|{name or 'at'}-step\d{{8,}}|{name or 'last'}"
    return re.compile(rf"(?:{alternatives})(?:{FLOAT_SUFFIX})?")


def format_to_save(options: SavingOptions, loaded: Literal["safetensors", "ckpt", "diffusers"]) -> SaveAs:
    """The format of saved checkpoints: `save_model_as`, else the format that was loaded.

    A diffusers folder is then saved with safetensors. `use_safetensors` replaces a pickled format by safetensors.
    """
    save_as: SaveAs = options.save_model_as or ("diffusers_safetensors" if loaded == "diffusers" else loaded)
    if options.use_safetensors and save_as == "ckpt":
        return "safetensors"
    if options.use_safetensors and save_as == "diffusers":
        return "diffusers_safetensors"
    return save_as


def checkpoint_path(directory: Path, name: str, save_as: SaveAs) -> Path:
    """The path of the checkpoint of that name: a file, or a folder for the diffusers formats."""
    return directory / (name if save_as.startswith("diffusers") else f"{name}.{save_as}")


def checkpoint_paths(directory: Path, name: str, save_as: SaveAs) -> list[Path]:
    """The paths under which a checkpoint of that name may stand: as asked for, and with FLOAT_SUFFIX."""
    return [checkpoint_path(directory, name + suffix, save_as) for suffix in ("", FLOAT_SUFFIX)]


def existing_checkpoints(directory: Path, name: str, save_as: SaveAs) -> list[Path]:
    """The checkpoints of that name on the disk, oldest first."""
    paths = checkpoint_paths(directory, name, save_as)
    return sorted((path for path in paths if path.exists()), key=lambda path: path.stat().st_mtime)


def overwritten(options: Config, save_as: SaveAs) -> str | None:
    """Says that a new run replaces the final checkpoint of an earlier run at its end; None if there is none."""
    existing = existing_checkpoints(options.output_folder, final_name(options), save_as)
    if not existing:
        return None
    message = f"{existing[-1]} exists and is replaced at the end of this run: to keep it, set another output_name"
    return f"{message}, or continue its run with resume = auto"


def replaced(save: Save, directory: Path, save_as: SaveAs, *, in_store: bool = False) -> list[Path]:
    """Returns the checkpoints that this one replaces.

    With `in_store`, paths that do not exist count too, because an object store may hold them.
    """
    if save.replaces is None:
        return []
    find = checkpoint_paths if in_store else existing_checkpoints
    return find(directory, save.replaces, save_as)


def write_checkpoint(
    path: Path,
    precision: torch.dtype | None,
    model: SDXL,
    vae: AutoencoderKL,
    *,
    save_as: SaveAs,
    metadata: Mapping[str, str],
    epoch: int,
    step: int,
) -> None:
    """Writes a checkpoint. It stands at `path` once it is complete. Raises OSError if storage fails."""
    with atomic_path(path) as temporary:
        save_checkpoint(
            temporary, model, vae, save_as=save_as, dtype=precision, metadata=metadata, epoch=epoch, global_step=step
        )
    logger.info("saved %s", path)


def name_and_precision(
    save: Save, options: SavingOptions, model: SDXL, vae: AutoencoderKL
) -> tuple[str, torch.dtype | None]:
    """Returns the name of a checkpoint and the data type of its weights. None keeps that in memory.

    A weight that is too large for float16 does not end the run. The file is then written in float32, FLOAT_SUFFIX is
    added to its name, and a warning names the tensors.
    """
    name, dtype = save.name, PRECISIONS[options.save_precision]
    if too_large := saturated(model, vae, dtype):
        name, dtype = name + FLOAT_SUFFIX, torch.float32
        logger.warning(
            "save_precision = fp16: %d tensors hold values beyond float16's range (%s); %s is saved in float32",
            len(too_large),
            ", ".join(too_large[:5]) + (", ..." if len(too_large) > 5 else ""),
            name,
        )
    return name, dtype


def remove(path: Path) -> None:
    """Removes a file or folder if it exists. A failure is logged as a warning and does not end the run."""
    try:
        if path.is_dir():
            # The folder is renamed first, so that a half-deleted folder never stands under the final name.
            doomed = path.rename(path.with_name(f".{path.name}.{os.getpid()}.old.tmp"))
            shutil.rmtree(doomed)
        elif path.exists():
            path.unlink()
        else:
            return
        logger.info("removed %s", path)
    except OSError as error:
        logger.warning("%s could not be removed: %s", path, error.strerror)
