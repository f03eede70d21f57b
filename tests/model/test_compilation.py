"""Compiled blocks give the same predictions and gradients, need few graphs for all shapes, and keep their names."""

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from sdxl_finetune.batch import Tokens
from sdxl_finetune.config import load_config
from sdxl_finetune.errors import UserError
from sdxl_finetune.model.attention import enable_gradient_checkpointing
from sdxl_finetune.model.compilation import check_compiler, compile_blocks, compiler_failures
from sdxl_finetune.model.random_model import TINY, build_random_model
from sdxl_finetune.model.sdxl import SDXL, evaluating
from sdxl_finetune.training.loop import train
from sdxl_finetune.training.setup import build_run

SHAPES = [(2, 8, 8), (2, 16, 8), (3, 8, 24), (2, 16, 16), (4, 24, 8), (2, 8, 32), (2, 12, 20), (3, 24, 12), (2, 20, 8)]
"""Images, height and width of latents. They are more shapes than the 8 graphs after which torch stops compiling."""
WIDTHS = 2
"""Number of different widths of the transformer blocks, in the tiny model and in SDXL."""
CPU = torch.device("cpu")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch's own modules, when they are imported
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # dynamo looks, and silences it
    pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a compiler"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def tokens(images: int) -> Tensor:
    ids = torch.full((images, 1, 77), 49407)
    ids[:, :, 0] = 49406
    return ids


def learn(model: SDXL, shape: tuple[int, int, int], *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns the prediction and the gradients of all weights."""
    images, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(images, 4, height, width, generator=generator)
    timesteps = torch.randint(0, 1000, (images,), generator=generator)
    sizes = torch.zeros(images, 2, dtype=torch.int64)
    model.zero_grad()
    prediction = model(latents, timesteps, Tokens(tokens(images), tokens(images)), sizes, sizes, sizes)
    prediction.square().mean().backward()
    gradients = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    return prediction.detach(), torch.cat(gradients)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def assert_the_same(plain: SDXL, compiled: SDXL, shapes: Sequence[tuple[int, int, int]]) -> None:
    for seed, shape in enumerate(shapes):
        for actual, expected in zip(learn(compiled, shape, seed=seed), learn(plain, shape, seed=seed), strict=True):
            assert (actual - expected).norm() < 1e-5 * expected.norm(), shape


def test_all_shapes_give_the_same_gradients_with_one_graph_per_width() -> None:
    plain = build_random_model(TINY, seed=0)[0].train()
    names = list(plain.state_dict())
    compiled = copy.deepcopy(plain)
    enable_gradient_checkpointing(compiled)
    compile_blocks(compiled, "aot_eager")
    assert list(compiled.state_dict()) == names and [name for name, _ in compiled.named_parameters()] == names
    assert_the_same(plain, compiled, SHAPES)
    assert graphs() == WIDTHS
    assert_the_same(plain, compiled, [(1, 8, 8), (1, 16, 8)])
    assert graphs() == 2 * WIDTHS  # torch compiles another graph for a single image
    with torch.no_grad(), evaluating(compiled):
        for images in (1, 2):
            sizes = torch.zeros(images, 2, dtype=torch.int64)
            inputs = torch.zeros(images, 4, 8, 8), torch.full((images,), 7), Tokens(tokens(images), tokens(images))
            compiled(*inputs, sizes, sizes, sizes)
    assert graphs() == 4 * WIDTHS and not torch._dynamo.utils.counters["graph_break"]


def test_inductor_gives_the_same_gradients() -> None:
    check_compiler("inductor", CPU)
    plain = build_random_model(TINY, seed=0)[0].train()
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled, "inductor")
    before = graphs()
    assert_the_same(plain, compiled, SHAPES[:3])
    assert graphs() == before + WIDTHS


@pytest.mark.parametrize("exact", [[], ["--mixed_precision", "bf16", "--full_bf16", "--fused_backward_pass"]])
def test_a_compiled_run_saves_the_same_weights(work: Path, exact: list[str]) -> None:
    start, plain = load_file("base.safetensors"), saved("plain", *exact)
    compiled = saved("compiled", *exact, "--torch_compile", "--dynamo_backend", "aot_eager")
    assert graphs() > 0 and plain.keys() == compiled.keys()
    change, error = (
        torch.cat([(left[name].float() - right[name].float()).flatten() for name in start]).norm()
        for left, right in ((plain, start), (compiled, plain))
    )
    assert error < (5e-2 if exact else 1e-4) * change


def saved(out: str, *more: str) -> dict[str, Tensor]:
    """Trains two steps and returns the saved weights."""
    assert train(configured(out, *more)) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return load_file(f"{out}/last.safetensors")


def configured(out: str, *more: str):
    options = ["--pretrained_model_name_or_path", "base.safetensors", "--train_data_dir", "images", "--output_dir", out]
    options += ["--resolution", "64", "--train_batch_size", "2", "--max_train_steps", "2", "--cache_latents"]
    options += ["--optimizer_type", "SGD", "--learning_rate", "1e-2", "--train_text_encoder", "--seed", "1"]
    options += ["--max_data_loader_n_workers", "0", "--gradient_checkpointing", "--save_precision", "float"]
    config = load_config([*options, *more], program="sdxl-train")
    assert config is not None
    return config


def test_compiler_failures_become_one_line_errors(work: Path) -> None:
    """An unknown backend fails before the model is read. A failure during a step shows its first line."""
    with (
        pytest.raises(
            UserError, match=r"^torch_compile = True: the backend tvm does not work here \(.+\): remove torch_compile"
        ),
        build_run(configured("out", "--torch_compile", "--dynamo_backend", "tvm")),
    ):
        pass
    broken = torch.compile(torch.relu, backend="relu_compile_error_TESTING_ONLY")
    with pytest.raises(UserError) as caught, compiler_failures("inductor"):
        broken(torch.ones(2))
    assert "\n" not in str(caught.value) and "ReluCompileError" in str(caught.value)
    with pytest.raises(ValueError, match="ours"), compiler_failures("inductor"):
        raise ValueError("ours")
