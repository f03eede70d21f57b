"""Real runs whose numbers go wrong: they stop or leave the step out, name the cause, and can be reproduced."""

import json
import math
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from sdxl_finetune.config import Config, load_config
from sdxl_finetune.errors import UserError
from sdxl_finetune.training.dump_reading import read_dump
from sdxl_finetune.training.loop import train
from tests.runtime.test_locks import hold
from tests.training.toy_runs import OPTIONS, config, read_rows

FIXTURES = Path(__file__).parent / "fixtures"
HEAVY = '[paths]\n"images/{name}*" = {{ loss_weight = 3e38 }}\n'
"""A loss weight with which the gradients of an image overflow in float32."""
UNET = ["--optimizer_type", "SGD", "--learning_rate", "1e-3", "--train_batch_size", "1", "--no-train_text_encoder"]
DRIFTING = """
import os
import torch

class Drifting(torch.optim.SGD):
    '''Steps as SGD does. From the third step on the second process adds a little of its own to one tensor.'''
    def step(self, closure=None):
        super().step(closure)
        self.steps = getattr(self, "steps", 0) + 1
        if os.environ["RANK"] == "1" and self.steps >= 3:
            self.param_groups[0]["params"][5].data.view(-1)[3] += 1e-6
"""


@pytest.fixture
def work(work) -> Path:
    """With the smallest model of all tests, and a loss weight that spoils the gradients of one image."""
    (work / "base.safetensors").unlink()
    with tarfile.open(FIXTURES / "state_format_1.tar.xz") as archive:
        weights = archive.extractfile("./out/old-step00000003-state/weights.safetensors")
        assert weights is not None
        (work / "base.safetensors").write_bytes(weights.read())
    (work / "heavy.toml").write_text(HEAVY.format(name="chelsea"))
    return work


def run(*more: str, **options: str) -> int:
    try:
        return train(config(*UNET, *more))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def reproduce(folder: Path, capsys) -> str:
    """The report of `sdxl-train --reproduce`."""
    loaded = load_config(["--reproduce", str(folder)], program="sdxl-train")
    assert loaded is not None and loaded.output_dir == Path("out"), "the options of the run"
    files = {path: path.stat().st_mtime_ns for path in Path().rglob("*") if "cache" not in path.parts}
    capsys.readouterr()
    try:
        assert train(loaded) == 0
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert files == {path: path.stat().st_mtime_ns for path in Path().rglob("*") if "cache" not in path.parts}
    return capsys.readouterr().out


