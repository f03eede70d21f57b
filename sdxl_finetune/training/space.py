"""The space that saves take: each by itself, and all that a run keeps. Checked before the start of training."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sdxl_finetune.config import Config
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.files import free_bytes, size_text
from sdxl_finetune.model.save import checkpoint_bytes, single_file_tensors
from sdxl_finetune.model.tensorfile import Source, source_bytes
from sdxl_finetune.optim.ema import uses_ema
from sdxl_finetune.optim.optimizer import state_bytes
from sdxl_finetune.output.checkpoints import PRECISIONS, Save
from sdxl_finetune.runtime.processes import trained_dtype
from sdxl_finetune.training.every import Timeline, saves_every
from sdxl_finetune.training.learner import Learner
from sdxl_finetune.training.saves import checkpoints_due, final_state, states_due

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveSizes:
    """Bytes of one checkpoint, and of one training state."""

    checkpoint: float
    state: float

    def of_one_step(self, config: Config) -> float:
        """Bytes that the saves of one step take at most."""
        return self.checkpoint + (self.state if final_state(config) else 0)

    def of_run(self, config: Config, timeline: Timeline) -> float:
        """Bytes that all saves of the run take that no later one replaces, with one more of each while it is saved."""
        moments = list(saves_every(config, timeline.epochs).moments(timeline))
        weights = [save for moment in moments for save in checkpoints_due(config, moment, timeline.epochs)]
        states = [save for moment in moments for save in states_due(config, moment, timeline.epochs)]
        return (kept(weights) + 2) * self.checkpoint + (kept(states) + 2) * self.state


def kept(saves: Sequence[Save]) -> int:
    """Number of saves that no later one replaces."""
    return len({save.name for save in saves} - {save.replaces for save in saves})


def value_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dictionaries and lists, and of all sources of tensors."""
    match value:
        case Tensor():
            return value.numel() * value.element_size()
        case Source():
            return source_bytes(value)
        case Mapping():
            return sum(map(value_bytes, value.values()))
        case list() | tuple():
            return sum(map(value_bytes, value))
        case _:
            return 0


def expected_sizes(config: Config, learner: Learner) -> SaveSizes:
    """The sizes of saves before the first step, when the optimizer may have no state yet."""
    state = float(value_bytes(single_file_tensors(learner.sdxl, learner.vae, None, exact=True)))
    trained = sum(group.size for group in learner.parameters.groups)
    with suppress(Exception):  # a user's own optimizer may not step on a small tensor
        state += trained * state_bytes(config, trained_dtype(config))
    state += 4 * trained * uses_ema(config)
    return SaveSizes(checkpoint_bytes(learner.sdxl, learner.vae, PRECISIONS[config.save_precision]), state)


def check_space(config: Config, learner: Learner, timeline: Timeline) -> None:
    """Raises UserError if no disk has room for the saves of one step. Warns if there is no room for all of the run."""
    sizes = expected_sizes(config, learner)
    free = {folder: free_bytes(folder) for folder in config.save_folders}
    needed = sizes.of_one_step(config)
    if max(free.values()) < needed:
        message = f"the disk has {size_text(free[config.output_folder])} free, and one save takes {size_text(needed)}"
        message += ": free space, or set another output_dir or a save_fallback_dir"
        raise UserError(Problem(message, key="output_dir", value=str(config.output_folder)))
    if free[config.output_folder] < (whole := sizes.of_run(config, timeline)):
        message = "the disk of %s has %s free, and the saves of the whole run may take %s: free space, or keep fewer"
        logger.warning(message, config.output_folder, size_text(free[config.output_folder]), size_text(whole))
