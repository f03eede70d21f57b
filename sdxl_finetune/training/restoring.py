"""Gives a learner what a training state holds beside the weights of the model."""

import logging

from sdxl_finetune.config import Config
from sdxl_finetune.errors import counted
from sdxl_finetune.training.learned_weights import LearnedWeights
from sdxl_finetune.training.learner import Learner
from sdxl_finetune.training.optimizer_state import load_ema, load_loss_weights, restore_optimizer_state
from sdxl_finetune.training.resume import Start, changed_arguments

logger = logging.getLogger(__name__)


def restore(start: Start | None, learner: Learner) -> None:
    """Gives the learner optimizer state, loss scale, EMA and loss weights, if the run starts from a training state."""
    if start and learner.loss_weights:
        _restore_loss_weights(start, learner.config, learner.loss_weights)
    if start is None or not start.is_state:
        return
    update = learner.update
    changed = changed_arguments(start, learner.config)
    saved_scale, unknown = restore_optimizer_state(
        start.optimizer, update.optimizer, update.optimizer_groups, changed=changed
    )
    if unknown:
        count = counted(len(unknown), "parameter")
        logger.info("without saved optimizer state, which starts anew: %s, for example %s", count, unknown[0])
    if saved_scale is not None and update.loss_scale is not None:
        update.loss_scale.load_state_dict(saved_scale)
    if learner.ema and (unknown := learner.ema.load(load_ema(start.optimizer))):
        count = counted(len(unknown), "parameter")
        logger.info("without a saved EMA, which starts with the weights: %s, for example %s", count, unknown[0])


def _restore_loss_weights(start: Start, config: Config, weights: LearnedWeights) -> None:
    """Gives the learned loss weights their saved state, if the training state has one."""
    saved = load_loss_weights(start.optimizer) if start.is_state else None
    if saved is None:
        logger.info("%s has no learned loss weights, which start anew with the weight 1", start.path)
        return
    weights.load(saved, changed=changed_arguments(start, config, "edm2_loss_weighting_optimizer_args"))
