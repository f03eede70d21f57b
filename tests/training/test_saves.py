"""Which checkpoints and training states are due, and which older ones they replace: the reference's golden runs."""

from hypothesis import given
from hypothesis import strategies as st

from sdxl_finetune.config import Config
from sdxl_finetune.output.checkpoints import Save, final_name
from sdxl_finetune.training.every import Moment
from sdxl_finetune.training.saves import (
    checkpoints_due,
    final_state,
    replaced_epoch,
    replaced_step,
    states_due,
)

KEYS = "checkpoint_keys.json.gz"
STATE_OPTIONS = ("save_state", "save_state_on_train_end")


def config_of(command_line: list[str], *, with_states: bool) -> Config:
    """The options of a golden command line, with or without those about training states."""
    words = " ".join(command_line).replace("--", "").split()
    flags = {name: True for name in words if name in STATE_OPTIONS}
    counts = {words[at - 1]: int(value) for at, value in enumerate(words) if value.isdecimal()}
    if not with_states:
        flags, counts = {}, {name: value for name, value in counts.items() if not name.endswith("_state")}
    return Config(output_name="my_model", **flags, **counts)


def moment_of(run: dict, entry: dict) -> Moment:
    """The moment of an entry in a golden run's log."""
    if run["mode"] == "epochs":
        epoch = entry["end_of_epoch_index"] + 1
        return Moment(step=10 * epoch, epoch=epoch)
    return Moment(step=entry["global_step"], epoch=None)


def test_removals_are_golden(golden) -> None:
    removal = golden(KEYS)["removal"]
    for case in removal["get_remove_epoch_no"]:
        for epoch, old in case["by_epoch"].items():
            assert replaced_epoch(int(epoch), case["every"], case["last"]) == old
    for case in removal["get_remove_step_no"]:
        for step, old in case["by_step"].items():
            assert replaced_step(int(step), case["every"], case["last"]) == old


def test_checkpoints_of_whole_runs_are_golden(golden) -> None:
    runs = golden(KEYS)["save_runs"]
    assert len(runs) == 19
    for run in runs:
        config = config_of(run["cli"], with_states=False)
        suffix = ".safetensors" if run["stable_diffusion_format"] else ""
        files: set[str] = set()
        for entry in run["log"]:
            if entry.get("at_train_end"):
                due = [Save(name=final_name(config))]
                if not run["stable_diffusion_format"]:
                    continue  # the recorder of the golden run kept no folder at the end
            else:
                due = checkpoints_due(config, moment_of(run, entry), run["num_train_epochs"])
            for save in due:
                files = (files | {save.name + suffix}) - {f"{save.replaces}{suffix}"}
            assert sorted(files) == [name for name in entry["files"] if not name.endswith("-state")], run["cli"]


def test_states_of_whole_runs_are_golden(golden) -> None:
    runs = [run for run in golden(KEYS)["save_runs"] if any("save_state" in option for option in run["cli"])]
    assert len(runs) == 6
    for run in runs:
        config = config_of(run["cli"], with_states=True)
        states: set[str] = set()
        for entry in run["log"]:
            if entry.get("at_train_end"):
                last = final_state(config)
                due = [last] if last else []
            else:
                due = states_due(config, moment_of(run, entry), run["num_train_epochs"])
            for save in due:
                states = (states | {save.name}) - {save.replaces or ""}
            assert sorted(states) == [name for name in entry["files"] if name.endswith("-state")], run["cli"]


def test_a_checkpoint_by_step_and_one_by_epoch_can_be_due_together() -> None:
    config = Config(output_name="m", save_every_n_steps=10, save_every_n_epochs=1)
    due = checkpoints_due(config, Moment(step=20, epoch=2), 3)
    assert [save.name for save in due] == ["m-step00000020", "m-000002"]
    assert checkpoints_due(config, Moment(step=21, epoch=None), 3) == []


@given(step=st.integers(1, 10_000), every=st.integers(1, 100), keep=st.integers(1, 1000))
def test_what_is_replaced_was_saved_and_is_old_enough(step: int, every: int, keep: int) -> None:
    step *= every
    old = replaced_step(step, every, keep)
    if old is None:
        assert step <= keep
    else:
        assert old % every == 0 and keep < step - old <= keep + every
    assert replaced_epoch(step, every, keep) in (None, step - every * keep)
