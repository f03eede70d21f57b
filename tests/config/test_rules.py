"""Checks over several options refuse what the reference refuses and accept what it accepts."""

import math
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from pydantic import ValidationError

from sdxl_finetune.config import Config, load_config
from sdxl_finetune.config.fields import OnlyWith, kinds
from sdxl_finetune.config.rules import find_problems, find_remarks
from sdxl_finetune.errors import UserError

# Accepted by the reference and refused here: not supported yet, or a mistake that the reference does not notice.
NOT_YET = ()
ACCEPTED = (
    ["--deepspeed"],
    ["--zero_terminal_snr"],
    ["--log_with", "wandb"],
    ["--weighted_captions", "--cache_text_encoder_outputs"],
    ["--cache_text_encoder_outputs", "--caption_dropout_rate", "0.1"],
)
"""Refused by the reference. This program does not use deepspeed, logs to files without wandb, and caches the outputs of
weighted and of empty captions."""
OURS = (["--adaptive_noise_scale", "0.1", "--noise_offset", "0.05"],)


def test_options_refused_by_the_reference_are_refused(golden, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "1_x").mkdir(parents=True)
    (tmp_path / "data" / "1_x" / "a.png").touch()
    (tmp_path / "model.safetensors").touch()
    refusals = golden("config.json")["refusals"]
    base = refusals["base_cli"]
    base = [*base[: base.index("--train_data_dir")], "--train_data_dir", "data", "--output_name", "m"]
    base += ["--pretrained_model_name_or_path", "model.safetensors", "--output_dir", "out"]
    runs = [run for run in refusals["runs"] if "result" not in run]
    assert len(runs) > 50
    for run in runs:
        arguments = [*base, *run["cli"]]
        yet = any(word.removeprefix("--") in NOT_YET for word in run["cli"])
        knows_model = run["cli"] == ["--block_lr", "1e-4,1e-4"]  # compared with the blocks in test_parameters.py
        accepted = knows_model or run["cli"] in ACCEPTED
        if accepted or (run["reached_model_loading"] and run["cli"] not in OURS and not yet):
            assert load_config(arguments, program="sdxl-train") is not None, run["cli"]
        else:
            with pytest.raises(UserError) as caught:
                load_config(arguments, program="sdxl-train")
            options = {word.removeprefix("--") for word in run["cli"]} | {"min_bucket_reso"}
            assert {problem.key for problem in caught.value.problems} <= options


OWN_RATES = {"optimizer_args": ["relative_step=False"]}


def refused(**values) -> list[str]:
    return [names.split()[0] for names, _ in find_problems(Config(**values))]


TEXT = {"cache_text_encoder_outputs_to_disk": True}
NEEDED = ["pretrained_model_name_or_path", "train_data_dir", "resolution", "output_dir"]


