"""The schema: every option of the reference is accounted for, with its type, choices and default."""

from typing import Literal, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sdxl_finetune.config import (
    ColourOptions,
    Config,
    FlowOptions,
    ImageWeightOptions,
    LearnedWeightOptions,
    NumbersOptions,
    PairingOptions,
    QualityOptions,
    VaeOptions,
)
from sdxl_finetune.config.fields import LR_SCHEDULES, ScheduleName, Shown, expected, kinds
from sdxl_finetune.config.limit_options import LimitOptions
from sdxl_finetune.config.options import GROUPS, to_toml
from sdxl_finetune.config.reading import tomllib
from sdxl_finetune.config.tag_options import TagReportOptions
from sdxl_finetune.config.unsupported import FOREIGN, OFF, REFERENCE, is_off

EMA = {"ema_decay", "ema_half_life", "ema_previews", "ema_validation", "ema_save", "ema_on_cpu"}
VALIDATION = {name for name in Config.model_fields if name.startswith("valid")} | {"max_validation_steps"}
STARTS = {"initial_step", "initial_epoch", "lr_scheduler_cycle_decay"}
TEXT_OUTPUTS = {"text_encoder_outputs_variants", "text_encoder_batch_size"}
OURS = {*VALIDATION, *EMA, *STARTS, *TEXT_OUTPUTS, "cache_dir", "on_bad_image", "resume_at_next_epoch", "exact_masters"}
OURS |= {"no_memory", "metadata_columns", *QualityOptions.model_fields, *ImageWeightOptions.model_fields}
OURS |= {"caption_sources", "caption_break", "caption_tag_dropout_groups", "protected_tags_file"}
OURS |= {"freeze_parameters", "train_parameters", "save_retry_minutes", "save_fallback_dir", *LimitOptions.model_fields}
FORKS = {"flow_model", *FlowOptions.model_fields, *PairingOptions.model_fields, *LearnedWeightOptions.model_fields}
FORKS |= {"contrastive_flow_matching", "cfm_lambda", "soft_min_snr_gamma", "loss_multiplier", *VaeOptions.model_fields}
FORKS |= {"use_zero_cond", "freeze_unet_blocks"}
"""Options of forks of the reference."""
OURS |= FORKS | {"cache_dir_local", "cache_dir_local_gb", *ColourOptions.model_fields, *TagReportOptions.model_fields}
OURS |= {*NumbersOptions.model_fields}


@pytest.fixture(scope="module")
def reference(golden):
    return {option["dest"]: option for option in golden("config.json")["options"]}


def test_every_option_of_the_reference_is_accounted_for(reference):
    assert len(reference) == 176
    assert set(reference) == (set(Config.model_fields) - OURS) | set(REFERENCE)
    assert not set(Config.model_fields) & (set(REFERENCE) | set(FOREIGN))
    assert not set(REFERENCE) & set(FOREIGN)
    assert sum(len(group.model_fields) for group in GROUPS) == len(Config.model_fields)


def test_defaults_are_the_reference_s(reference):
    config = Config()
    for name in set(Config.model_fields) - OURS:
        default, ours = reference[name]["default"], getattr(config, name)
        if name == "max_token_length":
            assert (default, ours) == (None, 75)  # the reference's None is one chunk
        elif name == "async_upload":
            assert (default, ours) == (False, None)  # there, a program cannot tell an unset switch from false
        elif name in ("optimizer_args", "lr_scheduler_args"):
            assert (default, ours) == (None, {})
        else:
            assert ours == default, name


def test_types_and_choices_are_the_reference_s(reference):
    words = {"int": int, "float": float, "str": str, "StoreTrue": bool}
    for name in set(Config.model_fields) - OURS:
        option = reference[name]
        (kind,) = kinds(Config.model_fields[name])
        if name == "max_token_length":  # any number of chunks; the reference has choices on the command line only
            assert kind is int and all(Config(max_token_length=choice) for choice in option["choices"])
        elif get_origin(kind) is Literal:
            assert list(get_args(kind)) == [choice for choice in option["choices"] if choice is not None], name
        elif not isinstance(kind, Shown):
            assert kind is words[option["type"] or option["action"]] and not option["choices"], name


