"""Two processes over gloo, launched like a user's, train like one process with twice the batch, and fail together."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdxl_finetune.config import load_config
from sdxl_finetune.training.loop import train
from tests.runtime.each_rank import digest_lines

STYLE = Path(__file__).parents[2] / "configs" / "style.toml"
OPTIONS = [
    *("--config", str(STYLE), "--output_dir", "out", "--logging_dir", "", "--log_with", "", "--seed", "5"),
    *("--resolution", "96", "--min_bucket_reso", "64", "--max_bucket_reso", "128", "--max_data_loader_n_workers", "0"),
    *("--mixed_precision", "no", "--no-full_bf16", "--sample_every_n_epochs", "0", "--sample_prompts", ""),
    *("--save_precision", "float", "--max_train_epochs", "2", "--gradient_accumulation_steps", "2"),
]
TWO = [str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"]

DIGEST = re.compile(r"digest (\d+) (\w+) (\S+) (\S+)")


def environment() -> dict[str, str]:
    return {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}


def launch(*arguments: str, program: list[str] | None = None, **variables: str) -> subprocess.Popen:
    """Starts two ranks on a free port, in a new process group."""
    command = [*TWO, "--main_process_port", "0", *(program or ["-m", "sdxl_finetune"]), *OPTIONS, *arguments]
    return subprocess.Popen(
        command,
        env={**environment(), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def output(process: subprocess.Popen, seconds: float = 300) -> str:
    """Waits for the process to end, and returns its output."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        for pid in [*children(process), process.pid]:  # each rank has its own session
            os.kill(pid, signal.SIGKILL)
        raise


def finished(process: subprocess.Popen) -> str:
    """Waits for a launch that must end well, and returns its output."""
    printed = output(process)
    assert process.returncode == 0, printed
    return printed


def children(process: subprocess.Popen) -> list[int]:
    """Process numbers of the ranks of a launch, in the order of their starts."""
    numbers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return sorted(int(number) for number in numbers)


