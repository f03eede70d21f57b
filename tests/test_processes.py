"""Two processes over gloo, launched as a user does: they train as one with twice the batch, and fail as one."""

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
from each_rank import digest_lines
from safetensors.torch import load_file

from sdxl_finetune.config import load_config
from sdxl_finetune.train import train

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

STYLE = Path(__file__).parent.parent / "configs" / "style.toml"
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


def launch(*arguments: str, program: list[str] | None = None) -> subprocess.Popen:
    """Two ranks on a port of their own, in a process group of their own."""
    command = [*TWO, "--main_process_port", "0", *(program or ["-m", "sdxl_finetune"]), *OPTIONS, *arguments]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def output(process: subprocess.Popen, seconds: float = 240) -> str:
    """What the process says until it ends."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def children(process: subprocess.Popen) -> list[int]:
    """The ranks of a launch, in the order of their starts."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return sorted(int(pid) for pid in found)


def changes(path: str, start: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([(value.float() - start[key].float()).flatten() for key, value in load_file(path).items()])


def test_two_processes_train_as_one_with_twice_the_batch(work) -> None:
    """Eight photographs in two buckets, so that a window is short, a batch is a tail and a rank once has no image."""
    program = [str(Path(__file__).parent / "each_rank.py")]
    two = output(launch("--train_batch_size", "2", program=program))
    digests = defaultdict(list)
    for step, *values in DIGEST.findall(two):
        digests[int(step)].append(values)
    assert len(digests) >= 4, two
    for values in digests.values():
        assert len(values) == 2 and values[0] == values[1]
    alone = {
        int(step): values
        for line in digest_lines([*OPTIONS, "--train_batch_size", "4"])
        for step, *values in DIGEST.findall(line)
    }
    assert list(alone) == sorted(digests)
    for step, (_, loss, norm) in alone.items():
        assert float(digests[step][0][1]) == pytest.approx(float(loss), rel=1e-4), step
        assert float(digests[step][0][2]) == pytest.approx(float(norm), rel=1e-3), step


def test_two_processes_write_the_files_of_one(work) -> None:
    """The command of the documentation; SGD, because AdamW's first steps turn rounding into signs."""
    sgd = ["--optimizer_type", "SGD", "--learning_rate", "0.01", "--learning_rate_te1", "0.01"]
    said = output(launch(*sgd, "--train_batch_size", "2", "--save_every_n_epochs", "1", "--output_dir", "two"))
    alone = [*OPTIONS, *sgd, "--train_batch_size", "4", "--output_dir", "one", "--save_every_n_epochs", "1"]
    config = load_config(alone, program="sdxl-train")
    assert config is not None and train(config) == 0
    names = sorted(path.name for path in Path("one").glob("*.safetensors"))
    assert names == sorted(path.name for path in Path("two").glob("*.safetensors")), said
    assert len(names) == 2
    start = load_file("base.safetensors")
    for name in names:
        one, two = changes(f"one/{name}", start), changes(f"two/{name}", start)
        assert one.norm() > 0
        assert (one - two).norm() < 1e-3 * one.norm()


def test_a_lost_process_ends_the_run_with_one_cause(work) -> None:
    process = launch("--max_train_epochs", "500", "--save_every_n_epochs", "1")
    wait_for(Path("out"), "*-000001.safetensors", process)
    started = time.monotonic()
    os.kill(children(process)[1], signal.SIGKILL)
    said = output(process, 60)
    assert time.monotonic() - started < 60
    assert process.returncode == 1
    assert said.count("error: ") == 1 and "error: another process of this run has ended" in said
    assert "SIGKILL" in said.partition("Root Cause")[2]


def test_a_wrong_option_is_said_once(work) -> None:
    said = output(launch("--metadata_thumbnail", "nofile.png"))
    assert said.count("error: ") == 1 and "error: command line: metadata_thumbnail = 'nofile.png'" in said
    assert "metadata_thumbnail" in said.partition("Root Cause")[2]


def test_an_image_that_one_rank_cannot_read_ends_the_run(work) -> None:
    """Without a cache, the rank whose turn it is finds it, and says it; the other only loses its peer."""
    photo = sorted(Path("images").glob("*.jpg"))[3]
    photo.write_bytes(photo.read_bytes()[:3000])
    said = output(launch("--no-cache_latents", "--no-cache_latents_to_disk", "--train_batch_size", "1"), 90)
    named = [line for line in said.splitlines() if line.startswith("error: ") and photo.name in line]
    assert len(named) == 1 and photo.name in said.partition("Root Cause")[2]


def wait_for(folder: Path, pattern: str, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not any(folder.glob(pattern)):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.1)