def test_reference_options_at_their_defaults_are_off(reference):
    for name in REFERENCE:
        assert is_off(name, reference[name]["default"]), name
    assert set(OFF) <= set(REFERENCE)


def test_honoured_options_are_read_as_options_of_the_schema():
    assert {foreign.remark for foreign in FOREIGN.values() if foreign.outcome == "honoured"} <= set(Config.model_fields)


def test_each_option_is_documented_in_one_line():
    for name, field in Config.model_fields.items():
        assert field.description and "\n" not in field.description, name
        assert len(kinds(field)) == 1 and expected(field), name


def test_limits_are_described_in_words():
    assert expected(Config.model_fields["lr_scheduler_cycle_decay"]) == "a number above 0, at most 1"
    assert not [name for name, field in Config.model_fields.items() if "None" in expected(field)]


def test_an_option_that_may_be_unset_is_unset_by_default():
    for field in Config.model_fields.values():
        optional = type(None) in get_args(field.annotation)
        assert optional == (field.get_default(call_default_factory=True) is None)


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("1024,1024", (1024, 1024)),
        ("768", (768, 768)),
        (768, (768, 768)),
        ("512, 768", (512, 768)),
        ([512, 768], (512, 768)),
        ((512, 768), (512, 768)),
        ("", None),
    ],
)
def test_resolution_is_a_side_or_width_and_height(value, size):
    assert Config(resolution=value).resolution == size


@pytest.mark.parametrize("value", ["64,64,64", "abc", " ", True, 0, [0, 8], [1.5, 2], -1, "1e3", {"a": 1}, "64,"])
def test_a_wrong_resolution_is_refused(value):
    with pytest.raises(ValidationError):
        Config(resolution=value)


def test_warmup_is_read_as_the_reference_does(golden):
    for text, result in golden("lr.json.gz")["lr_warmup_steps_parsing"].items():
        if "rejected" in result or (not 0 <= result["value"] <= 1 and result["type"] == "float"):
            if text in ("1.0", "1e2"):  # refused there when typed; here a share, or a whole number of steps
                assert Config(lr_warmup_steps=text).lr_warmup_steps == float(text)
                continue
            with pytest.raises(ValidationError):
                Config(lr_warmup_steps=text)
        else:
            assert Config(lr_warmup_steps=text).lr_warmup_steps == result["value"]
    assert type(Config(lr_warmup_steps=10).lr_warmup_steps) is int
    assert type(Config(lr_warmup_steps=1.0).lr_warmup_steps) is float


def test_optimizer_args_are_python_values(golden):
    read = {"weight_decay=0.1": {"weight_decay": 0.1}, "betas=0.9,0.99": {"betas": (0.9, 0.99)}}
    read |= {"fused=True": {"fused": True}, "name='a=b'": {"name": "a=b"}}
    for text, value in read.items():
        assert Config(optimizer_args=[text]).optimizer_args == value
    refused = [
        case["optimizer_args"]
        for case in golden("optimizer.json")["cases"]
        if case.get("raised") and case["raised"][0] == "ValueError" and case["optimizer_args"]
    ]
    assert len(refused) == 3
    together = {"weight_decay": 0.1, "betas": (0.9, 0.99), "fused": True}
    for text in ("weight_decay=0.1 betas=0.9,0.99 fused=True", "weight_decay=0.1,betas=(0.9, 0.99),fused=True"):
        assert Config(optimizer_args=text).optimizer_args == Config(optimizer_args=[text]).optimizer_args == together
    for arguments in [*refused, ["=1"], 3]:
        with pytest.raises(ValidationError):
            Config(optimizer_args=arguments)


def test_zero_and_empty_text_switch_an_option_off():
    """GUIs write 0 or an empty text for options that their users have left alone."""
    zero = "save_every_n_epochs save_every_n_steps save_n_epoch_ratio save_last_n_epochs save_last_n_steps"
    zero += " save_last_n_epochs_state save_last_n_steps_state max_train_epochs ddp_timeout lr_scheduler_timescale"
    for name in zero.split():
        assert getattr(Config(**{name: 0}), name) is None
    assert Config(vae_batch_size=0).vae_batch_size == 1
    assert Config(lr_scheduler_num_cycles=0).lr_scheduler_num_cycles == 0
    for name, field in Config.model_fields.items():
        if kinds(field) != [str]:
            assert getattr(Config(**{name: ""}), name) == field.get_default(call_default_factory=True), name


