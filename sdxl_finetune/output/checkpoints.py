"""Saved weights: when they are due, what they are called, which older ones they push out, and writing them.

When, names and removals are the reference's (golden checkpoint_keys.json.gz: names, removal, save_runs): numbered
files every N epochs and every N steps, none for the last epoch, `{output_name}` at the end. Epochs and steps are
counted from the start of training, never from a resume. Files exist under their names only when they are complete,
and nothing older is removed before.
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

from sdxl_finetune.config import Config
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
"""What save_precision names; None: as the model is in memory."""
TOO_LARGE = "-float"
"""Follows the name of weights that were asked for in float16 and do not fit it."""


@dataclass(frozen=True, kw_only=True)
class Due:
    """Weights that are to be saved now. Names are without extension."""

    name: str
    replaces: str | None = None
    """The weights that are removed once these are complete."""


def weights_due(config: Config, *, epoch: int | None, step: int, epochs: int) -> list[Due]:
    """The numbered files to save after an optimizer step, the `step`-th of the run. `epoch` is the number of the
    epoch that it ends, None within an epoch; `epochs` is how many there will be.
    """
    keep_epochs, keep_steps = config.save_last_n_epochs, config.save_last_n_steps
    return due_after(config, epoch=epoch, step=step, epochs=epochs, keep_epochs=keep_epochs, keep_steps=keep_steps)


def due_after(
    config: Config, *, epoch: int | None, step: int, epochs: int, keep_epochs: int | None, keep_steps: int | None
) -> list[Due]:
    """The same for whatever is saved with the weights, of which so many are kept."""
    due = []
    every = config.save_every_n_steps
    if every and step % every == 0:
        old = replaced_step(step, every, keep_steps)
        due.append(Due(name=step_name(config, step), replaces=None if old is None else step_name(config, old)))
    every = epochs_between_saves(config, epochs)
    if every and epoch and epoch % every == 0 and epoch < epochs:
        old = replaced_epoch(epoch, every, keep_epochs)
        due.append(Due(name=epoch_name(config, epoch), replaces=None if old is None else epoch_name(config, old)))
    return due


def final_weights(config: Config) -> Due:
    """What to save at the end of training."""
    return Due(name=config.output_name or "last")


def epochs_between_saves(config: Config, epochs: int) -> int | None:
    """save_n_epoch_ratio asks for that many files over the run, and wins over save_every_n_epochs."""
    if config.save_n_epoch_ratio:
        return epochs // config.save_n_epoch_ratio or 1
    return config.save_every_n_epochs


def replaced_epoch(epoch: int, every: int, keep: int | None) -> int | None:
    """The epoch whose file the file of `epoch` pushes out when the last `keep` files are kept; None keeps all."""
    if keep is None or epoch < every * keep:
        return None
    return epoch - every * keep


def replaced_step(step: int, every: int, keep: int | None) -> int | None:
    """The step whose file the file of `step` pushes out when files live for `keep` steps: the last multiple of
    `every` that is more than `keep` steps ago.
    """
    if keep is None or step <= keep:
        return None
    return (step - keep - 1) // every * every


def epoch_name(config: Config, epoch: int) -> str:
    return f"{config.output_name or 'epoch'}-{epoch:06d}"


def step_name(config: Config, step: int) -> str:
    return f"{config.output_name or 'at'}-step{step:08d}"


def saved_names(config: Config) -> re.Pattern[str]:
    """Matches the names under which this config saves, without extension."""
    name = config.output_name and re.escape(config.output_name)
    alternatives = rf"{name or 'epoch'}-\d{{6,}}|{name or 'at'}-step\d{{8,}}|{name or 'last'}"
    return re.compile(rf"(?:{alternatives})(?:{TOO_LARGE})?")


def kind_to_save(config: Config, loaded: Literal["safetensors", "ckpt", "diffusers"]) -> SaveAs:
    """How weights are saved: save_model_as, else as the model that was loaded, a folder with safetensors in it.
    use_safetensors turns either way of pickling into safetensors.
    """
    kind: SaveAs = config.save_model_as or ("diffusers_safetensors" if loaded == "diffusers" else loaded)
    if config.use_safetensors and kind == "ckpt":
        return "safetensors"
    if config.use_safetensors and kind == "diffusers":
        return "diffusers_safetensors"
    return kind


def path_of(directory: Path, name: str, kind: SaveAs) -> Path:
    """Where the weights of that name lie: a file, or a folder for the diffusers kinds."""
    return directory / (name if kind.startswith("diffusers") else f"{name}.{kind}")


def existing(directory: Path, name: str, kind: SaveAs) -> list[Path]:
    """The weights of that name that there are, or of the one that they get if they are too large for float16; the
    newest last.
    """
    found = [path for one in (name, name + TOO_LARGE) if (path := path_of(directory, one, kind)).exists()]
    return sorted(found, key=lambda path: path.stat().st_mtime)


def remove_replaced(due: Due, directory: Path, kind: SaveAs) -> None:
    """Removes the weights that those which were due have taken the place of."""
    if due.replaces:
        for old in (due.replaces, due.replaces + TOO_LARGE):
            remove(path_of(directory, old, kind))


def save_weights(
    due: Due,
    config: Config,
    model: SDXL,
    vae: AutoencoderKL,
    *,
    directory: Path,
    kind: SaveAs,
    metadata: Mapping[str, str],
    epoch: int,
    step: int,
) -> Path:
    """Writes the weights that are due, then removes those that they replace; returns where they are.

    A run is not lost to a weight beyond float16's range: the file is then written in float32, its name says so, and
    so does a warning with the names of the tensors.
    """
    name, dtype = due.name, PRECISIONS[config.save_precision]
    if unfit := saturated(model, vae, dtype):
        name, dtype = name + TOO_LARGE, torch.float32
        logger.warning(
            "%d tensors hold values beyond float16's range (%s); saving %s in float32",
            len(unfit),
            ", ".join(unfit[:5]) + (", ..." if len(unfit) > 5 else ""),
            name,
        )
    path = path_of(directory, name, kind)
    with atomic_path(path) as temporary:
        save_checkpoint(
            temporary, model, vae, save_as=kind, dtype=dtype, metadata=metadata, epoch=epoch, global_step=step
        )
    logger.info("saved %s", path)
    remove_replaced(due, directory, kind)
    return path


def remove(path: Path) -> None:
    """Removes a file or folder, if it is there; a failure is no reason to end a run."""
    try:
        if path.is_dir():
            # Renamed first, so that half a folder never stands under its name.
            doomed = path.rename(path.with_name(f".{path.name}.{os.getpid()}.old.tmp"))
            shutil.rmtree(doomed)
        elif path.exists():
            path.unlink()
        else:
            return
        logger.info("removed %s", path)
    except OSError as error:
        logger.warning("%s could not be removed: %s", path, error.strerror)
