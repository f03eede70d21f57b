"""Hooks of the training loop: previews, validation, colour checks, checkpoints and training states.

Pure functions of the moment decide when something is due, and under which name it is saved (every.py, saves.py). The
hooks carry it out. No hook changes anything about training. All ranks call the hooks at the same steps: they share out
the previews, the validation and the colour checks, and the first rank saves.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image

from sdxl_finetune.errors import UserError
from sdxl_finetune.files import remove_leftovers
from sdxl_finetune.output import checkpoints
from sdxl_finetune.output.checkpoints import Save, overwritten
from sdxl_finetune.output.previews import PreviewModel, draw_previews
from sdxl_finetune.output.prompts import PreviewFiles, Prompt, load_prompts, with_size
from sdxl_finetune.runtime.processes import on_first_rank
from sdxl_finetune.runtime.signals import Interrupt
from sdxl_finetune.training.every import Moment, colours_every, previews_every, validation_every, weights_every
from sdxl_finetune.training.failed_saves import SaveFailed
from sdxl_finetune.training.resume import Start
from sdxl_finetune.training.saves import (
    NOTHING,
    STATE_SUFFIX,
    Due,
    Refused,
    checkpoints_due,
    final_state,
    saves_due,
    states_due,
)
from sdxl_finetune.training.setup import Run
from sdxl_finetune.training.space import check_space
from sdxl_finetune.training.state import is_saved_name
from sdxl_finetune.training.write_saves import (
    published_weights,
    remove_old_states,
    remove_replaced,
    training_state,
    write_checkpoint,
    write_state,
)

logger = logging.getLogger(__name__)


def begin(run: Run) -> None:
    """Prepares the output folder and does what is due before the first step.

    Half-written files of a killed run are removed. A new run draws previews and validates the untrained model. A
    resumed run saves the checkpoints and states that were due at the resumed step and are missing. Raises UserError if
    no disk has room for a save.
    """
    if run.accelerator.is_main_process:
        for folder in run.config.save_folders:
            for path in remove_leftovers(folder, lambda name: is_saved_name(run.config, name)):
                logger.info("removed %s, which an earlier run left half-written", path)
    if run.timeline.first < run.timeline.steps:  # the last saves alone may be less than those of a step
        on_first_rank(run.accelerator, lambda: check_space(run.config, run.learner, run.timeline))
    if run.start is None:
        if message := overwritten(run.config, run.save_as):
            logger.warning("%s", message)
        moment = run.timeline.after(run.timeline.first)
        preview_if_due(run, moment)
        validate_if_due(run, moment)
        check_colours_if_due(run, moment)
    else:
        _save_missing(run, run.start)
    run.requests.begin(sum(group.size for group in run.learner.parameters.groups))


def is_finished(run: Run) -> bool:
    """True if no step is left to make, and the final checkpoint exists and is not that of an earlier run."""
    start = run.start
    if start is None or start.state.step < run.timeline.steps:
        return False
    shared = [_has_checkpoint(run, checkpoints.final_name(run.config), start)]
    broadcast_object_list(shared)  # machines with folders of their own may hold other files
    return shared[0]


def _has_checkpoint(run: Run, name: str, start: Start) -> bool:
    """True if a checkpoint of that name exists here or in the store, and is not that of an earlier run.

    Checkpoints are saved after the training state of the same step.
    """
    paths = [path for folder in _places(run) for path in checkpoints.checkpoint_paths(folder, name, run.save_as)]
    times = [path.stat().st_mtime for path in paths if path.exists()]
    times += [run.stored.checkpoints[path.name] for path in paths if path.name in run.stored.checkpoints]
    return bool(times) and (not start.is_state or max(times) >= start.state.saved_at)


def _places(run: Run) -> list[Path]:
    """The folders in which a save of an earlier run counts. What is uploaded has to stand in `output_dir`."""
    config = run.config
    return [run.output_dir] if config.uploads_saves else config.save_folders


def preview_if_due(run: Run, moment: Moment) -> None:
    """Draws the previews that are due at this moment, and shows them in the log."""
    every = previews_every(run.config)
    if not (run.prompts and every.is_due(moment)):
        return
    if not on_first_rank(run.accelerator, lambda: run.failed_saves.has_disk("previews", moment.step)):
        return
    run.log.flush()
    shared = [(_current_prompts(run), datetime.now())]
    broadcast_object_list(shared)
    prompts, now = shared[0]
    learner, accelerator = run.learner, run.accelerator
    model = PreviewModel(
        sdxl=learner.sdxl,
        vae=learner.vae,
        tokenizer=run.tokenizer,
        objective=learner.objective,
        flow=run.config,
        autocast=learner.autocast,
    )
    files = PreviewFiles(
        folder=run.output_dir / "sample",
        output_name=run.config.output_name,
        epoch=moment.epoch if every.epochs or not moment.step else None,
        step=moment.step,
        time=now,
    )
    prompts_of_rank = list(enumerate(prompts))[accelerator.process_index :: accelerator.num_processes]
    with run.log.pause(), published_weights(run, run.config.ema_previews):
        drawn = draw_previews(model, prompts_of_rank, run.config, files, run.seed)
        previews = gather_object([(preview.index, preview.prompt.prompt, preview.path) for preview in drawn])
    if run.accelerator.is_main_process and previews:
        try:
            images = [(index, _read_image(path), prompt) for index, prompt, path in sorted(previews)]
        except OSError as error:  # what storage took and does not give back
            logger.warning("previews after step %d cannot be read and are not in the log: %s", moment.step, error)
            return
        run.log.previews(images, moment.step)


def validate_if_due(run: Run, moment: Moment) -> None:
    """Computes the validation losses that are due at this moment, and logs them."""
    if run.validation is None or not validation_every(run.config).is_due(moment):
        return
    run.log.flush()
    with run.log.pause(), published_weights(run, run.config.ema_validation):
        losses = run.validation(run.learner)
    run.log.validation(losses, step=moment.step, epoch=_epoch_of(run, moment))


def check_colours_if_due(run: Run, moment: Moment) -> None:
    """Compares the colours of drawn pictures with those of images if that is due, and warns of a drift."""
    if run.colours is None or not colours_every(run.config).is_due(moment):
        return
    run.log.flush()
    with run.log.pause(), published_weights(run, run.config.ema_previews):
        drifts = run.colours(run.learner)
    run.log.colours(drifts, step=moment.step, epoch=_epoch_of(run, moment))
    if (text := run.colours.warning(drifts, step=moment.step)) and run.accelerator.is_main_process:
        logger.warning("%s", text)


def draw_weights_if_due(run: Run, moment: Moment) -> None:
    """Shows the curve of learned loss weights in the log if it is due."""
    weights = run.learner.loss_weights
    if weights is None or not weights_every(run.config).is_due(moment):
        return
    run.log.flush()
    with run.log.pause():
        run.log.loss_weights(weights.curve(), step=moment.step, epoch=_epoch_of(run, moment))


def _epoch_of(run: Run, moment: Moment) -> int:
    """Number of the epoch of the last step, or 0 before the first one."""
    return run.timeline.plan.place(moment.step - 1)[0] + 1 if moment.step else 0


def save_if_due(run: Run, moment: Moment) -> Due:
    """Saves the checkpoints and training states that are due or asked for. Returns what storage has taken.

    What storage refused before is due too, after a while.
    """
    began, wish = time.monotonic(), run.requests.wish
    if moment.is_last:
        wish = max(wish, run.requests.late_wish())
    due = saves_due(run.config, moment, run.timeline.epochs, wish)
    if not moment.is_last:
        due = run.failed_saves.with_retries(due, moment.step)
    written = due.without(_save(run, due, step=moment.step))
    if written.states:
        run.requests.note_save(time.monotonic() - began)
    return written


def save_final(run: Run) -> None:
    """Saves the final checkpoint, and the training state if the options ask for one.

    Raises SaveFailed if storage does not take them until the end of `save_retry_minutes`.
    """
    state = final_state(run.config)
    states = [state] if state and not _is_saved(run, state) else []
    final = Due([Save(name=checkpoints.final_name(run.config))], states)
    _save_at_the_end(run, run.failed_saves.at_the_end(run.timeline.steps, final), run.timeline.steps)


def _is_saved(run: Run, state: Save) -> bool:
    """True if the run has resumed from this final state. A run that uploads counts none, and uploads it once more."""
    config, start = run.config, run.start
    if start is None or start.state.step < run.timeline.steps or config.uploads_saves:
        return False
    return on_first_rank(run.accelerator, lambda: start.is_in(config) and start.path.name == state.name)


def save_stopped(run: Run, moment: Moment, written: Due = NOTHING, cause: Interrupt | None = None) -> None:
    """Saves the training state of a run that is stopped at this moment, and what was asked for or refused before.

    `written` is what was saved at this moment already. Raises SaveFailed if storage does not take the saves until the
    end of `save_retry_minutes`.
    """
    due = run.failed_saves.at_the_stop(moment.step, run.requests.late_wish(), written)
    _save_at_the_end(run, due, moment.step, cause)


@contextmanager
def saved_if_data_fails(run: Run) -> Iterator[None]:
    """If a batch cannot be read in the context, saves the training state of the last step before the error goes on.

    Other ranks wait for the batch, and cannot save together. A run of several processes therefore saves nothing.
    """
    try:
        yield
    except UserError:
        run.log.flush()
        moment = run.timeline.after(run.log.last_step)
        if run.accelerator.num_processes == 1 and not moment.is_first:
            name = checkpoints.step_name(run.config, moment.step) + STATE_SUFFIX
            if not any((folder / name).exists() for folder in run.config.save_folders):
                try:
                    save_stopped(run, moment)
                except SaveFailed as failure:
                    logger.error("%s", failure)
        raise


def _current_prompts(run: Run) -> Sequence[Prompt]:
    """The prompts that the file holds now. It is read each time, because users edit it during a run."""
    assert run.config.sample_prompts is not None
    if not run.accelerator.is_main_process:
        return ()
    try:
        return with_size(load_prompts(run.config.sample_prompts), run.dataset.index.resolution)
    except UserError as error:
        logger.warning("%s; the prompts from the start of the run are used instead", error)
        return run.prompts


def _read_image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()


def _save_missing(run: Run, start: Start) -> None:
    """Saves what was due at the step that a run resumes from and is missing, and removes what it replaces.

    Does nothing if the run resumes from another folder than `output_dir`. The first rank decides this for all, because
    each machine has its own folder, and the ranks must save together.
    """
    step, epochs = start.state.step, run.timeline.epochs
    moment = run.timeline.after(step)
    weights = checkpoints_due(run.config, moment, epochs)
    states = states_due(run.config, moment, epochs) if start.is_state else []
    missing = [save for save in weights if not _has_checkpoint(run, save.name, start)]
    existing = {path.name for folder in _places(run) for save in states if (path := folder / save.name).exists()}
    existing |= run.stored.states.keys()
    missing_states = [save for save in states if save.name not in existing]
    shared = [(start.is_in(run.config), missing, missing_states)]
    broadcast_object_list(shared)
    is_own, missing, missing_states = shared[0]
    if not is_own:
        return
    _save(run, Due(missing, missing_states), step=step)
    if run.accelerator.is_main_process:
        for save in weights:
            remove_replaced(run, save)
        if start.is_state:
            remove_old_states(run, states, step)


def _save_at_the_end(run: Run, due: Due, step: int, cause: Interrupt | None = None) -> None:
    """Saves, and tries what storage refuses again and again. `cause` is what stopped the run; None at its last step.

    Raises SaveFailed if the wait for storage ends. A second signal ends it too.
    """
    began, attempt, refused = time.monotonic(), 0, Refused()
    try:
        while refused := _save(run, due, step=step):
            if end := run.failed_saves.wait(attempt, began, run.requests.end_of_wait):
                raise run.failed_saves.failure(refused, end, cause)
            attempt, due = attempt + 1, due.only(refused)
    except Interrupt as interrupt:
        if not refused:
            raise
        raise run.failed_saves.failure(refused, interrupt.source, cause) from None


def _save(run: Run, due: Due, *, step: int) -> Refused:
    """Saves on the first rank while the other ranks wait. Raises WrongNumbers if a number so far went wrong.

    Returns what storage refuses. Old checkpoints and states are deleted only after the new ones are complete.
    """
    if not due:
        return Refused()
    run.log.note_save(step)
    with run.log.pause():
        refused = Refused()
        if run.accelerator.is_main_process:
            if due.weights:  # not for a state alone: a run that is being stopped has little time
                run.stages.count_tags()
            state = training_state(run, step, due.is_temporary)
            # States first: a run that is killed in between resumes from the state, and then saves the checkpoint.
            unsaved_states = [save.name for save in due.states if not write_state(run, save, state)]
            unsaved = [save.name for save in due.weights if not write_checkpoint(run, save, state)]
            refused = Refused(unsaved, unsaved_states)
            complete = due.without(refused).states
            remove_old_states(run, complete, step if complete else 0)
        return run.failed_saves.note(step, due, refused)
