"""Which checkpoints and training states are saved at a moment, and which older ones each of them replaces.

Numbered checkpoints are saved every N epochs and every N steps. The last epoch gets no numbered checkpoint, because
`{output_name}` is saved at the end. Epochs and steps are counted from the start of training, never from a resume.
Times, names and removals are the reference's (golden checkpoint_keys.json.gz: names, removal, save_runs).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sdxl_finetune.config import Config, SavingOptions
from sdxl_finetune.output.checkpoints import Save, epoch_name, final_name, step_name
from sdxl_finetune.runtime.signals import Wish
from sdxl_finetune.training.every import Moment, saves_every

STATE_SUFFIX = "-state"
"""A training state's directory is named as the checkpoint that is saved with it, and this suffix."""


@dataclass(frozen=True)
class Refused:
    """The saves of one step that storage refused, by name. Equal on all ranks."""

    weights: Sequence[str] = ()
    states: Sequence[str] = ()

    def __bool__(self) -> bool:
        return bool(self.weights or self.states)


@dataclass(frozen=True)
class Due:
    """The checkpoints and training states of one moment. Equal on all ranks."""

    weights: Sequence[Save] = ()
    states: Sequence[Save] = ()
    is_temporary: bool = False
    """True if the next training state replaces these states."""
    is_asked: bool = False
    """True if a file `save` asked for the states. Nothing replaces them."""

    def __bool__(self) -> bool:
        return bool(self.weights or self.states)

    def only(self, refused: Refused) -> "Due":
        """Returns the saves that storage refused."""
        weights = [save for save in self.weights if save.name in refused.weights]
        return replace(self, weights=weights, states=[save for save in self.states if save.name in refused.states])

    def without(self, refused: Refused) -> "Due":
        """Returns the saves that storage took."""
        weights = [save for save in self.weights if save.name not in refused.weights]
        return replace(self, weights=weights, states=[save for save in self.states if save.name not in refused.states])


NOTHING = Due()


def checkpoints_due(options: SavingOptions, moment: Moment, epochs: int) -> list[Save]:
    """The numbered checkpoints to save at this moment of a run of `epochs` epochs."""
    return _due(options, moment, epochs, options.save_last_n_epochs, options.save_last_n_steps)


def states_due(config: Config, moment: Moment, epochs: int) -> list[Save]:
    """The numbered training states to save at this moment of a run of `epochs` epochs."""
    if not config.save_state:
        return []
    keep_epochs = config.save_last_n_epochs_state or config.save_last_n_epochs
    keep_steps = config.save_last_n_steps_state or config.save_last_n_steps
    return [
        Save(name=save.name + STATE_SUFFIX, replaces=save.replaces and save.replaces + STATE_SUFFIX)
        for save in _due(config, moment, epochs, keep_epochs, keep_steps)
    ]


def _due(
    options: SavingOptions, moment: Moment, epochs: int, keep_epochs: int | None, keep_steps: int | None
) -> list[Save]:
    every, due = saves_every(options, epochs), []
    if every.steps and every.is_due_by_step(moment):
        old = replaced_step(moment.step, every.steps, keep_steps)
        due.append(
            Save(name=step_name(options, moment.step), replaces=None if old is None else step_name(options, old))
        )
    if every.epochs and moment.epoch and every.is_due_by_epoch(moment) and moment.epoch < epochs:
        old = replaced_epoch(moment.epoch, every.epochs, keep_epochs)
        due.append(
            Save(name=epoch_name(options, moment.epoch), replaces=None if old is None else epoch_name(options, old))
        )
    return due


def saves_due(config: Config, moment: Moment, epochs: int, wish: Wish = Wish.NOTHING) -> Due:
    """All that is saved at this moment of a run of `epochs` epochs, with what a request asks for."""
    weights, states = checkpoints_due(config, moment, epochs), states_due(config, moment, epochs)
    name, is_asked = step_name(config, moment.step), wish is Wish.CHECKPOINT
    is_temporary = not (states or is_asked)
    if is_asked and all(save.name != name for save in weights):
        weights = [*weights, Save(name=name)]
    if wish and not states:
        states = [Save(name=name + STATE_SUFFIX)]
    return Due(weights, states, is_temporary=is_temporary, is_asked=is_asked)


def final_state(config: Config) -> Save | None:
    """The training state to save at the end of training, if the options ask for one."""
    wanted = config.save_state or config.save_state_on_train_end
    return Save(name=final_name(config) + STATE_SUFFIX) if wanted else None


def replaced_epoch(epoch: int, every: int, keep: int | None) -> int | None:
    """The epoch whose checkpoint is removed after that of `epoch`, if the last `keep` are kept; None keeps all."""
    if keep is None or epoch < every * keep:
        return None
    return epoch - every * keep


def replaced_step(step: int, every: int, keep: int | None) -> int | None:
    """The step whose checkpoint is removed after that of `step`, if checkpoints are kept for `keep` steps.

    It is the last multiple of `every` that is more than `keep` steps ago.
    """
    if keep is None or step <= keep:
        return None
    return (step - keep - 1) // every * every
