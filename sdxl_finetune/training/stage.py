"""The stage of a run: its base model, hardware and images, which saved checkpoints tell (output/stages.py)."""

from datetime import datetime
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

import sdxl_finetune
from sdxl_finetune.config import Config
from sdxl_finetune.data.index import Index
from sdxl_finetune.model.load import open_checkpoint
from sdxl_finetune.output.stages import Stage, StageRecord, base_facts, hardware_name, stages_of
from sdxl_finetune.training.resume import Start

LEAST_IMAGES = (1, 10, 100, 1000)
"""Numbers of images for which tags that have at least so many images are counted."""


def begin_stage(config: Config, start: Start | None, index: Index, accelerator: Accelerator) -> StageRecord:
    """Begins the run's stage, or continues the stage of the run that `start` was saved by."""
    *earlier, stage = (start.state.stages if start else ()) or _new_stages(config, start)
    images = {
        "images": int((index.repeats > 0).sum()),
        "images_with_repeats": int(index.repeats.sum()),
        "held_out": int(index.held_out.sum()),
        "quality": count_quality_tags(index),
    }
    hardware = hardware_name(gather_object([device_name(accelerator.device)]))
    return StageRecord(earlier, stage.model_copy(update=images), hardware, partial(count_tags, index))


def _new_stages(config: Config, start: Start | None) -> tuple[Stage, ...]:
    """The stages of the model that training began with, and a new one."""
    path = config.model_path
    metadata = open_checkpoint(path)[0].metadata
    stage = Stage(
        name=config.metadata_title or config.output_name,
        program=f"sdxl_finetune {sdxl_finetune.__version__}",
        base=base_facts(metadata, path),
        started=None if start else datetime.now().date().isoformat(),
        unrecorded_steps=start.state.step if start else 0,
    )
    return (*stages_of(metadata), stage)


def device_name(device: torch.device) -> str:
    """The product name of a GPU, or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def count_quality_tags(index: Index) -> dict[str, int]:
    """Images in use with each quality tag that the run sets, the best tag first; empty without such tags."""
    tags = [tuple(tag.tag for tag in subset.quality_tags or ()) for subset in index.subsets]
    counts: dict[str, int] = {}
    for names in dict.fromkeys(filter(None, tags)):
        own = index.used & np.array([one == names for one in tags])[index.subset]
        found = np.bincount(index.numbers("quality")[own] + 1, minlength=len(names) + 1)[1:]
        for name, count in zip(names, found.tolist(), strict=True):
            counts[name] = counts.get(name, 0) + count
    return counts


def count_tags(index: Index) -> dict[str, int]:
    """Number of different tags in the captions by the least number of images that have them."""
    from sdxl_finetune.report.rows import Rows  # imported here, because it would slow down each start
    from sdxl_finetune.report.tags import TagCounter

    counter = TagCounter()
    for tags in Rows(index).tags():
        counter.add(tags)
    images = counter.result().images
    return {str(least): int((images >= least).sum()) for least in LEAST_IMAGES}
