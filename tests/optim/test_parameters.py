"""Groups of trained parameters and their learning rates."""

import pytest
import torch
from torch.nn import Parameter

from sdxl_finetune.config import OptimizerOptions
from sdxl_finetune.errors import UserError
from sdxl_finetune.low_bits import MasterWeights
from sdxl_finetune.optim.parameters import Group, trained_parameters


def parts(golden=None):
    names = [
        "time_embed.0.weight",
        "label_emb.0.0.weight",
        *[f"input_blocks.{block}.0.weight" for block in range(9)],
        *[f"middle_block.{block}.norm.weight" for block in range(3)],
        *[f"output_blocks.{block}.0.weight" for block in range(9)],
        "out.0.weight",
        "out.2.bias",
    ]
    unet = {f"model.diffusion_model.{name}": Parameter(torch.zeros(2)) for name in names}
    te1 = {"te1.a": Parameter(torch.zeros(3)), "te1.b": Parameter(torch.zeros(4))}
    return {"unet": unet, "text_encoder1": te1, "text_encoder2": {"te2.a": Parameter(torch.zeros(5))}}


def groups_of(options: OptimizerOptions, parts) -> list[Group]:
    return trained_parameters(options, parts, MasterWeights()).groups


def rates_of(groups: list[Group]) -> dict[str, float]:
    return {group.name: group.lr for group in groups}


def test_each_part_has_the_learning_rate_of_its_option() -> None:
    config = OptimizerOptions(
        learning_rate=3e-5, learning_rate_te1=1e-6, learning_rate_te2=1e-6, train_text_encoder=True
    )
    groups = groups_of(config, parts())
    assert rates_of(groups) == {"unet": 3e-5, "text_encoder1": 1e-6, "text_encoder2": 1e-6}
    assert [group.size for group in groups] == [50, 7, 5]


def test_text_encoders_are_frozen_without_train_text_encoder_and_take_the_unet_rate_with_it() -> None:
    everything = parts()
    groups = groups_of(OptimizerOptions(learning_rate=1e-5, learning_rate_te1=1e-6), everything)
    assert rates_of(groups) == {"unet": 1e-5}
    assert not any(parameter.requires_grad for parameter in everything["text_encoder1"].values())
    assert all(parameter.requires_grad for parameter in everything["unet"].values())
    groups = groups_of(OptimizerOptions(learning_rate=1e-5, learning_rate_te2=0.0, train_text_encoder=True), parts())
    assert rates_of(groups) == {"unet": 1e-5, "text_encoder1": 1e-5}


def test_a_learning_rate_of_zero_freezes_a_part_and_all_zero_is_an_error() -> None:
    config = OptimizerOptions(learning_rate=0.0, learning_rate_te1=1e-6, learning_rate_te2=0.0, train_text_encoder=True)
    assert rates_of(groups_of(config, parts())) == {"text_encoder1": 1e-6}
    with pytest.raises(UserError, match="nothing would be trained"):
        groups_of(OptimizerOptions(learning_rate=0.0), parts())


def test_block_lr_divides_the_unet_into_the_references_blocks() -> None:
    rates = [index * 1e-6 for index in range(23)]
    everything = parts()
    groups = groups_of(OptimizerOptions(block_lr=",".join(map(str, rates))), everything)
    assert rates_of(groups) == {f"block{index}": pytest.approx(rates[index]) for index in range(1, 23)}
    prefix = "model.diffusion_model."
    place = {name.removeprefix(prefix): group.name for group in groups for name in group.parameters}
    assert place["input_blocks.0.0.weight"] == "block1"
    assert place["input_blocks.8.0.weight"] == "block9"
    assert place["middle_block.0.norm.weight"] == "block10"
    assert place["output_blocks.0.0.weight"] == "block13"
    assert place["out.0.weight"] == place["out.2.bias"] == "block22"
    assert not everything["unet"][f"{prefix}time_embed.0.weight"].requires_grad
    del everything["unet"][f"{prefix}output_blocks.8.0.weight"]
    with pytest.raises(UserError, match="22 blocks, got 23"):
        groups_of(OptimizerOptions(block_lr=",".join(map(str, rates))), everything)
    shorter = groups_of(OptimizerOptions(block_lr=",".join(map(str, rates[:22]))), everything)
    assert [group.name for group in shorter] == [f"block{index}" for index in range(1, 22)]


def test_full_names_are_part_and_checkpoint_name_with_block_lr_too() -> None:
    one_rate = trained_parameters(OptimizerOptions(train_text_encoder=True), parts(), MasterWeights())
    block_rates = OptimizerOptions(train_text_encoder=True, block_lr=",".join(["1e-6"] * 23))
    names = [name for name, _ in one_rate.named()]
    assert {"unet.model.diffusion_model.out.2.bias", "text_encoder1.te1.a", "text_encoder2.te2.a"} <= set(names)
    assert {name for name, _ in trained_parameters(block_rates, parts(), MasterWeights()).named()} == set(names)