def test_needed_options_are_named():
    assert refused() == NEEDED


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ({"min_timestep": 500, "max_timestep": 500}, "min_timestep"),
        ({"max_timestep": 1, "min_timestep": 1}, "min_timestep"),
        ({"min_timestep": 999}, None),
        ({"flow_timestep_distribution": "laplace"}, "laplace_timestep_sampling_mu"),
        ({"flow_timestep_distribution": "laplace", "laplace_timestep_sampling_mu": 0.0}, "laplace_timestep_sampling_b"),
        ({"laplace_timestep_sampling_mu": 0.0, "laplace_timestep_sampling_b": 3.0}, None),
        ({"flow_model": True, "flow_logit_mean": 1.0, "flow_uniform_static_ratio": 2.5}, None),
        ({"use_8bit_adam": True, "use_lion_optimizer": True}, "use_8bit_adam"),
        ({"use_8bit_adam": True, "optimizer_type": "AdamW"}, "use_8bit_adam"),
        ({"use_lion_optimizer": True, "optimizer_type": "AdamW"}, "use_lion_optimizer"),
        ({"lr_warmup_steps": 10}, None),
        ({"lr_warmup_steps": 0.1, "lr_scheduler": "constant_with_warmup"}, None),
        ({"max_train_steps": 0}, "max_train_steps"),
        ({"max_train_steps": 0, "max_train_epochs": 1}, None),
        ({"enable_bucket": True, "bucket_reso_steps": 0}, "bucket_reso_steps"),
        ({"bucket_reso_steps": 0, "min_bucket_reso": 0, "max_bucket_reso": 0}, None),
        ({"lr_scheduler": "cosine_with_min_lr"}, "lr_scheduler"),
        ({"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 0.0}, None),
        ({"lr_scheduler": "piecewise_constant"}, "lr_scheduler"),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ["step_rules='1:5,0.1'"]}, None),
        ({"lr_scheduler": "adafactor:3e-05"}, "lr_scheduler"),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ["step_rules='1:5'"]}, "lr_scheduler"),
        ({"lr_scheduler": "linear", "lr_scheduler_args": ["last_epoch=1"]}, "lr_scheduler_args"),
        ({"lr_warmup_steps": 10, "optimizer_type": "AdamWScheduleFree"}, None),
        ({"lr_scheduler": "adafactor:3e-05", "optimizer_type": "AdaFactor"}, None),
        ({"lr_scheduler": "adafactor", "optimizer_type": "AdaFactor", "lr_warmup_steps": 0.1}, None),
        ({"lr_scheduler": "adafactor", "optimizer_type": "AdaFactor", **OWN_RATES}, "lr_scheduler"),
        ({"lr_scheduler": "adafactor:1e-5", "optimizer_type": "AdaFactor", **OWN_RATES}, None),
        ({"lr_scheduler": "adafactor"}, "lr_scheduler"),
        ({"full_fp16": True}, "full_fp16"),
        ({"full_fp16": True, "mixed_precision": "fp16"}, None),
        ({"full_fp16": True, "full_bf16": True, "mixed_precision": "fp16"}, "full_fp16"),
        ({"full_fp16": True, "mixed_precision": "fp16", "fused_backward_pass": True}, "fused_backward_pass"),
        ({"non_finite_steps": "skip"}, None),
        ({"non_finite_steps": "skip", "fused_backward_pass": True}, "non_finite_steps"),
        ({"non_finite_steps": "skip", "fused_optimizer_groups": 4}, "non_finite_steps"),
        ({"output_name": "a/b"}, "output_name"),
        ({"output_name": "a\\b"}, "output_name"),
        ({"output_name": ".."}, "output_name"),
        ({"cache_latents_to_disk": True, "random_crop": True}, "random_crop"),
        ({"adaptive_noise_scale": 0.0}, None),
        ({**TEXT, "shuffle_caption": True}, "shuffle_caption"),
        ({**TEXT, "shuffle_caption": True, "text_encoder_outputs_variants": 4}, None),
        ({**TEXT, "caption_tag_dropout_rate": 0.1}, "caption_tag_dropout_rate"),
        ({**TEXT, "caption_tag_dropout_rate": 0.1, "text_encoder_outputs_variants": 4}, None),
        ({**TEXT, "token_warmup_step": 10, "text_encoder_outputs_variants": 4}, "token_warmup_step"),
        ({**TEXT, "caption_dropout_rate": 0.1, "caption_dropout_every_n_epochs": 2, "enable_wildcard": True}, None),
        ({**TEXT, "train_text_encoder": True}, "train_text_encoder"),
        ({**TEXT, "train_text_encoder": True, "learning_rate_te1": 0.0}, "train_text_encoder"),
        ({**TEXT, "train_text_encoder": True, "learning_rate_te1": 0, "learning_rate_te2": 0}, None),
        ({**TEXT, "learning_rate_te1": 1e-5}, None),
        ({"adaptive_noise_scale": 0.1, "noise_offset": 0.1, "cache_latents": True}, None),
        ({"log_with": "all", "logging_dir": ""}, "log_with"),
        ({"min_snr_gamma": 5.0, "soft_min_snr_gamma": 5.0}, "min_snr_gamma"),
        ({"soft_min_snr_gamma": 5.0, "flow_model": True}, None),
        ({"edm2_loss_weighting": True, "flow_model": True, "fused_backward_pass": True}, None),
        ({"loss_type": "huber", "huber_c": 0.0}, "huber_c"),
        ({"zero_terminal_snr": True}, None),
        ({"flow_use_ot": True}, None),
        ({"flow_use_ot": True, "color_aug": True}, "color_aug"),
        ({"contrastive_flow_matching": True, "random_crop": True, "flow_model": True}, "random_crop"),
        ({"knn_noise_k": 1, "random_crop": True}, None),
        ({"flow_use_ot": True, "immiscible_noise": 8}, "flow_use_ot"),
        ({"immiscible_noise": 8, "knn_noise_k": 4}, "immiscible_noise"),
        ({"flow_use_ot": True, "immiscible_noise": 0, "knn_noise_k": 1}, None),
        ({"contrastive_flow_matching": True}, "contrastive_flow_matching"),
        ({"contrastive_flow_matching": True, "v_parameterization": True}, None),
    ],
)
def test_impossible_combinations_are_refused(values, wrong):
    (*others,) = [name for name in refused(**values) if name not in NEEDED]
    assert (wrong in others) if wrong else not others


