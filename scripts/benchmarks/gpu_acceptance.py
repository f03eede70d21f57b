"""Checks on a GPU what cannot be checked without one, and prints a report for docs/gpu.md.

    bash scripts/gpu_acceptance.sh [NAME ...] [--folder FOLDER] [--cpu]

Each check adds lines to the report: what was measured, and `pass`, `FAIL`, or `not run` with the reason. A check that
raises an exception has failed, and the other checks still run. docs/gpu.md explains each line. The exit status is 1 if
a check has failed, and 2 if the machine has a GPU that torch cannot use.
"""

import argparse
import contextlib
import gc
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from scripts.benchmarks import gpu_speed
from scripts.benchmarks.checkpoint_memory import full_size_sources
from scripts.benchmarks.gpu_checks import (
    ROOT,
    Bench,
    Line,
    check_attention,
    check_average,
    check_bitsandbytes,
    check_compiled,
    check_ranks,
    check_resume,
    check_trajectory,
    check_waiting,
    reason,
)
from scripts.benchmarks.proof_models import as_bf16
from scripts.benchmarks.proof_runs import TOY
from scripts.benchmarks.running import run_python
from scripts.toy.style import write_pictures
from sdxl_finetune.commands.memory_estimate import BatchShape, estimate
from sdxl_finetune.config import Config
from sdxl_finetune.model.load import inspect_checkpoint
from sdxl_finetune.model.tensorfile import write_safetensors
from sdxl_finetune.output.metadata import versions
from sdxl_finetune.training.setup import build_run

TFLOP_PER_IMAGE = 20.6
"""Forward and backward pass of full-size SDXL for one image of 1024 x 1024 pixels with 227 tokens.

Work that gradient checkpointing repeats is not counted.
"""
PEAK_TFLOPS = {
    "A100": 312.0,
    "A40": 149.7,
    "RTX 4090": 165.2,
    "H100 80GB HBM3": 989.0,
    "H200": 989.0,
    "L40S": 362.0,
}
"""Peak TFLOP/s for dense bf16 matrix products with float32 sums, by a part of the device's name. H100: SXM module."""
FULL_SIZE_DISK = 8 << 30
"""Bytes of disk for the full-size model of 6.9 GB, with a reserve."""
FULL_SIZE_MEMORY = 22 << 30
"""Bytes of GPU memory that full-size SDXL needs. Cards of 24 GB have slightly more."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *CHECKS], help="checks to run (default: all)")
    parser.add_argument(
        "--folder", type=Path, help="folder for models and runs, which is kept (default: a temporary folder)"
    )
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU, and leave out checks that need one")
    arguments = parser.parse_args()
    if arguments.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["ACCELERATE_USE_CPU"] = "1"
    elif problem := unusable_gpu():
        print(f"error: {problem}", file=sys.stderr)
        return 2
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic sums. cuBLAS reads it only once
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as temporary:
        bench = prepare(arguments.folder or Path(temporary), cuda=torch.cuda.is_available())
        lines = list(run_checks(bench, arguments.names or list(CHECKS)))
    print("\n".join(["", *head(), *table(lines)]))
    return 1 if any(line.outcome == "FAIL" for line in lines) else 0


def unusable_gpu() -> str | None:
    """Returns the reason if the machine has an NVIDIA GPU that torch cannot use, else None."""
    if torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        return None
    if subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode:
        return None
    if torch.version.cuda is None:
        return (
            f"this machine has a GPU, but torch {torch.__version__} in .venv is a build without CUDA. Install one with "
            f"it: .venv/bin/pip install --force-reinstall torch=={torch.__version__.partition('+')[0]} --index-url "
            "https://download.pytorch.org/whl/cu126 (or another CUDA version that the driver supports). Or add --cpu"
        )
    return (
        f"this machine has a GPU, but torch {torch.__version__} cannot use it, perhaps because the driver is older "
        f"than its CUDA {torch.version.cuda}. Compare with the output of nvidia-smi, or add --cpu"
    )


def prepare(folder: Path, *, cuda: bool, quick: bool = False) -> Bench:
    """Writes the training images and the bf16 model that the checks use."""
    folder.mkdir(parents=True, exist_ok=True)
    write_pictures(folder / "pictures", 16 if quick else 64)
    as_bf16(TOY, folder / "start.safetensors")
    return Bench(folder=folder.resolve(), cuda=cuda, quick=quick)


def run_checks(bench: Bench, names: Sequence[str]) -> Iterator[Line]:
    """Runs the checks and yields their lines. An exception becomes a line that says FAIL."""
    for name in names:
        began = time.perf_counter()
        try:
            yield from show(CHECKS[name](bench))
        except Exception as error:
            yield from show([Line(name, f"raised {reason(error)}", "FAIL")])
            traceback.print_exc()
        AcceleratorState._reset_state(reset_partial_state=True)
        gc.collect()
        if bench.cuda:
            torch.cuda.empty_cache()
        print(f"({name}: {time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True)


def show(lines: Iterable[Line]) -> Iterator[Line]:
    """Prints each line on the terminal at once, and yields it."""
    for line in lines:
        print(f"{line.outcome}: {line.name}: {line.measured}", file=sys.stderr, flush=True)
        yield line


def head() -> list[str]:
    """Returns the head of the report: time, commit, machine and versions."""
    commit = output_of("git", "-C", str(ROOT), "describe", "--always", "--dirty") or "unknown"
    rows = {
        "date, commit": f"{datetime.now():%Y-%m-%d %H:%M}, {commit}",
        "machine": f"{platform.platform()}, {os.cpu_count()} CPU cores, {machine_memory() / 2**30:.0f} GiB",
        "device": ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or "CPU",
        "driver, CUDA of torch": f"{driver() or 'none'}, {torch.version.cuda or 'none'}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    return ["# GPU acceptance", "", *(f"- {name}: {value}" for name, value in rows.items()), ""]


def driver() -> str:
    return output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]


def machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def output_of(*command: str) -> str:
    """Returns the output of a command, or the empty text if the command fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def table(lines: Sequence[Line]) -> list[str]:
    rows = [f"| {line.name} | {line.measured.replace('|', '/')} | {line.outcome} |" for line in lines]
    return ["| check | measured | outcome |", "|---|---|---|", *rows]


