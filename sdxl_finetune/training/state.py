"""Training states: everything that a run needs to go on as if it had never stopped, in one directory.

    weights.safetensors   the model in the precision in which it is trained, the VAE and unused tensors included;
                          a checkpoint like any other
    optimizer.pt          optimizer state, EMA, loss scale, learned loss weights and torch's random state (see
                          optimizer_state.py)
    state.json            a TrainingState: where the run stood, and under which options
    manifest.json         size and SHA-256 of the other files

Batch order, noise, captions and learning rates are functions of the step, so nothing else has to be saved. A directory
exists under its final name only when it is complete, and it is trusted only if it agrees with its manifest.
"""

import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from sdxl_finetune.config import Config, SavingOptions
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.files import atomic_path, is_plain_name
from sdxl_finetune.model.load import Format
from sdxl_finetune.model.tensorfile import Source, write_pickle, write_safetensors
from sdxl_finetune.output.checkpoints import saved_names
from sdxl_finetune.output.metadata import versions
from sdxl_finetune.output.stages import Stage, parse_stages, stages_json
from sdxl_finetune.parsing import parse_json
from sdxl_finetune.training.saves import STATE_SUFFIX

FORMAT = 1
"""Version of state.json. Raise it when a field changes its meaning, and keep from_json reading older ones."""
WEIGHTS, OPTIMIZER, STATE, MANIFEST = "weights.safetensors", "optimizer.pt", "state.json", "manifest.json"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Where a run stands after an optimizer step, beside its tensors.

    `to_json` and `from_json` are state.json. `to_metadata` and `from_metadata` are the smaller part that saved
    checkpoints carry: counters, batch order and log, without optimizer and options.
    """

    step: int
    """Optimizer steps made, from the start of training."""
    epoch: int
    """Whole epochs made."""
    steps_into_epoch: int = 0
    """Steps made in the current, unfinished epoch."""
    seed: int | None = None
    """None in checkpoints of other programs, which do not say it."""
    origin: tuple[int, int] = (0, 0)
    """Step and epoch from which the batch plan counts (see Plan.origin)."""
    data_order: Mapping[str, Any] | None = None
    """The facts that the order of images depends on, in words for a message; None if unknown."""
    log: str | None = None
    """Name of the run's folder in `logging_dir`."""
    stages: tuple[Stage, ...] = ()
    """The stages of training so far; empty if an older version saved the state."""
    holds_ema: bool = False
    """True for a checkpoint whose weights are the EMA; never for a training state, which holds both."""
    checkpoint_format: Format | None = None
    """Format of the model that training started from. Like all that follows, only in state.json."""
    optimizer: str | None = None
    config: Mapping[str, Any] | None = None
    """The options of the run, without secrets and local paths."""
    is_interrupted: bool = False
    """True if the next complete state replaces this one: the run was stopped, or `save_state_every_minutes` asked."""
    saved_at: float = field(default_factory=time.time)
    """Seconds since 1970."""

    def to_json(self) -> dict[str, Any]:
        """The contents of state.json, as values that JSON can hold."""
        return {
            "format": FORMAT,
            "step": self.step,
            "epoch": self.epoch,
            "seed": self.seed,
            "time": self.saved_at,
            "versions": versions(),
            "resume": self._position(),
            "optimizer": self.optimizer,
            "config": self.config,
            "checkpoint": self.checkpoint_format,
            "interrupted": self.is_interrupted,
            "stages": stages_json(self.stages),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainingState":
        """The state that `to_json` wrote. Raises ValueError for a format that is newer than this program.

        Raises ValueError, KeyError, TypeError or AttributeError for other values.
        """
        if values["format"] > FORMAT:
            message = f"{STATE} has format {values['format']}, and this version of the program reads up to {FORMAT}"
            raise ValueError(f"{message}; update the program")
        config, seed = values["config"], values["seed"]
        if not isinstance(config, dict | None) or not isinstance(values["optimizer"], str | None):
            raise ValueError("config or optimizer is of a wrong type")
        if values["checkpoint"] not in (None, *get_args(Format)):
            raise ValueError("the format of checkpoints is unknown")
        return cls(
            step=_count("step", values["step"]),
            epoch=_count("epoch", values["epoch"]),
            seed=None if seed is None else _count("seed", seed),
            saved_at=float(values["time"]),
            optimizer=values["optimizer"],
            config=config,
            checkpoint_format=values["checkpoint"],
            is_interrupted=values["interrupted"],
            stages=parse_stages(values.get("stages")),
            **_read_position(values["resume"]),
        )

    def to_metadata(self, *, holds_ema: bool) -> str:
        """The value of the metadata field `resume` of a checkpoint, which may hold the EMA instead of the weights."""
        return json.dumps(self._position() | ({"averaged": True} if holds_ema else {}), sort_keys=True)

    @classmethod
    def from_metadata(cls, *, step: int, epoch: int, seed: int | None, position: str | None) -> "TrainingState":
        """The state that a saved checkpoint tells; `position` is its metadata field `resume`."""
        counted = {"step": step, "epoch": epoch} | ({} if seed is None else {"seed": seed})
        for name, value in counted.items():
            _count(name, value)
        return cls(step=step, epoch=epoch, seed=seed, **_read_position(parse_json(position or "{}")))

    def _position(self) -> dict[str, Any]:
        return {
            "within": self.steps_into_epoch,
            "origin": list(self.origin),
            "order": self.data_order,
            "log": self.log,
        }


def _read_position(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a position. Raises ValueError, TypeError or AttributeError for values that no run has saved.

    The name of the log becomes a folder in `logging_dir`. A file of somebody else must not name a folder elsewhere.
    """
    step, epoch = values.get("origin", (0, 0))
    order, log = values.get("order"), values.get("log")
    if log is not None and not is_plain_name(log):
        raise ValueError(f"log = {log!r} is no name of a folder")
    if order is not None and not isinstance(order, dict):
        raise ValueError("the order of images is no table")
    return {
        "steps_into_epoch": _count("within", values.get("within", 0)),
        "origin": (_count("origin", step), _count("origin", epoch)),
        "data_order": order,
        "log": log,
        "holds_ema": bool(values.get("averaged", False)),
    }


def _count(name: str, value: Any) -> int:
    """A number of steps or epochs, or a seed. Raises ValueError for any other value."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{name} = {value!r:.100} is no whole number from 0 to 2^63")
    return value


def save_state(
    directory: Path, state: TrainingState, weights: Mapping[str, Source], optimizer: Mapping[str, Any]
) -> None:
    """Writes a training state; `optimizer` comes from `collect_optimizer_state`."""
    with atomic_path(directory) as folder:
        folder.mkdir()
        write_safetensors(folder / WEIGHTS, weights, {})
        write_pickle(folder / OPTIMIZER, optimizer)
        text = json.dumps(state.to_json(), indent=1, sort_keys=True, default=str)
        (folder / STATE).write_text(text + "\n", encoding="utf-8")
        files = {name: _size_and_digest(folder / name) for name in (WEIGHTS, OPTIMIZER, STATE)}
        (folder / MANIFEST).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")


def load_state(directory: Path) -> TrainingState:
    """The TrainingState of a directory that agrees with its manifest. Raises UserError for any other directory."""
    try:
        manifest = parse_json((directory / MANIFEST).read_bytes())
        damaged = [name for name in (WEIGHTS, OPTIMIZER, STATE) if not _agrees(directory / name, manifest[name])]
        if damaged:
            message = f"this training state is damaged: {', '.join(damaged)} differs from {MANIFEST}; use another state"
            raise UserError(Problem(message, file=str(directory)))
        return TrainingState.from_json(parse_json((directory / STATE).read_bytes()))
    except FileNotFoundError as error:
        message = f"this is not a complete training state, {Path(error.filename).name} is missing: use another state"
        raise UserError(Problem(message, file=str(directory))) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            Problem(f"this training state cannot be read ({error}): use another state", file=str(directory))
        ) from None