def test_missing_files_and_unusable_folders_are_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    wrong = {
        "pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0",
        "vae": "none.safetensors",
        "sample_prompts": "none.txt",
        "log_tracker_config": "none.toml",
        "metadata_thumbnail": "none.png",
        "train_data_dir": str(tmp_path / "empty"),
        "output_dir": str(tmp_path / "file" / "out"),
        "logging_dir": str(tmp_path / "file"),
        "conditioning_data_dir": str(tmp_path / "nowhere"),
    }
    assert set(refused(**wrong, resolution=64, masked_loss=True)) == set(wrong)
    assert "conditioning_data_dir" not in refused(**wrong, resolution=64)
    assert "metadata_thumbnail" not in refused(metadata_thumbnail="data:image/png;base64,AAAA")
    assert "output_dir" not in refused(output_dir=str(tmp_path / "new" / "folder"))


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"max_train_epochs": 2, "max_train_steps": 100}, "max_train_steps"),
        ({"max_train_epochs": 2}, None),
        ({"sample_every_n_epochs": 1}, "sample_every_n_epochs"),
        ({"sample_at_first": True}, "sample_at_first"),
        ({"sample_prompts": "p"}, "sample_prompts"),
        ({"shuffle_caption": True, "keep_tokens": 1, "keep_tokens_separator": "|||"}, None),
        ({"sample_every_n_epochs": 1, "sample_every_n_steps": 5, "sample_prompts": "p"}, "sample_every_n_steps"),
        ({"learning_rate_te2": 1e-6}, "learning_rate_te2"),
        ({"learning_rate_te2": 1e-6, "train_text_encoder": True}, None),
        ({"enable_bucket": True, "min_bucket_reso": 100}, "min_bucket_reso"),
        ({"enable_bucket": True, "max_bucket_reso": 1000}, "max_bucket_reso"),
        ({"dataset_config": "d.toml", "in_json": "m.json"}, "in_json"),
        ({"in_json": "m.json", "reg_data_dir": "r"}, "reg_data_dir"),
        ({"optimizer_type": "AdamWScheduleFree", "lr_warmup_steps": 10}, "lr_warmup_steps"),
        ({"lr_warmup_steps": 10}, "lr_warmup_steps"),
        ({"lr_warmup_steps": 10, "lr_scheduler": "adafactor:1e-5"}, "lr_warmup_steps"),
        ({"lr_warmup_steps": 10, "lr_scheduler": "cosine"}, None),
        (
            {"lr_warmup_steps": 10, "lr_scheduler": "cosine", "lr_scheduler_type": "StepLR"},
            "lr_scheduler lr_warmup_steps",
        ),
        ({"lr_decay_steps": 10, "lr_scheduler": "cosine"}, "lr_decay_steps"),
        ({"optimizer_type": "AdamWScheduleFree", "lr_scheduler_power": 2.0}, "lr_scheduler_power"),
        ({"huber_c": 0.2}, "huber_c"),
        ({"zero_terminal_snr": True}, "zero_terminal_snr"),
        ({"zero_terminal_snr": True, "v_parameterization": True}, None),
        ({"loss_type": "huber", "huber_c": 0.2}, None),
        ({"loss_type": "huber", "huber_scale": 2.0}, "huber_scale"),
        ({"loss_type": "huber", "huber_scale": 2.0, "huber_schedule": "constant"}, None),
        ({"multires_noise_discount": 0.1}, "multires_noise_discount"),
        ({"multires_noise_discount": 0.1, "multires_noise_iterations": 6}, None),
        ({"keep_tokens": 1}, "keep_tokens"),
        ({"keep_tokens": 1, "dataset_config": "d.toml"}, None),
        ({"validation_seed": 1}, "validation_seed"),
        ({"validation_seed": 1, "dataset_config": "d.toml"}, None),
        ({"save_last_n_steps": 100}, "save_last_n_steps"),
        ({"save_last_n_steps": 100, "save_every_n_steps": 10}, None),
        ({"wandb_run_name": "x", "log_with": "tensorboard"}, "wandb_run_name"),
        ({"ema_previews": False}, "ema_previews"),
        ({"optimizer_type": "Adafactor"}, "learning_rate"),
        ({"optimizer_type": "Adafactor", **OWN_RATES}, None),
        ({"optimizer_type": "torch.optim.Adafactor"}, None),
        ({"optimizer_type": "Prodigy"}, "learning_rate"),
        ({"optimizer_type": "dadaptation.DAdaptAdam", "learning_rate": 1e-4}, "learning_rate"),
        ({"optimizer_type": "Prodigy", "learning_rate": 1.0}, None),
        ({"full_fp16": True, "exact_masters": False}, "exact_masters"),
        ({"initial_step": 5, "resume": "auto"}, "initial_step"),
        ({"initial_step": 5}, None),
        ({"text_encoder_outputs_variants": 4}, "text_encoder_outputs_variants"),
        ({**TEXT, "enable_wildcard": True}, "enable_wildcard"),
        ({"masked_loss": True}, "masked_loss"),
        ({"masked_loss": True, "alpha_mask": True}, None),
        ({"conditioning_data_dir": "c"}, "conditioning_data_dir"),
        ({"conditioning_data_dir": "c", "masked_loss": True}, None),
        ({"conditioning_data_dir": "c", "masked_loss": True, "alpha_mask": True}, "alpha_mask"),
        ({"conditioning_data_dir": "c", "masked_loss": True, "alpha_mask": True, "dataset_config": "d"}, None),
        ({"face_crop_aug_range": "1,2"}, None),
        ({"face_crop_aug_range": "1,2", "cache_latents": True}, "face_crop_aug_range"),
        ({**TEXT, "enable_wildcard": True, "text_encoder_outputs_variants": 4}, None),
        ({"flow_use_ot": True, "flow_model": True}, "flow_use_ot"),
        ({"flow_use_ot": True, "cache_latents_to_disk": True}, None),
        ({"noise_offset": 0.1, "flow_model": True}, "noise_offset"),
        ({"noise_offset": 0.1}, None),
        ({"cfm_lambda": 0.1}, "cfm_lambda"),
        ({"edm2_loss_weighting": True}, None),
        ({"edm2_loss_weighting": True, "min_snr_gamma": 5.0}, "min_snr_gamma"),
        ({"edm2_loss_weighting": True, "soft_min_snr_gamma": 5.0}, "soft_min_snr_gamma"),
        ({"edm2_loss_weighting": True, "image_weights": "w.toml"}, None),
        ({}, None),
    ],
)
def test_surprising_options_are_remarked(values, option):
    assert [name for name, _ in find_remarks(Config(**values))] == (option.split() if option else [])


