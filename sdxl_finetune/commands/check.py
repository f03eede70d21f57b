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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from sdxl_finetune.commands.freezing_report import saving_lines, selection_lines
from sdxl_finetune.commands.memory_estimate import BatchShape, largest_batch
from sdxl_finetune.commands.memory_report import Workload, describe
from sdxl_finetune.commands.storage_report import (
    Findings,
    file_lines,
    latent_lines,
    optimizer_lines,
    say_text_outputs,
)
from sdxl_finetune.config import Config, with_local_models, with_options
from sdxl_finetune.data.batch_plan import Plan, build_plan
from sdxl_finetune.data.caption_lengths import measure_captions
from sdxl_finetune.data.index import Bucket, Index
from sdxl_finetune.errors import UserError, counted
from sdxl_finetune.files import size_text
from sdxl_finetune.model.declared import read_declared
from sdxl_finetune.model.load import inspect_checkpoint
from sdxl_finetune.optim.lr import Rate, build_lr, steps_of
from sdxl_finetune.optim.optimizer import state_bytes
from sdxl_finetune.optim.parameters import Group
from sdxl_finetune.output.checkpoints import format_to_save, overwritten
from sdxl_finetune.output.console import console
from sdxl_finetune.output.hub import check_token
from sdxl_finetune.output.metadata import versions
from sdxl_finetune.output.prompts import Prompt, load_prompts, with_size
from sdxl_finetune.runtime.processes import trained_dtype
from sdxl_finetune.storage import Address
from sdxl_finetune.training.checks import Outline, index_images, read_inputs
from sdxl_finetune.training.every import Timeline, first_step, previews_every, total_steps
from sdxl_finetune.training.resume import (
    Start,
    check_options,
    data_order,
    find_start,
    may_be_undecodable,
    resumed_origin,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
MOST_SAMPLES = 4000
"""Steps at most at which the learning rate is computed, because a run may have millions."""
WIDTH = 100
"""Columns of the output."""


def check(config: Config) -> int:
    """Prints the report. Returns 0, or 2 if a problem would stop the run."""
    found = Findings()
    with console(config, 0):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = found.attempt(with_local_models, config) or config
        in_store = isinstance(config.resume, Address) or config.output_address is not None
        is_elsewhere = config.resume_from_huggingface or in_store
        start = None if is_elsewhere else found.attempt(find_start, config)
        if start and start.is_state:
            found.attempt(check_options, start, config)
        inputs = read_inputs(config, device, found, weights=start.weights if start else None)
        index = _describe_data(config, inputs.index, found)
        if index and inputs.tokenizer:
            found.say("captions", *measure_captions(index, inputs.tokenizer).describe())
        if inputs.choice:
            found.say("tag report", inputs.choice.describe())
        groups = _describe_model(config, inputs.model, found, start) if inputs.model else None
        per_element = found.attempt(state_bytes, config, trained_dtype(config))
        if index:
            plan = _plan(config, index, processes(), start)
            if start:
                found.say("resumes", f"{start.progress}, from {start.path}")
                plan = replace(plan, origin=_origin(config, start, data_order(index, plan), found) or plan.origin)
            steps = total_steps(config, plan)
            timeline = Timeline(plan, steps, start.state.step if start else first_step(config, plan, steps))
            found.say("steps", *_steps(config, index, timeline))
            lr = found.attempt(build_lr, config, timeline.steps)
            if lr and groups:
                found.say("learning rate", *_rates(lr, groups, timeline), *_endless_warmup(config, lr, timeline.steps))
            if inputs.model and groups and per_element is not None:
                found.say("freezing", *saving_lines(config, inputs.model, per_element))
                found.say("optimizer", *optimizer_lines(config, groups, per_element))
                if not config.no_memory:
                    found.say("memory", *_memory(config, index, timeline))
                found.say("files", *file_lines(config, timeline, groups, per_element, found))
        if index:
            found.say("latents", *latent_lines(config, index, found))
            if inputs.model:
                found.attempt(say_text_outputs, config, index, found)
        if config.huggingface_repo_id:
            found.say("uploads", *_uploads(config))
            found.attempt(check_token, config)
        found.say("machine", *_machine(config))
    found.say("problems", *(map(str, with_options(found.found, config)) if found.found else ["none found"]))
    for heading, line in found.lines:
        for number, part in enumerate(textwrap.wrap(line, WIDTH, subsequent_indent="  ", break_long_words=False)):
            print(f"{heading if not number else '':14}{part}")
    return 2 if found.found else 0


def processes() -> int:
    """Number of processes that will train: those of the launch, or one for each GPU."""
    return int(os.environ.get("WORLD_SIZE", 0)) or max(1, torch.cuda.device_count())


def _describe_data(config: Config, index: Index | None, found: Findings) -> Index | None:
    if index is None:
        # The rest of the report describes the images that can be read. The others are among the problems.
        # Their messages have been logged before, and on_bad_image = "skip" in them would be wrong.
        try:
            logging.getLogger("sdxl_finetune.data").setLevel(logging.ERROR)
            index = index_images(config.model_copy(update={"on_bad_image": "skip"}))
        except UserError:
            return None
        finally:
            logging.getLogger("sdxl_finetune.data").setLevel(logging.NOTSET)
    total, *lines = index.describe().splitlines()
    buckets = [line for line in lines if line.startswith("bucket ")]
    if config.on_bad_image == "stop" and index.bad_files:
        total = total.replace("skipped", "not usable, so training would stop (see the problems below)")
    found.say("images", total)
    texts = [bucket.removeprefix("bucket ") for bucket in buckets]
    width = max(map(len, texts)) + 2
    across = max(1, WIDTH // width)
    rows = [
        "".join(text.ljust(width) for text in texts[start : start + across]) for start in range(0, len(texts), across)
    ]
    found.say("buckets", *rows)
    for line in lines[len(buckets) :]:
        heading, _, text = line.partition(": ")
        found.say(heading, text)
    return index


def _describe_model(config: Config, model: Outline, found: Findings, start: Start | None) -> Sequence[Group]:
    contradictions = read_declared(model.inspected.file).contradictions(
        config.model_path,
        objective=config.objective,
        zero_terminal_snr=config.zero_terminal_snr,
        use_zero_cond=config.use_zero_cond,
    )
    remarks = [str(remark) for remark in contradictions]
    if not start and (replaced := overwritten(config, format_to_save(config, model.inspected.format))):
        remarks.append(replaced)
    found.say("remarks", *remarks)
    trained = [f"{group.name} {_millions(group.size)} at {group.lr:g}" for group in model.groups]
    frozen = [
        f"{part} {_millions(size)}"
        for part, named in model.parts.items()
        if (size := sum(p.numel() for p in named.values() if not p.requires_grad))
    ]
    found.say("trained", ", ".join(trained))
    found.say("frozen", ", ".join([*frozen, "VAE"]), *selection_lines(config, model))
    return model.groups


def _millions(size: int) -> str:
    return f"{size / 1e6:.1f} million"


def _plan(config: Config, index: Index, ranks: int, start: Start | None = None) -> Plan:
    seed = start.state.seed if start and config.seed is None else config.seed
    return build_plan(index, ranks=ranks, accumulation=config.gradient_accumulation_steps, seed=seed or 0)


def _origin(config: Config, start: Start, order: Mapping[str, Any], found: Findings) -> tuple[int, int] | None:
    """The origin of the resumed run's plan. None if the order of the images has changed, which is a problem."""
    skips = config.cache_latents and config.on_bad_image == "skip"
    if skips and (count := may_be_undecodable(start, order)):
        line = f"{counted(count, 'image')} more than before: the run decodes them, and leaves out those that are broken"
        found.say("", f"{line}. If any other is left, the order of the images has changed, and the run says so")
        return start.state.origin
    return found.attempt(resumed_origin, start, order, config)


def _steps(config: Config, index: Index, timeline: Timeline) -> Iterator[str]:
    own, plan, steps = processes(), timeline.plan, timeline.steps
    epochs = steps / plan.steps_per_epoch
    yield (
        f"{counted(plan.batches_per_epoch, 'batch')} and {counted(plan.steps_per_epoch, 'step')} an epoch,"
        f" {counted(steps, 'step')} in all"
        f" ({epochs:.4g} epoch{'s' * (epochs != 1)}) on {counted(own, 'process')}"
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


def _endless_warmup(config: Config, lr: Rate, steps: int) -> Iterator[str]:
    """Yields a line if the rate still rises when the run ends."""
    warmup, base = steps_of(config.lr_warmup_steps, steps), config.learning_rate
    if 0 < steps <= warmup and math.isclose(lr(steps - 1, base), base * (steps - 1) / warmup):
        warmups = f"lr_warmup_steps = {config.lr_warmup_steps}: the warm-up lasts longer than the run"
        yield f"{warmups} of {counted(steps, 'step')}, so that the learning rate never gets to {base:g}"


def _sign(difference: float) -> int:
    return 0 if math.isclose(difference, 0, abs_tol=1e-15) else 1 if difference > 0 else -1


def _uploads(config: Config) -> Iterator[str]:
    states = " and training states" if config.save_state_to_huggingface else ""
    place = "/".join(
        filter(None, [str(config.huggingface_repo_id), (config.huggingface_path_in_repo or "").strip("/")])
    )
    visibility = "public" if config.huggingface_repo_visibility == "public" else "private"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    yield f"checkpoints{states} to the {config.huggingface_repo_type or 'model'} repository {place} at {endpoint}"
    yield f"a repository that does not exist is created ({visibility}); the token is tried when the run starts"


def _memory(config: Config, index: Index, timeline: Timeline) -> Iterator[str]:
    architecture = inspect_checkpoint(config.model_path, config.vae_path, config).architecture
    assert architecture is not None
    largest = max((index.buckets[number] for number in np.unique(index.bucket[index.used])), key=_pixels)
    workload = Workload(
        batch=largest_batch(index, timeline.plan),
        bucket=BatchShape(config.vae_batch_size, largest.height, largest.width),
        preview=_largest_preview(config, index, timeline),
        ranks=processes(),
    )
    try:
        yield from describe(config, architecture, workload)
    except RuntimeError as error:  # a user's own optimizer may read numbers, which fake tensors do not have
        yield f"no memory estimate for {config.optimizer_name}: {str(error).splitlines()[0]}"


def _pixels(image: Bucket | Prompt) -> int:
    return (image.width or 0) * (image.height or 0)


def _largest_preview(config: Config, index: Index, timeline: Timeline) -> tuple[int, int] | None:
    """Width and height of the largest preview; None if no previews are due, or if the prompts cannot be read."""
    if not config.sample_prompts or not any(True for _ in previews_every(config).moments(timeline)):
        return None
    try:
        prompt = max(with_size(load_prompts(config.sample_prompts), index.resolution), key=_pixels)
    except (UserError, ValueError):  # the problems say so
        return None
    return prompt.width or 0, prompt.height or 0


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
            yield f"GPU {number}: {properties.name}, {size_text(properties.total_memory)}, {bf16}"
    else:
        yield f"no GPU: training runs on {os.cpu_count()} CPU cores, bf16 slowly"
    shared = Path("/dev/shm")
    if shared.is_dir():
        yield f"/dev/shm: {size_text(shutil.disk_usage(shared).free)} free (workers pass batches through it)"
