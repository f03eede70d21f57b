"""The lines of sdxl-check on disk and memory that a run fills: checkpoints, training states, caches."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from sdxl_finetune.config import Config
from sdxl_finetune.data.index import Index
from sdxl_finetune.data.tokens import tokenizer_of
from sdxl_finetune.errors import Problem, Problems, counted
from sdxl_finetune.files import free_bytes, size_text
from sdxl_finetune.latents.captions import KEYS_FOLDER, Captions, count_keys, find_keys
from sdxl_finetune.latents.preparing import latent_bytes
from sdxl_finetune.latents.together import check_memory
from sdxl_finetune.model.architecture import FULL
from sdxl_finetune.model.keymap import VAE
from sdxl_finetune.model.load import inspect_checkpoint
from sdxl_finetune.optim.ema import uses_ema
from sdxl_finetune.optim.parameters import Group
from sdxl_finetune.output.checkpoints import PRECISIONS, Save, final_name
from sdxl_finetune.runtime.host import memory_bytes
from sdxl_finetune.runtime.processes import weight_dtype
from sdxl_finetune.storage import Address
from sdxl_finetune.training.every import Timeline, previews_every, saves_every
from sdxl_finetune.training.saves import checkpoints_due, final_state, states_due
from sdxl_finetune.training.space import SaveSizes, kept

ENDINGS = {"cache_latents": ".latents", "cache_text_encoder_outputs": ".text_outputs"}
"""Endings of the files that each option writes."""


class Findings(Problems):
    """Lines of the report with their headings, and the problems that were found."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []

    def say(self, heading: str, *lines: str) -> None:
        self.lines += [(heading if not number else "", line) for number, line in enumerate(lines)]


def optimizer_lines(config: Config, groups: Sequence[Group], state_bytes: float) -> Iterator[str]:
    size = optimizer_state_bytes(groups, state_bytes)
    yield f"{config.optimizer_name}, {size_text(size)} of states in each process"


def optimizer_state_bytes(groups: Sequence[Group], state_bytes: float) -> float:
    """Bytes of optimizer states that each process keeps, given the bytes for each trained element."""
    return sum(group.size for group in groups) * state_bytes


def file_lines(
    config: Config, timeline: Timeline, groups: Sequence[Group], state_bytes: float, found: Findings
) -> Iterator[str]:
    file = inspect_checkpoint(config.model_path).file
    dtype = PRECISIONS[config.save_precision] or weight_dtype(config)
    parameters = sum(math.prod(source.shape) for source in file.tensors.values())
    vae = sum(math.prod(source.shape) for key, source in file.tensors.items() if key.startswith((VAE, "vae.")))
    trained = sum(group.size for group in groups)
    size = 4 if config.keeps_masters else weight_dtype(config).itemsize
    state = (parameters - vae) * size + vae * 4 + optimizer_state_bytes(groups, state_bytes)
    state += 4 * trained * uses_ema(config)
    moments = list(saves_every(config, timeline.epochs).moments(timeline))
    weights_saves = [save for moment in moments for save in checkpoints_due(config, moment, timeline.epochs)]
    state_saves = [save for moment in moments for save in states_due(config, moment, timeline.epochs)]
    yield from _kind("weights", weights_saves, final_name(config), parameters * dtype.itemsize)
    last = final_state(config)
    if config.save_state or last:
        yield from _kind("states", state_saves, last.name if last else None, state)
    else:
        yield f"a training state, saved when the run is stopped by a signal, takes {size_text(state)}"
    previews = len(list(previews_every(config).moments(timeline))) if config.sample_prompts else 0
    if previews:
        yield f"{counted(previews, 'round')} of previews"
    needed = SaveSizes(parameters * dtype.itemsize, state).of_run(config, timeline)
    free = free_bytes(config.output_folder)
    yield f"free in {config.output_folder}: {size_text(free)}"
    if free < needed:
        message = f"the disk has {size_text(free)} free, and the run needs {size_text(needed)}"
        message += ": free space, or keep fewer checkpoints with save_last_n_epochs or save_last_n_steps"
        found.found.append(Problem(message, key="output_dir", value=str(config.output_folder)))


def _kind(kind: str, saves: Sequence[Save], final: str | None, size: float) -> Iterator[str]:
    count, names = kept(saves) + (final is not None), [save.name for save in saves]
    shown = ", ".join(names[:3]) + (f", ... {names[-1]}" if len(names) > 3 else "")
    end = f"{final} at the end" if final else ""
    numbered = f"{len(names)} numbered {kind} ({shown})" if names else f"no numbered {kind}"
    yield f"{numbered} and {end}" if end else numbered
    yield f"{size_text(size)} each; {count} kept, and one more while saving: {size_text((count + 1) * size)}"


def latent_lines(config: Config, index: Index, found: Findings) -> Iterator[str]:
    if not config.cache_latents:
        yield "encoded again at each use, because cache_latents is off"
        return
    size = FULL.latent_size
    if isinstance(config.pretrained_model_name_or_path, Path) and config.model_path.exists():
        inspected = found.attempt(inspect_checkpoint, config.model_path, config.vae_path, config)
        if inspected and inspected.architecture:
            size = inspected.architecture.latent_size
    yield _place_of_cache(config, latent_bytes(index, size), "cache_latents", found)


def say_text_outputs(config: Config, index: Index, found: Findings) -> None:
    """Adds the size of the cached text encoder outputs. Raises UserError if the model cannot be read."""
    if not config.cache_text_encoder_outputs:
        return
    architecture = inspect_checkpoint(config.model_path, config.vae_path, config).architecture
    if architecture is None:
        return
    tokenizer = tokenizer_of(config)
    zeroed = tokenizer.is_empty if config.use_zero_cond else None
    captions = Captions(index, config.text_encoder_outputs_variants, tokenizer.identity(), zeroed)
    keys = find_keys(captions, config.cache_folder / KEYS_FOLDER, writes=True)
    count = count_keys(keys, captions.used)
    channels = tokenizer.positions * (architecture.te1.width + architecture.te2.width) + architecture.te2.projection
    place = _place_of_cache(config, 2 * count * channels, "cache_text_encoder_outputs", found)
    found.say("text outputs", f"{count} different captions: {place}")


def _place_of_cache(config: Config, size: int, option: str, found: Findings) -> str:
    """Where the cache of an option is kept. Notes a problem if that place is too small for it."""
    if getattr(config, f"{option}_to_disk"):
        folder = config.cache_location
        if isinstance(folder, Address):
            return f"{size_text(size)} at {folder}"
        free = free_bytes(folder)
        cached = sum(path.stat().st_size for path in folder.rglob(f"*{ENDINGS[option]}")) if folder.exists() else 0
        if size - cached > free:
            message = f"the cache takes {size_text(size)}, and the disk has {size_text(free)} free"
            message += ": free space, or set another cache_dir"
            found.found.append(Problem(message, key=f"{option}_to_disk", value=True))
        return f"{size_text(size)} in {folder}, free there: {size_text(free)}"
    memory = memory_bytes()
    found.attempt(check_memory, size, f"the {option.removeprefix('cache_').replace('_', ' ')}", option)
    return f"{size_text(size)} in memory, of {size_text(memory)}"
