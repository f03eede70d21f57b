"""Writes the checkpoints and training states of a run, and removes what they replace.

Only the first rank calls these functions. What storage refuses is said and tried elsewhere by failed_saves.py.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path

from sdxl_finetune.model.save import checkpoint_bytes, single_file_tensors
from sdxl_finetune.output import checkpoints
from sdxl_finetune.output.checkpoints import Save
from sdxl_finetune.output.metadata import build_metadata
from sdxl_finetune.training.optimizer_state import collect_optimizer_state
from sdxl_finetune.training.setup import Run
from sdxl_finetune.training.space import value_bytes
from sdxl_finetune.training.state import TrainingState, interrupted_states, save_state, time_of_saving

logger = logging.getLogger(__name__)


@contextmanager
def published_weights(run: Run, ema: bool) -> Iterator[None]:
    """Within the context the model holds the weights to save or to evaluate.

    They are the EMA if there is one and `ema` is true, and the averaged weights of a schedule-free optimizer.
    """
    learner = run.learner
    with learner.update.weights_for_use(), learner.ema.in_place() if learner.ema and ema else nullcontext():
        yield


def training_state(run: Run, step: int, is_interrupted: bool) -> TrainingState:
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


def write_checkpoint(run: Run, save: Save, state: TrainingState) -> bool:
    """Saves a checkpoint and removes the one that it replaces. Returns False if storage refuses it."""
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
        model = learner.sdxl, learner.vae
        name, precision = checkpoints.name_and_precision(save, run.config, *model)

        def write(folder: Path) -> Path:
            path = checkpoints.checkpoint_path(folder, name, run.save_as)
            checkpoints.write_checkpoint(
                path,
                precision,
                *model,
                save_as=run.save_as,
                metadata=metadata,
                epoch=state.epoch,
                step=state.step,
            )
            return path

        path = run.failed_saves.write(name, checkpoint_bytes(*model, precision), write)
    if path is None:
        return False
    if path.parent == run.output_dir:
        run.uploads.add(path)
    remove_replaced(run, save)
    return True


def remove_replaced(run: Run, save: Save) -> None:
    """Removes the checkpoint that this save replaces. The store may hold one that another machine has saved."""
    in_store = run.config.output_address is not None
    with _said_if_it_fails():
        for folder in run.config.save_folders:
            for path in checkpoints.replaced(save, folder, run.save_as, in_store=in_store):
                _remove(run, path)


def write_state(run: Run, save: Save, state: TrainingState) -> bool:
    """Saves a training state. Returns False if storage refuses it."""
    learner, scale = run.learner, run.learner.update.loss_scale
    optimizer = collect_optimizer_state(
        learner.update.optimizer,
        learner.update.optimizer_groups,
        ema=learner.ema.averages if learner.ema else None,
        scaler=None if scale is None else scale.state_dict(),
        loss_weights=learner.loss_weights.state() if learner.loss_weights else None,
    )
    weights = single_file_tensors(learner.sdxl, learner.vae, None, exact=True)

    def write(folder: Path) -> Path:
        save_state(folder / save.name, state, weights, optimizer)
        return folder / save.name

    path = run.failed_saves.write(save.name, value_bytes(weights) + value_bytes(optimizer), write)
    if path is None:
        return False
    logger.info("saved %s", path)
    if path.parent == run.output_dir:
        run.uploads.add(path, to_hub=run.config.save_state_to_huggingface)
    return True


def remove_old_states(run: Run, states: Sequence[Save], step: int) -> None:
    """Removes what these training states replace, and the states of runs that were interrupted before `step`.

    Nothing else would ever remove the state of an interrupted run. Another machine may have saved it. It then stands in
    the store only.
    """
    for save in states:
        run.stored.interrupted.pop(save.name, None)
        for folder in run.config.save_folders if save.replaces else ():
            _remove(run, folder / str(save.replaces))
    old: set[Path] = set()
    with _said_if_it_fails():
        old |= set(interrupted_states(run.config, before=step))
    stored = {name for name, saved_after in run.stored.interrupted.items() if saved_after < step}
    for path in sorted(old | {run.output_dir / name for name in stored}):
        run.stored.interrupted.pop(path.name, None)
        _remove(run, path)


def _remove(run: Run, path: Path) -> None:
    """Removes a save, after its upload. Saves in `save_fallback_dir` are not uploaded."""
    if path.parent == run.output_dir:
        run.uploads.remove(path)
    else:
        checkpoints.remove(path)


@contextmanager
def _said_if_it_fails() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        logger.warning("older saves cannot be looked up (%s) and stay for now", error.strerror or error)
