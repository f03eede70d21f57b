"""Dumps of steps whose numbers went wrong: `--reproduce` runs them again.

A dump is a folder in `dumps` of `output_dir`:

    step.json             a Dump without its tensors: the step, the images, their timesteps and losses
    config.toml           the options of the run, without secrets
    batches.safetensors   the tensors of its micro-batches

Batches are functions of the position in the run. They are therefore made again when a dump is written, and no step
keeps its batches. A dump holds no weights: they are those of the last training state, or of the base model.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sdxl_finetune.batch import Batch
from sdxl_finetune.config import Config, to_toml
from sdxl_finetune.data.loader import TrainingDataset
from sdxl_finetune.errors import UserError
from sdxl_finetune.files import atomic_path
from sdxl_finetune.optim.parameters import TrainedParameters
from sdxl_finetune.output.checkpoints import step_name
from sdxl_finetune.output.metadata import versions
from sdxl_finetune.output.watch import Watch
from sdxl_finetune.printable import encodable
from sdxl_finetune.training.every import Timeline
from sdxl_finetune.training.failed_saves import FailedSaves

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of step.json. Raise it when a field changes its meaning, and keep dump_reading.py reading older ones."""
FOLDER, STEP, CONFIG, BATCHES = "dumps", "step.json", "config.toml", "batches.safetensors"
MOST_DUMPS = 3
"""Dumps that a run writes at most: each further step that is skipped would only repeat what they show."""
MOST_BYTES = 256 << 20
"""Micro-batches that are dumped hold no more bytes, those with a loss that is not finite first. There is always one."""


@dataclass(frozen=True)
class DumpedBatch:
    """A micro-batch of one rank."""

    batch: Batch
    images: Sequence[str]
    """Names of the images."""
    losses: Sequence[float]
    """Losses of the images in the run. Those that were not finite are NaN."""


@dataclass(frozen=True, kw_only=True)
class Dump:
    """A step to run again."""

    step: int
    """The number of the step, from 1."""
    steps: int
    """Optimizer steps of the whole run."""
    seed: int
    ranks: int
    batches: Sequence[DumpedBatch]


class StepFiles:
    """Images and dumps of the steps of a run (a StepSource of output/watch.py)."""

    def __init__(
        self, config: Config, seed: int, dataset: TrainingDataset, timeline: Timeline, failed_saves: FailedSaves
    ) -> None:
        self._config, self._seed, self._dataset, self._timeline = config, seed, dataset, timeline
        self._failed_saves, self._written = failed_saves, 0

    def images(self, step: int) -> list[str]:
        index = self._dataset.index
        micro_batches = self._timeline.plan.micro_batches(step - 1, step)
        return [str(index[row].path) for micro_batch in micro_batches for row in micro_batch.rows.tolist()]

    def dump(self, step: int, losses: Sequence[float]) -> str | None:
        """Writes the dump on the first rank. `losses` are those of the step's images, over all ranks."""
        if self._written == MOST_DUMPS or self._config.reproduce:
            return None
        self._written += 1
        folder = self._config.output_folder / FOLDER / step_name(self._config, step)
        try:
            if self._dataset.rank == 0:
                self._failed_saves.check_disk()
                _write(folder, self._config, self._dump(step, losses))
        except (OSError, SafetensorError, UserError) as error:
            return f"the step could not be dumped ({error})"
        return f'"sdxl-train --reproduce {folder}" runs the step again'

    def _dump(self, step: int, losses: Sequence[float]) -> Dump:
        batches = sorted(self._batches(step, losses), key=lambda each: all(map(math.isfinite, each.losses)))
        sizes = np.cumsum([sum(tensor.nbytes for tensor in _tensors(each.batch).values()) for each in batches])
        kept = max(1, int((sizes <= MOST_BYTES).sum()))
        return Dump(
            step=step,
            steps=self._timeline.steps,
            seed=self._seed,
            ranks=self._dataset.ranks,
            batches=batches[:kept],
        )

    def _batches(self, step: int, losses: Sequence[float]) -> Iterator[DumpedBatch]:
        """Makes the micro-batches of all ranks again. A rank that stands in with an image of weight 0 has none."""
        before = 0
        for micro_batch in self._timeline.plan.micro_batches(step - 1, step):
            names = [str(self._dataset.index[row].path) for row in micro_batch.rows.tolist()]
            of_images = list(losses[before : before + len(names)]) or [math.nan] * len(names)
            before += len(names)
            for rank in range(self._dataset.ranks):
                loaded = replace(self._dataset, rank=rank)[micro_batch]
                if loaded.batch is None:
                    raise UserError(loaded.problems)
                if (first := loaded.batch.first_slot) is not None:
                    own = slice(first, first + len(loaded.batch.weights))
                    yield DumpedBatch(loaded.batch, names[own], of_images[own])


def build_watch(
    config: Config,
    seed: int,
    dataset: TrainingDataset,
    timeline: Timeline,
    parameters: TrainedParameters,
    failed_saves: FailedSaves,
) -> Watch:
    """Builds the watch of a run, which names the images of steps and dumps steps whose numbers went wrong."""
    names = [name for name, _ in parameters.named()]
    return Watch(config, StepFiles(config, seed, dataset, timeline, failed_saves), names, timeline.first)


def _write(folder: Path, config: Config, dump: Dump) -> None:
    tensors = {
        f"{number}.{name}": tensor.contiguous()
        for number, each in enumerate(dump.batches)
        for name, tensor in _tensors(each.batch).items()
    }
    values = {
        "format": FORMAT,
        "versions": versions(),
        "step": dump.step,
        "steps": dump.steps,
        "seed": dump.seed,
        "processes": dump.ranks,
        "batches": [_describe(each) for each in dump.batches],
    }
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        save_file(tensors, temporary / BATCHES)
        (temporary / CONFIG).write_text(to_toml(config, changed_only=True), encoding="utf-8")
        (temporary / STEP).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _describe(dumped: DumpedBatch) -> dict[str, Any]:
    batch = dumped.batch
    return {
        "position": dataclasses.asdict(batch.position),
        "images_in_step": batch.images_in_step,
        "first_slot": batch.first_slot,
        "images": [encodable(name) for name in dumped.images],
        "timesteps": batch.timesteps.tolist(),
        "losses": [loss if math.isfinite(loss) else None for loss in dumped.losses],
    }


def _tensors(batch: Batch) -> dict[str, Tensor]:
    fields = ((field.name, getattr(batch, field.name)) for field in dataclasses.fields(batch))
    return {name: value for name, value in fields if isinstance(value, torch.Tensor)}
