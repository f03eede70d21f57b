"""Checks of scripts/benchmarks/gpu_acceptance.py that train and compare. Each check yields lines of its report."""

import importlib.util
import re
import shutil
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
from scripts.benchmarks.running import run_python
from sdxl_finetune.batch import Tokens
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
"""Step, hash of the weights, loss and gradient norm, as tests/runtime/each_rank.py prints them."""


@dataclass(frozen=True)
class Line:
    """One line of the report."""

    name: str
    measured: str
    outcome: Literal["pass", "FAIL", "not run"]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Place and size of the checks."""

    folder: Path
    """Contains the images `pictures` and the bf16 model `start.safetensors`, made from tests/toy."""
    cuda: bool
    quick: bool = False
    """True in tests: the checks make as few steps as possible."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.cuda else "cpu")

    @property
    def backend(self) -> str:
        return "aot_eager" if self.quick else "inductor"

    def build_config(self, *more: str, steps: int, out: str = "out") -> Config:
        """Builds a config that trains the small model with both text encoders. `more` are further options."""
        options = ["--pretrained_model_name_or_path", str(self.folder / "start.safetensors")]
        options += ["--train_data_dir", str(self.folder / "pictures"), "--output_dir", str(self.folder / out)]
        options += ["--output_name", "model", "--resolution", "64", "--caption_extension", ".txt", "--cache_latents"]
        options += ["--max_train_steps", str(steps), "--train_batch_size", "4", "--train_text_encoder", "--seed", "1"]
        options += ["--learning_rate", "3e-5", "--console_log_level", "WARNING", "--max_data_loader_n_workers", "0"]
        config = load_config([*options, *more], program="sdxl-train")
        assert config is not None
        return config


def check_trajectory(bench: Bench) -> Iterator[Line]:
    """Compares the change of the weights in bf16, with and without exact masters, with that in float32."""
    steps = 3 if bench.quick else 100 if bench.cuda else 10
    with exact_float32():  # runs first, because a bf16 run turns TF32 on
        exact = change_of_weights(bench, "float32", steps)
    errors = {}
    for name in ("masters", "rounded"):
        change = change_of_weights(bench, name, steps)
        errors[name] = {part: float((change[part] - exact[part]).norm() / exact[part].norm()) for part in exact}
    shown = {name: ", ".join(f"{part} {error:.3f}" for part, error in row.items()) for name, row in errors.items()}
    holds = all(error < 0.25 and error < 0.5 * errors["rounded"][part] for part, error in errors["masters"].items())
    measured = f"after {steps} steps: {shown['masters']}; with exact_masters = false: {shown['rounded']}"
    yield Line("error of full_bf16's change against float32", measured, "pass" if holds else "FAIL")


