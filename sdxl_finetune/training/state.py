"""Training states: everything that a run needs to go on as if it had never stopped, in one directory.

    weights.safetensors   all of the model in the precision in which it is trained, the VAE and unused tensors too;
                          a checkpoint like any other
    optimizer.pt          what the optimizer keeps, by the names of the parameters; its groups' values; the moving
                          average of the weights; the gradient scaler; torch's random state
    state.json            where the run stood, and under which options
    manifest.json         size and SHA-256 of the others

Batch order, noise, captions and learning rates are functions of the step, so that nothing has to be saved for them.
A directory exists under its name only when it is whole, and is trusted only when it agrees with its manifest.
Names and removals are the reference's (golden checkpoint_keys.json.gz: names, save_runs).
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_finetune.config import Config
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.files import atomic_path
from sdxl_finetune.model.save import single_file_tensors
from sdxl_finetune.model.sdxl import SDXL
from sdxl_finetune.model.tensorfile import write_safetensors
from sdxl_finetune.optim.parameters import Group, named_parameters, part_of
from sdxl_finetune.output.checkpoints import Due, due_after, final_weights, saved_names, step_name

FORMAT = 1
ON_CPU = ("step", "mu_product")
"""What torch's optimizers count on the host, where reading it costs nothing."""
SUFFIX = "-state"
WEIGHTS, OPTIMIZER, ABOUT, MANIFEST = "weights.safetensors", "optimizer.pt", "state.json", "manifest.json"


def states_due(config: Config, *, epoch: int | None, step: int, epochs: int) -> list[Due]:
    """The states to save after an optimizer step; arguments as of `weights_due`."""
    if not config.save_state:
        return []
    keep_epochs = config.save_last_n_epochs_state or config.save_last_n_epochs
    keep_steps = config.save_last_n_steps_state or config.save_last_n_steps
    due = due_after(config, epoch=epoch, step=step, epochs=epochs, keep_epochs=keep_epochs, keep_steps=keep_steps)
    return [Due(name=one.name + SUFFIX, replaces=one.replaces and one.replaces + SUFFIX) for one in due]


def final_state(config: Config) -> Due | None:
    """The state to save at the end of training, if there is to be one."""
    wanted = config.save_state or config.save_state_on_train_end
    return Due(name=final_weights(config).name + SUFFIX) if wanted else None


def interrupted_state(config: Config, step: int) -> Due:
    """The state to save when a run is stopped after `step` steps."""
    return Due(name=step_name(config, step) + SUFFIX)


def interrupted_states(config: Config, *, before: int) -> list[Path]:
    """The states of this config that interruptions left before the step `before`."""
    assert config.output_dir is not None
    found = []
    for path in config.output_dir.glob(f"*{SUFFIX}"):
        about = look(path) if is_saved_name(config, path.name) else {}
        if about.get("interrupted") and about["step"] < before:
            found.append(path)
    return found


def look(path: Path) -> dict[str, Any]:
    """What state.json says, not checked; empty if it cannot be read."""
    try:
        about = json.loads((path / ABOUT).read_bytes())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def is_saved_name(config: Config, name: str) -> bool:
    """Whether this config saves files or folders of that name."""
    return bool(saved_names(config).fullmatch(re.sub(r"(-state|\.safetensors|\.ckpt)$", "", name)))


def save_state(
    path: Path,
    model: SDXL,
    vae: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    groups: Sequence[Group],
    *,
    average: Mapping[str, Tensor] | None,
    scaler: Mapping[str, Any] | None,
    about: Mapping[str, Any],
) -> None:
    """Writes the state directory `path`. `about` becomes state.json: what `resume` reads."""
    with atomic_path(path) as folder:
        folder.mkdir()
        write_safetensors(folder / WEIGHTS, single_file_tensors(model, vae, None, exact=True), {})
        kept: dict[str, Any] = {
            "state": {
                name: dict(optimizer.state[one]) for name, one in named_parameters(groups) if one in optimizer.state
            },
            "groups": {
                group.name: {name: value for name, value in values.items() if name not in ("params", "lr")}
                for group, values in zip(groups, optimizer.param_groups, strict=True)
            },
            "average": average,
            "scaler": scaler,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        }
        torch.save(kept, folder / OPTIMIZER)
        about = {"format": FORMAT, **about}
        (folder / ABOUT).write_text(json.dumps(about, indent=1, sort_keys=True, default=str) + "\n", encoding="utf-8")
        files = {name: _size_and_digest(folder / name) for name in (WEIGHTS, OPTIMIZER, ABOUT)}
        (folder / MANIFEST).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")


