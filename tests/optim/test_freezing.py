"""Parameters that are frozen or trained by name."""

import fnmatch
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from sdxl_finetune.config import Config, OptimizerOptions
from sdxl_finetune.errors import UserError
from sdxl_finetune.low_bits import MasterWeights
from sdxl_finetune.model.architecture import FULL
from sdxl_finetune.model.sdxl import SDXL
from sdxl_finetune.optim.freezing import UNET_PREFIX
from sdxl_finetune.optim.parameters import trained_parameters


@functools.cache
def sdxl_parts() -> dict[str, dict[str, Parameter]]:
    """The parameters of SDXL itself, without memory."""
    with torch.device("meta"):
        return SDXL(FULL).parameters_by_part()


def trained(**options) -> dict[str, set[str]]:
    """Names of the trained parameters by part."""
    parts = sdxl_parts()
    names: dict[str, set[str]] = {part: set() for part in parts}
    found = trained_parameters(OptimizerOptions(**options), parts, MasterWeights())
    for group in found.groups:
        assert group.parameters and group.lr
        names[group.part] |= set(group.parameters)
    for part, named in parts.items():
        assert {name for name, parameter in named.items() if parameter.requires_grad} == names[part]
    return names


def problem_of(**options) -> str:
    with pytest.raises(UserError) as caught:
        trained_parameters(OptimizerOptions(**options), sdxl_parts(), MasterWeights())
    return str(caught.value)


def block_of(name: str) -> int:
    """Number of the block of a parameter of SDXL's U-Net, from the shape of the network (9, 3 and 9 blocks)."""
    word, number, *_ = name.removeprefix(UNET_PREFIX).split(".")
    starts = {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}
    return starts[word] + int(number) if word in starts else {"time_embed": 0, "label_emb": 0, "out": 22}[word]


@settings(deadline=None, max_examples=20)
@given(st.sets(st.integers(0, 22), min_size=1, max_size=22))
def test_frozen_blocks_are_those_that_block_lr_counts(numbers: set[int]) -> None:
    left = {name for name in sdxl_parts()["unet"] if block_of(name) not in numbers}
    assert trained(freeze_unet_blocks=",".join(map(str, numbers)))["unet"] == left
    rates = [0.0 if number in numbers else 1e-5 for number in range(23)]
    assert trained(block_lr=rates)["unet"] == left


def test_blocks_are_frozen_beside_block_lr_and_empty_groups_are_left_out() -> None:
    rates = [0.0, *[1e-5] * 22]
    found = trained_parameters(
        OptimizerOptions(block_lr=rates, freeze_unet_blocks="3,1"), sdxl_parts(), MasterWeights()
    )
    assert [group.name for group in found.groups] == [f"block{number}" for number in (2, *range(4, 23))]


def test_patterns_freeze_and_choose_in_all_parts() -> None:
    attention = {name for name in sdxl_parts()["unet"] if ".attn2." in name}
    assert trained(freeze_parameters="*.attn2.*")["unet"] == set(sdxl_parts()["unet"]) - attention
    assert trained(train_parameters=["*.attn2.*"])["unet"] == attention
    encoders = {"train_text_encoder": True, "learning_rate_te2": 0.0}
    for pattern in ("text_encoder1.text_model.embeddings.*", "text_encoder1.embeddings.*"):
        names = trained(freeze_parameters=pattern, **encoders)
        assert names["unet"] == set(sdxl_parts()["unet"]) and not names["text_encoder2"]
        left = set(sdxl_parts()["text_encoder1"]) - names["text_encoder1"]
        assert len(left) == 2 and all("embeddings" in name for name in left)
    names = trained(train_parameters="out.*, text_encoder1.*.layers.3.*", **encoders)
    assert names["unet"] == {name for name in sdxl_parts()["unet"] if block_of(name) == 22}
    assert len(names["text_encoder1"]) == 16
    names = trained(train_parameters="*.attn2.*", freeze_parameters="*.to_k.*", freeze_unet_blocks=5)
    assert names["unet"] == {name for name in attention if ".to_k." not in name and block_of(name) != 5}


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(["input_blocks.*", "*norm*", "out.?.bias", "*.[01].*", "*"]))
def test_a_pattern_of_the_unet_means_the_same_with_and_without_the_prefix(pattern: str) -> None:
    expected = {n for n in sdxl_parts()["unet"] if fnmatch.fnmatchcase(n.removeprefix(UNET_PREFIX), pattern)}
    if "*" not in pattern[:1]:
        assert trained(train_parameters=UNET_PREFIX + pattern)["unet"] == expected
    assert trained(train_parameters=pattern)["unet"] >= expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"freeze_unet_blocks": "4,23,40"}, ["this U-Net has 23 blocks, 0 to 22: remove 23", "remove 40"]),
        ({"freeze_parameters": "input_block.4.*"}, ["no parameter has a name like input_block.4.*", "input_blocks.4"]),
        ({"freeze_parameters": "*.attn3.*"}, ["did you mean", "attn2"]),
        ({"train_parameters": "text_encoder1.encoder.layer.0.*, *.to_kk.*"}, ["layers.0", "*.to_kk.*", "to_k"]),
        ({"freeze_parameters": "input_blocks.4"}, ["that is a module: input_blocks.4.* stands for its parameters"]),
        ({"freeze_parameters": "§§§§"}, ["names are, for example, model.diffusion_model."]),
        ({"train_parameters": "text_encoder1.*, out.*"}, ["set train_text_encoder and a rate above 0"]),
        ({"train_parameters": "out.*", "freeze_unet_blocks": "22"}, ["all parameters that it names are frozen"]),
        ({"freeze_parameters": "*"}, ["nothing would be trained, because freeze_parameters freezes all"]),
        ({"freeze_unet_blocks": "0,1", "learning_rate": 0.0}, ["nothing would be trained"]),
    ],
)
def test_what_names_nothing_or_leaves_nothing_is_refused_with_a_remedy(options, words) -> None:
    said = problem_of(**options)
    assert all(word in said for word in words), said


def test_values_are_read_as_forks_and_files_write_them() -> None:
    for value in ("2, 3,4", [4, 3, 2], "4,3,2,2,"):
        assert Config(freeze_unet_blocks=value).freeze_unet_blocks == (2, 3, 4)
    assert (
        Config(freeze_unet_blocks=0).freeze_unet_blocks == (0,)
        and Config(freeze_unet_blocks="").freeze_unet_blocks is None
    )
    assert (
        Config(freeze_parameters="a.*, b").freeze_parameters == Config(freeze_parameters=["a.*", "b"]).freeze_parameters
    )
    for value in ("1,x", "-1", [1.5], [True], ","):
        with pytest.raises(ValueError):
            Config(freeze_unet_blocks=value)
    for value in (3, [1], " , "):
        with pytest.raises(ValueError):
            Config(train_parameters=value)
