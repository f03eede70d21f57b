"""Hooks of the training loop: previews, validation, colour checks, checkpoints and training states.

Pure functions of the moment decide when something is due, and under which name it is saved (every.py, saves.py). The
hooks carry it out. No hook changes anything about training. All ranks call the hooks at the same steps: they share out
the previews, the validation and the colour checks, and the first rank saves.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image

from sdxl_finetune.errors import UserError
from sdxl_finetune.files import remove_leftovers
from sdxl_finetune.model.save import single_file_tensors
from sdxl_finetune.output import checkpoints
from sdxl_finetune.output.checkpoints import Save, overwritten
from sdxl_finetune.output.metadata import build_metadata
from sdxl_finetune.output.previews import PreviewModel, draw_previews
from sdxl_finetune.output.prompts import PreviewFiles, Prompt, load_prompts, with_size
from sdxl_finetune.training.every import Moment, colours_every, previews_every, validation_every, weights_every
from sdxl_finetune.training.optimizer_state import collect_optimizer_state
from sdxl_finetune.training.resume import Start
from sdxl_finetune.training.saves import STATE_SUFFIX, checkpoints_due, final_state, states_due
from sdxl_finetune.training.setup import Run
from sdxl_finetune.training.state import TrainingState, interrupted_states, is_saved_name, save_state, time_of_saving

logger = logging.getLogger(__name__)


def begin(run: Run) -> None:
    """Prepares the output folder and does what is due before the first step.

    Half-written files of a killed run are removed. A new run draws previews and validates the untrained model. A
    resumed run saves the checkpoints and states that were due at the resumed step and are missing.
    """
    if run.accelerator.is_main_process:
        for path in remove_leftovers(run.output_dir, lambda name: is_saved_name(run.config, name)):
            logger.info("removed %s, which an earlier run left half-written", path)
    if run.start is None:
        if message := overwritten(run.config, run.save_as):
            logger.warning("%s", message)
        moment = run.timeline.after(run.timeline.first)
        preview_if_due(run, moment)
        validate_if_due(run, moment)
        check_colours_if_due(run, moment)
    else:
        _save_missing(run, run.start)


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
    paths = checkpoints.checkpoint_paths(run.output_dir, name, run.save_as)
    times = [path.stat().st_mtime for path in paths if path.exists()]
    times += [run.stored.checkpoints[path.name] for path in paths if path.name in run.stored.checkpoints]
    return bool(times) and (not start.is_state or max(times) >= start.state.saved_at)


def preview_if_due(run: Run, moment: Moment) -> None:
    """Draws the previews that are due at this moment, and shows them in the log."""
    every = previews_every(run.config)
    if not (run.prompts and every.is_due(moment)):
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
        images = [(index, _read_image(path), prompt) for index, prompt, path in sorted(previews)]
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


def save_if_due(run: Run, moment: Moment) -> bool:
    """Saves the checkpoints and training states that are due. Returns True if a state was saved."""
    epochs = run.timeline.epochs
    states = states_due(run.config, moment, epochs)
    _save(run, checkpoints_due(run.config, moment, epochs), states, step=moment.step)
    return bool(states)


def save_final(run: Run) -> None:
    """Saves the final checkpoint, and the training state if the options ask for one."""
    state = final_state(run.config)
    _save(run, [Save(name=checkpoints.final_name(run.config))], [state] if state else [], step=run.timeline.steps)


def save_interrupted(run: Run, moment: Moment) -> None:
    """Saves the training state of a run that is stopped at this moment."""
    state = Save(name=checkpoints.step_name(run.config, moment.step) + STATE_SUFFIX)
    _save(run, [], [state], step=moment.step, is_interrupted=True)


@contextmanager
def published_weights(run: Run, ema: bool) -> Iterator[None]:
    """Within the context the model holds the weights to save or to evaluate.

    They are the EMA if there is one and `ema` is true, and the averaged weights of a schedule-free optimizer.
    """
    learner = run.learner
    with learner.update.weights_for_use(), learner.ema.in_place() if learner.ema and ema else nullcontext():
        yield


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
    existing = {save.name for save in states if (run.output_dir / save.name).exists()} | run.stored.states.keys()
    missing_states = [save for save in states if save.name not in existing]
    shared = [(start.is_in(run.config), missing, missing_states)]
    broadcast_object_list(shared)
    is_own, missing, missing_states = shared[0]
    if not is_own:
        return
    _save(run, missing, missing_states, step=step)
    if run.accelerator.is_main_process:
        for save in weights:
            _remove_replaced(run, save)
        if start.is_state:
            _remove_old_states(run, states, step)


def _save(
    run: Run, weights: Sequence[Save], states: Sequence[Save], *, step: int, is_interrupted: bool = False
) -> None:
    """Saves on the first rank while the other ranks wait. Raises WrongNumbers if a number so far went wrong.

    Old checkpoints and states are deleted only after the new ones are complete.
    """
    if not (weights or states):
        return
    run.log.note_save(step)
    with run.log.pause():
        if run.accelerator.is_main_process:
            if weights:  # not for a state alone: a run that is being stopped has little time
                run.stages.count_tags()
            state = _training_state(run, step, is_interrupted)
            # States first: a run that is killed in between resumes from the state, and then saves the checkpoint.
            for save in states:
                _save_state(run, save, state)
            for save in weights:
                _save_checkpoint(run, save, state)
            _remove_old_states(run, states, step if states else 0)
        run.accelerator.wait_for_everyone()


def _training_state(run: Run, step: int, is_interrupted: bool) -> TrainingState:
    plan = run.timeline.plan
    epoch, steps_into_epoch = plan.place(step)
    return TrainingState(
        step=step,
        epoch=epoch,
        steps_into_epoch=steps_into_epoch,
        seed=run.seed,
        origin=plan.origin,
        data_order=run.data_order,
        log=run.log.name,
        checkpoint_format=run.checkpoint_format,
        optimizer=run.config.optimizer_name,
        config=run.options,
        is_interrupted=is_interrupted,
        stages=run.stages.stages(steps=step, epochs=epoch + steps_into_epoch / plan.steps_per_epoch),
        saved_at=time_of_saving(step, run.start.state if run.start and run.start.is_state else None),
    )


def _save_checkpoint(run: Run, save: Save, state: TrainingState) -> None:
    learner, ema = run.learner, run.config.ema_save
    metadata = build_metadata(
        run.config,
        epoch=state.epoch,
        step=state.step,
        seed=run.seed,
        now=datetime.now().astimezone(),
        thumbnail=run.thumbnail,
        resume=state.to_metadata(holds_ema=ema and learner.ema is not None),
        stages=state.stages,
    )
    with published_weights(run, ema):
        path = checkpoints.write_checkpoint(
            save,
            run.config,
            learner.sdxl,
            learner.vae,
            save_as=run.save_as,
            metadata=metadata,
            epoch=state.epoch,
            step=state.step,
        )
    run.uploads.add(path)
    _remove_replaced(run, save)


def _remove_replaced(run: Run, save: Save) -> None:
    """Removes the checkpoint that this save replaces. The store may hold one that another machine has saved."""
    in_store = run.config.output_address is not None
    for path in checkpoints.replaced(save, run.output_dir, run.save_as, in_store=in_store):
        run.uploads.remove(path)


def _save_state(run: Run, save: Save, state: TrainingState) -> None:
    learner, scale = run.learner, run.learner.update.loss_scale
    optimizer = collect_optimizer_state(
        learner.update.optimizer,
        learner.update.optimizer_groups,
        ema=learner.ema.averages if learner.ema else None,
        scaler=None if scale is None else scale.state_dict(),
        loss_weights=learner.loss_weights.state() if learner.loss_weights else None,
    )
    path = run.output_dir / save.name
    save_state(path, state, single_file_tensors(learner.sdxl, learner.vae, None, exact=True), optimizer)
    logger.info("saved %s", path)
    run.uploads.add(path, to_hub=run.config.save_state_to_huggingface)


def _remove_old_states(run: Run, states: Sequence[Save], step: int) -> None:
    """Removes what these training states replace, and the states of runs that were interrupted before `step`.

    Nothing else would ever remove the state of an interrupted run. Another machine may have saved it. It then stands in
    the store only.
    """
    for save in states:
        run.stored.interrupted.pop(save.name, None)
        if save.replaces:
            run.uploads.remove(run.output_dir / save.replaces)
    old = {path.name for path in interrupted_states(run.config, before=step)}
    stored = {name for name, saved_after in run.stored.interrupted.items() if saved_after < step}
    for name in sorted(old | stored):
        run.stored.interrupted.pop(name, None)
        run.uploads.remove(run.output_dir / name)
