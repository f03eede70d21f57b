"""Imports what the programs import while they run, so that processes forked from this one start at once."""

import bitsandbytes  # noqa: F401
import tensorboard.compat.tensorflow_stub  # noqa: F401
import transformers.models.clip.modeling_clip  # noqa: F401

import sdxl_finetune.commands.cache
import sdxl_finetune.commands.check
import sdxl_finetune.commands.data
import sdxl_finetune.commands.model
import sdxl_finetune.training.loop  # noqa: F401
