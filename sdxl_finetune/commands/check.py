"""`sdxl-check`: a dry run that prints everything that can be known before training, on one screen.

The command reads the config, the headers and captions of the images, and the header of the model. It checks each part
on its own, so that it reports all problems at once. It trains nothing and writes only the dataset index, which the run
uses later.
"""

import itertools
import logging
import math
import os
import shutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from sdxl_finetune.commands.memory_estimate import largest_batch
from sdxl_finetune.commands.memory_report import describe
from sdxl_finetune.config import Config, load_datasets
from sdxl_finetune.data.batch_plan import Plan, build_plan
from sdxl_finetune.data.index import Index, build_index
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.latents.captions import Captions, count_keys
from sdxl_finetune.model.keymap import VAE
from sdxl_finetune.model.load import Inspected, inspect_checkpoint
from sdxl_finetune.model.sdxl import SDXL
from sdxl_finetune.optim.ema import uses_ema
from sdxl_finetune.optim.lr import Rate, build_lr
from sdxl_finetune.optim.optimizer import trial_optimizer
from sdxl_finetune.optim.parameters import Group, trained_parameters
from sdxl_finetune.optim.update import check_update
from sdxl_finetune.output.checkpoints import PRECISIONS, Save, final_name
from sdxl_finetune.output.console import console
from sdxl_finetune.output.metadata import load_thumbnail, versions
from sdxl_finetune.output.prompts import load_prompts
from sdxl_finetune.runtime.processes import weight_dtype
from sdxl_finetune.training.every import Timeline, previews_every, saves_every
from sdxl_finetune.training.saves import checkpoints_due, final_state, states_due
from sdxl_finetune.training.setup import tokenizer_of, total_steps

logger = logging.getLogger(__name__)

T = TypeVar("T")
MOST_SAMPLES = 4000
"""Steps at most at which the learning rate is computed, because a run may have millions."""
WIDTH = 100
"""Columns of the output."""
MiB, GiB = 1 << 20, 1 << 30


@dataclass
class Findings:
    """Lines of the report with their headings, and the problems that were found."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def attempt(self, function: Callable[..., T], *arguments: object, **options: object) -> T | None:
        """Returns the function's result. If it raises UserError, notes the problems and returns None."""
        try:
            return function(*arguments, **options)
        except UserError as error:
            self.problems += [problem for problem in error.problems if problem not in self.problems]
            return None

    def say(self, heading: str, *lines: str) -> None:
        self.lines += [(heading if not number else "", line) for number, line in enumerate(lines)]