def read_state(path: Path) -> dict[str, Any]:
    """What state.json says, of a directory that agrees with its manifest. Raises UserError for any other, with what
    is wrong with it.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        wrong = [name for name in (WEIGHTS, OPTIMIZER, ABOUT) if not _agrees(path / name, manifest[name])]
        about = {} if wrong else json.loads((path / ABOUT).read_bytes())
    except FileNotFoundError as error:
        message = f"this is no training state, or not a complete one: {Path(error.filename).name} is missing"
        raise UserError(Problem(message, file=str(path))) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(Problem(f"this training state cannot be read: {error}", file=str(path))) from None
    if wrong:
        message = f"this training state is damaged: {', '.join(wrong)} is not what {MANIFEST} says; take another"
        raise UserError(Problem(message, file=str(path)))
    if about["format"] > FORMAT:
        raise UserError(Problem("this training state was saved by a later version of this program", file=str(path)))
    return about


def load_optimizer(
    path: Path, optimizer: torch.optim.Optimizer, groups: Sequence[Group], *, changed: frozenset[str]
) -> tuple[dict[str, Any] | None, list[str]]:
    """Gives the optimizer what the state in directory `path` holds, bit for bit, and torch its random state. Values of
    groups that are named in `changed` stay as they are built. Returns the scaler's state, and the names of parameters
    of which the state knows nothing.

    Not by load_state_dict: torch's converts what optimizers keep to the parameters' precision, and some optimizers'
    own copy all of it.
    """
    kept = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True, mmap=True)
    for group, values in zip(groups, optimizer.param_groups, strict=True):
        old: dict[str, Any] = kept["groups"].get(group.name) or next(  # block_lr was turned on, or off
            (one for name, one in kept["groups"].items() if part_of(name) == group.part), {}
        )
        values.update({name: _copy(value, values.get(name)) for name, value in old.items() if name not in changed})
    values_of = {id(one): values for values in optimizer.param_groups for one in values["params"]}
    unknown = []
    for name, parameter in named_parameters(groups):
        if name in kept["state"]:
            optimizer.state[parameter] = {
                key: _placed(optimizer, parameter, key, value, values_of[id(parameter)])
                for key, value in kept["state"][name].items()
            }
        else:
            unknown.append(name)
    torch.set_rng_state(kept["random"].clone())
    if kept["random_cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(kept["random_cuda"].clone())
    return kept["scaler"], unknown if kept["state"] else []


def load_average(path: Path) -> Mapping[str, Tensor]:
    """The moving average that the state in directory `path` holds, mapped from the file; empty if it has none."""
    return torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True, mmap=True).get("average") or {}


def _placed(optimizer: torch.optim.Optimizer, parameter: Tensor, key: str, value: Any, group: Mapping[str, Any]) -> Any:
    """A value where the optimizer wants it: counts of steps stay on the CPU unless it counts on the device, and what
    bitsandbytes pages goes into pages of its own.
    """
    if key in ON_CPU and not (group.get("capturable") or group.get("fused")):
        return _copy(value)
    if getattr(optimizer, "is_paged", False) and isinstance(value, Tensor):
        if value.shape == parameter.shape:
            return optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)  # type: ignore[attr-defined]
        if value.shape == (2, *parameter.shape):  # AdEMAMix
            return optimizer._get_state_double_buffer(parameter, dtype=value.dtype).copy_(value)  # type: ignore[attr-defined]
    return _copy(value, parameter)


def _copy(value: Any, like: Any = None) -> Any:
    """Not mapped from the file any more, and on the device of `like` if that is a tensor."""
    match value:
        case Tensor():
            device = like.device if isinstance(like, Tensor) else value.device
            return torch.empty_like(value, device=device).copy_(value)
        case dict():
            return {key: _copy(one, like) for key, one in value.items()}
        case list() | tuple():
            return type(value)(_copy(one, like) for one in value)
        case _:
            return value


def _size_and_digest(path: Path) -> list[Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return [path.stat().st_size, digest.hexdigest()]


def _agrees(path: Path, expected: list[Any]) -> bool:
    return path.stat().st_size == expected[0] and _size_and_digest(path) == expected
