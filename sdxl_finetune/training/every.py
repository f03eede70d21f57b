"""When previews, validation and saves are due: every N steps, every N epochs, at the start, at the end.

The training loop and sdxl-check ask the same `Every`, so that the check prints what the run will do.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from sdxl_finetune.config import (
    ColourOptions,
    LearnedWeightOptions,
    LengthOptions,
    PreviewOptions,
    ResumeOptions,
    SavingOptions,
    ValidationOptions,
)
from sdxl_finetune.config.tag_options import TagReportOptions
from sdxl_finetune.data.batch_plan import Plan
from sdxl_finetune.errors import counted

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A point after an optimizer step, or before the first step, at which hooks may run."""

    step: int
    """Optimizer steps made, counted from the start of training."""
    epoch: int | None
    """Number, from 1, of the epoch that ended with this step; None within an epoch and before the first step."""
    is_first: bool = False
    """True before the first step of the run."""
    is_last: bool = False
    """True after the last step of the run."""


@dataclass(frozen=True)
class Timeline:
    """All optimizer steps of a run and the epochs that they form."""

    plan: Plan
    steps: int
    """Optimizer steps of the whole run, from the start of training."""
    first: int = 0
    """Optimizer steps made before this run, by count: those of the resumed run, or see `first_step`."""

    @property
    def epochs(self) -> int:
        """Number of epochs that the run enters. `max_train_steps` may cut the last epoch short."""
        whole, steps_into_next = self.plan.place(self.steps)
        return whole + (steps_into_next > 0)

    def after(self, step: int) -> Moment:
        """The moment at which `step` optimizer steps are made. The end of the run also ends its last epoch."""
        epochs, steps_into_epoch = self.plan.place(step)
        is_first, is_last = step == self.first, step == self.steps
        epoch = None
        if step and (is_last or steps_into_epoch == 0):
            epoch = epochs + (steps_into_epoch > 0)
        return Moment(step=step, epoch=epoch, is_first=is_first, is_last=is_last)


def total_steps(options: LengthOptions, plan: Plan) -> int:
    """Optimizer steps of the whole run: from `max_train_epochs` if it is set, else `max_train_steps`."""
    if options.max_train_epochs is None:
        return options.max_train_steps
    return plan.steps_until(options.max_train_epochs)


def first_step(options: ResumeOptions, plan: Plan, steps: int) -> int:
    """The number of optimizer steps from which a new run of `steps` steps counts: 0, or what the options ask for.

    File names, learning rate, batches and noise are those of a run that has made so many steps. As in the reference's
    train_network.py, `initial_step` wins over `initial_epoch`.
    """
    step = options.initial_step
    if step is None:
        step = plan.steps_until((options.initial_epoch or 1) - 1)
    if step < steps:
        return step
    message = "initial step %d has no effect: the run has only %s, counted from 0. Raise its number of steps"
    logger.warning(message, step, counted(steps, "step"))
    return 0


@dataclass(frozen=True, kw_only=True)
class Every:
    """Something that recurs during a run. A period of None or 0 is off."""

    steps: int | None = None
    epochs: int | None = None
    at_start: bool = False
    at_end: bool = False

    def is_due(self, moment: Moment) -> bool:
        """True if it happens at this moment."""
        if moment.is_first:
            return self.at_start
        return self.is_due_by_step(moment) or self.is_due_by_epoch(moment) or (self.at_end and moment.is_last)

    def is_due_by_step(self, moment: Moment) -> bool:
        """True if the period in steps ends at this moment."""
        return bool(self.steps) and moment.step > 0 and moment.step % (self.steps or 1) == 0

    def is_due_by_epoch(self, moment: Moment) -> bool:
        """True if the period in epochs ends at this moment."""
        return bool(self.epochs) and moment.epoch is not None and moment.epoch % (self.epochs or 1) == 0

    def next_step(self, timeline: Timeline, step: int) -> int:
        """The first step after `step` at which it may be due; at most the last step of the run."""
        candidates = [timeline.steps]
        if self.steps:
            candidates.append((step // self.steps + 1) * self.steps)
        if self.epochs:
            epoch = (timeline.plan.place(step)[0] // self.epochs + 1) * self.epochs
            candidates.append(timeline.plan.steps_until(epoch))
        return min(candidates)

    def moments(self, timeline: Timeline) -> Iterator[Moment]:
        """All moments of the run at which it is due, in order."""
        step = timeline.first
        while True:
            moment = timeline.after(step)
            if self.is_due(moment):
                yield moment
            if step >= timeline.steps:
                return
            step = self.next_step(timeline, step)


def previews_every(options: PreviewOptions) -> Every:
    """When previews are drawn. A period in epochs wins over a period in steps, as in the reference."""
    steps = None if options.sample_every_n_epochs else options.sample_every_n_steps
    return Every(steps=steps, epochs=options.sample_every_n_epochs, at_start=options.sample_at_first)


def validation_every(options: ValidationOptions) -> Every:
    """When the model is validated: before the first step, after the last one, and in the period of the options.

    A period in epochs wins over a period in steps. Without either option the model is validated after each epoch.
    """
    epochs, steps = options.validate_every_n_epochs, options.validate_every_n_steps
    if epochs is None and steps is None:
        epochs = 1
    return Every(steps=None if epochs else steps, epochs=epochs, at_start=True, at_end=True)


def colours_every(options: ColourOptions) -> Every:
    """When colours are checked: before the first step, after the last one, and in the period of the options.

    A period in epochs wins over a period in steps. Without either option they are never checked.
    """
    epochs, steps = options.colour_check_every_n_epochs, options.colour_check_every_n_steps
    is_on = bool(epochs or steps)
    return Every(steps=None if epochs else steps, epochs=epochs, at_start=is_on, at_end=is_on)


def weights_every(options: LearnedWeightOptions) -> Every:
    """When the curve of learned loss weights is drawn: after the last step, and every N steps; never without them."""
    is_on = options.edm2_loss_weighting
    return Every(steps=options.edm2_loss_weighting_generate_graph_every_x_steps if is_on else None, at_end=is_on)


def reports_every(options: TagReportOptions) -> Every:
    """When tag reports are made: before the first step, after the last one, and every N epochs."""
    epochs = options.tag_report_every_n_epochs
    return Every(epochs=epochs, at_start=epochs is not None, at_end=epochs is not None)


def saves_every(options: SavingOptions, epochs: int) -> Every:
    """When numbered checkpoints are saved in a run of `epochs` epochs.

    `save_n_epoch_ratio` asks for a number of checkpoints over the run. It wins over `save_every_n_epochs`, as in the
    reference.
    """
    period = options.save_every_n_epochs
    if options.save_n_epoch_ratio:
        period = epochs // options.save_n_epoch_ratio or 1
    return Every(steps=options.save_every_n_steps, epochs=period)
