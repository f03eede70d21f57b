"""What sdxl-check says of memory is what a step then takes."""

import time
from pathlib import Path

import pytest
import torch

from scripts.benchmarks.memory import GRID, build_config, compare
from sdxl_finetune.commands.allocations import Allocations
from sdxl_finetune.commands.fake_learner import Modules, build_fake_learner
from sdxl_finetune.commands.memory_estimate import (
    BatchShape,
    Known,
    estimate,
    estimate_caches,
    estimate_previews,
)
from sdxl_finetune.commands.memory_report import Estimator, GiB, Workload, fits, on_cuda
from sdxl_finetune.config import Config
from sdxl_finetune.model.architecture import FULL
from sdxl_finetune.model.random_model import TINY, build_random_model

NEEDS = {"train_text_encoder": True, "cache_latents": True, "learning_rate": 1e-5}
LEAST = {
    "full_bf16": True,
    "mixed_precision": "bf16",
    "optimizer_type": "AdamW8bit",
    "fused_backward_pass": True,
    "gradient_checkpointing": True,
}


@pytest.mark.parametrize(
    "name", ["float32 AdamW", "float32 activations", "float32 activations checkpointing", "bf16 AdamW8bit fused"]
)
def test_what_the_allocator_gives_out(name: str, tmp_path: Path) -> None:
    foretold, measured = compare(build_config(tmp_path, *GRID[name]))
    assert foretold == pytest.approx(measured, rel=0.1)


def test_the_full_size() -> None:
    """20.0 GiB of private memory was the peak of a process that trained SDXL, U-Net and both encoders, with these
    settings on a CPU: tensors, and what Python and the libraries take besides. Nothing of that size is allocated here.
    """
    started = time.process_time()
    found = estimate(Config(**NEEDS, **LEAST), FULL, BatchShape(1, 128, 128), cuda=False)
    assert found.total == pytest.approx(20.0 * GiB, rel=0.1)
    parameters = 2_567_463_684 + 115_561_728 + 694_659_840
    kept = found.parts["weights"] + found.parts["masters"] + found.parts["optimizer states"]
    assert kept / parameters == pytest.approx(6.03, rel=0.01)
    assert time.process_time() - started < 60


def test_settings_save_what_they_promise() -> None:
    shape, usual = BatchShape(2, 256, 256), Config(**NEEDS)
    most = estimate(usual, TINY, shape, cuda=True)
    parameters = most.parts["weights"] // 4
    states = most.parts["optimizer states"] / 2
    assert most.parts["weights"] == pytest.approx(states, rel=0.01)
    less = estimate(usual.model_copy(update=LEAST), TINY, shape, cuda=True)
    for part in ("weights", "masters"):
        assert less.parts[part] == pytest.approx(2 * parameters, rel=0.01)
    assert less.total < 0.7 * most.total
    kept = estimate(usual.model_copy(update={"gradient_checkpointing": True}), TINY, BatchShape(8, 256, 256), cuda=True)
    assert kept.total < estimate(usual, TINY, BatchShape(8, 256, 256), cuda=True).total


def test_the_smallest_full_size_step_is_not_hidden_by_the_building_of_the_model() -> None:
    """U-Net alone, Adafactor inside the backward pass, no masters: 4.78 GiB of U-Net and 1.51 of encoders in bf16, the
    factored states (0.9, of which most are for the few tensors that are not factored), and about 1 GiB of activations.
    """
    options = LEAST | {"optimizer_type": "Adafactor", "exact_masters": False}
    options |= {"cache_latents": True, "learning_rate": 1e-5}
    known = Known()
    shape = BatchShape(1, 1024, 1024)
    found = estimate(Config(**options), FULL, shape, cuda=True, known=known)
    assert found.parts["weights"] == pytest.approx(6.29 * GiB, rel=0.01)
    assert 7 * GiB < found.total < 9.5 * GiB and found.phase == "backward pass"
    assert on_cuda([found]) < 10.5 * GiB
    cached = estimate(Config(**options, cache_text_encoder_outputs=True), FULL, shape, cuda=True, known=known)
    assert found.total - cached.total == pytest.approx(1.51 * GiB, rel=0.02)
    started = time.process_time()
    with_masters = Config(**options | {"exact_masters": True})
    assert estimate(with_masters, FULL, shape, cuda=True, known=known).parts["masters"] == pytest.approx(
        2 * 2_567_463_684, rel=0.001
    )
    assert time.process_time() - started < 15 and len(known.passes) == 2  # the pass was not computed again


def test_caches_and_previews_are_phases_of_their_own() -> None:
    """Encoding happens before the model is on the device, and a preview only adds the VAE to what stays there."""
    config = Config(cache_latents=True, cache_text_encoder_outputs=True, learning_rate=1e-5, vae_batch_size=2)
    images, captions = estimate_caches(config, TINY, BatchShape(1, 256, 256))
    assert images.phase == "encoding of images" and set(images.parts) == {"VAE", "activations"}
    assert captions.phase == "encoding of captions" and set(captions.parts) == {"weights", "activations"}
    doubled = config.model_copy(update={"vae_batch_size": 4})
    more = estimate_caches(doubled, TINY, BatchShape(1, 256, 256))[0]
    assert more.parts["activations"] == pytest.approx(2 * images.parts["activations"], rel=0.01)
    step = estimate(config, TINY, BatchShape(1, 64, 64), cuda=True)
    preview = estimate_previews(TINY, step, 256, 256)
    assert preview.total - sum(preview.parts[part] for part in ("VAE", "activations")) == sum(step.kept.values())
    assert "gradients" in step.parts and "gradients" not in preview.parts


