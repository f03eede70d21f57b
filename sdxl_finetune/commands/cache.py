"""`sdxl-cache`: builds the dataset index and the latents on the disk, and nothing else, for runs to come."""

import logging
import os

from sdxl_finetune.config import Config
from sdxl_finetune.errors import Problem, UserError, say_errors
from sdxl_finetune.latents.preparing import encode_dataset, shared_index
from sdxl_finetune.model.load import load_vae
from sdxl_finetune.output.console import console
from sdxl_finetune.runtime.out_of_memory import OutOfMemory
from sdxl_finetune.runtime.processes import build_accelerator
from sdxl_finetune.runtime.signals import Interrupt, stop_on_signals

logger = logging.getLogger(__name__)


def cache(config: Config) -> int:
    """Encodes what is not there yet; returns the exit status. Raises UserError for the user's mistakes."""
    if not config.cache_latents_to_disk:
        message = "without it nothing is kept for later: set it to true"
        raise UserError(Problem(message, key="cache_latents_to_disk", value=False))
    try:
        with stop_on_signals() as stop, console(config, int(os.environ.get("RANK", 0))):
            accelerator = build_accelerator(config)
            index = shared_index(config, accelerator)
            logger.info("%s", index.describe())
            assert config.pretrained_model_name_or_path is not None
            vae = load_vae(config.pretrained_model_name_or_path, config.vae)
            encode_dataset(config, index, vae, accelerator, stop)
            accelerator.end_training()
    except OutOfMemory as error:
        say_errors(error)
        return 1
    except Interrupt as interrupt:
        return interrupt.exit_status
    return 0
