"""`sdxl-cache`: builds the dataset index and the latent cache on the disk, for runs to come."""

import logging
import os

from sdxl_finetune.config import Config
from sdxl_finetune.errors import Problem, UserError, say_errors
from sdxl_finetune.latents.preparing import prepare
from sdxl_finetune.model.load import load_vae
from sdxl_finetune.output.console import console
from sdxl_finetune.runtime.out_of_memory import OutOfMemory
from sdxl_finetune.runtime.processes import build_accelerator
from sdxl_finetune.runtime.signals import Interrupt, stop_on_signals
from sdxl_finetune.training.setup import shared_index
from sdxl_finetune.training.vae_encoder import VaeEncoder

logger = logging.getLogger(__name__)


def cache(config: Config) -> int:
    """Encodes the missing latents; returns the exit status. Raises UserError for the user's mistakes."""
    if not config.cache_latents_to_disk:
        message = "sdxl-cache keeps latents on the disk: set this option to true"
        raise UserError(Problem(message, key="cache_latents_to_disk", value=False))
    try:
        with stop_on_signals() as stop, console(config, int(os.environ.get("RANK", 0))):
            accelerator = build_accelerator(config)
            index = shared_index(config, accelerator)
            logger.info("%s", index.describe())
            assert config.pretrained_model_name_or_path is not None
            vae = load_vae(config.pretrained_model_name_or_path, config.vae)
            prepare(index, VaeEncoder(vae, accelerator.device), config, accelerator, stop)
            accelerator.end_training()
    except OutOfMemory as error:
        say_errors(error)
        return 1
    except Interrupt as interrupt:
        return interrupt.exit_status
    return 0
