"""Where a run starts: anew, from a training state, or from a checkpoint. Checks that data and options still fit.

From a training state the rest of the run is exactly what it would have been. From a checkpoint the counters, learning
rates, batches and noise continue; the optimizer starts anew, and the weights are what the file's precision holds.
Either way the images must come in the same order as before. Therefore the facts that the order depends on are saved,
and compared with those of the resumed run.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_finetune.config import Config, ResumeOptions, SavingOptions
from sdxl_finetune.config.hub import AUTO
from sdxl_finetune.data.batch_plan import Plan
from sdxl_finetune.data.index import Index
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.model.load import open_checkpoint
from sdxl_finetune.output.checkpoints import saved_names
from sdxl_finetune.output.hub import download_start
from sdxl_finetune.output.metadata import PREFIX, shareable
from sdxl_finetune.training.saves import STATE_SUFFIX
from sdxl_finetune.training.state import OPTIMIZER, WEIGHTS, TrainingState, load_state, peek_state

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Start:
    """A training state or checkpoint that a run continues from."""

    path: Path
    """Directory of the training state, or the checkpoint's file or folder."""
    is_state: bool
    """True for a training state, False for a checkpoint."""
    state: TrainingState

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
    path = download_start(config) if config.resume_from_huggingface and config.resume != AUTO else config.resume
    start = _load(path) if path != AUTO else next(_newest(config), None)
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


def data_order(index: Index, plan: Plan) -> dict[str, Any]:
    """The facts that the order of the images depends on, by names that a message can show."""
    return {
        **index.facts(),
        "images in a batch of all processes": np.unique(plan.batch_sizes).tolist(),
        "gradient_accumulation_steps": plan.accumulation,
        "seed": plan.seed,
    }


def resumed_origin(start: Start, order: Mapping[str, Any], options: ResumeOptions) -> tuple[int, int]:
    """The origin of the resumed run's plan: as before, or the next epoch if the order of images has changed.

    Raises UserError, which names the changes, if the order has changed and `resume_at_next_epoch` is off.
    """
    state = start.state
    if state.data_order is None:
        logger.info("%s does not say which images it was trained on; the images of the config are used", start.path)
        return state.origin
    changed = ", ".join(
        fact if isinstance(value, str) else f"{fact}: {state.data_order.get(fact)} -> {value}"
        for fact, value in order.items()
        if state.data_order.get(fact) != value
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
    before, now = start.state.config, shareable(config)
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
    if problems:
        raise UserError(problems)
    changes = [
        f"{name} {before.get(name)} -> {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if json.dumps(before.get(name)) != json.dumps(now.get(name)) and name not in ("seed", "resume_at_next_epoch")
    ]
    if changes:
        logger.info("options that have changed since %s was saved: %s", start.path, ", ".join(changes))


def changed_optimizer_args(start: Start, config: Config) -> frozenset[str]:
    """The names of `optimizer_args` that differ from those of the training state."""
    before = dict(argument.split("=", 1) for argument in (start.state.config or {}).get("optimizer_args", []))
    now = dict(argument.split("=", 1) for argument in shareable(config).get("optimizer_args", []))
    return frozenset(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def _newest(options: SavingOptions) -> Iterator[Start]:
    """The sound training states of this `output_name`, newest first, then its sound checkpoints, newest first."""
    assert options.output_dir is not None
    names = saved_names(options)
    paths = list(options.output_dir.iterdir()) if options.output_dir.is_dir() else []
    states = {
        path: state.saved_at if (state := peek_state(path)) else 0.0
        for path in paths
        if path.name.endswith(STATE_SUFFIX) and names.fullmatch(path.name.removesuffix(STATE_SUFFIX))
    }
    checkpoints = {
        path: path.stat().st_mtime
        for path in paths
        if names.fullmatch(path.name if path.is_dir() else path.stem)
        and (path.is_dir() or path.suffix in (".safetensors", ".ckpt"))
    }
    for times in (states, checkpoints):
        for path in sorted(times, key=times.__getitem__, reverse=True):
            if start := _load_if_sound(path):
                yield start


def _load_if_sound(path: Path) -> Start | None:
    try:
        return _load(path)
    except UserError as error:
        logger.warning("resume = auto: skipped %s", error)
        return None


def _load(path: Path) -> Start:
    if not path.exists():
        raise UserError(Problem("there is no such training state, file or folder", key="resume", value=str(path)))
    if path.is_dir() and not (path / "unet").is_dir():
        return Start(path=path, is_state=True, state=load_state(path))
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
    return Start(path=path, is_state=False, state=state)
