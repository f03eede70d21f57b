"""What only a GPU can show, as a report to paste: bash scripts/gpu_acceptance.sh [NAME ...] [--folder FOLDER] [--cpu]

Each check gives a line: what was measured, and pass, FAIL, or not run and why. One that raises has failed, and the
others go on. docs/gpu.md says what each line means. Exit status 1 if one has failed, 2 if torch cannot use the GPU that
is there.
"""

import argparse
import contextlib
import gc
import importlib.util
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
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import gpu_speed
import precision
import torch
from accelerate.state import AcceleratorState
from bench_checkpoint_memory import full_size_sources
from proof import TOY, as_bf16
from safetensors.torch import load_file
from torch import Tensor, nn
from toy_style import write_pictures

from sdxl_finetune.config import Config, load_config, to_toml
from sdxl_finetune.masters import Masters, exact_value, split
from sdxl_finetune.model.compiled import compile_blocks
from sdxl_finetune.model.load import inspect_checkpoint, load_checkpoint
from sdxl_finetune.model.memory import use_attention
from sdxl_finetune.model.sdxl import SDXL
from sdxl_finetune.model.tensorfile import write_safetensors
from sdxl_finetune.optim.groups import Group
from sdxl_finetune.optim.optimizer import build_optimizer
from sdxl_finetune.optim.update import PIECE, ExactUpdate
from sdxl_finetune.output.metadata import versions
from sdxl_finetune.run import build_run
from sdxl_finetune.runtime import StopRequest, build_accelerator
from sdxl_finetune.tools.rehearsal import estimate
from sdxl_finetune.train import record, train, training_steps

ROOT = Path(__file__).parent.parent
TFLOP_PER_IMAGE = 20.6
"""Forward and backward pass of full SDXL for one image of 1024 pixels with 227 tokens, nothing computed twice."""
PEAK_TFLOPS = {
    "A100": 312.0,
    "A40": 149.7,
    "RTX 4090": 165.2,
    "H100 80GB HBM3": 989.0,
    "H200": 989.0,
    "L40S": 362.0,
}
"""Of dense bf16 products summed in float32, by words of the device's name; H100 is the SXM module."""
BF16 = ["--mixed_precision", "bf16", "--full_bf16"]
FULL_BYTES = 8 << 30
"""Of disk that the full-size model takes, and a little."""
FULL_MEMORY = 22 << 30
"""Of the device: cards of 24 GB have a little more."""
DIGEST = re.compile(r"digest (\d+) (\w+) (\S+) (\S+)")


@dataclass(frozen=True)
class Line:
    """One line of the report."""

    name: str
    measured: str
    outcome: Literal["pass", "FAIL", "not run"]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where and how large everything is done."""

    folder: Path
    """Holds `pictures` and `start.safetensors`, the model that draws in bf16."""
    cuda: bool
    quick: bool = False
    """As few steps as show that the checks work."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.cuda else "cpu")

    @property
    def backend(self) -> str:
        return "aot_eager" if self.quick else "inductor"

    def configured(self, *more: str, steps: int, out: str = "out") -> Config:
        """A config for the model that draws, both text encoders trained."""
        given = ["--pretrained_model_name_or_path", str(self.folder / "start.safetensors")]
        given += ["--train_data_dir", str(self.folder / "pictures"), "--output_dir", str(self.folder / out)]
        given += ["--output_name", "model", "--resolution", "64", "--caption_extension", ".txt", "--cache_latents"]
        given += ["--max_train_steps", str(steps), "--train_batch_size", "4", "--train_text_encoder", "--seed", "1"]
        given += ["--learning_rate", "3e-5", "--console_log_level", "WARNING", "--max_data_loader_n_workers", "0"]
        config = load_config([*given, *more], program="sdxl-train")
        assert config is not None
        return config


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *CHECKS], help="which checks; all if none is named")
    parser.add_argument("--folder", type=Path, help="for models and runs (a temporary folder); kept")
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone, and what needs one out")
    given = parser.parse_args()
    if given.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["ACCELERATE_USE_CPU"] = "1"
    elif problem := unusable_gpu():
        print(f"error: {problem}", file=sys.stderr)
        return 2
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once; deterministic sums need it
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as temporary:
        bench = prepared(given.folder or Path(temporary), cuda=torch.cuda.is_available())
        lines = list(run_checks(bench, given.names or list(CHECKS)))
    print("\n".join(["", *head(), *table(lines)]))
    return 1 if any(line.outcome == "FAIL" for line in lines) else 0


