"""What happens every so often in a run: previews and saved weights.

When, and under which name, is decided by pure functions of the position (output/prompts.py, output/weights.py); here
they meet the run. Neither changes anything about training.
"""

import logging
from collections.abc import Sequence
from datetime import datetime

from sdxl_finetune.optim.optimizer import averaged_weights
from sdxl_finetune.output.metadata import build_metadata
from sdxl_finetune.output.prompts import Prompt, load_prompts, preview_due
from sdxl_finetune.output.sample import draw_previews
from sdxl_finetune.output.weights import Due, final_weights, save_weights, weights_due
from sdxl_finetune.problems import UserError
from sdxl_finetune.run import Run

logger = logging.getLogger(__name__)


def preview_if_due(run: Run, *, step: int, epoch: int | None) -> None:
    """Draws the previews that are due, on the first rank: before training (step 0), after a step (epoch None), or
    after an epoch.
    """
    config = run.config
    due = preview_due(
        every_n_steps=config.sample_every_n_steps,
        every_n_epochs=config.sample_every_n_epochs,
        at_first=config.sample_at_first,
        step=step,
        epoch=epoch,
    )
    if due and run.prompts and run.accelerator.is_main_process:
        prompts = _current_prompts(run)
        with run.log.pause(), averaged_weights(run.optimizer):
            previews = draw_previews(
                run.sdxl,
                run.vae,
                prompts,
                config=config,
                tokenizer=run.tokenizer,
                schedule=run.schedule,
                autocast=run.accelerator.autocast,
                seed=run.seed,
                epoch=epoch,
                step=step,
                now=datetime.now(),
            )
            for drawn in previews:
                run.log.image(drawn.index, drawn.image, drawn.prompt.prompt, step)


def _current_prompts(run: Run) -> Sequence[Prompt]:
    """The prompts as the file has them now, as in the reference: it may be edited during a run."""
    assert run.config.sample_prompts is not None
    try:
        return load_prompts(run.config.sample_prompts)
    except UserError as error:
        logger.warning("the prompts that the run began with are drawn again: %s", error)
        return run.prompts


def save_if_due(run: Run, *, step: int, epoch: int | None) -> None:
    """Saves the weights that are due after `step` steps; `epoch` is the number of the epoch that has ended, if one
    has.
    """
    for due in weights_due(run.config, epoch=epoch, step=step, epochs=run.epochs):
        _save(run, due, step=step)


def save_final(run: Run) -> None:
    """Saves the weights at the end of training."""
    _save(run, final_weights(run.config), step=run.steps)


def _save(run: Run, due: Due, *, step: int) -> None:
    """On the first rank, and only when every loss so far is known to be finite."""
    run.log.flush()
    if run.accelerator.is_main_process:
        epoch, now = step // run.plan.steps_per_epoch, datetime.now().astimezone()
        metadata = build_metadata(run.config, epoch=epoch, step=step, seed=run.seed, now=now, thumbnail=run.thumbnail)
        with run.log.pause(), averaged_weights(run.optimizer):
            save_weights(
                due,
                run.config,
                run.sdxl,
                run.vae,
                directory=run.output_dir,
                kind=run.save_as,
                metadata=metadata,
                epoch=epoch,
                step=step,
            )