def change_of_weights(bench: Bench, scheme: str, steps: int) -> dict[str, Tensor]:
    """Returns the change of the weights of each part after `steps` steps."""
    weights, _ = precision.train(bench.folder, precision.SCHEMES[scheme], [steps])
    return {part: weights[steps][part] - start for part, start in weights[0].items()}


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within the context, float32 matrix products on a GPU are not rounded to TF32."""
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
    """Compares AdamW8bit on slices of exact masters with AdamW8bit on whole float32 parameters."""
    shapes = {"matrix": (SLICE // 1024 * 2 + 500, 1024), "kernel": (64, 64, 3, 3), "norm": (1280,)}
    for fused in (False, True):
        options = {"optimizer_type": "AdamW8bit", "full_bf16": True, "mixed_precision": "bf16", "max_grad_norm": 0.0}
        config = Config(**options, learning_rate=1e-4, fused_backward_pass=fused)
        accelerator = build_accelerator(config)
        start = {name: random_values(shape, seed, bench) for seed, (name, shape) in enumerate(shapes.items())}
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
            gradients = {
                name: random_values(shape, 10 + step, bench).bfloat16().float() for name, shape in shapes.items()
            }
            with update.accumulate(last=True, only=True):
                torch.stack(
                    [(model[name].float() * gradient).sum() for name, gradient in gradients.items()]
                ).sum().backward()
            update.step()
            for name, gradient in gradients.items():
                whole[name].grad = gradient
            optimizer.step()
        different = [*differing_weights(model, masters, whole), *differing_states(update, optimizer, whole)]
        fused_word = "fused, " if fused else ""
        measured = f"differ: {', '.join(different)}" if different else "masters and states bit-identical after 3 steps"
        yield Line(f"AdamW8bit on float32 views ({fused_word}slices)", measured, "FAIL" if different else "pass")


def random_values(shape: Sequence[int], seed: int, bench: Bench) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 0.02).to(bench.device)


def differing_weights(model: nn.ParameterDict, masters: MasterWeights, whole: nn.ParameterDict) -> list[str]:
    return [name for name, parameter in model.items() if not torch.equal(masters.value(parameter), whole[name])]


def differing_states(update: ExactUpdate, optimizer: torch.optim.Optimizer, whole: nn.ParameterDict) -> list[str]:
    """Returns the names of optimizer states that differ from the joined states of the slices."""
    slices: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for name, buffer in update.optimizer_groups[0].parameters.items():
        slices[name.partition("#")[0]].append(update.optimizer.state[buffer])
    return [
        f"{name} {key}"
        for name, parameter in whole.items()
        for key, value in optimizer.state[parameter].items()
        if key.startswith(("state", "absmax"))
        and not torch.equal(torch.cat([state[key].flatten() for state in slices[name]]), value.flatten())
    ]


def check_attention(bench: Bench) -> Iterator[Line]:
    """Compares xformers' attention with torch's."""
    name = "xformers against SDPA"
    if not bench.cuda:
        yield Line(name, "needs CUDA", "not run")
    elif importlib.util.find_spec("xformers") is None:
        yield Line(name, "xformers is not installed: .venv/bin/pip install xformers", "not run")
    else:
        yield against_float32(bench, name, lambda model: use_attention(model, "xformers") == "xformers")


def check_compiled(bench: Bench) -> Iterator[Line]:
    """Compares compiled transformer blocks with uncompiled blocks."""

    def compiled(model: SDXL) -> bool:
        compile_blocks(model, bench.backend)
        return True

    yield against_float32(bench, f"compiled blocks ({bench.backend}) against eager ones", compiled)


def against_float32(bench: Bench, name: str, change: Callable[[SDXL], bool]) -> Line:
    """Compares a bf16 model that `change` has changed, and an unchanged one, with a float32 model.

    The check passes if prediction and gradient of the changed model are about as close to float32 as those of the
    unchanged model.
    """
    with exact_float32():
        exact = predict(bench, torch.float32, lambda _: True)
    unchanged, changed = (predict(bench, torch.bfloat16, apply) for apply in (lambda _: True, change))
    errors = [
        tuple(float((value - exact_value).norm() / exact_value.norm()) for value in values)
        for *values, exact_value in zip(changed, unchanged, exact, strict=True)
    ]
    measured = "; ".join(
        f"{what} {error:.2e} (unchanged {usual:.2e})"
        for what, (error, usual) in zip(("prediction", "gradient"), errors, strict=True)
    )
    holds = all(error <= 1.5 * usual + 1e-3 for error, usual in errors)
    return Line(name, f"error in bf16 against float32: {measured}", "pass" if holds else "FAIL")


def predict(bench: Bench, dtype: torch.dtype, change: Callable[[SDXL], bool]) -> tuple[Tensor, Tensor]:
    """Returns the prediction for two random images, and the gradient of all parameters as one vector."""
    model = load_checkpoint(bench.folder / "start.safetensors", dtype=dtype).model.to(bench.device).train()
    assert change(model), "the change was not possible: see the warning above"
    generator = torch.Generator().manual_seed(0)
    side = 16 if bench.quick else 32
    latents = torch.randn(2, 4, side, side, generator=generator)
    ids = torch.randint(0, 49406, (2, 1, 77), generator=generator)
    ids[:, :, 0], ids[:, :, 20:] = 49406, 49407
    sizes = torch.full((2, 2), 8 * side)
    noisy, timesteps, tokens, size, corner = (
        tensor.to(bench.device) for tensor in (latents, torch.tensor([100, 700]), ids, sizes, torch.zeros_like(sizes))
    )
    prediction = model(noisy, timesteps, Tokens(tokens, tokens), size, corner, size)
    prediction.square().mean().backward()
    gradients = [parameter.grad.float().flatten() for parameter in model.parameters() if parameter.grad is not None]
    return prediction.detach().float(), torch.cat(gradients)


def check_ranks(bench: Bench) -> Iterator[Line]:
    """Checks that two processes have equal weights, and train like one process with twice the batch size."""
    name = f"two ranks over {'NCCL' if bench.cuda else 'gloo (NCCL was not run)'}"
    if bench.cuda and torch.cuda.device_count() < 2:
        yield Line(name, "needs two GPUs", "not run")
        return
    options = write_config(bench.build_config(*BF16, "--fused_backward_pass", "--max_grad_norm", "0", steps=2))
    program = str(ROOT / "tests" / "runtime" / "each_rank.py")
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    output_of_two = run_python([*launch, program, *options, "--train_batch_size", "2"], cpu=not bench.cuda)
    digests_of_one = DIGEST.findall(run_python([program, *options], cpu=not bench.cuda))
    digests = defaultdict(list)
    for step, *values in DIGEST.findall(output_of_two):
        digests[step].append(values)
    same = all(len(values) == 2 and values[0] == values[1] for values in digests.values())
    pairs = [(digests[step][0][1:], expected) for step, _, *expected in digests_of_one if step in digests]
    errors = [max(abs(float(a[i]) / float(b[i]) - 1) for a, b in pairs) for i in range(2)] if pairs else [1.0, 1.0]
    holds = same and len(digests_of_one) == len(digests) == 2 and errors[0] < 1e-2 and errors[1] < 5e-2
    words = f"weights of both {'bit-identical' if same else 'DIFFER'} after each of {len(digests)} steps; against one "
    yield Line(name, f"{words}process: loss {errors[0]:.1e}, norm {errors[1]:.1e} away", "pass" if holds else "FAIL")


def write_config(config: Config) -> list[str]:
    """Writes the config to a file, and returns the command-line options that load it."""
    path = config.output_dir / "ranks.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_toml(config), encoding="utf-8")
    return ["--config", str(path)]


def check_waiting(bench: Bench) -> Iterator[Line]:
    """Checks that no step waits for the device, as far as torch notices.

    The steps use torch's AdamW: torch would not notice if bitsandbytes waited.
    """
    ways = {"float32 weights": ["--mixed_precision", "bf16"], "full_bf16": BF16}
    for way, more in {**ways, "full_bf16, fused": [*BF16, "--fused_backward_pass"]}.items():
        name = f"no waiting for the device within a step ({way})"
        if not bench.cuda:
            yield Line(name, "needs CUDA", "not run")
            continue
        try:
            made = guarded_steps(bench.build_config(*more, steps=12), errors_on_waiting)
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            yield Line(name, f"raised {reason(error)}", "FAIL")
            traceback.print_exc()
        else:
            yield Line(name, f"{made} steps and their log under set_sync_debug_mode('error')", "pass")
        AcceleratorState._reset_state(reset_partial_state=True)


def guarded_steps(config: Config, guard: Callable[[], AbstractContextManager[None]]) -> int:
    """Makes and logs the steps of a run within `guard`, after two warm-up steps. Returns their number."""
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
    """Within the context, torch raises an error if the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_resume(bench: Bench) -> Iterator[Line]:
    """Compares a run of six steps with a run that resumes from the state after three steps."""
    half = 1 if bench.quick else 3
    options = [*BF16, "--optimizer_type", "AdamW8bit", "--fused_backward_pass", "--gradient_checkpointing"]
    options += ["--save_every_n_steps", str(half), "--save_state", "--save_precision", "float"]
    with deterministic(bench):
        whole = train_model(bench, "whole", options, steps=2 * half)
        (state,) = (bench.folder / "whole").glob(f"*step{half:08d}-state")
        again = train_model(bench, "again", options, steps=2 * half) if bench.cuda else whole
        resumed = train_model(bench, "resumed", [*options, "--resume", str(state)], steps=2 * half)
    if difference := largest_difference(whole, again):
        measured = f"two undisturbed runs differ by up to {difference:.1e}, so that this device shows nothing"
        yield Line("resume equality", measured, "not run")
        return
    difference = largest_difference(whole, resumed)
    result = f"weights differ by up to {difference:.1e}" if difference else "weights bit-identical"
    measured = f"{2 * half} steps against {half} and {half}: {result}"
    yield Line("resume equality", measured, "FAIL" if difference else "pass")


