"""Measures what training loses with each way of holding weights in 16 bits.

    python -m scripts.benchmarks.precision [--steps 100] [--write]

Under each scheme the small model that draws (tests/toy) is fine-tuned on the new style, at the users' rates: U-Net
3e-5, text encoders 1e-6. Data, noise and timesteps are the same, and so are the first weights, which bf16 holds
exactly. After 1, 10, 100 ... steps the change of the weights is compared with that of float32 training. The figures are
the relative L2 error, and the share of weights that have moved at all, for the U-Net and each text encoder. The bytes
are those kept for each trained parameter from step to step, without gradients. --write puts the tables into
docs/precision.md.

Kahan sums come from torch-optimi and stochastic rounding from torchao: pip install torch-optimi torchao. Without them
their rows are left out, with a message.
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
from scripts.benchmarks.proof import TOY, as_bf16
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
    """A way to hold the weights, and the optimizer that steps on them."""

    what: str
    options: Sequence[str]
    package: str = ""
    """That it needs."""


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
    """One scheme's run: for each number of steps and part, the error of the change and the share that has moved."""

    errors: dict[int, dict[str, float]]
    moved: dict[int, dict[str, float]]
    bytes: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *SCHEMES], help="which schemes; all if none is named")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="keeps what was measured, and goes on from there")
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
                print(f"{name}: left out, {package} is not installed")
                continue
            rows[name] = measured(folder, name, marks, exact)
            print(f"{name}: {rows[name].errors}", flush=True)
    tables = "\n".join([*table(rows, marks), *memory_table(rows)])
    print(tables)
    if arguments.write:
        marked = re.compile(r"(<!-- tables -->\n).*(<!-- end of tables -->)", re.DOTALL)
        text = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(marked.sub(lambda found: f"{found[1]}{tables}\n{found[2]}", text), encoding="utf-8")
    late = max(marks)
    if {"masters", "autocast"} <= rows.keys():
        worse = [
            part for part in PARTS if rows["masters"].errors[late][part] > rows["autocast"].errors[late][part] + 0.05
        ]
        sys.exit(f"masters are worse than float32 weights under autocast: {worse}" if worse else 0)


def reference(folder: Path, marks: Sequence[int]) -> dict[int, dict[str, torch.Tensor]]:
    """Weights at the start (0) and after each of these numbers of steps of float32 training."""
    path = folder / f"float32-{max(marks)}.pt"
    if not path.exists():
        kept, _ = run(folder, SCHEMES["float32"], marks)
        torch.save(kept, path)
    return torch.load(path, weights_only=True)


def measured(
    folder: Path, name: str, marks: Sequence[int], exact: Mapping[int, Mapping[str, torch.Tensor]]
) -> Measured:
    path = folder / f"{name}-{max(marks)}.json"
    if not path.exists():
        kept, size = run(folder, SCHEMES[name], marks)
        errors, moved = ({mark: {} for mark in marks} for _ in range(2))
        for mark in marks:
            for part in PARTS:
                true, found = (weights[mark][part] - weights[0][part] for weights in (exact, kept))
                errors[mark][part] = float((found - true).norm() / true.norm())
                moved[mark][part] = float((found[true != 0] != 0).float().mean())
        path.write_text(json.dumps({"errors": errors, "moved": moved, "bytes": size}))
    read = json.loads(path.read_text())
    return Measured(
        *({int(mark): row for mark, row in read[key].items()} for key in ("errors", "moved")), read["bytes"]
    )


def run(
    folder: Path, scheme: Scheme, marks: Sequence[int]
) -> tuple[dict[int, dict[str, torch.Tensor]], dict[str, float]]:
    """Trains, and returns the weights at each mark, and what is kept for each of them in bytes."""
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
        "max_grad_norm": 0,  # as all schemes clip alike only then: fused clips each tensor by itself
        "max_data_loader_n_workers": 0,
        "console_log_level": "WARNING",
        "seed": 0,
    }
    given = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    flags = ["--cache_latents", "--cache_latents_to_disk", "--train_text_encoder"]
    config = load_config([*given, *flags, *scheme.options], program="sdxl-train")
    assert config is not None
    with build_run(config) as built:
        kept = {0: weights_of(built.learner)}
        for step in training_steps(built.learner, built.batches(), StopRequest()):
            done = step.number
            if done in marks:
                assert math.isfinite(step.loss.item())
                kept[done] = weights_of(built.learner)
        count, sizes = kept_bytes(built.learner)
    AcceleratorState._reset_state(reset_partial_state=True)
    return kept, {name: size / count for name, size in sizes.items()}


def weights_of(learner: Learner) -> dict[str, torch.Tensor]:
    """Returns the weights of each part, with what masters or Kahan sums hold beside the bf16 weights."""
    states = learner.update.optimizer.state

    def value(parameter: torch.nn.Parameter) -> torch.Tensor:
        beside = states[parameter].get("kahan_comp", 0.0) if parameter in states else 0.0
        return (learner.sdxl.masters.value(parameter).float() + beside).flatten()

    return {part: torch.cat([*map(value, module.parameters())]) for part, module in learner.sdxl.named_children()}


def table(rows: Mapping[str, Measured], marks: Sequence[int]) -> list[str]:
    lines = []
    for part, words in PARTS.items():
        heads = [words, f"moved after {max(marks):,}", *(f"error after {mark:,}" for mark in marks)]
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