def test_a_run_stops_and_names_image_parameter_and_dump(work, capsys) -> None:
    steps = ["--max_train_epochs", "1", "--save_every_n_steps", "1"]
    assert run(*steps, "--image_weights", "heavy.toml") == 1
    told = capsys.readouterr().err
    rows = read_rows("logs")
    number = rows[-1]["step"]
    assert f"error: the gradient norm of step {number} is inf; nothing was saved after it" in told
    assert "its images: images/chelsea.jpg (timestep " in told
    assert "gradients are not finite" in told and "the first in unet." in told
    saved = {path.name for path in Path("out").glob("*.safetensors")}
    assert saved == {f"at-step{step:08d}.safetensors" for step in range(1, number)}
    (folder,) = Path("out/dumps").iterdir()
    assert f'"sdxl-train --reproduce {folder}" runs the step again' in told
    assert {path.name for path in folder.iterdir()} == {"step.json", "config.toml", "batches.safetensors"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1 << 20
    report = reproduce(folder, capsys)
    assert f"step {number} with the weights of " in report
    assert "images/chelsea.jpg, timestep " in report and "gradients are not finite" in report
    assert report.endswith("\nreproduced\n") and "training steps" not in report, "the batch alone shows it"


def test_a_weight_that_is_no_number_is_named_alike_by_the_run_and_by_its_reproduction(work, capsys) -> None:
    """The gradients of U-Net and text encoders are all NaN. The last layer of the U-Net has the first of them."""
    model = load_file("base.safetensors")
    broken = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    model[broken].view(-1)[0] = math.nan
    save_file(model, "base.safetensors")
    assert run("--max_train_steps", "2", "--train_text_encoder") == 1
    told = capsys.readouterr().err
    assert "no step of this run had changed the weights before: look for a broken model" in told
    first = re.search(r"the first in (\S+);", told)
    assert first and first[1].startswith("unet.model.diffusion_model.out.")
    report = reproduce(next(Path("out/dumps").iterdir()), capsys)
    assert f"weights that are not finite: unet.{broken}" in report and f"the first in {first[1]}\n" in report
    layer = broken.rpartition(".")[0]
    assert f"first layer with an output that is not finite: unet.{layer}\n" in report


def test_a_step_is_left_out_as_if_it_had_not_been_there(work, caplog) -> None:
    options = ["--max_train_steps", "8", "--image_weights", "heavy.toml", "--non_finite_steps", "skip"]
    assert run(*options, "--save_every_n_steps", "1") == 0
    rows = read_rows("logs")
    (skipped,) = (row for row in rows if row["grad_norm"] is None)
    assert skipped["update/unet"] == 0 and all(row["update/unet"] > 0 for row in rows if row is not skipped)
    assert f"of step {skipped['step']} is inf; it was left out; its images: images/chelsea.jpg" in caplog.text
    before = load_file(f"out/at-step{skipped['step'] - 1:08d}.safetensors") if skipped["step"] > 1 else None
    after = load_file(f"out/at-step{skipped['step']:08d}.safetensors")
    assert all(value.isfinite().all() for value in load_file("out/last.safetensors").values())
    assert before is None or all(torch.equal(value, after[name]) for name, value in before.items())


def test_more_steps_in_a_row_than_allowed_end_the_run(work, capsys, caplog) -> None:
    (work / "heavy.toml").write_text(HEAVY.format(name=""))
    options = ["--image_weights", "heavy.toml", "--non_finite_steps", "skip", "--max_non_finite_steps", "2"]
    assert run("--max_train_steps", "8", *options) == 1
    assert "3 such steps in a row are more than max_non_finite_steps allows" in capsys.readouterr().err
    assert [row["step"] for row in read_rows("logs")] == [1, 2, 3]
    assert caplog.text.count("it was left out") == 2
    assert not list(Path("out").glob("*.safetensors"))


@pytest.mark.parametrize("full_bf16", [False, True])
def test_steps_between_the_last_save_and_the_fault_are_made_again(work, capsys, full_bf16: bool) -> None:
    """The batch is harmless with saved weights. The steps after the save spoil the weights."""
    precision = ["--full_bf16", "--mixed_precision", "bf16"] if full_bf16 else []
    fast = ["--learning_rate", "1e12", "--max_grad_norm", "0", *precision]
    assert run("--max_train_steps", "8", *fast) == 1
    number = read_rows("logs")[-1]["step"]
    assert 1 < number < 8
    (folder,) = Path("out/dumps").iterdir()
    with hold(Path("out/.last.lock")) as run_that_goes_on:
        report = reproduce(folder, capsys)
        run_that_goes_on.kill()
    assert f"all numbers are finite; training steps 1 to {number - 1} again" in report
    again = report.partition("again, and then the step:\n")[2]
    assert again.endswith("\nreproduced\n") and "gradients are not finite, the first in unet." in again


def test_a_folder_that_is_no_dump_is_refused(work) -> None:
    (work / "none").mkdir()
    with pytest.raises(UserError, match=r"config\.toml: cannot be read"):
        load_config(["--reproduce", "none"], program="sdxl-train")
    for content, message in {'{"format": 2}': "has format 2", "{": "cannot be read", "{}": "cannot be read"}.items():
        (work / "none" / "step.json").write_text(content)
        with pytest.raises(UserError, match=message):
            train(Config(reproduce=Path("none")))


def test_processes_whose_weights_drift_apart_are_stopped(work) -> None:
    (work / "drifting.py").write_text(DRIFTING)
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"]
    options = [*OPTIONS, *UNET, "--optimizer_type", "drifting.Drifting", "--rank_check_every_n_steps", "2"]
    paths = os.pathsep.join([str(work), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*launch, "--main_process_port", "0", "-m", "sdxl_finetune", *options, "--max_train_steps", "9"],
        env={**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    told = done.stdout + done.stderr
    assert done.returncode != 0
    assert "error: the weights of the processes differ after step 4: 1 parameter, first unet." in told, told
    assert "last found equal after step 2: resume from a training state that is not newer" in told
    assert [row["step"] for row in read_rows("logs")] == [1, 2, 3, 4]
    assert not Path("out/last.safetensors").exists()


def test_a_dump_of_two_processes_holds_the_batches_of_both(work) -> None:
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"]
    options = [*OPTIONS, *UNET, "--image_weights", "heavy.toml", "--gradient_accumulation_steps", "2"]
    done = subprocess.run(
        [*launch, "--main_process_port", "0", "-m", "sdxl_finetune", *options, "--max_train_epochs", "1"],
        env={**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "images/chelsea.jpg" in done.stdout + done.stderr
    (folder,) = Path("out/dumps").iterdir()
    dump = read_dump(folder)
    rows = read_rows("logs")
    assert (dump.ranks, dump.step) == (2, rows[-1]["step"])
    assert {(each.batch.position.micro_batch, each.batch.first_slot) for each in dump.batches} <= {
        (micro_batch, slot) for micro_batch in range(2) for slot in range(2)
    }
    images = [image for each in dump.batches for image in each.images]
    assert len(set(images)) == len(images) == sum(len(each.batch.weights) for each in dump.batches)
    assert "images/chelsea.jpg" in images
    # The losses that all ranks share belong to the images. Their mean is the loss of the log, without loss weights.
    losses = json.loads((folder / "step.json").read_text())["batches"]
    assert all(math.isfinite(loss) and loss > 0 for each in losses for loss in each["losses"])