def check_average(bench: Bench) -> Iterator[Line]:
    """Compares the EMA that is kept in host memory with the EMA on the device, in the saved checkpoints."""
    options = [*BF16, "--save_precision", "float", "--ema_decay", "0.5"]
    with deterministic(bench):
        runs = [train_model(bench, "average", options, steps=3) for _ in range(2)]
        on_cpu = train_model(bench, "average", [*options, "--ema_on_cpu"], steps=3)
    repeated, difference = (largest_difference(runs[0], other) for other in (runs[1], on_cpu))
    measured = f"up to {difference:.1e} from that on the device, where two runs differ by up to {repeated:.1e}"
    yield Line("moving average in host memory", measured, "pass" if difference <= 2 * repeated else "FAIL")


def train_model(bench: Bench, out: str, options: Sequence[str], *, steps: int) -> dict[str, Tensor]:
    """Trains into the empty folder `out`, and returns the tensors of the final checkpoint."""
    shutil.rmtree(bench.folder / out, ignore_errors=True)
    assert train(bench.build_config(*options, steps=steps, out=out)) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return load_file(bench.folder / out / "model.safetensors")


def largest_difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Returns the largest difference of two checkpoints' values. It is 0 only if all tensors are equal."""
    assert first.keys() == second.keys()
    tiny = sys.float_info.min  # the result for tensors that differ only by NaN, whose difference is not a number
    return max(
        0.0 if torch.equal(value, second[name]) else max(tiny, float((value - second[name]).abs().max()))
        for name, value in first.items()
    )


@contextmanager
def deterministic(bench: Bench) -> Iterator[None]:
    """Within the context, CUDA adds in the same order every time, where torch supports it."""
    torch.use_deterministic_algorithms(bench.cuda, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def reason(error: BaseException) -> str:
    """Returns an exception in one line, with the innermost place in this repository that it passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if ".venv" not in frame.filename]
    places = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT)]
    place = f" ({Path(places[-1].filename).name}:{places[-1].lineno})" if places else ""
    message = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {message}{place}"
