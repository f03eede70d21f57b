"""Where a run begins: anew, after a training state, or after saved weights; and whether it may go on from there.

From a state the rest of a run is exactly what it would have been. From saved weights its counters, learning rates,
batches and noise are; the optimizer starts anew, and the weights are what the file's precision holds. Either way the
images must come in the order in which they would have come, so that what the order depends on (`order_facts`) is
compared with what it was.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_finetune.config import Config
from sdxl_finetune.data.batch_plan import Plan
from sdxl_finetune.data.index import Index
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.model.load import open_checkpoint
from sdxl_finetune.optim.optimizer import optimizer_name
from sdxl_finetune.output.checkpoints import saved_names
from sdxl_finetune.output.metadata import PREFIX, shareable, versions
from sdxl_finetune.training.state import SUFFIX, WEIGHTS, look, read_state

logger = logging.getLogger(__name__)

AUTO = Path("auto")


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run goes on from."""

    path: Path
    """A training state's directory, or saved weights."""
    is_state: bool
    step: int
    """Optimizer steps made, from the start of training."""
    epoch: int
    """Whole epochs."""
    within: int
    """Steps made in the epoch that follows."""
    seed: int | None
    origin: tuple[int, int]
    """Of the plan, see there."""
    order: Mapping[str, Any] | None
    """The `order_facts` of then."""
    log: str | None
    """The name of the run's folder in logging_dir."""
    averaged: bool
    """Whether these are weights that hold the moving average, not what was trained."""
    about: Mapping[str, Any]
    """All that state.json says; empty for weights."""

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS if self.is_state else self.path


def find_start(config: Config) -> Start | None:
    """What `resume` asks for; None to start anew. Says which it is. Raises UserError if a path is neither a sound
    training state nor weights that say how far they were trained.
    """
    if config.resume is None:
        return None
    if config.resume != AUTO:
        start: Start | None = _read(config.resume)
    else:
        start = next(_newest(config), None)
    if start is None:
        name = config.output_name or "this run"
        logger.info("resume = auto: no state and no weights of %s in %s, training starts anew", name, config.output_dir)
    else:
        kind = "training state" if start.is_state else "saved weights (the optimizer starts anew)"
        kind += ", a moving average," if start.averaged else ""
        logger.info("going on after step %d (epoch %d) from the %s %s", start.step, start.epoch, kind, start.path)
    return start


def order_facts(index: Index, plan: Plan) -> dict[str, Any]:
    """What the order of the images depends on, in words that a message can show."""
    return {
        **index.facts(),
        "images in a batch of all processes": np.unique(plan.batch_sizes).tolist(),
        "gradient_accumulation_steps": plan.accumulation,
        "seed": plan.seed,
    }


def settle_origin(start: Start, order: Mapping[str, Any], config: Config) -> tuple[int, int]:
    """The plan's origin: as it was, or the next epoch if the order has changed and resume_at_next_epoch allows it.
    Raises UserError, saying what has changed, if it does not.
    """
    if start.order is None:
        logger.info("%s does not say what it was trained on: it is taken to be what the config says", start.path)
        return start.origin
    changed = ", ".join(
        fact if isinstance(now, str) else f"{fact}: {start.order.get(fact)} -> {now}"
        for fact, now in order.items()
        if start.order.get(fact) != now
    )
    if not changed:
        return start.origin
    following = start.epoch + (start.within > 0)
    if not config.resume_at_next_epoch:
        message = (
            f"the order of images of this run has changed ({changed}), so that it cannot go on within an epoch: set "
            f"resume_at_next_epoch = true to go on with epoch {following + 1}, or change it back"
        )
        raise UserError(Problem(message, key="resume", value=str(start.path)))
    logger.info("changed since %s was saved: %s; going on with epoch %d", start.path, changed, following + 1)
    return start.step, following