def estimator() -> Estimator:
    shape = BatchShape(2, 256, 256)
    return Estimator(TINY, Workload(batch=shape, bucket=BatchShape(1, 64, 64)))


def test_cached_text_encoder_outputs_take_the_encoders_off_a_gpu() -> None:
    shape, plain = BatchShape(1, 64, 64), Config(cache_latents=True, learning_rate=1e-5)
    cached = plain.model_copy(update={"cache_text_encoder_outputs": True})
    model = build_random_model(TINY, seed=0)[0]
    encoders = 4 * sum(parameter.numel() for part in (model.te1, model.te2) for parameter in part.parameters())
    saved = {
        cuda: estimate(plain, TINY, shape, cuda=cuda).parts["weights"]
        - estimate(cached, TINY, shape, cuda=cuda).parts["weights"]
        for cuda in (True, False)
    }
    assert saved[True] == pytest.approx(encoders, rel=0.01) and saved[False] == 0, "a CPU run keeps them in its memory"


def test_a_card_that_is_too_small_is_told_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    config, estimates = Config(**NEEDS, train_batch_size=2, text_encoder_batch_size=1), estimator()
    monkeypatch.setattr("sdxl_finetune.commands.memory_report.CARDS", (0.001, 0.35, 80))
    monkeypatch.setattr("sdxl_finetune.commands.memory_report.ALLOWANCE", (0, 0.05))
    said = list(fits(config, estimates, estimates.phases(config)))
    assert said[0] == "fits a card of 80 GB"
    assert said[1].startswith('does not fit 0.35 GB; would with optimizer_type = "AdamW8bit"')
    assert said[2].startswith("does not fit 0.001 GB, nor with")
    remedies = "gradient_checkpointing = true", "train_text_encoder = false", "cache_text_encoder_outputs = true"
    for remedy in (*remedies, "Adafactor", "train_batch_size = 1"):
        assert remedy in said[2]
    assert "AdamW8bit" not in said[2], "a later optimizer replaces it"
    assert said[2].endswith("GiB") and "train_text_encoder = false: only the U-Net is trained" in said


def test_a_remedy_that_does_not_help_is_not_suggested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without full_bf16 there are no masters to leave out, and fp16 cannot be combined with full_bf16."""
    estimates = Estimator(TINY, Workload(batch=BatchShape(8, 512, 512), bucket=BatchShape(1, 64, 64)))
    options = {"cache_latents": True, "learning_rate": 1e-5, "optimizer_type": "Adafactor", "mixed_precision": "fp16"}
    config = Config(**options, train_batch_size=8, gradient_checkpointing=True)
    monkeypatch.setattr("sdxl_finetune.commands.memory_report.CARDS", (0.001,))
    (said, *_) = fits(config, estimates, estimates.phases(config))
    assert "train_batch_size = 1" in said
    assert "exact_masters" not in said and "full_bf16" not in said


def test_a_result_that_shares_the_storage_of_an_argument_counts_once() -> None:
    with Allocations(count_scratch=False) as allocations:
        tensor = torch.zeros(256, 256)
        for _ in range(3):  # the second and third are made from the first
            shared = torch.ops.aten._unsafe_view(tensor, [65536])
            copied = tensor + 1
            assert shared.untyped_storage() is tensor.untyped_storage()
        alive, _ = allocations.peak()
    assert copied.shape == (256, 256)
    # The new copy is made before the old one is let go.
    assert sum(alive.values()) == 3 * tensor.nbytes


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_keeps_no_scores(autocast: bool) -> None:
    """Four times the positions take four times the memory, and not sixteen times."""
    config = Config(**NEEDS, mixed_precision="bf16" if autocast else "no", optimizer_type="AdamW8bit")
    config = config.model_copy(update={"train_text_encoder": False, "fused_backward_pass": True})
    small, large = (estimate(config, TINY, BatchShape(1, side, side), cuda=False).total for side in (512, 1024))
    assert small < large < 5 * small


def test_repeated_operations_give_what_the_first_one_gave() -> None:
    """The second result has the same attributes, or is the very argument that was written to."""
    with Allocations(count_scratch=False):
        weight, step = torch.zeros(3, 4), torch.zeros(3, 4)
        first, second = weight + 1, weight + 1
        assert type(first) is type(second) and vars(first) == vars(second)
        assert (first.shape, first.stride(), first.device) == (second.shape, second.stride(), second.device)
        for _ in range(2):
            assert weight.mul_(0.5) is weight
            assert torch.add(weight, step, out=first) is first
            assert torch._foreach_add_([weight], [step])[0] is weight
            changed = torch.zeros(3, 4)
            assert changed.t_() is changed and changed.shape == (4, 3)


def test_modules_of_an_estimate_are_copies() -> None:
    modules, config = Modules(TINY), Config(**NEEDS, gradient_checkpointing=True, cache_text_encoder_outputs=True)
    before = modules.sdxl()
    with Allocations(count_scratch=False) as allocations:
        build_fake_learner(config, modules, allocations, cuda=True)
    after = modules.sdxl()
    assert after.masters is not before.masters
    for part in (before, after):
        assert {parameter.device.type for parameter in part.parameters()} == {"meta"}
        assert "te1" in dict(part.named_children())
        assert not any(getattr(module, "gradient_checkpointing", False) for module in part.modules())
        assert not any(module._forward_pre_hooks for module in part.modules())
