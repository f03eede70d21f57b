"""Where a run starts: anew, from a training state, or from a checkpoint. Checks that data and options still fit.

From a training state the rest of the run is exactly what it would have been. From a checkpoint the counters, learning
rates, batches and noise continue; the optimizer starts anew, and the weights are what the file's precision holds.
Either way the images must come in the same order as before. Therefore the facts that the order depends on are saved,
and compared with those of the resumed run.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_finetune.config import Config, ResumeOptions
from sdxl_finetune.config.hub import AUTO
from sdxl_finetune.data.batch_plan import Plan
from sdxl_finetune.data.index import MARK_FACTS, Index
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.model.load import open_checkpoint
from sdxl_finetune.output.checkpoints import saved_names
from sdxl_finetune.output.hub import download_start
from sdxl_finetune.output.metadata import PREFIX, shareable
from sdxl_finetune.output.stages import recorded_stages
from sdxl_finetune.storage import Address, StorageError, list_files, read
from sdxl_finetune.storage.folders import fetch, fetch_to, files_at
from sdxl_finetune.training.option_files import saved_options
from sdxl_finetune.training.saves import STATE_SUFFIX
from sdxl_finetune.training.state import OPTIMIZER, WEIGHTS, TrainingState, is_saved_name, load_state, peek_state
from sdxl_finetune.training.stored_saves import find_stored

logger = logging.getLogger(__name__)

LEARNED = ("edm2_loss_weighting_num_channels", "edm2_loss_weighting_optimizer")
"""Options that the saved state of learned loss weights cannot follow."""
HEAD = 1 << 20
"""Bytes of a file that tell it from another one. They hold the metadata of a checkpoint, with the time of saving."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """A training state or checkpoint that a run continues from."""

    path: Path
    """Directory of the training state, or the checkpoint's file or folder."""
    is_state: bool
    """True for a training state, False for a checkpoint."""
    state: TrainingState
    address: Address | None = None
    """Place from which other machines download it; None for a path that all machines share."""
    content: str = ""
    """The result of `content_of` for what the first process found at an address."""

    def is_in(self, config: Config) -> bool:
        """True if this stands in a folder that this run saves in, or at the address of `output_dir`."""
        if self.address and self.address.parent == config.output_address:
            return True
        return self.path.resolve().parent in [folder.resolve() for folder in config.save_folders]

    def is_of(self, config: Config) -> bool:
        """True if a run with these options saves under this name, in this place."""
        return self.is_in(config) and is_saved_name(config, self.path.name)

    @property
    def weights(self) -> Path:
        """The checkpoint to load the model from."""
        return self.path / WEIGHTS if self.is_state else self.path

    @property
    def progress(self) -> str:
        """How far the run was when this was saved."""
        state = self.state
        if state.steps_into_epoch:
            return f"after step {state.step} (in epoch {state.epoch + 1})"
        return f"after step {state.step}" + (f" (the end of epoch {state.epoch})" if state.epoch else "")

    @property
    def optimizer(self) -> Path:
        """The optimizer's file of a training state."""
        return self.path / OPTIMIZER


def find_start(config: Config) -> Start | None:
    """Finds what `resume` asks for and logs it; None to start anew.

    Raises UserError if a given path is neither a sound training state nor a checkpoint that says how far it was
    trained.
    """
    if config.resume is None:
        return None
    if config.resume == AUTO:
        start = next(_newest(config), None)
    elif isinstance(config.resume, Address):
        start = _load(_download(config.resume, config), config.resume)
    else:
        start = _load(download_start(config) if config.resume_from_huggingface else config.resume)
    if start is None:
        name = config.output_name or "this run"
        message = "resume = auto: %s has no training state and no checkpoint of %s; training starts anew"
        logger.info(message, config.output_dir, name)
        return None
    kind = "training state" if start.is_state else "checkpoint"
    if start.state.holds_ema:
        kind += " of EMA weights"
    if not start.is_state:
        kind += " (the optimizer starts anew)"
    logger.info("resuming %s from the %s %s", start.progress, kind, start.path)
    return start


def find_start_before(config: Config, step: int) -> Start | None:
    """Finds the newest save of `output_name` with fewer steps than `step`; else what the run itself resumed from.

    Training states come before checkpoints. Returns None if there is nothing, or only later saves.
    """
    for start in _newest(config):
        if start.state.step < step:
            return start
    own = None if config.resume in (None, AUTO) or config.resume_from_huggingface else find_start(config)
    return own if own and own.state.step < step else None


