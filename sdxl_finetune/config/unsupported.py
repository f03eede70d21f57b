"""Options that real configs contain and this program does not have, each with what happens to it.

`REFERENCE` lists the other options of the reference's SDXL trainer. Together with the schema it covers all of them.
`FOREIGN` lists options of the reference's other trainers and of its GUIs. A switched-off option is accepted.
Otherwise an option has one of three outcomes:

    no effect   a warning says so once
    honoured    it is read as the option that the remark names
    refused     ignoring it would change what the user asked for
"""

from dataclasses import dataclass
from typing import Literal

_DEEPSPEED = (
    "DeepSpeed is not used. Gradients are averaged over all cards, and each card holds the optimizer states of all"
    " parameters: sdxl-check and the log of the run say their memory. fused_backward_pass and Adafactor or an 8-bit"
    " optimizer save as much"
)
_LAUNCHER = "it belongs on the command line of accelerate launch"
_GUI = "it belongs to a GUI"
_IGNORED = "the reference's SDXL trainer ignores it too"
_LORA = "it belongs to LoRA training, but this program trains the whole model"
_OTHER_MODELS = "it belongs to models other than SDXL"
_FORK = "it belongs to a fork of sd-scripts and changes what is trained, but this program does not have it: remove it"
_LEARNED = (
    "learned loss weights are part of a training state and come back with resume; a new run learns them anew, and the"
    " network of forks has another input: remove it"
)

