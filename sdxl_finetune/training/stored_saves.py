"""Training states and checkpoints of a run that stand in an object store. Another machine may have saved them."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator

from sdxl_finetune.config import Config
from sdxl_finetune.output.checkpoints import final_name, remove, saved_names
from sdxl_finetune.output.uploads import Uploads
from sdxl_finetune.parsing import parse_json
from sdxl_finetune.storage import Address, StorageError, list_files, read
from sdxl_finetune.training.saves import STATE_SUFFIX
from sdxl_finetune.training.state import MANIFEST, STATE, TrainingState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredSaves:
    """The complete saves of one `output_name` in a store."""

    states: dict[str, float] = field(default_factory=dict)
    """Time at which each training state was saved. Its upload may have ended long after later saves."""
    checkpoints: dict[str, float] = field(default_factory=dict)
    """Time at which the upload of each checkpoint was complete."""
    interrupted: dict[str, int] = field(default_factory=dict)
    """Step of each training state that was saved because its run was stopped."""


def find_stored(config: Config, address: Address) -> StoredSaves:
    """Finds the saves with one listing, and a request for each training state. Raises StorageError."""
    names, saves = saved_names(config), StoredSaves()
    for found in list_files(address):
        name, _, rest = found.name.partition("/")
        if rest == MANIFEST and names.fullmatch(name.removesuffix(STATE_SUFFIX)):
            state = _read_state(address / name)
            saves.states[name] = state.saved_at if state else found.time
            if state and state.is_interrupted:
                saves.interrupted[name] = state.step
        elif (rest == "model_index.json" and names.fullmatch(name)) or (
            not rest and Path(name).suffix in (".safetensors", ".ckpt") and names.fullmatch(Path(name).stem)
        ):
            saves.checkpoints[name] = found.time
    return saves


def try_find_stored(config: Config) -> StoredSaves:
    """Finds the saves at the address of `output_dir`. If the store does not answer, a warning says so."""
    if config.output_address is None:
        return StoredSaves()
    try:
        return find_stored(config, config.output_address)
    except StorageError as error:
        logger.warning("%s: old saves that only the store holds are not removed by this run", error)
        return StoredSaves()


def build_uploads(config: Config, accelerator: Accelerator) -> tuple[Uploads, StoredSaves]:
    """Uploads of the run, and the saves that the store holds. Only the first rank needs and finds them."""
    stored = try_find_stored(config) if accelerator.is_main_process else StoredSaves()
    rank, address = accelerator.process_index, config.output_address
    uploads = Uploads(config, config.output_folder, final_name(config), remove, rank=rank, address=address)
    uploads.give_up_replaced(stored.states | stored.checkpoints)
    return uploads, stored


def _read_state(address: Address) -> TrainingState | None:
    try:
        return TrainingState.from_json(parse_json(read(address / STATE)))
    except (StorageError, ValueError, KeyError, TypeError, AttributeError):
        return None