def test_options_set_the_options_that_they_imply():
    assert Config(cache_latents_to_disk=True).cache_latents
    for on in ({"flow_use_ot": True}, {"immiscible_noise": 4}, {"knn_noise_k": 2}, {"contrastive_flow_matching": True}):
        assert Config(**on).cache_latents and Config(**on, cache_latents=False).with_latents == list(on)
    for off in ({"flow_use_ot": False}, {"immiscible_noise": 0}, {"knn_noise_k": 1}, {"immiscible_noise": ""}):
        assert not Config(**off).cache_latents and not Config(**off).noise_needs_latents
    assert Config(logging_dir="logs").log_with == "tensorboard"
    assert Config(logging_dir="logs", log_with="wandb").log_with == "wandb"
    assert Config(caption_extention=".tags", caption_extension=".txt").caption_extension == ".tags"
    for length, read in {255: 225, 77: 75, 512: 450, 300: 300}.items():
        assert Config(max_token_length=length).max_token_length == read
    assert Config(max_token_length=None).max_token_length == 75
    assert Config(sample_every_n_epochs=0, sample_every_n_steps=-1).sample_every_n_steps is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": "1e-4"},
        {"learning_rate": float("nan")},
        {"seed": 1.0},
        {"seed": True},
        {"seed": -1},
        {"xformers": 1},
        {"mixed_precision": "weird"},
        {"max_token_length": 50},
        {"max_token_length": "225"},
        {"caption_separator": ""},
        {"lr_scheduler": "nonsense"},
        {"lr_scheduler": "adafactor:"},
        {"lr_scheduler": "reduce_lr_on_plateau"},
        {"block_lr": []},
        {"block_lr": ",".join(["1e-4"] * 22 + ["a"])},
        {"block_lr": [-1.0] * 23},
        {"vae": 3},
        {"save_every_n_epochs": -1},
        {"output_dir": "C:\train"},
        {"unknown": 1},
    ],
)
def test_wrong_values_are_refused(wrong):
    with pytest.raises(ValidationError) as caught:
        Config(**wrong)
    assert [error["loc"][0] for error in caught.value.errors()] == list(wrong)


@given(st.lists(st.floats(0, 1), min_size=23, max_size=23))
def test_block_rates_read_as_text(rates):
    assert Config(block_lr=",".join(str(rate) for rate in rates)).block_lr == tuple(rates)


def test_lr_schedulers_are_those_that_work_in_the_reference(golden):
    cases = golden("lr.json.gz")["cases"]
    works = {case["lr_scheduler"] for case in cases if not case.get("raised")}
    # Adafactor's own steps go with this name too: golden optimizer.json replaces any schedule by adafactor:RATE.
    for name in {case["lr_scheduler"] for case in cases} - works - {"adafactor"}:
        with pytest.raises(ValidationError):
            Config(lr_scheduler=name)
    for name in works:
        assert Config(lr_scheduler=name).lr_scheduler == name
    assert set(LR_SCHEDULES) == set(get_args(ScheduleName))


@pytest.mark.parametrize(
    ("values", "distribution"),
    [
        ({}, None),
        ({"flow_model": True}, "logit_normal"),
        ({"flow_model": True, "flow_timestep_distribution": ""}, "logit_normal"),
        ({"flow_model": True, "flow_timestep_distribution": "uniform"}, "uniform"),
        ({"laplace_timestep_sampling_mu": 0, "laplace_timestep_sampling_b": 3.0}, "laplace"),
        ({"laplace_timestep_sampling_mu": 0.5, "laplace_timestep_sampling_b": ""}, None),
    ],
)
def test_default_distribution_follows_the_objective_and_is_saved(values, distribution):
    config = Config(**values)
    assert config.flow_timestep_distribution == distribution
    for changed_only in (False, True):
        tables = tomllib.loads(to_toml(config, changed_only=changed_only))
        assert Config(**{name: value for table in tables.values() for name, value in table.items()}) == config
