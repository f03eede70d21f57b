"""What happens every so often in a run: previews, saved weights and saved states.

When, and under which name, is decided by pure functions of the position (output/prompts.py, output/weights.py,
output/state.py); here they meet the run. None of it changes anything about training.

All ranks pass through here at the same steps. The previews are shared out among them; the first one saves.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image

from sdxl_finetune.errors import UserError
from sdxl_finetune.files import remove_leftovers
from sdxl_finetune.output.checkpoints import (
    Due,
    existing,
    final_weights,
    remove,
    remove_replaced,
    save_weights,
    weights_due,
)
from sdxl_finetune.output.metadata import build_metadata
from sdxl_finetune.output.previews import draw_previews
from sdxl_finetune.output.prompts import Prompt, load_prompts, preview_due
from sdxl_finetune.training.resume import Start, about_state, where_it_stands
from sdxl_finetune.training.setup import Run
from sdxl_finetune.training.state import (
    final_state,
    interrupted_state,
    interrupted_states,
    is_saved_name,
    save_state,
    states_due,
)
from sdxl_finetune.training.validation import validation_due

logger = logging.getLogger(__name__)


def begin(run: Run) -> None:
    """Before the first step: removes what a killed run left half written, and does what it was about to do after the
    step that this one goes on from; or draws the previews of an untrained model.
    """
    if run.accelerator.is_main_process:
        for path in remove_leftovers(run.output_dir, lambda name: is_saved_name(run.config, name)):
            logger.info("removed %s, which was never finished", path)
    if run.start is None:
        preview_if_due(run, step=0, epoch=None)
        validate_if_due(run, step=0, epoch=None)
    elif run.start.path.resolve().parent == run.output_dir.resolve():
        _catch_up(run, run.start)


def _catch_up(run: Run, start: Start) -> None:
    """What else was due at the step that a run goes on from, and what would have been removed then."""
    epochs, within = run.plan.place(start.step)
    epoch = None if within else epochs
    weights = weights_due(run.config, epoch=epoch, step=start.step, epochs=run.epochs)
    states = states_due(run.config, epoch=epoch, step=start.step, epochs=run.epochs) if start.is_state else []
    missing_weights = [due for due in weights if not existing(run.output_dir, due.name, run.save_as)]
    missing_states = [due for due in states if not (run.output_dir / due.name).exists()]
    _save(run, missing_weights, missing_states, step=start.step)
    if run.accelerator.is_main_process:
        for due in weights:
            remove_replaced(due, run.output_dir, run.save_as)
        if start.is_state:
            _remove_states(run, states, start.step)


def preview_if_due(run: Run, *, step: int, epoch: int | None) -> None:
    """Draws the previews that are due: before training (step 0), after a step (epoch None), or after an epoch."""
    config = run.config
    due = preview_due(
        every_n_steps=config.sample_every_n_steps,
        every_n_epochs=config.sample_every_n_epochs,
        at_first=config.sample_at_first,
        step=step,
        epoch=epoch,
    )
    if not (due and run.prompts):
        return
    run.log.flush()
    shared = [(_current_prompts(run), datetime.now())]
    broadcast_object_list(shared)
    prompts, now = shared[0]
    with run.log.pause(), shown_weights(run, config.ema_previews):
        drawn = draw_previews(
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
            now=now,
            rank=run.accelerator.process_index,
            ranks=run.accelerator.num_processes,
        )
        previews = gather_object([(one.index, one.prompt.prompt, one.path) for one in drawn])
    if run.accelerator.is_main_process and previews:
        run.log.previews([(index, _read(path), prompt) for index, prompt, path in sorted(previews)], step)


def _read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()


@contextmanager
def shown_weights(run: Run, average: bool) -> Iterator[None]:
    """Within it, the model holds the weights that are not for training but for use."""
    with run.update.weights_for_use(), run.ema.in_place() if run.ema and average else nullcontext():
        yield


def validate_if_due(run: Run, *, step: int, epoch: int | None) -> None:
    """Validates before training (step 0), as often as is asked for, and at the end; `epoch` has ended, if any has."""
    last = step == run.steps
    if run.validation is None or not validation_due(run.config, step=step, epoch=epoch, last=last):
        return
    run.log.flush()
    with run.log.pause(), shown_weights(run, run.config.ema_validation):
        losses = run.validation(run.sdxl, run.accelerator.device, run.accelerator.autocast)
    run.log.validation(losses, step=step, epoch=run.plan.place(step - 1)[0] + 1 if step else 0)


def _current_prompts(run: Run) -> Sequence[Prompt]:
    """The prompts as the file has them now, as in the reference: it may be edited during a run."""
    assert run.config.sample_prompts is not None
    if not run.accelerator.is_main_process:
        return ()
    try:
        return load_prompts(run.config.sample_prompts)
    except UserError as error:
        logger.warning("the prompts that the run began with are drawn again: %s", error)
        return run.prompts


def save_if_due(run: Run, *, step: int, epoch: int | None) -> bool:
    """Saves the weights and states that are due after `step` steps; `epoch` is the number of the epoch that has ended,
    if one has. Returns whether a state was saved.
    """
    states = states_due(run.config, epoch=epoch, step=step, epochs=run.epochs)
    _save(run, weights_due(run.config, epoch=epoch, step=step, epochs=run.epochs), states, step=step)
    return bool(states)


def save_final(run: Run) -> None:
    """Saves the weights, and the state if it is asked for, at the end of training."""
    state = final_state(run.config)
    _save(run, [final_weights(run.config)], [state] if state else [], step=run.steps)


def save_interrupted(run: Run, *, step: int) -> None:
    """Saves the state of a run that is stopped after `step` steps."""
    _save(run, [], [interrupted_state(run.config, step)], step=step, interrupted=True)


def is_finished(run: Run) -> bool:
    """Whether there is nothing left to do but what the run that this one goes on from has done."""
    start = run.start
    final = existing(run.output_dir, final_weights(run.config).name, run.save_as)
    if start is None or start.step < run.steps or not final:
        return False
    return not start.is_state or final[-1].stat().st_mtime >= start.about["time"]


def _save(run: Run, weights: Sequence[Due], states: Sequence[Due], *, step: int, interrupted: bool = False) -> None:
    """On the first rank, and only when every loss so far is known to be finite; the others wait. Nothing older goes
    before what replaces it is complete.
    """
    if not (weights or states):
        return
    run.log.note_save(step)
    with run.log.pause():
        if run.accelerator.is_main_process:
            where = where_it_stands(run.plan, run.order, step, run.log.name)
            # The state first: a run that is killed between them goes on from it, and saves the weights then.
            for due in states:
                _save_state(run, due, step, where, interrupted)
            for due in weights:
                _save_weights(run, due, step, where)
            _remove_states(run, states, step if states else 0)
        run.accelerator.wait_for_everyone()


def _save_weights(run: Run, due: Due, step: int, where: Mapping[str, Any]) -> None:
    epoch, now = run.plan.place(step)[0], datetime.now().astimezone()
    if run.ema and run.config.ema_save:
        where = {**where, "averaged": True}
    metadata = build_metadata(
        run.config, epoch=epoch, step=step, seed=run.seed, now=now, thumbnail=run.thumbnail, resume=where
    )
    with shown_weights(run, run.config.ema_save):
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


def _save_state(run: Run, due: Due, step: int, where: Mapping[str, Any], interrupted: bool) -> None:
    path, scaler = run.output_dir / due.name, run.accelerator.scaler
    about = about_state(run.config, where, step=step, epoch=run.plan.place(step)[0], seed=run.seed)
    save_state(
        path,
        run.sdxl,
        run.vae,
        run.update.optimizer,
        run.update.optimizer_groups,
        average=run.ema.averages if run.ema else None,
        scaler=None if scaler is None else scaler.state_dict(),
        about=about | {"checkpoint": run.checkpoint_format, "interrupted": interrupted},
    )
    logger.info("saved %s", path)


def _remove_states(run: Run, states: Sequence[Due], step: int) -> None:
    """Those that these states of `step` replace; and, as there is one of this step, those that interruptions left
    before, which nothing else would ever remove.
    """
    for due in states:
        if due.replaces:
            remove(run.output_dir / due.replaces)
    for path in interrupted_states(run.config, before=step):
        remove(path)