def unusable_gpu() -> str | None:
    """What is wrong if the machine has an NVIDIA GPU and torch cannot use it."""
    if torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        return None
    if subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode:
        return None
    if torch.version.cuda is None:
        return (
            f"this machine has a GPU, but torch {torch.__version__} in .venv is a build without CUDA. Install one with "
            f"it, .venv/bin/pip install --force-reinstall torch=={torch.__version__.partition('+')[0]} --index-url "
            "https://download.pytorch.org/whl/cu126 (or of another CUDA version that the driver has); or give --cpu"
        )
    return (
        f"this machine has a GPU, but torch {torch.__version__} cannot use it, perhaps because the driver is older "
        f"than its CUDA {torch.version.cuda}: see nvidia-smi; or give --cpu"
    )


def prepared(folder: Path, *, cuda: bool, quick: bool = False) -> Bench:
    folder.mkdir(parents=True, exist_ok=True)
    write_pictures(folder / "pictures", 16 if quick else 64)
    as_bf16(TOY, folder / "start.safetensors")
    return Bench(folder=folder.resolve(), cuda=cuda, quick=quick)


def run_checks(bench: Bench, names: Sequence[str]) -> Iterator[Line]:
    for name in names:
        began = time.perf_counter()
        try:
            yield from said(CHECKS[name](bench))
        except Exception as error:
            yield from said([Line(name, f"raised {reason(error)}", "FAIL")])
            traceback.print_exc()
        AcceleratorState._reset_state(reset_partial_state=True)
        gc.collect()
        if bench.cuda:
            torch.cuda.empty_cache()
        print(f"({name}: {time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True)


def said(lines: Iterable[Line]) -> Iterator[Line]:
    """Shows each line on the terminal as it comes."""
    for line in lines:
        print(f"{line.outcome}: {line.name}: {line.measured}", file=sys.stderr, flush=True)
        yield line


def reason(error: BaseException) -> str:
    """An exception in one line, with the deepest place in this repository that it passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if ".venv" not in frame.filename]
    places = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT)]
    at = f" ({Path(places[-1].filename).name}:{places[-1].lineno})" if places else ""
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0] if words else ''}{at}"


def head() -> list[str]:
    """On what the report was made."""
    commit = quietly("git", "-C", str(ROOT), "describe", "--always", "--dirty") or "unknown"
    rows = {
        "date, commit": f"{datetime.now():%Y-%m-%d %H:%M}, {commit}",
        "machine": f"{platform.platform()}, {os.cpu_count()} CPU cores, {machine_memory() / 2**30:.0f} GiB",
        "device": ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or "CPU",
        "driver, CUDA of torch": f"{driver() or 'none'}, {torch.version.cuda or 'none'}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    return ["# GPU acceptance", "", *(f"- {name}: {value}" for name, value in rows.items()), ""]


def driver() -> str:
    return quietly("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]


def machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def quietly(*command: str) -> str:
    """What a command says; nothing if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def table(lines: Sequence[Line]) -> list[str]:
    rows = [f"| {one.name} | {one.measured.replace('|', '/')} | {one.outcome} |" for one in lines]
    return ["| check | measured | outcome |", "|---|---|---|", *rows]


def check_trajectory(bench: Bench) -> Iterator[Line]:
    """The change of the weights in bf16, with masters and without, against that of float32."""
    steps = 3 if bench.quick else 100 if bench.cuda else 10
    with exact_float32():  # first: a run in bf16 allows TF32 from then on
        exact = moved(bench, "float32", steps)
    errors = {}
    for name in ("masters", "rounded"):
        found = moved(bench, name, steps)
        errors[name] = {part: float((found[part] - exact[part]).norm() / exact[part].norm()) for part in exact}
    shown = {name: ", ".join(f"{part} {error:.3f}" for part, error in row.items()) for name, row in errors.items()}
    holds = all(one < 0.25 and one < 0.5 * errors["rounded"][part] for part, one in errors["masters"].items())
    measured = f"after {steps} steps: {shown['masters']}; with exact_masters = false: {shown['rounded']}"
    yield Line("error of full_bf16's change against float32", measured, "pass" if holds else "FAIL")


def moved(bench: Bench, scheme: str, steps: int) -> dict[str, Tensor]:
    """How far each part has gone after so many steps."""
    kept, _ = precision.run(bench.folder, precision.SCHEMES[scheme], [steps])
    return {part: kept[steps][part] - start for part, start in kept[0].items()}


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within it, products of float32 on a GPU are not rounded to TF32."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def check_bitsandbytes(bench: Bench) -> Iterator[Line]:
    """AdamW8bit on float32 views of bf16 weights, in pieces, against whole float32 parameters."""
    shapes = {"matrix": (PIECE // 1024 * 2 + 500, 1024), "kernel": (64, 64, 3, 3), "norm": (1280,)}
    for fused in (False, True):
        options = {"optimizer_type": "AdamW8bit", "full_bf16": True, "mixed_precision": "bf16", "max_grad_norm": 0.0}
        config = Config(**options, learning_rate=1e-4, fused_backward_pass=fused)
        accelerator = build_accelerator(config)
        start, masters = {name: drawn(shape, at, bench) for at, (name, shape) in enumerate(shapes.items())}, {}
        model, whole = nn.ParameterDict(), nn.ParameterDict(start)
        for name, value in start.items():
            high, low = split(value)
            model[name] = nn.Parameter(high)
            masters[model[name]] = low
        update = ExactUpdate(config, [Group("unet", dict(model.items()), 1e-4)], masters, accelerator)
        optimizer = build_optimizer(config, [Group("unet", dict(whole.items()), 1e-4)])
        for step in range(3):
            gradients = {name: drawn(shape, 10 + step, bench).bfloat16().float() for name, shape in shapes.items()}
            with update.gradients(last=True, alone=True):
                torch.stack([(model[name].float() * one).sum() for name, one in gradients.items()]).sum().backward()
            update.step(0.0)
            for name, one in gradients.items():
                whole[name].grad = one
            optimizer.step()
        different = [*differing_weights(model, masters, whole), *differing_states(update, optimizer, whole)]
        way = "fused, " if fused else ""
        words = f"differ: {', '.join(different)}" if different else "masters and states bit-identical after 3 steps"
        yield Line(f"AdamW8bit on float32 views ({way}pieces)", words, "FAIL" if different else "pass")


def drawn(shape: Sequence[int], seed: int, bench: Bench) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 0.02).to(bench.device)


def differing_weights(model: nn.ParameterDict, masters: Masters, whole: nn.ParameterDict) -> list[str]:
    return [name for name, one in model.items() if not torch.equal(exact_value(one, masters), whole[name])]


def differing_states(update: ExactUpdate, optimizer: torch.optim.Optimizer, whole: nn.ParameterDict) -> list[str]:
    """Names of states that are not those of the pieces, one after the other."""
    pieces: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for name, shadow in update.stepped[0].parameters.items():
        pieces[name.partition("#")[0]].append(update.optimizer.state[shadow])
    return [
        f"{name} {key}"
        for name, parameter in whole.items()
        for key, value in optimizer.state[parameter].items()
        if key.startswith(("state", "absmax"))
        and not torch.equal(torch.cat([one[key].flatten() for one in pieces[name]]), value.flatten())
    ]


def check_attention(bench: Bench) -> Iterator[Line]:
    """xformers' attention against torch's."""
    name = "xformers against SDPA"
    if not bench.cuda:
        yield Line(name, "needs CUDA", "not run")
    elif importlib.util.find_spec("xformers") is None:
        yield Line(name, "xformers is not installed: .venv/bin/pip install xformers", "not run")
    else:
        yield against_float32(bench, name, lambda model: use_attention(model, "xformers") == "xformers")


def check_compiled(bench: Bench) -> Iterator[Line]:
    """Compiled transformer blocks against the same ones."""

    def compiled(model: SDXL) -> bool:
        compile_blocks(model, bench.backend)
        return True

    yield against_float32(bench, f"compiled blocks ({bench.backend}) against eager ones", compiled)


def against_float32(bench: Bench, name: str, change: Callable[[SDXL], bool]) -> Line:
    """Whether a model in bf16 that `change` has changed predicts and learns as closely to float32 as one unchanged."""
    with exact_float32():
        truth = predicted(bench, torch.float32, lambda _: True)
    plain, changed = (predicted(bench, torch.bfloat16, one) for one in (lambda _: True, change))
    errors = [
        tuple(float((one - true).norm() / true.norm()) for one in (other, known))
        for other, known, true in zip(changed, plain, truth, strict=True)
    ]
    words = "; ".join(
        f"{what} {error:.2e} (unchanged {usual:.2e})"
        for what, (error, usual) in zip(("prediction", "gradient"), errors, strict=True)
    )
    holds = all(error <= 1.5 * usual + 1e-3 for error, usual in errors)
    return Line(name, f"error in bf16 against float32: {words}", "pass" if holds else "FAIL")


def predicted(bench: Bench, dtype: torch.dtype, change: Callable[[SDXL], bool]) -> tuple[Tensor, Tensor]:
    """Prediction and gradient for two images."""
    model = load_checkpoint(bench.folder / "start.safetensors", dtype=dtype).model.to(bench.device).train()
    assert change(model), "it fell back: see the warning above"
    generator = torch.Generator().manual_seed(0)
    side = 16 if bench.quick else 32
    latents = torch.randn(2, 4, side, side, generator=generator)
    ids = torch.randint(0, 49406, (2, 1, 77), generator=generator)
    ids[:, :, 0], ids[:, :, 20:] = 49406, 49407
    sizes = torch.full((2, 2), 8 * side)
    given = latents, torch.tensor([100, 700]), ids, ids, sizes, torch.zeros_like(sizes), sizes
    prediction = model(*(one.to(bench.device) for one in given))
    prediction.square().mean().backward()
    gradients = [one.grad.float().flatten() for one in model.parameters() if one.grad is not None]
    return prediction.detach().float(), torch.cat(gradients)


def check_ranks(bench: Bench) -> Iterator[Line]:
    """Two processes keep the same masters, and train as one with twice the batch."""
    name = f"two ranks over {'NCCL' if bench.cuda else 'gloo (NCCL was not run)'}"
    if bench.cuda and torch.cuda.device_count() < 2:
        yield Line(name, "needs two GPUs", "not run")
        return
    options = plain_options(bench.configured(*BF16, "--fused_backward_pass", "--max_grad_norm", "0", steps=2))
    program = str(ROOT / "tests" / "each_rank.py")
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    two = spoken([*launch, program, *options, "--train_batch_size", "2"], cpu=not bench.cuda)
    one = DIGEST.findall(spoken([program, *options], cpu=not bench.cuda))
    digests = defaultdict(list)
    for step, *values in DIGEST.findall(two):
        digests[step].append(values)
    same = all(len(values) == 2 and values[0] == values[1] for values in digests.values())
    pairs = [(digests[step][0][1:], expected) for step, _, *expected in one if step in digests]
    away = [max(abs(float(a[at]) / float(b[at]) - 1) for a, b in pairs) for at in range(2)] if pairs else [1.0, 1.0]
    holds = same and len(one) == len(digests) == 2 and away[0] < 1e-2 and away[1] < 5e-2
    words = f"weights of both {'bit-identical' if same else 'DIFFER'} after each of {len(digests)} steps; against one "
    yield Line(name, f"{words}process: loss {away[0]:.1e}, norm {away[1]:.1e} away", "pass" if holds else "FAIL")


def plain_options(config: Config) -> list[str]:
    """What a command line gives to have this config."""
    path = config.output_dir / "ranks.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_toml(config), encoding="utf-8")
    return ["--config", str(path)]


def spoken(command: Sequence[str], *, cpu: bool) -> str:
    """What a Python program says; raises with its last line if it fails."""
    environment = {**os.environ, **({"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"} if cpu else {})}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=600)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")] or done.stderr.splitlines()
        raise RuntimeError(f"status {done.returncode}: {errors[-1] if errors else 'without a word'}")
    return done.stdout


def check_waiting(bench: Bench) -> Iterator[Line]:
    """No step waits for the device, as far as torch notices: with torch's AdamW, as bitsandbytes itself waits."""
    ways = {"float32 weights": ["--mixed_precision", "bf16"], "full_bf16": BF16}
    for way, more in {**ways, "full_bf16, fused": [*BF16, "--fused_backward_pass"]}.items():
        name = f"no waiting for the device within a step ({way})"
        if not bench.cuda:
            yield Line(name, "needs CUDA", "not run")
            continue
        try:
            made = guarded_steps(bench.configured(*more, steps=12), errors_on_waiting)
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            yield Line(name, f"raised {reason(error)}", "FAIL")
            traceback.print_exc()
        else:
            yield Line(name, f"{made} steps and their log under set_sync_debug_mode('error')", "pass")
        AcceleratorState._reset_state(reset_partial_state=True)


def guarded_steps(config: Config, guard: Callable[[], AbstractContextManager[None]]) -> int:
    """How many steps of a run, after two to warm up, were made and logged within `guard`."""
    made = 0
    with build_run(config) as run:
        steps = training_steps(run, StopRequest())
        for _ in range(2):
            record(run, next(steps))
        with guard():
            for step in steps:
                record(run, step)
                made += 1
    return made


@contextmanager
def errors_on_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_resume(bench: Bench) -> Iterator[Line]:
    """A run of six steps, against one that goes on from the state after half of them."""
    half = 1 if bench.quick else 3
    options = [*BF16, "--optimizer_type", "AdamW8bit", "--fused_backward_pass", "--gradient_checkpointing"]
    options += ["--save_every_n_steps", str(half), "--save_state", "--save_precision", "float"]
    with deterministic(bench):
        whole = trained(bench, "whole", options, steps=2 * half)
        (state,) = (bench.folder / "whole").glob(f"*step{half:08d}-state")
        again = trained(bench, "again", options, steps=2 * half) if bench.cuda else whole
        resumed = trained(bench, "resumed", [*options, "--resume", str(state)], steps=2 * half)
    if away := farthest(whole, again):
        words = f"two undisturbed runs differ by up to {away:.1e}, so that this device shows nothing"
        yield Line("resume equality", words, "not run")
        return
    away = farthest(whole, resumed)
    words = f"weights differ by up to {away:.1e}" if away else "weights bit-identical"
    yield Line("resume equality", f"{2 * half} steps against {half} and {half}: {words}", "FAIL" if away else "pass")


def trained(bench: Bench, out: str, options: Sequence[str], *, steps: int) -> dict[str, Tensor]:
    shutil.rmtree(bench.folder / out, ignore_errors=True)
    assert train(bench.configured(*options, steps=steps, out=out)) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return load_file(bench.folder / out / "model.safetensors")


def farthest(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference of two files' numbers; 0 if they are the same bits."""
    assert one.keys() == other.keys()
    tiny = sys.float_info.min  # where a difference is lost, as with numbers that are none
    return max(
        0.0 if torch.equal(value, other[name]) else max(tiny, float((value - other[name]).abs().max()))
        for name, value in one.items()
    )


@contextmanager
def deterministic(bench: Bench) -> Iterator[None]:
    """Within it CUDA adds up in the same order every time, where torch can have that."""
    torch.use_deterministic_algorithms(bench.cuda, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_speed(bench: Bench) -> Iterator[Line]:
    """Images a second with and without compiled blocks, model FLOP utilisation, peak memory against its estimate."""
    if missing := missing_for_full_size(bench) if bench.cuda else None:
        yield Line("speed, utilisation and peak memory of full-size SDXL", missing, "not run")
        return
    model = full_size_model(bench.folder) if bench.cuda else bench.folder / "start.safetensors"
    what = "full-size SDXL, 1024 px" if bench.cuda else "model that draws, 64 px"
    sizes = [1, 2, 4, 8, 16, 32] if bench.cuda else [1, 4]
    plain = speeds(bench, model, sizes)
    best = max(plain, key=lambda row: row["images_per_second"])
    yield speed_line(bench, what, plain)
    yield memory_line(bench, model, plain)
    with_blocks = speeds(bench, model, sorted({1, best["batch"]}), backend=bench.backend)
    yield speed_line(bench, f"{what}, compiled blocks", with_blocks)


def speeds(bench: Bench, model: Path, sizes: Sequence[int], backend: str | None = None) -> list[dict[str, Any]]:
    """What fitted, by size of batch; measured in a process of its own."""
    shape = (1024, 225) if bench.cuda else (64, 75)
    if bench.quick:
        config = gpu_speed.configured(
            model, bench.folder / "pictures", bench.folder / "speed", resolution=shape[0], tokens=shape[1],
            backend=backend,
        )  # fmt: skip
        rows = list(gpu_speed.measure(config, sizes[:1], steps=2))
        AcceleratorState._reset_state(reset_partial_state=True)
    else:
        command = [str(ROOT / "scripts" / "gpu_speed.py"), str(model), str(bench.folder / "pictures")]
        command += ["--resolution", str(shape[0]), "--tokens", str(shape[1]), "--batches", *map(str, sizes)]
        command += ["--seconds", "120", *(["--backend", backend] if backend else [])]
        rows = [json.loads(line) for line in spoken(command, cpu=not bench.cuda).splitlines() if line.startswith("{")]
    fitted = [row for row in rows if "out_of_memory" not in row]
    if not fitted:
        raise RuntimeError(f"out of memory with batch {sizes[0]}")
    return fitted


def missing_for_full_size(bench: Bench) -> str | None:
    if torch.cuda.get_device_properties(0).total_memory < FULL_MEMORY:
        return f"needs {FULL_MEMORY >> 30} GiB on the device"
    if shutil.disk_usage(bench.folder).free < FULL_BYTES:
        return f"needs {FULL_BYTES >> 30} GiB of disk: give --folder"
    return None


def full_size_model(folder: Path) -> Path:
    path = folder / "full.safetensors"
    if not path.exists():
        write_safetensors(path, full_size_sources(), {})
    return path


def speed_line(bench: Bench, what: str, rows: Sequence[Mapping[str, Any]]) -> Line:
    shown = [f"batch {row['batch']}: {row['images_per_second']:.2f}" for row in rows]
    fastest = max(row["images_per_second"] for row in rows)
    words = f"images/s {', '.join(shown)}; first steps {rows[0]['warm_seconds']:.0f} s; {utilisation(bench, fastest)}"
    return Line(f"speed, {what}", words, "pass")


def utilisation(bench: Bench, images_per_second: float) -> str:
    """Of the device, by a model of full size."""
    if not bench.cuda:
        return "model FLOP utilisation not run (needs CUDA)"
    return utilisation_of(torch.cuda.get_device_name(), images_per_second)


def utilisation_of(device: str, images_per_second: float) -> str:
    done = TFLOP_PER_IMAGE * images_per_second
    peak = next((peak for words, peak in PEAK_TFLOPS.items() if re.search(rf"\b{words}\b", device)), None)
    if peak is None:
        return f"{done:.0f} TFLOP/s (unknown device: no peak to compare with)"
    return f"{done:.0f} of {peak:g} TFLOP/s: model FLOP utilisation {done / peak:.1%}"


def memory_line(bench: Bench, model: Path, rows: Sequence[Mapping[str, Any]]) -> Line:
    """Within a tenth of the estimate, for every size of batch."""
    name = "peak memory against the estimate"
    if not bench.cuda:
        return Line(name, "needs CUDA", "not run")
    shown, shares = [], []
    for row in rows:
        config = gpu_speed.configured(
            model, bench.folder / "pictures", bench.folder / "speed", resolution=1024, tokens=225, batch=row["batch"]
        )
        expected, peak = estimated_peak_bytes(config), row["peak_bytes"]
        shown.append(f"batch {row['batch']}: {peak / 2**30:.2f} GiB (estimate {expected / 2**30:.2f} GiB)")
        shares.append(peak / expected)
    outcome = "not run" if not shares else "pass" if all(0.9 < one < 1.1 for one in shares) else "FAIL"
    return Line(name, "; ".join(shown), outcome)


def estimated_peak_bytes(config: Config) -> int:
    """What sdxl-check expects a run of this config, in one bucket, to take of the device at its peak: tensors alone."""
    assert config.pretrained_model_name_or_path is not None and config.resolution is not None
    architecture = inspect_checkpoint(config.pretrained_model_name_or_path).architecture
    assert architecture is not None
    width, height = config.resolution
    return estimate(config, architecture, (config.train_batch_size, height, width), cuda=True).total


CHECKS: Mapping[str, Callable[[Bench], Iterator[Line]]] = {
    "trajectory": check_trajectory,
    "bitsandbytes": check_bitsandbytes,
    "attention": check_attention,
    "compiled": check_compiled,
    "ranks": check_ranks,
    "waiting": check_waiting,
    "resume": check_resume,
    "speed": check_speed,
}


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
