"""`sdxl-cache`: builds the dataset index and the caches on the disk, for runs to come."""

import logging
import os
from contextlib import ExitStack

from sdxl_finetune.config import Config, with_local_models
from sdxl_finetune.data.tokens import tokenizer_of
from sdxl_finetune.errors import Problem, UserError, say_errors
from sdxl_finetune.latents.captions import prepare_text
from sdxl_finetune.latents.masks import prepare_masks
from sdxl_finetune.latents.preparing import prepare
from sdxl_finetune.model.load import load_text_encoders, load_vae
from sdxl_finetune.model.vae import latent_size
from sdxl_finetune.output.console import console
from sdxl_finetune.runtime.out_of_memory import OutOfMemory
from sdxl_finetune.runtime.processes import build_accelerator, weight_dtype
from sdxl_finetune.runtime.signals import Interrupt, stop_on_signals
from sdxl_finetune.runtime.watch import watched
from sdxl_finetune.training.setup import shared_index
from sdxl_finetune.training.text_encoder import TextEncoders
from sdxl_finetune.training.vae_encoder import VaeEncoder

logger = logging.getLogger(__name__)


def cache(config: Config) -> int:
    """Encodes the missing latents and captions; returns the exit status. Raises UserError for the user's mistakes."""
    if not (config.cache_latents_to_disk or config.cache_text_encoder_outputs_to_disk):
        message = "sdxl-cache keeps latents and text encoder outputs on the disk: set this option to true,"
        message += " or cache_text_encoder_outputs_to_disk"
        raise UserError(Problem(message, key="cache_latents_to_disk", value=False))
    try:
        with stop_on_signals() as stop, console(config, int(os.environ.get("RANK", 0))), ExitStack() as stack:
            accelerator = build_accelerator(config)
            stack.enter_context(watched(config, accelerator))
            config = with_local_models(config)
            index = shared_index(config, accelerator)
            logger.info("%s", index.describe())
            path, device = config.model_path, accelerator.device
            if config.cache_latents_to_disk:
                vae = load_vae(path, config.vae_path, config)
                index, _ = prepare_masks(index, config, accelerator, latent_size(vae).pixels, stop)
                index, _ = prepare(index, VaeEncoder(vae, device), config, accelerator, stop)
            if config.cache_text_encoder_outputs_to_disk:
                dtype, exact = weight_dtype(config), config.keeps_masters
                sdxl = load_text_encoders(path, dtype=dtype, vae_path=config.vae_path, exact=exact, options=config)
                sdxl.zero_cond = config.use_zero_cond
                prepare_text(index, TextEncoders(sdxl, tokenizer_of(config), device), config, accelerator, stop)
            accelerator.end_training()
    except OutOfMemory as error:
        say_errors(error)
        return 1
    except Interrupt as interrupt:
        return interrupt.exit_status
    return 0
