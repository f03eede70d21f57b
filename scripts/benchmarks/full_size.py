"""Trains full-size SDXL in the memory of a 24 GB card.

    python -m scripts.benchmarks.full_size

The script writes a checkpoint of SDXL's size with random weights, and makes three optimizer steps with it on the CPU.
It uses full_bf16 with exact masters, AdamW8bit, fused_backward_pass and gradient_checkpointing, with batch size 1. It
prints the
private memory of the process (RssAnon) after loading and at its peak. It also prints the bytes of weights, low bits and
optimizer states for each trained parameter.

The training process may use at most --limit GiB. If the machine runs out of memory, the system kills this process
first. By default glibc keeps freed blocks of up to 32 MB, which costs 2 GiB here. The script therefore makes glibc
return blocks above 256 KB at once. The script needs 7 GB of disk, and takes some minutes on two cores, because bf16
convolutions are slow on a CPU.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from scripts.benchmarks.checkpoint_memory import anonymous_bytes, full_size_sources, peak
from scripts.toy.photos import write_photos
from sdxl_finetune.commands.model import main as model_tool
from sdxl_finetune.config import load_config
from sdxl_finetune.model.tensorfile import write_safetensors
from sdxl_finetune.runtime.signals import StopRequest
from sdxl_finetune.training.learner import Learner
from sdxl_finetune.training.loop import training_steps
from sdxl_finetune.training.setup import build_run

GiB = 1 << 30
STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, help="folder for the model, which is then kept (default: a temporary folder)"
    )
    parser.add_argument("--resolution", type=int, default=128, help="pixels (default: 128)")
    parser.add_argument("--max_token_length", type=int, default=75, help="75, 150 or 225 (default: 75)")
    parser.add_argument("--limit", type=float, default=22.0, help="most private memory in GiB (default: 22)")
    parser.add_argument(
        "--preset", choices=("full", "small", "tiny"), default="full", help="small and tiny only try out the script"
    )
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)  # runs the training process
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments)
        return
    with tempfile.TemporaryDirectory() as temporary:
        arguments.folder = arguments.folder or Path(temporary)
        prepare(arguments.folder, arguments.preset)
        again = ["-m", "scripts.benchmarks.full_size", *sys.argv[1:], "--train", "--folder", str(arguments.folder)]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
        sys.exit(subprocess.run([sys.executable, *again], env=environment).returncode)


def prepare(folder: Path, preset: str) -> None:
    """Writes the training images and the model."""
    folder.mkdir(parents=True, exist_ok=True)
    write_photos(folder / "photos")
    model = folder / f"{preset}.safetensors"
    if model.exists():
        return
    if preset == "full":
        write_safetensors(model, full_size_sources(), {})
    else:
        model_tool(["init", str(model), "--preset", preset])


def train(arguments: argparse.Namespace) -> None:
    """Makes the training steps and prints the memory."""
    Path("/proc/self/oom_score_adj").write_text("1000")
    resource.setrlimit(resource.RLIMIT_DATA, (int(arguments.limit * GiB),) * 2)
    options = {
        "pretrained_model_name_or_path": arguments.folder / f"{arguments.preset}.safetensors",
        "train_data_dir": arguments.folder / "photos",
        "output_dir": arguments.folder / "out",
        "resolution": arguments.resolution,
        "max_token_length": arguments.max_token_length,
        "caption_extension": ".txt",
        "train_batch_size": 1,
        "max_train_steps": STEPS,
        "optimizer_type": "AdamW8bit",
        "mixed_precision": "bf16",
        "learning_rate": 3e-5,
        "learning_rate_te1": 1e-6,
        "learning_rate_te2": 1e-6,
        "max_data_loader_n_workers": 0,
        "seed": 0,
    }
    flags = ["full_bf16", "fused_backward_pass", "gradient_checkpointing", "cache_latents", "train_text_encoder"]
    given = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    config = load_config([*given, *(f"--{flag}" for flag in flags)], program="sdxl-train")
    assert config is not None
    with peak("load and train") as highest, build_run(config) as run:
        print_memory("after loading", anonymous_bytes())
        started = time.perf_counter()
        for step in training_steps(run.learner, run.batches(), StopRequest()):
            seconds, started = time.perf_counter() - started, time.perf_counter()
            loss = step.loss.item()
            print(f"step {step.number}: loss {loss:.4f}, {seconds:.0f} s, so far {highest[0] / GiB:.2f} GiB")
        print_memory("peak", highest[0])
        count, parts = kept_bytes(run.learner)
    print(f"trained parameters: {count / 1e9:.3f} billion")
    print(", ".join(f"{name} {size / count:.3f}" for name, size in parts.items()), end=": ")
    print(f"{sum(parts.values()) / count:.3f} bytes for each trained parameter")


def print_memory(when: str, size: int) -> None:
    print(f"private memory {when}: {size / GiB:.2f} GiB", flush=True)


def kept_bytes(learner: Learner) -> tuple[int, dict[str, int]]:
    """Returns the number of trained parameters, and the bytes that are kept for them between steps, by kind."""
    trained = [parameter for _, parameter in learner.parameters.named()]
    low_bits = [learner.sdxl.masters.kept(parameter) for parameter in trained]
    values = [value for state in learner.update.optimizer.state.values() for value in state.values()]
    # By address, because 8-bit states share their tables.
    states = {value.data_ptr(): value.nbytes for value in values if isinstance(value, torch.Tensor)}
    return sum(parameter.numel() for parameter in trained), {
        "weights": sum(parameter.nbytes for parameter in trained),
        "masters": sum(bits.nbytes for bits in low_bits if bits is not None),
        "optimizer": sum(states.values()),
    }


if __name__ == "__main__":
    main()