def changes(path: str, start: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([(value.float() - start[key].float()).flatten() for key, value in load_file(path).items()])


def test_two_processes_train_like_one_with_twice_the_batch_size(work) -> None:
    """Eight photographs in two buckets give a short last step, a short batch, and once a rank without an image."""
    program = [str(Path(__file__).parent / "each_rank.py")]
    two = finished(launch("--train_batch_size", "2", program=program))
    alone = "".join(digest_lines([*OPTIONS, "--train_batch_size", "4"]))
    assert assert_they_agree(two, alone, loss=1e-4, norm=1e-3) >= 4


def assert_they_agree(two: str, alone: str, *, loss: float, norm: float) -> int:
    """Checks that both ranks agree in every bit, and with one process in loss and norm. Returns the number of steps."""
    digests = defaultdict(list)
    for step, *values in DIGEST.findall(two):
        digests[int(step)].append(values)
    for values in digests.values():
        assert len(values) == 2 and values[0] == values[1], two
    single = DIGEST.findall(alone)
    assert [int(step) for step, *_ in single] == sorted(digests), two
    for step, _, *expected in single:
        for actual, reference, share in zip(digests[int(step)][0][1:], expected, (loss, norm), strict=True):
            assert float(actual) == pytest.approx(float(reference), rel=share), step
    return len(digests)


def test_processes_exit_after_the_end_of_a_run(work) -> None:
    """Freeing the process group must not deadlock with gloo's threads."""
    process = launch(program=[str(Path(__file__).parent / "leave_often.py")])
    printed = output(process, seconds=120)
    assert process.returncode == 0 and printed.count("left\n") == 2, printed


@pytest.mark.parametrize("end", ["leave", "stop"])
def test_processes_do_not_abort_at_exit(work, end: str) -> None:
    """gloo's threads, which still free reduced tensors, must end before the interpreter."""
    process = launch(program=[str(Path(__file__).parent / "exit_at_once.py"), end])
    printed = output(process, seconds=120)
    assert process.returncode == 0 and printed.count("ended") == 2 and "terminate" not in printed, printed


@pytest.mark.parametrize("fused", [False, True])
def test_master_weights_of_two_processes_are_those_of_one(work, fused: bool) -> None:
    """Without DDP, gradients are averaged in float32. Fused, each tensor is stepped as soon as it has its gradient.

    The optimizer is SGD, because AdamW's first steps amplify rounding errors to signs. Gradients of bf16 have errors of
    some percent. A missing or a doubled average would change the weights by as much as the step.
    """
    program = [str(Path(__file__).parent / "each_rank.py")]
    exact = ["--mixed_precision", "bf16", "--full_bf16", "--max_train_epochs", "", "--max_train_steps", "2"]
    exact += ["--resolution", "64", "--max_bucket_reso", "64", *(["--fused_backward_pass"] if fused else [])]
    exact += [
        "--optimizer_type",
        "SGD",
        "--learning_rate",
        "0.01",
        "--learning_rate_te1",
        "0.01",
        "--max_grad_norm",
        "0",
    ]
    two = finished(launch("--train_batch_size", "1", *exact, program=program))
    of_two = load_file("changes.safetensors")
    alone = "".join(digest_lines([*OPTIONS, "--train_batch_size", "2", *exact]))
    assert assert_they_agree(two, alone, loss=1e-2, norm=5e-2) == 2
    of_one = load_file("changes.safetensors")
    for part in ("unet.", "te1."):
        one, other = (
            torch.cat([change.flatten() for name, change in sorted(changes.items()) if name.startswith(part)])
            for changes in (of_one, of_two)
        )
        assert one.norm() > 0 and (one - other).norm() < 0.1 * one.norm(), part


def test_both_processes_skip_a_step_whose_gradients_overflow(work) -> None:
    """In float16, with a loss scale that is too large for the first steps."""
    program = [str(Path(__file__).parent / "each_rank.py")]
    fp16 = ["--mixed_precision", "fp16", "--full_fp16", "--max_train_epochs", "", "--max_train_steps", "6"]
    fp16 += ["--resolution", "64", "--max_bucket_reso", "64", "--train_batch_size", "1"]
    two = finished(launch(*fp16, program=program, LOSS_SCALE=str(2.0**23)))
    digests = defaultdict(list)
    for step, digest, _, norm in DIGEST.findall(two):
        digests[int(step)].append((digest, math.isfinite(float(norm))))
    assert len(digests) == 6 and all(len(values) == 2 and values[0] == values[1] for values in digests.values()), two
    finite = [digests[step][0][1] for step in range(6)]
    assert not finite[0] and finite[-1]
    changed = [digests[step][0][0] != digests[step - 1][0][0] for step in range(1, 6)]
    assert changed == finite[1:]


def test_two_processes_write_the_same_files_as_one(work) -> None:
    """Uses the documentation's command, with SGD, because AdamW's first steps amplify rounding errors to signs."""
    sgd = ["--optimizer_type", "SGD", "--learning_rate", "0.01", "--learning_rate_te1", "0.01"]
    printed = finished(launch(*sgd, "--train_batch_size", "2", "--save_every_n_epochs", "1", "--output_dir", "two"))
    alone = [*OPTIONS, *sgd, "--train_batch_size", "4", "--output_dir", "one", "--save_every_n_epochs", "1"]
    config = load_config(alone, program="sdxl-train")
    assert config is not None and train(config) == 0
    names = sorted(path.name for path in Path("one").glob("*.safetensors"))
    assert names == sorted(path.name for path in Path("two").glob("*.safetensors")), printed
    assert len(names) == 2
    start = load_file("base.safetensors")
    for name in names:
        one, two = changes(f"one/{name}", start), changes(f"two/{name}", start)
        assert one.norm() > 0
        assert (one - two).norm() < 1e-3 * one.norm()


def test_a_killed_process_ends_the_run_with_one_root_cause(work) -> None:
    process = launch("--max_train_epochs", "500", "--save_every_n_epochs", "1")
    wait_for(Path("out"), "*-000001.safetensors", process)
    os.kill(children(process)[1], signal.SIGKILL)
    printed = output(process)
    assert process.returncode == 1
    assert printed.count("error: ") == 1 and "error: another process of this run has ended" in printed
    assert "SIGKILL" in printed.partition("Root Cause")[2]


def test_a_wrong_option_is_reported_once(work) -> None:
    printed = output(launch("--metadata_thumbnail", "nofile.png"))
    assert printed.count("error: ") == 1 and "error: command line: metadata_thumbnail = 'nofile.png'" in printed
    assert "metadata_thumbnail" in printed.partition("Root Cause")[2]


def test_an_image_that_one_rank_cannot_read_ends_the_run_with_one_error(work) -> None:
    """Without a latent cache, the rank that reads the image reports it. The other rank only loses its peer."""
    photo = sorted(Path("images").glob("*.jpg"))[3]
    photo.write_bytes(photo.read_bytes()[:3000])
    printed = output(launch("--no-cache_latents", "--no-cache_latents_to_disk", "--train_batch_size", "1"))
    named = [line for line in printed.splitlines() if line.startswith("error: ") and photo.name in line]
    assert len(named) == 1 and photo.name in printed.partition("Root Cause")[2]


def wait_for(folder: Path, pattern: str, process: subprocess.Popen, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not any(folder.glob(pattern)):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.1)


ON_EVERY_RANK = """
import os
import sys
from sdxl_finetune.config import load_config
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.runtime.processes import build_accelerator, on_every_rank

accelerator = build_accelerator(load_config(sys.argv[1:], program="sdxl-train"))

def find(failing):
    if os.environ["RANK"] == failing:
        raise UserError(Problem("not on this machine"))
    return os.environ["RANK"]

print(f"found {on_every_rank(lambda: find('nowhere'))}\\n", end="", flush=True)
try:
    on_every_rank(lambda: find("1"))
except UserError as error:
    print(f"{error}, says {os.environ['RANK']}\\n", end="", flush=True)
accelerator.end_training()
"""


def test_a_problem_of_one_rank_is_raised_on_all(work) -> None:
    Path("ranks.py").write_text(ON_EVERY_RANK)
    printed = finished(launch(program=["ranks.py"]))
    for rank in "01":
        assert f"found {rank}\n" in printed and f"not on this machine, says {rank}\n" in printed