def check_options(start: Start, config: Config) -> None:
    """Says which options differ from the state's. Raises UserError for one that no optimizer state survives."""
    before, now = start.about.get("config"), shareable(config)
    if before is None:
        return
    problems = []
    if start.about["optimizer"] != optimizer_name(config):
        message = f"the state {start.path} is of {start.about['optimizer']}; resume from saved weights to change it"
        problems.append(Problem(message, key="optimizer_type", value=optimizer_name(config)))
    for option in ("full_bf16", "exact_masters") if config.full_bf16 else ("full_bf16",):
        if before.get(option) != now[option]:
            message = f"the state {start.path} was trained otherwise; resume from saved weights to change it"
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


def changed_arguments(start: Start, config: Config) -> frozenset[str]:
    """The names of optimizer_args that differ from the state's."""
    before = dict(argument.split("=", 1) for argument in start.about["config"].get("optimizer_args", []))
    now = dict(argument.split("=", 1) for argument in shareable(config).get("optimizer_args", []))
    return frozenset(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def where_it_stands(plan: Plan, order: Mapping[str, Any], step: int, log: str | None) -> dict[str, Any]:
    """What saved weights and states say of the step that a run goes on from."""
    return {"within": plan.place(step)[1], "origin": plan.origin, "order": order, "log": log}


def about_state(config: Config, where: Mapping[str, Any], *, step: int, epoch: int, seed: int) -> dict[str, Any]:
    """What else a state says of itself."""
    own = {"step": step, "epoch": epoch, "seed": seed, "time": time.time(), "versions": versions()}
    return own | {"resume": where, "optimizer": optimizer_name(config), "config": shareable(config)}


def _newest(config: Config) -> Iterator[Start]:
    """The sound states of this output_name, newest first, then its sound weights."""
    assert config.output_dir is not None
    names = saved_names(config)
    found = list(config.output_dir.iterdir()) if config.output_dir.is_dir() else []
    states = [path for path in found if path.name.endswith(SUFFIX) and names.fullmatch(path.name[: -len(SUFFIX)])]
    weights = [
        path
        for path in found
        if names.fullmatch(path.name if path.is_dir() else path.stem)
        and (path.is_dir() or path.suffix in (".safetensors", ".ckpt"))
    ]
    paths = [
        *_by_age(states, lambda path: look(path).get("time", 0.0)),
        *_by_age(weights, lambda path: path.stat().st_mtime),
    ]
    yield from filter(None, map(_sound, paths))


def _sound(path: Path) -> Start | None:
    try:
        return _read(path)
    except UserError as error:
        logger.warning("passed over: %s", error)
        return None


def _by_age(paths: list[Path], age: Callable[[Path], float]) -> list[Path]:
    return sorted(paths, key=age, reverse=True)


def _read(path: Path) -> Start:
    if not path.exists():
        raise UserError(Problem("no such state, weights file or folder", key="resume", value=str(path)))
    if path.is_dir() and not (path / "unet").is_dir():
        about = read_state(path)
        return _start(path, True, about, about["resume"], about)
    file, _ = open_checkpoint(path)
    said = {name: file.metadata.get(PREFIX + name) for name in ("step", "epoch", "seed")}
    if said["step"] is None and file.global_step is not None:
        said |= {"step": str(file.global_step), "epoch": str(file.epoch or 0)}
    if said["step"] is None:
        message = (
            "it does not say how far it was trained; to start anew from it, give it as pretrained_model_name_or_path"
        )
        raise UserError(Problem(message, key="resume", value=str(path)))
    return _start(path, False, said, json.loads(file.metadata.get(PREFIX + "resume", "{}")), {})


def _start(
    path: Path, is_state: bool, counts: Mapping[str, Any], where: Mapping[str, Any], about: Mapping[str, Any]
) -> Start:
    step, epoch = where.get("origin", (0, 0))
    return Start(
        path=path,
        is_state=is_state,
        step=int(counts["step"]),
        epoch=int(counts["epoch"] or 0),
        within=where.get("within", 0),
        seed=None if counts["seed"] is None else int(counts["seed"]),
        origin=(step, epoch),
        order=where.get("order"),
        log=where.get("log"),
        averaged=where.get("averaged", False),
        about=about,
    )