STANDALONE = """
pretrained_model_name_or_path vae tokenizer_cache_dir max_token_length weighted_captions caption_break caption_sources
vae_custom_scale vae_custom_shift vae_reflection_padding latent_channels vae_type
train_data_dir reg_data_dir in_json metadata_columns dataset_config dataset_repeats resolution train_batch_size
resize_interpolation max_data_loader_n_workers caption_extention on_bad_image shuffle_caption
secondary_separator enable_wildcard caption_prefix caption_suffix caption_dropout_rate
caption_dropout_every_n_epochs caption_tag_dropout_rate token_warmup_step flip_aug color_aug random_crop
alpha_mask debug_dataset quality_tags image_weights
enable_bucket validation_split cache_latents cache_latents_to_disk
cache_text_encoder_outputs cache_text_encoder_outputs_to_disk skip_cache_check cache_dir
cache_dir_local cache_dir_local_gb
max_train_epochs gradient_accumulation_steps seed optimizer_type use_8bit_adam use_lion_optimizer optimizer_args
learning_rate train_text_encoder block_lr max_grad_norm lr_scheduler lr_scheduler_type lr_scheduler_args
flow_model flow_timestep_distribution flow_uniform_static_ratio stratified_timesteps
flow_use_ot immiscible_noise knn_noise_k contrastive_flow_matching
ema_decay ema_half_life colour_check_every_n_epochs
noise_offset multires_noise_iterations ip_noise_gamma min_timestep max_timestep v_parameterization loss_type
min_snr_gamma soft_min_snr_gamma loss_multiplier edm2_loss_weighting v_pred_like_loss debiased_estimation_loss
zero_terminal_snr scale_v_pred_loss_like_noise_pred adaptive_noise_scale
mixed_precision full_bf16 full_fp16 fused_backward_pass fused_optimizer_groups gradient_checkpointing xformers
diffusers_xformers sdpa torch_compile ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph
initial_step tag_report_every_n_epochs save_retry_minutes save_fallback_dir
non_finite_steps loss_spike_factor rank_check_every_n_steps reproduce
freeze_unet_blocks freeze_parameters train_parameters use_zero_cond
output_dir output_name save_model_as save_precision save_every_n_epochs save_every_n_steps save_n_epoch_ratio
save_state save_state_on_train_end resume logging_dir log_with console_log_level
max_train_hours save_state_every_minutes
console_log_file console_log_simple no_memory huggingface_repo_id async_upload
"""
"""Options that have an effect whatever the other options are. Whoever adds an option decides where it belongs."""