def check(config: Config) -> int:
    """Prints the report. Returns 0, or 2 if a problem would stop the run."""
    found = Findings()
    with console(config, 0):
        index = _check_data(config, found)
        groups = _check_model(config, found)
        state_bytes = found.attempt(_state_bytes, config)
        found.attempt(check_update, config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if index:
            plan = _plan(config, index, processes())
            timeline = Timeline(plan, total_steps(config, plan))
            found.say("steps", *_steps(config, index, timeline))
            lr = found.attempt(build_lr, config, timeline.steps)
            if lr and groups:
                found.say("learning rate", *_rates(lr, groups, timeline))
            if groups and state_bytes is not None:
                found.say("memory", *_memory(config, index, plan))
                found.say("files", *_files(config, timeline, groups, state_bytes))
        if index:
            found.say("latents", *_latents(config, index))
            found.attempt(_say_text_outputs, config, index, found)
        for function, argument in ((load_thumbnail, config.metadata_thumbnail), (load_prompts, config.sample_prompts)):
            if argument:
                found.attempt(function, argument)
        found.say("machine", *_machine(config))
    found.say("problems", *(map(str, found.problems) if found.problems else ["none found"]))
    for heading, line in found.lines:
        for number, part in enumerate(textwrap.wrap(line, WIDTH, subsequent_indent="  ", break_long_words=False)):
            print(f"{heading if not number else '':14}{part}")
    return 2 if found.problems else 0


def processes() -> int:
    """Number of processes that will train: those of the launch, or one for each GPU."""
    return int(os.environ.get("WORLD_SIZE", 0)) or max(1, torch.cuda.device_count())


def _check_data(config: Config, found: Findings) -> Index | None:
    found.attempt(tokenizer_of, config)
    datasets = found.attempt(load_datasets, config)
    if datasets is None:
        return None
    skip = config.skip_cache_check
    index = found.attempt(build_index, datasets, config.cache_folder, config.on_bad_image, skip_check=skip)
    if index is None:
        # The rest of the report describes the images that can be read.
        try:
            index = build_index(datasets, config.cache_folder, "skip", skip_check=skip)
        except UserError:
            return None
    total, *buckets = index.describe().splitlines()
    found.say("images", total)
    texts = [bucket.removeprefix("bucket ") for bucket in buckets]
    width = max(map(len, texts)) + 2
    across = max(1, WIDTH // width)
    rows = [
        "".join(text.ljust(width) for text in texts[start : start + across]) for start in range(0, len(texts), across)
    ]
    found.say("buckets", *rows)
    return index


def _check_model(config: Config, found: Findings) -> Sequence[Group] | None:
    assert config.pretrained_model_name_or_path is not None
    inspected: Inspected | None = found.attempt(inspect_checkpoint, config.pretrained_model_name_or_path)
    if inspected is None:
        return None
    if inspected.architecture is None:
        message = f"this is {inspected.kind}, not an SDXL base model"
        found.problems.append(Problem(message, file=str(config.pretrained_model_name_or_path)))
        return None
    with torch.device("meta"):
        model = SDXL(inspected.architecture)
    parts = model.parameters_by_part()
    parameters = found.attempt(trained_parameters, config, parts, model.masters)
    if parameters is None:
        return None
    trained = [f"{group.name} {_millions(group.size)} at {group.lr:g}" for group in parameters.groups]
    frozen = [
        f"{part} {_millions(size)}"
        for part, named in parts.items()
        if (size := sum(p.numel() for p in named.values() if not p.requires_grad))
    ]
    found.say("trained", ", ".join(trained))
    found.say("frozen", ", ".join([*frozen, "VAE"]))
    return parameters.groups


def _millions(size: int) -> str:
    return f"{size / 1e6:.1f} million"


def _state_bytes(config: Config) -> float:
    """Bytes of optimizer state for each trained element, measured on a small tensor. Raises UserError."""
    dtype = torch.float32 if config.keeps_masters else weight_dtype(config)
    parameter = torch.nn.Parameter(torch.zeros(128, 128, dtype=dtype))
    optimizer = trial_optimizer(config, [parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors if tensor.numel() > 1) / parameter.numel()


def _plan(config: Config, index: Index, ranks: int) -> Plan:
    return build_plan(index, ranks=ranks, accumulation=config.gradient_accumulation_steps, seed=config.seed or 0)


def _steps(config: Config, index: Index, timeline: Timeline) -> Iterator[str]:
    own, plan, steps = processes(), timeline.plan, timeline.steps
    epochs = steps / plan.steps_per_epoch
    yield (
        f"{plan.batches_per_epoch} batches and {plan.steps_per_epoch} steps an epoch, {steps} steps in all"
        f" ({epochs:.4g} epochs) on {own} process{'es' if own > 1 else ''}"
    )
    others = [count for count in (1, 2, 4, 8) if count != own]
    plans = {count: _plan(config, index, count).steps_per_epoch for count in others}
    yield "steps an epoch on " + ", ".join(f"{count}: {each}" for count, each in plans.items())


def _rates(lr: Rate, groups: Sequence[Group], timeline: Timeline) -> Iterator[str]:
    """The learning rate in the first and last step, at quarters, and wherever it turns."""
    steps = timeline.steps
    grid = sorted({round(step) for step in np.linspace(0, steps - 1, min(steps, MOST_SAMPLES)).tolist()})
    values = [lr(step, groups[0].lr) for step in grid]
    slopes = [_sign(after - before) for before, after in itertools.pairwise(values)]
    turns = [grid[at] for at in range(1, len(slopes)) if slopes[at] != slopes[at - 1]]
    quarters = [round((steps - 1) * part / 4) for part in range(5)]
    chosen = sorted({*quarters, *(turns if len(turns) <= 8 else turns[:8])})
    names = {group.name: group.lr for group in groups if not group.name.startswith("block")} or {
        groups[0].name: groups[0].lr
    }
    for step in chosen:
        rates = ", ".join(f"{name} {lr(step, base):.3g}" for name, base in names.items())
        yield f"step {step + 1} (epoch {timeline.plan.place(step)[0] + 1}): {rates}"


def _sign(difference: float) -> int:
    return 0 if math.isclose(difference, 0, abs_tol=1e-15) else 1 if difference > 0 else -1


def _files(config: Config, timeline: Timeline, groups: Sequence[Group], state_bytes: float) -> Iterator[str]:
    assert config.pretrained_model_name_or_path is not None and config.output_dir is not None
    file = inspect_checkpoint(config.pretrained_model_name_or_path).file
    dtype = PRECISIONS[config.save_precision] or weight_dtype(config)
    parameters = sum(math.prod(source.shape) for source in file.tensors.values())
    vae = sum(math.prod(source.shape) for key, source in file.tensors.items() if key.startswith((VAE, "vae.")))
    trained = sum(group.size for group in groups)
    size = 4 if config.keeps_masters else weight_dtype(config).itemsize
    state = (parameters - vae) * size + vae * 4 + trained * state_bytes
    state += 4 * trained * uses_ema(config)
    moments = list(saves_every(config, timeline.epochs).moments(timeline))
    weights_saves = [save for moment in moments for save in checkpoints_due(config, moment, timeline.epochs)]
    state_saves = [save for moment in moments for save in states_due(config, moment, timeline.epochs)]
    yield from _kind("weights", weights_saves, final_name(config), parameters * dtype.itemsize)
    last = final_state(config)
    if config.save_state or last:
        yield from _kind("states", state_saves, last.name if last else None, state)
    else:
        yield f"a training state, saved when the run is stopped by a signal, takes {_size(state)}"
    previews = len(list(previews_every(config).moments(timeline))) if config.sample_prompts else 0
    if previews:
        yield f"{previews} rounds of previews"
    # One more of each kind for the end of the run, and one more while it is being written.
    needed = (_kept(weights_saves) + 2) * parameters * dtype.itemsize + (_kept(state_saves) + 2) * state
    free = shutil.disk_usage(_existing(config.output_dir)).free
    yield f"free in {config.output_dir}: {_size(free)}" + (
        "" if free > needed else f", but the run needs {_size(needed)}: free space, or set save_last_n_epochs"
    )


def _memory(config: Config, index: Index, plan: Plan) -> Iterator[str]:
    assert config.pretrained_model_name_or_path is not None
    architecture = inspect_checkpoint(config.pretrained_model_name_or_path).architecture
    assert architecture is not None
    try:
        yield from describe(config, architecture, largest_batch(index, plan), processes())
    except RuntimeError as error:  # a user's own optimizer may read numbers, which fake tensors do not have
        yield f"no memory estimate for {config.optimizer_name}: {str(error).splitlines()[0]}"


def _kind(kind: str, saves: Sequence[Save], final: str | None, size: float) -> Iterator[str]:
    kept, names = _kept(saves) + (final is not None), [save.name for save in saves]
    shown = ", ".join(names[:3]) + (f", ... {names[-1]}" if len(names) > 3 else "")
    end = f" and {final} at the end" if final else ""
    yield f"{len(names)} numbered {kind} ({shown or 'none'}){end}"
    yield f"{_size(size)} each; {kept} stay, and one more while saving: {_size((kept + 1) * size)}"


def _kept(saves: Sequence[Save]) -> int:
    """Number of saves that no later one replaces."""
    return len({save.name for save in saves} - {save.replaces for save in saves})


def _latents(config: Config, index: Index) -> Iterator[str]:
    if not config.cache_latents:
        yield "encoded again at each use, because cache_latents is off"
        return
    areas = np.array([bucket.width * bucket.height for bucket in index.buckets], np.int64)
    used = index.used
    size = int((areas[index.bucket[used]] * (1 + index.flips[used])).sum()) * 4 * 2 // 64
    yield _place_of_cache(config, size, config.cache_latents_to_disk)


def _say_text_outputs(config: Config, index: Index, found: Findings) -> None:
    """Adds the size of the cached text encoder outputs. Raises UserError if the model cannot be read."""
    if not config.cache_text_encoder_outputs:
        return
    assert config.pretrained_model_name_or_path is not None
    architecture = inspect_checkpoint(config.pretrained_model_name_or_path).architecture
    if architecture is None:
        return
    tokenizer = tokenizer_of(config)
    captions = Captions(index, config.text_encoder_outputs_variants, tokenizer.identity())
    count = count_keys(captions.keys(), captions.used)
    channels = tokenizer.positions * (architecture.te1.width + architecture.te2.width) + architecture.te2.projection
    place = _place_of_cache(config, 2 * count * channels, config.cache_text_encoder_outputs_to_disk)
    found.say("text outputs", f"{count} different captions: {place}")


def _place_of_cache(config: Config, size: int, on_disk: bool) -> str:
    if on_disk:
        free = shutil.disk_usage(_existing(config.cache_folder)).free
        return f"{_size(size)} in {config.cache_folder}, free there: {_size(free)}"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{_size(size)} in memory, of {_size(memory)}"


def _machine(config: Config) -> Iterator[str]:
    yield ", ".join(f"{name} {version}" for name, version in versions().items())
    try:
        import xformers

        yield f"xformers {xformers.__version__}"
    except ImportError:
        yield "xformers is not installed: attention is PyTorch's"
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
            yield f"GPU {number}: {properties.name}, {_size(properties.total_memory)}, {bf16}"
    else:
        yield f"no GPU: training runs on {os.cpu_count()} CPU cores, bf16 slowly"
    yield f"optimizer {config.optimizer_name}"
    shared = Path("/dev/shm")
    if shared.is_dir():
        yield f"/dev/shm: {_size(shutil.disk_usage(shared).free)} free (workers pass batches through it)"


def _existing(folder: Path) -> Path:
    """The folder itself if it exists, else the nearest existing folder above it."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _size(count: float) -> str:
    return f"{count / GiB:.1f} GiB" if count >= GiB else f"{count / MiB:.1f} MiB"