def check_speed(bench: Bench) -> Iterator[Line]:
    """Measures images per second, with and without compiled blocks, model FLOP utilisation, and peak memory."""
    if missing := missing_for_full_size(bench) if bench.cuda else None:
        yield Line("speed, utilisation and peak memory of full-size SDXL", missing, "not run")
        return
    model = full_size_model(bench.folder) if bench.cuda else bench.folder / "start.safetensors"
    what = "full-size SDXL, 1024 px" if bench.cuda else "model that draws, 64 px"
    rows = speeds(bench, model, [1, 2, 4, 8, 16, 32] if bench.cuda else [1, 4])
    plain = [row for row in rows if not row["compiled"]]
    yield speed_line(bench, what, plain)
    yield memory_line(bench, model, plain)
    compiled = [row for row in rows if row["compiled"]]
    if failure := next((row["failure"] for row in compiled if "failure" in row), None):
        yield Line(f"speed, {what}, compiled blocks", failure, "FAIL")
    else:
        yield speed_line(bench, f"{what}, compiled blocks", compiled)


def speeds(bench: Bench, model: Path, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Measures the batch sizes in a new process, and returns the results of those that fit."""
    shape = (1024, 225) if bench.cuda else (64, 75)
    if bench.quick:
        config = gpu_speed.build_config(
            model, bench.folder / "pictures", bench.folder / "speed", resolution=shape[0], tokens=shape[1]
        )
        with build_run(config) as run:
            first = next(run.batches())
            rows = list(gpu_speed.measure(run.learner, first, sizes[:1], steps=2))
            rows += gpu_speed.measure_compiled(run.learner, first, rows, steps=2, backend=bench.backend)
        AcceleratorState._reset_state(reset_partial_state=True)
    else:
        command = ["-m", "scripts.benchmarks.gpu_speed", str(model), str(bench.folder / "pictures")]
        command += ["--resolution", str(shape[0]), "--tokens", str(shape[1]), "--batches", *map(str, sizes)]
        command += ["--seconds", "60", "--backend", bench.backend]
        output = run_python(command, cpu=not bench.cuda)
        rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    results = [row for row in rows if "out_of_memory" not in row]
    if not any(not row["compiled"] for row in results):
        raise RuntimeError(f"out of memory with batch {sizes[0]}")
    return results


def missing_for_full_size(bench: Bench) -> str | None:
    """Returns what is missing on this machine for full-size SDXL, or None."""
    if torch.cuda.get_device_properties(0).total_memory < FULL_SIZE_MEMORY:
        return f"needs {FULL_SIZE_MEMORY >> 30} GiB on the device"
    if shutil.disk_usage(bench.folder).free < FULL_SIZE_DISK:
        return f"needs {FULL_SIZE_DISK >> 30} GiB of disk: choose another folder with --folder"
    return None


def full_size_model(folder: Path) -> Path:
    path = folder / "full.safetensors"
    if not path.exists():
        write_safetensors(path, full_size_sources(), {})
    return path


def speed_line(bench: Bench, what: str, rows: Sequence[Mapping[str, Any]]) -> Line:
    shown = [f"batch {row['batch']}: {row['images_per_second']:.2f}" for row in rows]
    fastest = max(row["images_per_second"] for row in rows)
    measured = (
        f"images/s {', '.join(shown)}; first steps {rows[0]['warm_seconds']:.0f} s; {utilisation(bench, fastest)}"
    )
    return Line(f"speed, {what}", measured, "pass")


def utilisation(bench: Bench, images_per_second: float) -> str:
    """Returns the model FLOP utilisation of the GPU by full-size SDXL, as text."""
    if not bench.cuda:
        return "model FLOP utilisation not run (needs CUDA)"
    return utilisation_of(torch.cuda.get_device_name(), images_per_second)


def utilisation_of(device: str, images_per_second: float) -> str:
    achieved = TFLOP_PER_IMAGE * images_per_second
    peak = next((peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device)), None)
    if peak is None:
        return f"{achieved:.0f} TFLOP/s (unknown device: no peak to compare with)"
    return f"{achieved:.0f} of {peak:g} TFLOP/s: model FLOP utilisation {achieved / peak:.1%}"


def memory_line(bench: Bench, model: Path, rows: Sequence[Mapping[str, Any]]) -> Line:
    """Passes if the peak memory is within 10 % of the estimate for every batch size."""
    name = "peak memory against the estimate"
    if not bench.cuda:
        return Line(name, "needs CUDA", "not run")
    shown, ratios = [], []
    for row in rows:
        config = gpu_speed.build_config(
            model, bench.folder / "pictures", bench.folder / "speed", resolution=1024, tokens=225, batch=row["batch"]
        )
        expected, peak = estimated_peak_bytes(config), row["peak_bytes"]
        shown.append(f"batch {row['batch']}: {peak / 2**30:.2f} GiB (estimate {expected / 2**30:.2f} GiB)")
        ratios.append(peak / expected)
    outcome = "not run" if not ratios else "pass" if all(0.9 < ratio < 1.1 for ratio in ratios) else "FAIL"
    return Line(name, "; ".join(shown), outcome)


def estimated_peak_bytes(config: Config) -> int:
    """Returns the memory estimate of sdxl-check for a run with one bucket: the peak of all tensors, in bytes."""
    assert config.pretrained_model_name_or_path is not None and config.resolution is not None
    architecture = inspect_checkpoint(config.pretrained_model_name_or_path).architecture
    assert architecture is not None
    width, height = config.resolution
    return estimate(config, architecture, BatchShape(config.train_batch_size, height, width), cuda=True).total


CHECKS: Mapping[str, Callable[[Bench], Iterator[Line]]] = {
    "trajectory": check_trajectory,
    "bitsandbytes": check_bitsandbytes,
    "attention": check_attention,
    "compiled": check_compiled,
    "ranks": check_ranks,
    "waiting": check_waiting,
    "resume": check_resume,
    "average": check_average,
    "speed": check_speed,
}


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