def test_each_option_stands_alone_or_names_the_options_that_it_needs():
    with_condition = {
        name
        for name, field in Config.model_fields.items()
        if any(isinstance(note, OnlyWith) for note in field.metadata)
    }
    metadata = {name for name in Config.model_fields if name.startswith("metadata_")}
    assert with_condition | {*STANDALONE.split()} | metadata == set(Config.model_fields)
    assert with_condition.isdisjoint(STANDALONE.split())
    for name in with_condition:
        for note in Config.model_fields[name].metadata:
            if isinstance(note, OnlyWith):
                others = note.options.split()
                assert set(others) <= set(Config.model_fields) - {name}
                for value in note.values:  # a condition on a value that no option takes would never hold
                    assert value == "adafactor" or Config(**dict.fromkeys(others, value))


def test_an_option_without_effect_is_remarked_once_its_condition_is_missing():
    """Switches each option with a condition on, alone, and expects exactly one remark on it."""
    for name, field in Config.model_fields.items():
        notes = [note for note in field.metadata if isinstance(note, OnlyWith)]
        if not notes:
            continue
        (kind,) = kinds(field)
        default = field.get_default(call_default_factory=True)
        values = [*(get_args(kind) if get_origin(kind) is Literal else ()), True, False, 7, 0.25, "x", "x=1"]
        for value in values:
            try:
                config = Config(**{name: value})
            except ValidationError:
                continue
            if getattr(config, name) != default:
                break
        expected = [note for note in notes if not note.holds(config)]
        said = [message.partition(": ")[0] for option, message in find_remarks(config) if option == name]
        assert said[:1] == [note.remark() for note in expected[:1]], name


