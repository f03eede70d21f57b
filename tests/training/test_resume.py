"""Interrupted anywhere and resumed, a run ends as if nothing had happened; and what a resume is refused for."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from scripts.benchmarks.interrupt import OPTIONS, STYLE, differences, read_metrics, saved_names
from sdxl_finetune.config import load_config
from sdxl_finetune.errors import UserError
from sdxl_finetune.runtime.signals import SAME_SIGNAL
from sdxl_finetune.training.loop import train
from sdxl_finetune.training.setup import build_run

SGD = ["--optimizer_type", "SGD", "--learning_rate", "0.01", "--learning_rate_te1", "0.01"]
NO_AVERAGE = ["--ema_half_life", ""]  # what is saved is then what is trained


def arguments(folder: str, *more: str) -> list[str]:
    """A run of 6 steps, 4 an epoch, that saves weights and states after every third."""
    places = ["--output_dir", f"{folder}/out", "--logging_dir", f"{folder}/logs", "--seed", "5"]
    length = ["--max_train_epochs", "", "--max_train_steps", "6"]
    return ["--config", str(STYLE), *OPTIONS, *length, *places, "--save_last_n_steps", "", *more]


def run(folder: str, *more: str) -> int:
    config = load_config(arguments(folder, *more), program="sdxl-train")
    assert config is not None
    try:
        return train(config)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def refusal(folder: str, *more: str) -> str:
    with pytest.raises(UserError) as caught:
        run(folder, *more)
    return str(caught.value)


def forget(folder: str, *names: str) -> None:
    """Removes what a run has saved under these names."""
    for name in names:
        path = Path(folder) / "out" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("seed", "options"),
    [
        (1, ["--optimizer_type", "AdamW"]),
        (2, ["--optimizer_type", "AdamW8bit", "--max_data_loader_n_workers", "2"]),
        (3, ["--optimizer_type", "Lion"]),
    ],
    ids=["AdamW", "AdamW8bit, 2 workers", "Lion"],
)
def test_a_run_that_is_interrupted_again_and_again_ends_the_same(tmp_path, seed: int, options: list[str]) -> None:
    chain = ["-m", "scripts.benchmarks.interrupt", "--interruptions", "3", "--steps", "12", "--seed", str(seed)]
    command = [sys.executable, *chain, "--folder", str(tmp_path / "chain"), "--", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 interruptions" in done.stdout and done.stdout.endswith("identical\n")


def test_so_does_one_of_two_processes(tmp_path) -> None:
    chain = ["-m", "scripts.benchmarks.interrupt", "--interruptions", "2", "--steps", "8", "--seed", "4"]
    command = [sys.executable, *chain, "--processes", "2", "--folder", str(tmp_path / "chain")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("identical\n")


def test_saved_weights_go_on_with_the_same_batches_noise_and_rates(work) -> None:
    """Exactly, for an optimizer that keeps nothing and weights saved in full."""
    options = [*SGD, *NO_AVERAGE, "--lr_scheduler", "cosine", "--lr_warmup_steps", "2"]
    assert run("one", *options) == 0
    shutil.copytree("one", "other")
    forget("other", *(name for name in saved_names(Path("other")) if name != "style-step00000003.safetensors"))
    assert run("other", *options, "--resume", "auto") == 0
    assert read_metrics(Path("one")) == read_metrics(Path("other")) and len(read_metrics(Path("one"))) == 6
    # What is never trained is in the file's precision there, and in that of the first file here.
    forget("one", "style-step00000003-state")
    assert differences(Path("one"), Path("other")) == ["one/out/style-state/weights.safetensors"]


def test_weights_that_hold_the_average_say_so(work, caplog) -> None:
    assert run("one", "--max_train_steps", "3", "--no-save_state") == 0
    weights = "one/out/style-step00000003.safetensors"
    assert run("one", "--max_train_steps", "4", "--no-save_state", "--resume", weights) == 0
    assert f"checkpoint of EMA weights (the optimizer starts anew) {weights}" in caplog.text


@pytest.mark.parametrize("asked", [["--initial_step", "4"], ["--initial_epoch", "2"]], ids=["step", "epoch"])
def test_a_new_run_may_count_from_a_later_step(work, asked: list[str]) -> None:
    """It makes the steps of a run that was resumed there: same batches, noise, rates and names."""
    options = [*SGD, *NO_AVERAGE, "--lr_scheduler", "cosine", "--lr_warmup_steps", "2", "--save_every_n_steps", "4"]
    options += ["--validation_split", "0"]
    assert run("one", *options) == 0
    base = ["--pretrained_model_name_or_path", "one/out/style-step00000004.safetensors"]
    base += ["--vae", "base.safetensors"]
    assert run("other", *options, *base, *asked) == 0
    assert read_metrics(Path("other")) == read_metrics(Path("one"))[4:]
    assert "style-step00000004.safetensors" not in saved_names(Path("other"))
    one, other = (load_file(f"{folder}/out/style.safetensors") for folder in ("one", "other"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    forget("other", *(name for name in saved_names(Path("other")) if name.endswith(".safetensors")))
    assert run("other", *options, *base, *asked, "--resume", "auto") == 0
    assert read_metrics(Path("other")) == read_metrics(Path("one"))[4:], "a training state says its own step"


def test_an_initial_step_beyond_the_end_has_no_effect_and_is_named(work, caplog) -> None:
    assert run("one", "--initial_step", "100", "--max_train_steps", "1", "--no-save_state") == 0
    assert "initial step 100 has no effect: the run has only 1 step," in caplog.text
    assert [row["step"] for row in read_metrics(Path("one"))] == [1]


def test_a_checkpoint_of_the_old_kind_goes_on_where_it_stood(work, caplog) -> None:
    options = [*SGD, *NO_AVERAGE, "--save_model_as", "ckpt", "--no-save_state"]
    assert run("one", *options) == 0
    resumed = ["--logging_dir", "other/logs", "--resume", "one/out/style-step00000003.ckpt"]
    assert run("one", *options, *resumed) == 0
    assert read_metrics(Path("other")) == read_metrics(Path("one"))[3:]
    assert "does not say which images it was trained on" in caplog.text


def test_what_was_finished_stays_as_it_is(work, caplog) -> None:
    assert run("one", "--resume", "auto") == 0
    assert "training starts anew" in caplog.text
    times = {path: path.stat().st_mtime_ns for path in Path("one/out").iterdir()}
    assert run("one", "--resume", "auto") == 0
    assert "nothing to do: all 6 steps are made and the final checkpoint is saved" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in Path("one/out").iterdir()} == times
    assert run("one", "--resume", "auto", "--max_train_steps", "7") == 0
    assert [row["step"] for row in read_metrics(Path("one"))] == list(range(1, 8))


def test_a_run_of_another_name_leaves_the_log_of_the_first_as_it_is(work, caplog) -> None:
    options = [*SGD, *NO_AVERAGE]
    assert run("one", *options) == 0
    (first,) = Path("one/logs").iterdir()
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    assert run("one", *options, "--output_name", "branch", "--resume", "one/out/style-step00000003-state") == 0
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    (second,) = set(Path("one/logs").iterdir()) - {first}
    assert f"{first} is the log of another run, and stays as it is" in caplog.text
    metrics = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (first, second)]
    assert [json.loads(line)["loss"] for line in metrics[0]] == [json.loads(line)["loss"] for line in metrics[1]]


def test_a_damaged_state_is_named_and_not_taken(work, caplog) -> None:
    assert run("one", "--save_state_on_train_end") == 0
    state = Path("one/out/style-step00000006-state")
    content = bytearray((state / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (state / "optimizer.pt").write_bytes(content)
    said = refusal("one", "--resume", str(state))
    assert str(state) in said and "optimizer.pt" in said and "damaged" in said
    forget("one", "style-state", "style.safetensors", "style-step00000006.safetensors")
    (Path("one/out/style-step00000003-state") / "manifest.json").rename("manifest.json")
    said = refusal("one", "--resume", "one/out/style-step00000003-state")
    assert "manifest.json is missing" in said
    Path("manifest.json").rename("one/out/style-step00000003-state/manifest.json")
    caplog.clear()
    assert run("one", "--resume", "auto") == 0
    assert "resume = auto: skipped " in caplog.text and "resuming after step 3" in caplog.text
    assert "style-state" in saved_names(Path("one"))


def test_changed_images_are_said_and_need_a_word(work, caplog) -> None:
    assert run("one") == 0
    forget("one", "style.safetensors", "style-state", "style-step00000006-state", "style-step00000006.safetensors")
    state = Path("one/out/style-step00000003-state")
    shutil.copy(next(Path("images").glob("*.jpg")), "images/another.jpg")
    said = refusal("one", "--resume", "auto")
    assert str(state) in said and "resume_at_next_epoch" in said and "epoch 2" in said
    assert run("one", "--resume", "auto", "--resume_at_next_epoch", "--max_train_steps", "10") == 0
    rows = read_metrics(Path("one"))
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["epoch"] for row in rows] == [1, 1, 1, 2, 2, 2, 2, 2, 3, 3]  # 5 steps with a ninth image
    forget("one", "style.safetensors", "style-state", "style-step00000009-state")
    assert run("one", "--resume", "auto", "--max_train_steps", "10") == 0
    assert "resuming after step 8" in caplog.text
    assert read_metrics(Path("one")) == rows


def test_other_seeds_batches_and_optimizers_are_refused(work) -> None:
    assert run("one") == 0
    state = "one/out/style-step00000003-state"
    assert "seed: 5 -> 6" in refusal("one", "--resume", state, "--seed", "6")
    assert "gradient_accumulation_steps: 2 -> 1" in refusal(
        "one", "--resume", state, "--gradient_accumulation_steps", "1"
    )
    assert "[1] -> [2]" in refusal("one", "--resume", state, "--train_batch_size", "2")
    said = refusal("one", "--resume", state, "--optimizer_type", "Lion")
    assert "optimizer_type" in said and "AdamW" in said and "resume from a checkpoint" in said
    assert "no such training state" in refusal("one", "--resume", "nowhere")
    said = refusal("one", "--resume", "base.safetensors")
    assert "base.safetensors" in said and "pretrained_model_name_or_path" in said


def test_an_unset_seed_is_the_states(work) -> None:
    assert run("one", "--seed", "") == 0
    before = read_metrics(Path("one"))
    forget("one", "style.safetensors", "style-state", "style-step00000006-state")
    assert run("one", "--seed", "", "--resume", "auto") == 0
    assert read_metrics(Path("one")) == before


def test_changed_options_are_said(work, caplog) -> None:
    Path("tags.txt").write_text("style_*\n")
    protected = ["--shuffle_caption", "--protected_tags_file", "tags.txt"]
    assert run("one", "--optimizer_args", "weight_decay=0.1", "betas=0.8,0.9", *protected) == 0
    Path("tags.txt").write_text("another\n")
    forget("one", "style.safetensors", "style-state", "style-step00000006-state")
    caplog.clear()
    more = [
        "--optimizer_args",
        "weight_decay=0.2",
        "betas=0.8,0.9",
        "--learning_rate",
        "2e-5",
        "--resume",
        "auto",
        *protected,
    ]
    config = load_config(arguments("one", *more), program="sdxl-train")
    assert config is not None
    with build_run(config) as built:
        groups = [
            {name: group[name] for name in ("weight_decay", "betas")}
            for group in built.learner.update.optimizer.param_groups
        ]
    assert groups == [{"weight_decay": 0.2, "betas": (0.8, 0.9)}] * 3
    said = next(message for message in caplog.messages if message.startswith("options that have changed"))
    assert "learning_rate 3e-05 -> 2e-05" in said and "weight_decay" in said and "output" not in said
    assert "content of protected_tags_file" in said and "tags.txt" not in said


def start(folder: str, *more: str, after: int = 0) -> subprocess.Popen:
    """A long run that has made a step more than `after`."""
    command = [sys.executable, "-m", "sdxl_finetune", *arguments(folder, "--max_train_steps", "500", *more)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while sum(path.read_text().count("\n") for path in Path(folder).glob("logs/*/metrics.jsonl")) <= after:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    return process


def test_a_signal_saves_a_state_and_the_next_replaces_it(work) -> None:
    options = ["--no-save_state", "--save_every_n_steps", "", "--resume", "auto"]
    process = start("one", *options)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # as launchers do
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 143 and "Traceback" not in said
    (state,) = Path("one/out").glob("*-state")
    step = json.loads((state / "state.json").read_text())["step"]
    assert state.name == f"style-step{step:08d}-state"
    (log,) = Path("one/logs").iterdir()
    assert json.loads((log / "ended.json").read_text())["step"] == step
    process = start("one", *options, after=step)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 130 and f"resuming after step {step}" in said
    (newer,) = Path("one/out").glob("*-state")
    assert json.loads((newer / "state.json").read_text())["step"] > step


def test_a_second_signal_ends_the_run_at_once(work) -> None:
    """A step takes 32 micro-batches here. The process is halted while the time passes that tells two signals apart."""
    long = ["--dataset_repeats", "4", "--gradient_accumulation_steps", "200"]
    process = start("one", "--no-save_state", "--save_every_n_steps", "", *long)
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    assert any("send it again to stop at once" in line for line in process.stderr)
    process.send_signal(signal.SIGSTOP)
    time.sleep(SAME_SIGNAL + 0.2)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 143 and "Traceback" not in said
    assert not list(Path("one/out").glob("*state*"))


def test_what_a_killed_run_left_half_written_is_removed(work) -> None:
    out = Path("one/out")
    (out / ".style-step00000003-state.999999.tmp").mkdir(parents=True)
    (out / ".style.safetensors.999999.tmp").write_bytes(b"half")
    (out / ".others.safetensors.999999.tmp").write_bytes(b"not ours")
    (out / ".style-step00000009-state.999999.tmp").mkdir()
    (out / ".style-step00000009-state.999999.old.tmp").mkdir()
    (out / ".style-step00000009-state.999999.old.tmp" / "it").touch()
    (out / f".style-000002.safetensors.{os.getppid()}.tmp").write_bytes(b"being written")
    assert run("one", "--max_train_steps", "1", "--no-save_state") == 0
    left = sorted(path.name for path in out.glob(".*"))
    assert left == [".others.safetensors.999999.tmp", f".style-000002.safetensors.{os.getppid()}.tmp"]
    assert (out / "style-step00000009-state" / "it").exists()  # was moved away for one that never took its place


def test_states_are_checkpoints_too(work) -> None:
    """Their weights load like any others, and are the saved ones."""
    assert run("one", *NO_AVERAGE) == 0
    state = load_file("one/out/style-step00000003-state/weights.safetensors")
    weights = load_file("one/out/style-step00000003.safetensors")
    assert state.keys() == weights.keys()
    assert all((state[key].float() == weights[key]).all() for key in state)


@pytest.mark.parametrize(
    "more", [[], ["--fused_backward_pass", "--optimizer_type", "Adafactor"]], ids=["AdamW8bit", "fused"]
)
def test_masters_go_on_bit_for_bit(work, more: list[str]) -> None:
    """What bf16 does not show of the weights is in the state; files are made of it."""
    options = ["--mixed_precision", "bf16", "--full_bf16", "--optimizer_type", "AdamW8bit", *more]
    options += ["--resolution", "64", "--max_bucket_reso", "64", "--save_precision", "float", "--max_train_steps", "2"]
    options += ["--save_every_n_steps", "1", "--validation_split", "0", "--train_batch_size", "1"]
    assert run("one", *options) == 0
    shutil.copytree("one", "other")
    forget("other", *(name for name in saved_names(Path("other")) if name != "style-step00000001-state"))
    assert run("other", *options, "--resume", "auto") == 0
    assert differences(Path("one"), Path("other")) == []
    weights = load_file("one/out/style-state/weights.safetensors")
    trained = {name: value for name, value in weights.items() if name.startswith("model.diffusion_model.")}
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in trained.values())
    changed = refusal("one", *options, "--no-exact_masters", "--resume", "one/out/style-step00000001-state")
    assert "exact_masters" in changed and "resume from a checkpoint" in changed
    other = ["--no-full_bf16", "--resume", "one/out/style-step00000001-state"]
    assert "full_bf16 = False" in refusal("one", *options, *other)
