"""Runs with frozen parameters: these stay as they are to the bit, and cost no gradient and no optimizer state."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import Parameter

from sdxl_finetune.commands.check import check
from sdxl_finetune.errors import UserError
from sdxl_finetune.optim.freezing import unet_blocks
from sdxl_finetune.runtime.signals import StopRequest
from sdxl_finetune.training.loop import training_steps
from sdxl_finetune.training.setup import build_run
from tests.training.toy_runs import OPTIONS, config, losses, read_rows, run, train_on_two_processes, use_toy

UNET, TE1 = "model.diffusion_model.", "conditioner.embedders.0.transformer."
FAST = ["--learning_rate", "1e-3", "--max_train_steps", "3", "--save_precision", "float"]
FROZEN = ["--freeze_unet_blocks", "0,3", "--freeze_parameters", "*.attn2.to_k.*, out.*, text_encoder1.embeddings.*"]
BF16 = ["--mixed_precision", "bf16", "--full_bf16"]


@pytest.fixture
def work(work) -> Path:
    use_toy(work)
    return work


def is_frozen(key: str) -> bool:
    """True for keys of a checkpoint that FROZEN freezes, and for the VAE."""
    short = key.removeprefix(UNET)
    if key.startswith(UNET):
        start = ("time_embed.", "label_emb.", "input_blocks.2.", "out.")
        return short.startswith(start) or ".attn2.to_k." in short
    return not key.startswith("conditioner.") or key.startswith(f"{TE1}text_model.embeddings.")


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {key for key in before if not torch.equal(before[key].float(), after[key].float())}


@pytest.mark.parametrize(
    "more",
    [
        ["--train_text_encoder", "--gradient_checkpointing"],
        ["--train_text_encoder", *BF16],
        ["--train_text_encoder", *BF16, "--fused_backward_pass", "--learning_rate_te2", "0"],
        ["--optimizer_type", "Adafactor", "--optimizer_args", "relative_step=False", "scale_parameter=False"],
        ["--optimizer_type", "Prodigy", "--learning_rate", "1", *BF16],
    ],
    ids=["float32", "exact masters", "fused exact masters", "Adafactor", "Prodigy with exact masters"],
)  # fmt: skip
def test_frozen_parameters_are_bit_identical_and_all_others_have_moved(work, more) -> None:
    run(*FAST, *FROZEN, *more)
    before, after = load_file("base.safetensors"), load_file("out/last.safetensors")
    changed = moved(before, after)
    assert changed and not [key for key in changed if is_frozen(key)]
    left = {key for key in before if not is_frozen(key) and key not in changed}
    parts = [TE1, "conditioner.embedders.1."] if "--train_text_encoder" not in more else []
    parts += ["conditioner.embedders.1."] if "--learning_rate_te2" in more else []
    # Parts without training; tensors that SDXL never uses; keys of attention, whose biases have no gradient (softmax)
    unused = re.compile(r"final_layer_norm|layers\.1\.|logit_scale|k_proj\.bias|embeddings|embedding$")
    assert not [key for key in left if not key.startswith(tuple(parts)) and not unused.search(key)]


def test_block_lr_freezing_and_patterns_to_train_work_together(work) -> None:
    unet = {key: Parameter(value) for key, value in load_file("base.safetensors").items() if key.startswith(UNET)}
    blocks = len(unet_blocks(unet))
    rates = ",".join(["1e-3"] * blocks)
    run(*FAST, "--block_lr", rates, "--train_parameters", "*.attn*.*", "--freeze_unet_blocks", "3", *BF16)
    changed = moved(load_file("base.safetensors"), load_file("out/last.safetensors"))
    expected = {
        key for key in load_file("base.safetensors")
        if key.startswith(UNET) and ".attn" in key and not key.startswith(f"{UNET}input_blocks.2.")
    }  # fmt: skip
    assert changed == expected


def test_frozen_parameters_have_no_gradient_and_no_optimizer_state(work) -> None:
    with build_run(config(*FAST, *FROZEN, "--train_text_encoder")) as built:
        learner, stop = built.learner, StopRequest()
        for _ in training_steps(learner, built.batches(), stop):
            pass
        trained = {parameter for _, parameter in learner.parameters.named()}
        parameters = [one for part in learner.sdxl.parameters_by_part().values() for one in part.values()]
        frozen = [parameter for parameter in parameters if parameter not in trained]
        assert frozen and all(one.grad is None and not one.requires_grad for one in frozen)
        assert set(learner.update.optimizer.state) == trained
        held = {one for group in learner.update.optimizer.param_groups for one in group["params"]}
        assert held == trained


def test_two_processes_train_the_same_parameters_as_one(work) -> None:
    options = [*FAST, *FROZEN, "--train_text_encoder"]
    one = losses(run(*options))
    train_on_two_processes([*OPTIONS, *options, "--train_batch_size", "1", "--logging_dir", "logs2"])
    assert losses(read_rows("logs2")) == pytest.approx(one, rel=1e-3)
    changed = moved(load_file("base.safetensors"), load_file("out/last.safetensors"))
    assert changed and not [key for key in changed if is_frozen(key)]


@pytest.mark.parametrize("more", [["--ema_decay", "0.9"], [*BF16, "--fused_backward_pass"]], ids=["EMA", "masters"])
def test_a_resumed_run_ends_the_same_and_may_freeze_others(work, caplog, more) -> None:
    caplog.set_level("INFO")
    options = [*FAST, *more, "--save_state", "--save_every_n_steps", "2", "--max_train_steps", "4"]
    run(*options, *FROZEN)
    whole = load_file("out/last.safetensors")
    state = ["--resume", "out/at-step00000002-state"]
    run(*options, *FROZEN, *state)
    assert not moved(whole, load_file("out/last.safetensors"))
    assert "optimizer state is left out" not in caplog.text and "which starts anew" not in caplog.text
    others = ["--freeze_unet_blocks", "1", "--no-ema_save"] if "--ema_decay" in more else ["--freeze_unet_blocks", "1"]
    run(*options, *others, *state)
    assert "frozen now, so their saved optimizer state is left out: 2 parameters, for example unet." in caplog.text
    assert re.search(r"without saved optimizer state, which starts anew: \d+ parameters", caplog.text)
    assert "freeze_unet_blocks 0,3 -> 1" in caplog.text and "freeze_parameters" in caplog.text
    start = load_file("out/at-step00000002-state/weights.safetensors")
    changed = moved(start, load_file("out/last.safetensors"))
    assert f"{UNET}out.2.weight" in changed and f"{UNET}input_blocks.0.0.weight" not in changed


def test_check_names_each_choice_with_its_share_and_what_it_saves(work, capsys) -> None:
    asked = [*FROZEN, "--train_parameters", "input_blocks.*,out*", "--no_memory", "--mixed_precision", "no"]
    assert check(config(*asked, program="sdxl-check")) == 0
    said = re.sub(r"\n +", " ", capsys.readouterr().out)
    weights = load_file("base.safetensors")
    unet = {key: value.numel() for key, value in weights.items() if key.startswith(UNET)}
    total = sum(unet.values())

    def share(*starts: str, word: str = "") -> str:
        named = [size for key, size in unet.items() if key.removeprefix(UNET).startswith(starts) and word in key]
        return f"{sum(named):,} parameters in {len(named)} tensors, {sum(named) / total:.1%} of unet"

    for line in (
        f"freeze_unet_blocks 0: {share('time_embed', 'label_emb')}",
        f"freeze_unet_blocks 3: {share('input_blocks.2.')}",
        f"freeze_parameters *.attn2.to_k.*: {share('', word='.attn2.to_k.')}",
        f"train_parameters input_blocks.*: {share('input_blocks.')}",
    ):
        assert line in said, said
    left = sum(
        size
        for key, size in unet.items()
        if key.removeprefix(UNET).startswith(("input_", "out")) and not is_frozen(key)
    )
    frozen = total - left
    assert (
        f"unet {left / 1e6:.1f} million at" in said
        and f"{frozen / 1e6:.1f} million parameters that have a rate" in said
    )
    match = re.search(r"\(([\d.]+)%\). Saved: ([\d.]+) MiB of optimizer states, ([\d.]+) MiB of gradients", said)
    assert match and float(match[1]) == pytest.approx(100 * frozen / total, abs=0.06)
    assert float(match[2]) == pytest.approx(8 * frozen / 2**20, rel=0.01)
    assert float(match[3]) == pytest.approx(4 * frozen / 2**20, rel=0.01)
    assert check(config("--freeze_unet_blocks", "77", "--freeze_parameters", "*.atn1.*", program="sdxl-check")) == 2
    said = re.sub(r"\n +", " ", capsys.readouterr().out)
    assert "remove 77" in said and "did you mean" in said and "attn1" in said


def test_a_run_refuses_a_pattern_without_a_match(work) -> None:
    with (
        pytest.raises(UserError, match="no parameter has a name like"),
        build_run(config("--freeze_parameters", "x.*")),
    ):
        pass
