"""The checks of scripts/benchmarks/gpu_acceptance.py that train, compare and watch; each yields lines of its report."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn

from scripts.benchmarks import precision
from sdxl_finetune.config import Config, load_config, to_toml
from sdxl_finetune.low_bits import MasterWeights, split
from sdxl_finetune.model.attention import use_attention
from sdxl_finetune.model.compilation import compile_blocks
from sdxl_finetune.model.load import load_checkpoint
from sdxl_finetune.model.sdxl import SDXL
from sdxl_finetune.optim.optimizer import build_optimizer
from sdxl_finetune.optim.parameters import Group, TrainedParameters
from sdxl_finetune.optim.update import SLICE, ExactUpdate
from sdxl_finetune.runtime.processes import build_accelerator
from sdxl_finetune.runtime.signals import StopRequest
from sdxl_finetune.training.loop import train, training_steps
from sdxl_finetune.training.setup import build_run

ROOT = Path(__file__).parents[2]
BF16 = ["--mixed_precision", "bf16", "--full_bf16"]
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
    """AdamW8bit on float32 views of bf16 weights, in slices, against whole float32 parameters."""
    shapes = {"matrix": (SLICE // 1024 * 2 + 500, 1024), "kernel": (64, 64, 3, 3), "norm": (1280,)}
    for fused in (False, True):
        options = {"optimizer_type": "AdamW8bit", "full_bf16": True, "mixed_precision": "bf16", "max_grad_norm": 0.0}
        config = Config(**options, learning_rate=1e-4, fused_backward_pass=fused)
        accelerator = build_accelerator(config)
        start = {name: drawn(shape, at, bench) for at, (name, shape) in enumerate(shapes.items())}
        masters = MasterWeights()
        model, whole = nn.ParameterDict(), nn.ParameterDict(start)
        for name, value in start.items():
            high, low = split(value)
            model[name] = nn.Parameter(high)
            masters.add(model[name], low)
        parameters = TrainedParameters([Group("unet", dict(model.items()), 1e-4)], masters)
        update = ExactUpdate(config, parameters, accelerator)
        optimizer = build_optimizer(config, [Group("unet", dict(whole.items()), 1e-4)])
        for step in range(3):
            gradients = {name: drawn(shape, 10 + step, bench).bfloat16().float() for name, shape in shapes.items()}
            with update.accumulate(last=True, only=True):
                torch.stack([(model[name].float() * one).sum() for name, one in gradients.items()]).sum().backward()
            update.step()
            for name, one in gradients.items():
                whole[name].grad = one
            optimizer.step()
        different = [*differing_weights(model, masters, whole), *differing_states(update, optimizer, whole)]
        way = "fused, " if fused else ""
        words = f"differ: {', '.join(different)}" if different else "masters and states bit-identical after 3 steps"
        yield Line(f"AdamW8bit on float32 views ({way}slices)", words, "FAIL" if different else "pass")


def drawn(shape: Sequence[int], seed: int, bench: Bench) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 0.02).to(bench.device)


def differing_weights(model: nn.ParameterDict, masters: MasterWeights, whole: nn.ParameterDict) -> list[str]:
    return [name for name, one in model.items() if not torch.equal(masters.value(one), whole[name])]


def differing_states(update: ExactUpdate, optimizer: torch.optim.Optimizer, whole: nn.ParameterDict) -> list[str]:
    """Names of states that are not those of the slices, one after the other."""
    slices: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for name, buffer in update.optimizer_groups[0].parameters.items():
        slices[name.partition("#")[0]].append(update.optimizer.state[buffer])
    return [
        f"{name} {key}"
        for name, parameter in whole.items()
        for key, value in optimizer.state[parameter].items()
        if key.startswith(("state", "absmax"))
        and not torch.equal(torch.cat([one[key].flatten() for one in slices[name]]), value.flatten())
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
    """Checks that a bf16 model that `change` has changed stays as close to float32 as an unchanged one."""
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
    program = str(ROOT / "tests" / "runtime" / "each_rank.py")
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
    """Returns the command-line options that give this config."""
    path = config.output_dir / "ranks.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_toml(config), encoding="utf-8")
    return ["--config", str(path)]


def spoken(command: Sequence[str], *, cpu: bool) -> str:
    """Returns the output of a Python program. Raises with its last line if it fails."""
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
        steps = training_steps(run.learner, run.batches(), StopRequest())
        for _ in range(2):
            run.log.record(next(steps))
        with guard():
            for step in steps:
                run.log.record(step)
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


def check_average(bench: Bench) -> Iterator[Line]:
    """The moving average that is kept in host memory, against that on the device: saved files hold it."""
    options = [*BF16, "--save_precision", "float", "--ema_decay", "0.5"]
    with deterministic(bench):
        runs = [trained(bench, "average", options, steps=3) for _ in range(2)]
        on_cpu = trained(bench, "average", [*options, "--ema_on_cpu"], steps=3)
    again, away = (farthest(runs[0], other) for other in (runs[1], on_cpu))
    words = f"up to {away:.1e} from that on the device, where two runs differ by up to {again:.1e}"
    yield Line("moving average in host memory", words, "pass" if away <= 2 * again else "FAIL")


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


def reason(error: BaseException) -> str:
    """An exception in one line, with the deepest place in this repository that it passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if ".venv" not in frame.filename]
    places = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT)]
    at = f" ({Path(places[-1].filename).name}:{places[-1].lineno})" if places else ""
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0] if words else ''}{at}"