def remarks(**values) -> dict[str, str]:
    base = {"learning_rate": 1e-5, "optimizer_args": OWN_RATES["optimizer_args"]}
    return dict(find_remarks(Config(**{**base, **values})))


def test_masked_loss_without_masks_says_how_to_get_them():
    assert "set conditioning_data_dir to a folder of masks" in remarks(masked_loss=True)["masked_loss"]
    assert "masked_loss" not in remarks(masked_loss=True, alpha_mask=True)


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ({"learning_rate_te1": 0.0, "learning_rate_te2": 0.0}, True),
        ({"learning_rate": 0.0, "block_lr": "1e-5,1e-5"}, True),
        ({"learning_rate_te1": 0.0, "learning_rate_te2": 1e-6}, False),
        ({"learning_rate_te1": 0.0}, False),
        ({}, False),
    ],
)
def test_text_encoders_that_train_at_rate_0_are_named(rates, said):
    assert ("train_text_encoder" in remarks(train_text_encoder=True, **rates)) is said
    assert "train_text_encoder" not in remarks(**rates)


def test_bucket_limits_that_the_user_has_not_set():
    def messages(**values):
        return {names.split()[0]: message for names, message in find_problems(Config(enable_bucket=True, **values))}

    small, large = messages(resolution=128), messages(resolution=1536)
    assert small["min_bucket_reso"].endswith("and is 256 by default: set min_bucket_reso = 128")
    assert large["max_bucket_reso"].endswith("and is 1024 by default: set max_bucket_reso = 1536")
    assert messages(resolution=128, min_bucket_reso=256)["min_bucket_reso"].endswith("and is 256")
    free = messages(resolution=128, bucket_no_upscale=True)
    assert "min_bucket_reso" not in free, "buckets follow the sizes of images"


def test_one_remark_on_bucket_limits_without_effect():
    limits = {"min_bucket_reso": 100, "max_bucket_reso": 1000}
    found = [
        name
        for name, _ in find_remarks(Config(enable_bucket=True, bucket_no_upscale=True, **limits))
        if name.endswith("bucket_reso")
    ]
    assert found == ["min_bucket_reso", "max_bucket_reso"], "and none about rounding"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"flow_timestep_distribution": "logit_normal"}, "flow_timestep_distribution changes"),
        ({"flow_uniform_shift": True}, "flow_uniform_shift changes"),
        ({"flow_timestep_distribution": "uniform"}, None),
        ({"laplace_timestep_sampling_mu": 0.0, "laplace_timestep_sampling_b": 3.0}, None),
        ({"stratified_timesteps": True}, None),
    ],
)
def test_options_of_forks_flows_that_change_another_objective_are_named(values, said):
    remark = remarks(**values).get("flow_model", "")
    assert (said in remark) if said else not remark
    assert "flow_model" not in remarks(flow_model=True, **values)


def test_parameters_of_another_timestep_distribution_are_named():
    assert "has no effect unless" in remarks(flow_model=True, flow_beta_alpha=2.0)["flow_beta_alpha"]
    assert "flow_logit_mean" not in remarks(flow_model=True, flow_logit_mean=0.5)
    assert "flow_logit_mean" in remarks(flow_logit_mean=0.5)


@pytest.mark.parametrize("fallback", ["out", "./other/../out", "link", "{}/out"])
def test_output_dir_by_another_spelling_is_no_fallback(tmp_path, monkeypatch, fallback: str) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("out", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "link").symlink_to("out")
    named = Path(fallback.format(tmp_path))
    assert "save_fallback_dir" in refused(output_dir=Path("out"), save_fallback_dir=named)
    assert "save_fallback_dir" not in refused(output_dir=Path("out"), save_fallback_dir=Path("other"))


def test_the_wait_for_storage_may_have_no_end() -> None:
    assert Config(save_retry_minutes=math.inf).save_retry_minutes == math.inf
    for value in (math.nan, -1.0):
        with pytest.raises(ValidationError, match="save_retry_minutes"):
            Config(save_retry_minutes=value)
