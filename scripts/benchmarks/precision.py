"""Measures how much of the training is lost by each way to hold weights in 16 bits.

    python -m scripts.benchmarks.precision [NAME ...] [--steps 100] [--write]

Each scheme fine-tunes the small SDXL model that draws (tests/toy) on the new style, with the learning rates of
configs/style.toml. All schemes use the same data, noise and timesteps, and start from the same weights, which bf16
holds exactly. After 1, 10, 100, ... steps the change of the weights is compared with that of float32 training, for the
U-Net and each text encoder. The tables show the relative L2 error of the change and the share of weights that have
moved at all. They also show the bytes that are kept for each trained parameter between steps, without gradients.
`--write` puts the tables into docs/precision.md.

Kahan sums need the package torch-optimi, stochastic rounding needs torchao: pip install torch-optimi torchao. Without
a package its line is left out with a message.
"""

import argparse
import importlib.util
import json
import math
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from scripts.benchmarks.full_size import kept_bytes
from scripts.benchmarks.proof_models import as_bf16
from scripts.benchmarks.proof_runs import TOY
from scripts.toy.style import write_pictures
from sdxl_finetune.config import load_config
from sdxl_finetune.runtime.signals import StopRequest
from sdxl_finetune.training.learner import Learner
from sdxl_finetune.training.loop import training_steps
from sdxl_finetune.training.setup import build_run

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "precision.md"
PARTS = {"unet": "U-Net, 3e-5", "te1": "text encoder 1, 1e-6", "te2": "text encoder 2, 1e-6"}
BF16 = ["--mixed_precision", "bf16", "--full_bf16"]
ROUNDED = [*BF16, "--no-exact_masters"]


@dataclass(frozen=True)
class Scheme:
    """A way to hold the weights, and the optimizer that updates them."""

    what: str
    """Name in the tables."""
    options: Sequence[str]
    package: str = ""
    """Package that must be installed."""


SCHEMES = {
    "float32": Scheme("float32, AdamW", ["--mixed_precision", "no"]),
    "autocast": Scheme("float32 weights under bf16 autocast, AdamW", ["--mixed_precision", "bf16"]),
    "masters": Scheme("**full_bf16 with exact masters, AdamW**", BF16),
    "masters fused": Scheme("the same with fused_backward_pass", [*BF16, "--fused_backward_pass"]),
    "masters 8-bit": Scheme("**full_bf16 with exact masters, AdamW8bit**", [*BF16, "--optimizer_type", "AdamW8bit"]),
    "float32 8-bit": Scheme(
        "float32 weights under bf16 autocast, AdamW8bit",
        ["--mixed_precision", "bf16", "--optimizer_type", "AdamW8bit"],
    ),
    "rounded": Scheme("bf16 rounded to nearest, AdamW (the reference; `exact_masters = false`)", ROUNDED),
    "rounded 8-bit": Scheme("the same, AdamW8bit", [*ROUNDED, "--optimizer_type", "AdamW8bit"]),
    "kahan": Scheme(
        "bf16 with Kahan sums, torch-optimi AdamW", [*ROUNDED, "--optimizer_type", "optimi.AdamW"], "optimi"
    ),
    "stochastic": Scheme(
        "bf16 with stochastic rounding, torchao AdamW",
        [*ROUNDED, "--optimizer_type", "torchao.optim._AdamW", "--optimizer_args", "bf16_stochastic_round=True"],
        "torchao",
    ),
}