def start_here(start: Start, config: Config) -> Start:
    """Returns the start with its path on this machine. What another machine found at an address is downloaded.

    An earlier run may have left another file of the same name here. Raises UserError if the address does not hold what
    the first process has found.
    """
    if start.address is None or (start.path.exists() and content_of(start.path) == start.content):
        return start
    path = _download(start.address, config)
    if content_of(path) != start.content:
        message = f"differs from {start.path} on the first machine: wait until its upload is complete"
        raise UserError(Problem(message, key="resume", value=str(start.address)))
    return replace(start, path=path)


def content_of(place: Path | Address) -> str:
    """A hash that differs for saves of different runs under one name: of size and first bytes of each file."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(place, Path) and place.is_file():
        sizes = {"": place.stat().st_size}
    else:
        sizes = {one.name: one.size for one in (files_at(place) if isinstance(place, Address) else list_files(place))}
    for name, size in sorted(sizes.items()):
        digest.update(b"%d " % size + read(place / name if name else place, 0, min(size, HEAD)))
    return digest.hexdigest()


def _download(address: Address, config: Config) -> Path:
    """The path of a save on this machine. A local one of the same name counts if it is that of the address."""
    try:
        if address.parent == config.output_address:
            path = config.output_folder / address.name
            if not path.exists():
                fetch_to(address, path)
            if content_of(path) == content_of(address):
                return path
        return fetch(address, config.local_folder / "downloads")
    except StorageError as error:
        raise UserError(Problem(error.reason, key="resume", value=str(address))) from None


def data_order(index: Index, plan: Plan) -> dict[str, Any]:
    """The facts that the order of the images depends on, by names that a message can show."""
    return {
        **index.facts(),
        "images in a batch of all processes": _batch_sizes(index, plan),
        "gradient_accumulation_steps": plan.accumulation,
        "seed": plan.seed,
    }


def _batch_sizes(index: Index, plan: Plan) -> list[int]:
    """Images of a global batch: one number, or if datasets differ, a number for each dataset that has buckets."""
    _, first = np.unique([bucket.dataset for bucket in index.buckets], return_index=True)
    sizes: list[int] = plan.batch_sizes[first].tolist()
    return sizes if len(set(sizes)) > 1 else sizes[:1]


def differing(start: Start, order: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that differ from those of the resumed run, with their present values."""
    before = start.state.data_order or {}
    facts = {**dict.fromkeys(MARK_FACTS), **order}
    return {fact: value for fact, value in facts.items() if before.get(fact) != value}


def may_be_undecodable(start: Start, order: Mapping[str, Any]) -> int:
    """The number of images that are in use now and were not before, if nothing else has changed; 0 otherwise.

    `sdxl-check` decodes no image. The run leaves out images that cannot be decoded, and may then have the same images.
    """
    changed, before = differing(start, order), start.state.data_order or {}
    is_only_images = changed.keys() <= {"images", "images with repeats", "repeats"}
    return max(0, order["images"] - before.get("images", order["images"])) if is_only_images else 0


def resumed_origin(start: Start, order: Mapping[str, Any], options: ResumeOptions) -> tuple[int, int]:
    """The origin of the resumed run's plan: as before, or the next epoch if the order of images has changed.

    Raises UserError, which names the changes, if the order has changed and `resume_at_next_epoch` is off.
    """
    state = start.state
    if state.data_order is None:
        logger.info("%s does not say which images it was trained on; the images of the config are used", start.path)
        return state.origin
    changed = ", ".join(
        fact if isinstance(value, str | None) else f"{fact}: {state.data_order.get(fact)} -> {value}"
        for fact, value in differing(start, order).items()
    )
    if not changed:
        return state.origin
    next_epoch = state.epoch + (state.steps_into_epoch > 0)
    if not options.resume_at_next_epoch:
        message = (
            f"the order of images has changed since this was saved ({changed}), so its epoch cannot be continued:"
            f" change it back, or set resume_at_next_epoch = true to go on with epoch {next_epoch + 1}"
        )
        raise UserError(Problem(message, key="resume", value=str(start.path)))
    logger.info("%s has changed since %s was saved; going on with epoch %d", changed, start.path, next_epoch + 1)
    return state.step, next_epoch