def peek_state(directory: Path) -> TrainingState | None:
    """The TrainingState of a directory, without checking the manifest; None if state.json cannot be read."""
    try:
        return TrainingState.from_json(parse_json((directory / STATE).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def time_of_saving(step: int, start: TrainingState | None) -> float:
    """The time at which the state of this step is saved, in seconds since 1970. It is later than that of `start`.

    `resume = auto` takes the state that was saved last. The clock of the machine that saved `start`, the state or
    checkpoint that the run was resumed from, may be ahead. Therefore each step adds at least a microsecond.
    """
    now = time.time()
    return now if start is None else max(now, start.saved_at + 1e-6 * (step - start.step))


def interrupted_states(options: Config, *, before: int) -> list[Path]:
    """The directories of training states that stopped runs saved before the step `before`."""
    return [
        path
        for folder in options.save_folders
        for path in folder.glob(f"*{STATE_SUFFIX}")
        if is_saved_name(options, path.name)
        and (state := peek_state(path))
        and state.is_interrupted
        and state.step < before
    ]


def is_saved_name(options: SavingOptions, name: str) -> bool:
    """True if a run with these options saves a file or folder of that name."""
    return bool(saved_names(options).fullmatch(re.sub(r"(-state|\.safetensors|\.ckpt)$", "", name)))


def _size_and_digest(path: Path) -> list[Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return [path.stat().st_size, digest.hexdigest()]


def _agrees(path: Path, expected: list[Any]) -> bool:
    return path.stat().st_size == expected[0] and _size_and_digest(path) == expected