NO_EFFECT = {
    "lowram highvram": "models are always loaded to the device that uses them",
    "no_half_vae": "the VAE always runs in float32",
    "persistent_data_loader_workers": "data-loader workers always run until the end of the run",
    "mem_eff_attn": "xformers and torch's attention save as much memory",
    "cache_info": "captions and image sizes are always kept in cache_dir",
    "disable_mmap_load_safetensors": "weights are always read once, tensor by tensor",
    "clip_skip": "SDXL always uses the last but one layer of its text encoders, as in the reference",
    "fp8_base": "the reference's SDXL trainer ignores it too. full_bf16 and fused_backward_pass save memory",
    "deepspeed zero_stage zero3_init_flag zero3_save_16bit_model fp16_master_weights_and_gradients": _DEEPSPEED,
    "offload_optimizer_device offload_optimizer_nvme_path": _DEEPSPEED,
    "offload_param_device offload_param_nvme_path": _DEEPSPEED,
    "config_file output_config": "it belongs on the command line",
}
NOT_SUPPORTED = {
    "v2": "this program trains SDXL only: start from an SDXL checkpoint",
    "dataset_class": "it would run code of your own: use dataset_config",
}
FOREIGN_NO_EFFECT = {
    "no_token_padding": "captions are always padded, as in the reference's SDXL trainer",
    "sdxl sdxl_checkbox": "this program trains SDXL only",
    "skip_until_initial_step": "a run always starts with the batches of its first step, and loads no others",
    "epoch": "max_train_epochs is the number of epochs; the reference ignores this option too",
    "noise_offset_type": "noise_offset and multires_noise_iterations choose the kind of noise",
    "prior_loss_weight": f"{_IGNORED}. Repeats set the share of regularisation images",
    "unet_lr": f"{_IGNORED}. learning_rate is the learning rate of the U-Net",
    "text_encoder_lr learning_rate_te": f"{_IGNORED}. Use learning_rate_te1 and learning_rate_te2",
    "network_train_unet_only": f"{_IGNORED}. Without train_text_encoder, only the U-Net is trained",
    "network_train_text_encoder_only": f"{_IGNORED}. train_text_encoder with learning_rate = 0 does this",
    "stop_text_encoder_training": f"{_IGNORED}. Text encoders train to the end, or not at all",
    "lr_warmup": f"{_IGNORED}. lr_warmup_steps takes steps, or a share as 0.1",
    "use_wandb": f'{_IGNORED}. Use log_with = "wandb"',
    "batch_size": f"{_IGNORED}. Use train_batch_size",
    "num_repeats class_tokens image_dir metadata_file is_reg": f"{_IGNORED}. It belongs in a dataset_config file",
    "train_inpainting": f"{_IGNORED}. Masks and inpainting inputs are not used",
    "fp8_base_unet": f"{_IGNORED}. full_bf16 and fused_backward_pass save memory",
    "learning_rate_te3 train_t5xxl": "SDXL has two text encoders",
    "network_dim network_alpha network_args network_dropout network_weights dim_from_weights": _LORA,
    "train_norm dropout": _LORA,
    "conv_dim conv_alpha scale_weight_norms LoRA_type base_weights base_weights_multiplier": _LORA,
    "loraplus_lr_ratio loraplus_unet_lr_ratio loraplus_text_encoder_lr_ratio": _LORA,
    "no_metadata": "saved files always contain their metadata",
    "training_comment": "use metadata_description for a comment",
    "sample_dir sample_batch_size": "previews are saved in the folder sample of output_dir",
    "pin_memory pin_data_loader_memory": "batches for a GPU always lie in pinned memory",
    "lr_restart_cycles": f"{_IGNORED}. Use lr_scheduler_num_cycles",
    "min_lr": f"{_IGNORED}. Use lr_scheduler_min_lr_ratio, the lowest rate as a share of the highest",
    "keep_only_last_n_checkpoints": f"{_IGNORED}. Use save_last_n_epochs or save_last_n_steps",
    "log_caption_dropout log_caption_tag_dropout list_unet_blocks": "it only prints more in a fork of sd-scripts",
    "accumulation_n_steps": f"{_IGNORED}. Use gradient_accumulation_steps",
    "global_step taiyi latents_data_dir tokenizer1_path tokenizer2_path": f"{_IGNORED}",
    "disable_cuda_reduced_precision_operations": "torch's own settings of precision are used",
    "enable_npu_flash_attention": "it belongs to another kind of accelerator",
    "prefetch_factor": "data-loader workers always prepare the next batches",
    "skip_existing": "existing latents are always used if they are valid",
    "full_path recursive": "it belongs to the reference's scripts that write metadata files",
    "latents_only": "latents are cached with cache_latents, and images are read without it",
    "num_processes num_machines num_cpu_threads_per_process multi_gpu": _LAUNCHER,
    "gpu_ids main_process_port extra_accelerate_launch_args": _LAUNCHER,
    "dynamo_mode dynamo_use_dynamic dynamo_use_fullgraph": _LAUNCHER,
    "model_list save_as_bool headless template": _GUI,
    "log_tracker_config_dir state_dir vae_dir model_train_type enable_preview ui_custom_params": _GUI,
    "positive_prompts negative_prompts sample_width sample_height sample_cfg sample_seed sample_steps": _GUI,
    "randomly_choice_prompt prompt_file optimizer_args_custom prodigy_d0 prodigy_d_coef": _GUI,
    "compile compile_mode compile_backend compile_dynamic compile_fullgraph": _GUI,
    "image_folder caption_metadata_filename latent_metadata_filename train_dir": _GUI,
    "create_buckets create_caption use_latent_files generate_caption_database generate_image_buckets": _GUI,
    "sdxl_no_half_vae": "the VAE always runs in float32",
    "ae clip_l clip_g t5xxl gemma2 qwen3 discrete_flow_shift guidance_scale": _OTHER_MODELS,
    "timestep_sampling weighting_scheme logit_mean logit_std mode_scale": _OTHER_MODELS,
    "sigmoid_scale model_prediction_type blocks_to_swap train_blocks split_mode attn_mode split_attn": _OTHER_MODELS,
    "save_clip save_t5xxl t5xxl_device t5xxl_dtype t5xxl_max_token_length apply_t5_attn_mask": _OTHER_MODELS,
    "apply_lg_attn_mask clip_l_dropout_rate clip_g_dropout_rate t5_dropout_rate training_shift": _OTHER_MODELS,
    "blockwise_fused_optimizers cpu_offload_checkpointing single_blocks_to_swap": _OTHER_MODELS,
    "double_blocks_to_swap mem_eff_save show_timesteps show_timesteps_resolution vae_chunk_size": _OTHER_MODELS,
    "enable_scaled_pos_embed pos_emb_random_crop_rate model_type llm_adapter_path": _OTHER_MODELS,
    "edm2_loss_weighting_generate_graph": "the log always shows the curve of learned loss weights",
    "edm2_loss_weighting_generate_graph_output_dir": "the log holds the pictures of learned loss weights",
    "edm2_loss_weighting_generate_graph_y_limit": "the picture of learned loss weights fits its axis to the curve",
    "use_flash_attn use_sage_attn unsloth_offload_checkpointing system_prompt": _OTHER_MODELS,
}
HONOURED = {
    "optimizer": "optimizer_type",
    "max_resolution": "resolution",
    "skip_latents_validity_check": "skip_cache_check",
    "validation_every_n_step": "validate_every_n_steps",
    "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "loss_multipler": "loss_multiplier",
    "adaptive_loss_weighting": "edm2_loss_weighting",
}
_IMMISCIBLE = (
    "it mixes noise by the alphas of single steps, which gives inputs nearly without noise at every timestep."
    " immiscible_noise pairs noise and keeps the noise schedule: remove immiscible_diffusion"
)
FOREIGN_REFUSED = {
    "immiscible_diffusion": _IMMISCIBLE,
    "network_module": "this is a LoRA config, but this program trains the whole model: use a config without it",
    "additional_parameters": "write each of these options as a key of its own",
    "token_string init_word num_vectors_per_token": "this is a config for textual inversion: remove it",
    "perlin_noise optimizer_schedulefree_wrapper": _FORK,
    "vae_custom_scale vae_custom_shift": _FORK,
    "vae_reflection_padding use_zero_cond freeze_unet_blocks": _FORK,
    "edm2_loss_weighting_initial_weights adaptive_loss_model_path": _LEARNED,
    "edm2_loss_weighting_laplace": _FORK,
    "edm2_loss_weighting_importance_weighting edm2_loss_weighting_importance_weighting_max": _FORK,
    "edm2_loss_weighting_importance_min_snr_gamma edm2_loss_weighting_importance_weighting_safety_override": _FORK,
    "use_soft_min_snr": "it is a switch of SimpleTuner: use soft_min_snr_gamma, which needs a number, as 5",
    "min_snr_gamma_mix_debiased": _FORK,
    "loss_scale multires_noise_scaling stochastic_accumulation": _FORK,
    "ip_noise_gamma_scaling sangoi_loss_modifier fourier_loss use_log_norm_timesteps": _FORK,
    "vae_type latent_channels disable_cross_attn_mask use_zero_cond_dropout": _FORK,
    "use_kahan_summation skip_image_resolution": _FORK,
    "cwmi_lambda masked_min reg_min_timestep reg_max_timestep": _FORK,
}
OFF: dict[str, tuple[object, ...]] = {"clip_skip": (1, 2), "zero_stage": (2,)}
"""Values that switch an option off, besides false, 0 and the empty text."""


@dataclass(frozen=True)
class Foreign:
    """The outcome for an option that is not in the schema."""

    outcome: Literal["no effect", "honoured", "refused"]
    remark: str
    """Reason and remedy, or the name of the option that an honoured option is read as."""


def _each(outcome: Literal["no effect", "honoured", "refused"], rows: dict[str, str]) -> dict[str, Foreign]:
    return {name: Foreign(outcome, remark) for names, remark in rows.items() for name in names.split()}


REFERENCE = _each("no effect", NO_EFFECT) | _each("refused", NOT_SUPPORTED)
FOREIGN = _each("no effect", FOREIGN_NO_EFFECT) | _each("honoured", HONOURED) | _each("refused", FOREIGN_REFUSED)


def is_off(name: str, value: object) -> bool:
    """True if the value switches the option off. A foreign option without effect is never off: the user is told."""
    always_mentioned = name in FOREIGN and FOREIGN[name].outcome == "no effect"
    return not always_mentioned and (not value or value in OFF.get(name, ()))