def check_options(start: Start, config: Config) -> None:
    """Logs which options differ from those of the training state.

    Raises UserError for a changed option that the saved optimizer state cannot follow.
    """
    before, now = start.state.config, saved_options(config)
    if before is None:
        return
    problems = []
    advice = "set it back, or resume from a checkpoint instead of a training state"
    if start.state.optimizer != config.optimizer_name:
        message = f"the training state {start.path} holds the state of {start.state.optimizer}; {advice}"
        problems.append(Problem(message, key="optimizer_type", value=config.optimizer_name))
    precision = ["full_bf16", "full_fp16", *(["exact_masters"] if config.full_bf16 or config.full_fp16 else [])]
    for option in precision:
        if before.get(option, False) != now[option]:
            message = f"the training state {start.path} was trained with {option} = {before.get(option)}; {advice}"
            problems.append(Problem(message, key=option, value=now[option]))
    for option in LEARNED if before.get("edm2_loss_weighting") and config.edm2_loss_weighting else ():
        if before[option] != now[option]:
            message = f"the learned loss weights of {start.path} need {option} = {before[option]}"
            problems.append(Problem(f"{message}; {advice}", key=option, value=now[option]))
    if problems:
        raise UserError(problems)
    changes = [
        f"{name} {before.get(name)} -> {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if json.dumps(before.get(name)) != json.dumps(now.get(name)) and name not in ("seed", "resume_at_next_epoch")
    ]
    if changes:
        logger.info("options that have changed since %s was saved: %s", start.path, ", ".join(changes))


def changed_arguments(start: Start, config: Config, option: str = "optimizer_args") -> frozenset[str]:
    """The names of arguments in `option` that differ from those of the training state."""
    before = dict(argument.split("=", 1) for argument in (start.state.config or {}).get(option, []))
    now = dict(argument.split("=", 1) for argument in shareable(config).get(option, []))
    return frozenset(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def _newest(config: Config) -> Iterator[Start]:
    """The sound training states of this `output_name`, newest first, then its sound checkpoints, newest first.

    Those that stand only in the object store are downloaded when it is their turn. Another machine may have saved
    there later under the name of a local one. Such a save is downloaded too.
    """
    names = saved_names(config)
    paths = [path for folder in config.save_folders if folder.is_dir() for path in folder.iterdir()]
    states = {
        path: state.saved_at if (state := peek_state(path)) else 0.0
        for path in paths
        if path.name.endswith(STATE_SUFFIX) and names.fullmatch(path.name.removesuffix(STATE_SUFFIX))
    }
    elsewhere: set[Path] = set()
    checkpoints = {
        path: path.stat().st_mtime
        for path in paths
        if names.fullmatch(path.name if path.is_dir() else path.stem)
        and (path.is_dir() or path.suffix in (".safetensors", ".ckpt"))
    }
    if config.output_address:
        stored = find_stored(config, config.output_address)
        for here, there in ((states, stored.states), (checkpoints, stored.checkpoints)):
            places = {config.output_folder / name: time for name, time in there.items()}
            later = {path: time for path, time in places.items() if time > here.get(path, 0.0)}
            elsewhere |= later.keys()
            here |= later
    for times in (states, checkpoints):
        for path in sorted(times, key=times.__getitem__, reverse=True):
            if start := _load_if_sound(path, config, is_elsewhere=path in elsewhere):
                yield start


def _load_if_sound(path: Path, config: Config, *, is_elsewhere: bool) -> Start | None:
    in_store = config.output_address is not None and path.parent == config.output_folder
    address = config.output_address / path.name if config.output_address and in_store else None
    try:
        if address and (is_elsewhere or not path.exists()):
            path = _download(address, config)
        return _load(path, address)
    except UserError as error:
        logger.warning("resume = auto: skipped %s", error)
        return None


def _load(path: Path, address: Address | None = None) -> Start:
    if not path.exists():
        raise UserError(Problem("there is no such training state, file or folder", key="resume", value=str(path)))
    if path.is_dir() and not (path / "unet").is_dir():
        return Start(path=path, is_state=True, state=load_state(path), address=address, content=content_of(path))
    file, _ = open_checkpoint(path)
    step, epoch, seed, position = (file.metadata.get(PREFIX + name) for name in ("step", "epoch", "seed", "resume"))
    if step is None and file.global_step is not None:
        step, epoch = str(file.global_step), str(file.epoch or 0)
    if step is None:
        message = (
            "this checkpoint does not say how far it was trained; to start anew from it, give it as"
            " pretrained_model_name_or_path"
        )
        raise UserError(Problem(message, key="resume", value=str(path)))
    try:
        state = TrainingState.from_metadata(
            step=int(step), epoch=int(epoch or 0), seed=None if seed is None else int(seed), position=position
        )
    except (ValueError, TypeError, AttributeError) as error:
        message = f"its metadata is damaged ({error}); to start anew from it, give it as pretrained_model_name_or_path"
        raise UserError(Problem(message, key="resume", value=str(path))) from None
    state = replace(state, stages=recorded_stages(file.metadata))
    return Start(path=path, is_state=False, state=state, address=address, content=content_of(path))