@dataclass(frozen=True)
class Measured:
    """Result of one scheme, by number of steps and part of the model."""

    errors: dict[int, dict[str, float]]
    """Relative L2 error of the change of the weights."""
    moved: dict[int, dict[str, float]]
    """Share of the weights that float32 training changes and this scheme changes too."""
    bytes: dict[str, float]
    """Bytes for each trained parameter, by kind."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *SCHEMES], help="schemes to measure (default: all)")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (default: 100)")
    parser.add_argument("--folder", type=Path, help="folder for results. Results in it are used again")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/precision.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_pictures(folder / "pictures", 480)
        as_bf16(TOY, folder / "start.safetensors")
        marks = [mark for mark in (1, 10, 100, 1000) if mark <= arguments.steps]
        exact = reference(folder, marks)
        rows = {}
        for name in arguments.names or list(SCHEMES):
            package = SCHEMES[name].package
            if package and importlib.util.find_spec(package) is None:
                print(f"{name}: left out, because {package} is not installed. Run: pip install {package}")
                continue
            rows[name] = measure(folder, name, marks, exact)
            print(f"{name}: {rows[name].errors}", flush=True)
    tables = "\n".join([*table(rows, marks), *memory_table(rows)])
    print(tables)
    if arguments.write:
        marked = re.compile(r"(<!-- tables -->\n).*(<!-- end of tables -->)", re.DOTALL)
        text = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(marked.sub(lambda match: f"{match[1]}{tables}\n{match[2]}", text), encoding="utf-8")
    last = max(marks)
    if {"masters", "autocast"} <= rows.keys():
        worse = [
            part for part in PARTS if rows["masters"].errors[last][part] > rows["autocast"].errors[last][part] + 0.05
        ]
        sys.exit(f"masters are worse than float32 weights under autocast: {worse}" if worse else 0)


def reference(folder: Path, marks: Sequence[int]) -> dict[int, dict[str, torch.Tensor]]:
    """Returns the weights of float32 training at the start (key 0) and after each number of steps in `marks`."""
    path = folder / f"float32-{max(marks)}.pt"
    if not path.exists():
        weights, _ = train(folder, SCHEMES["float32"], marks)
        torch.save(weights, path)
    return torch.load(path, weights_only=True)


def measure(folder: Path, name: str, marks: Sequence[int], exact: Mapping[int, Mapping[str, torch.Tensor]]) -> Measured:
    """Runs one scheme and compares it with the weights of float32 training. The result is stored in `folder`."""
    path = folder / f"{name}-{max(marks)}.json"
    if not path.exists():
        weights, size = train(folder, SCHEMES[name], marks)
        errors, moved = ({mark: {} for mark in marks} for _ in range(2))
        for mark in marks:
            for part in PARTS:
                exact_change, change = (run[mark][part] - run[0][part] for run in (exact, weights))
                errors[mark][part] = float((change - exact_change).norm() / exact_change.norm())
                moved[mark][part] = float((change[exact_change != 0] != 0).float().mean())
        path.write_text(json.dumps({"errors": errors, "moved": moved, "bytes": size}))
    read = json.loads(path.read_text())
    return Measured(
        *({int(mark): row for mark, row in read[key].items()} for key in ("errors", "moved")), read["bytes"]
    )


def train(
    folder: Path, scheme: Scheme, marks: Sequence[int]
) -> tuple[dict[int, dict[str, torch.Tensor]], dict[str, float]]:
    """Trains and returns the weights after each number of steps, and the bytes for each trained parameter."""
    options = {
        "pretrained_model_name_or_path": folder / "start.safetensors",
        "train_data_dir": folder / "pictures",
        "output_dir": folder / "out",
        "resolution": 64,
        "train_batch_size": 4,
        "vae_batch_size": 16,
        "caption_extension": ".txt",
        "max_train_steps": max(marks),
        "learning_rate": 3e-5,
        "learning_rate_te1": 1e-6,
        "learning_rate_te2": 1e-6,
        "min_snr_gamma": 5,
        "max_grad_norm": 0,  # off, because fused_backward_pass clips each tensor by itself, unlike the other schemes
        "max_data_loader_n_workers": 0,
        "console_log_level": "WARNING",
        "seed": 0,
    }
    given = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    flags = ["--cache_latents", "--cache_latents_to_disk", "--train_text_encoder"]
    config = load_config([*given, *flags, *scheme.options], program="sdxl-train")
    assert config is not None
    with build_run(config) as run:
        weights = {0: copy_weights(run.learner)}
        for step in training_steps(run.learner, run.batches(), StopRequest()):
            if step.number in marks:
                assert math.isfinite(step.loss.item())
                weights[step.number] = copy_weights(run.learner)
        count, sizes = kept_bytes(run.learner)
    AcceleratorState._reset_state(reset_partial_state=True)
    return weights, {name: size / count for name, size in sizes.items()}


def copy_weights(learner: Learner) -> dict[str, torch.Tensor]:
    """Returns all weights of each part. They include low bits or Kahan sums, which the model does not compute with."""
    states = learner.update.optimizer.state

    def value(parameter: torch.nn.Parameter) -> torch.Tensor:
        kahan_sum = states[parameter].get("kahan_comp", 0.0) if parameter in states else 0.0
        return (learner.sdxl.masters.value(parameter).float() + kahan_sum).flatten()

    return {part: torch.cat([*map(value, module.parameters())]) for part, module in learner.sdxl.named_children()}


def table(rows: Mapping[str, Measured], marks: Sequence[int]) -> list[str]:
    lines = []
    for part, title in PARTS.items():
        heads = [title, f"moved after {max(marks):,}", *(f"error after {mark:,}" for mark in marks)]
        lines += ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
        for name, row in rows.items():
            cells = [f"{row.moved[max(marks)][part]:.1%}", *(f"{row.errors[mark][part]:.3f}" for mark in marks)]
            lines.append(f"| {SCHEMES[name].what} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def memory_table(rows: Mapping[str, Measured]) -> list[str]:
    kinds = ("weights", "masters", "optimizer")
    lines = [f"| bytes for each trained parameter | {' | '.join(kinds)} | together |", "|---|" + "--:|" * 4]
    for name, row in rows.items():
        cells = [f"{row.bytes[kind]:.2f}" for kind in kinds]
        lines.append(f"| {SCHEMES[name].what} | {' | '.join(cells)} | {sum(row.bytes.values()):.2f} |")
    return lines


if __name__ == "__main__":
    main()
