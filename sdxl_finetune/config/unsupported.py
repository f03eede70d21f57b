"""Options that real configs carry and the schema lacks, each with what happens to it.

`REFERENCE` is the rest of the reference's SDXL trainer: together with the schema it covers every option there.
`FOREIGN` are options of its other trainers and of its GUIs. An option that is switched off is accepted. What
happens otherwise: it has no effect (said once), it is honoured (as the option that the remark names), or it is
refused, because to ignore it would change what the user asked for.
"""

from dataclasses import dataclass
from typing import Literal

NO_EFFECT = {
    "lowram highvram": "models are always loaded to the device that uses them",
    "no_half_vae": "the VAE always runs in float32",
    "persistent_data_loader_workers": "workers always live as long as the run",
    "mem_eff_attn": "attention is PyTorch's, which is as sparing of memory, or xformers'",
    "cache_info": "captions and image sizes are always kept in cache_dir",
    "disable_mmap_load_safetensors": "weights are read once, tensor by tensor",
    "zero_stage zero3_init_flag zero3_save_16bit_model fp16_master_weights_and_gradients": "it is for deepspeed",
    "offload_optimizer_device offload_optimizer_nvme_path": "it is for deepspeed",
    "offload_param_device offload_param_nvme_path": "it is for deepspeed",
    "huggingface_repo_type huggingface_path_in_repo huggingface_repo_visibility": "it is for huggingface_repo_id",
    "huggingface_token async_upload": "it is for huggingface_repo_id",
    "config_file output_config": "it belongs on the command line",
}
NOT_SUPPORTED = {
    "v2": "this trains SDXL only; start from an SDXL checkpoint",
    "clip_skip": "SDXL always uses the last but one layer of its text encoders; leave it out",
    "dataset_class": "it runs code of your own; use dataset_config",
    "masked_loss alpha_mask conditioning_data_dir": "not supported yet; train without masks",
    "face_crop_aug_range debug_dataset deepspeed": "not supported yet; leave it out",
    "cache_text_encoder_outputs cache_text_encoder_outputs_to_disk": "not supported yet; leave it out",
    "save_state_to_huggingface": "not supported yet; upload saved states by other means",
    "resume_from_huggingface": "not supported yet; download the state and give its path as resume",
    "huggingface_repo_id": "not supported yet; upload saved files by other means",
    "full_fp16": "not supported yet; use mixed_precision fp16, or full_bf16",
    "fp8_base": "not supported yet; use full_bf16",
}
_LORA = "this is a LoRA config, and this program trains the whole model"
FOREIGN_NO_EFFECT = {
    "no_token_padding": "captions are always padded, as in the reference's SDXL trainer",
    "sdxl sdxl_checkbox": "this trains SDXL only",
    "epoch": "max_train_epochs is the number of epochs; the reference ignores this too",
    "noise_offset_type": "noise_offset and multires_noise_iterations say which noise",
    "prior_loss_weight": "the reference's SDXL trainer ignores it too",
    "network_dim network_alpha network_args network_dropout network_weights dim_from_weights": _LORA,
    "conv_dim conv_alpha scale_weight_norms LoRA_type": _LORA,
    "no_metadata": "saved files always carry their metadata",
    "training_comment": "metadata_description is the place for it",
    "sample_dir sample_batch_size": "previews go to the folder sample in output_dir",
    "num_processes num_machines num_cpu_threads_per_process multi_gpu": "it belongs to accelerate launch",
    "gpu_ids main_process_port extra_accelerate_launch_args": "it belongs to accelerate launch",
    "dynamo_mode dynamo_use_dynamic dynamo_use_fullgraph": "it belongs to accelerate launch",
    "model_list save_as_bool headless": "it belongs to a GUI",
}
HONOURED = {"optimizer": "optimizer_type", "max_resolution": "resolution"}
FOREIGN_REFUSED = {
    "network_module": _LORA,
    "network_train_unet_only": "leave it out, and train_text_encoder as well",
    "network_train_text_encoder_only": "set train_text_encoder, and learning_rate to 0",
    "unet_lr": "the U-Net's learning rate is learning_rate",
    "text_encoder_lr learning_rate_te": "use learning_rate_te1 and learning_rate_te2",
    "learning_rate_te3 train_t5xxl": "SDXL has two text encoders",
    "stop_text_encoder_training": "text encoders train to the end, or not at all without train_text_encoder",
    "lr_warmup": "use lr_warmup_steps, a number of steps or a share as 0.1",
    "use_wandb": "set log_with to wandb",
    "num_repeats class_tokens image_dir metadata_file is_reg": "it belongs in a dataset_config file",
    "batch_size": "use train_batch_size",
    "additional_parameters": "write these options as keys of their own",
    "initial_epoch initial_step skip_until_initial_step": "not supported yet; leave it out",
    "perlin_noise optimizer_schedulefree_wrapper": "not an option of SDXL training; leave it out",
    "ae clip_l clip_g t5xxl gemma2 qwen3 discrete_flow_shift guidance_scale": "it is for other models than SDXL",
    "timestep_sampling weighting_scheme logit_mean logit_std mode_scale": "it is for other models than SDXL",
    "sigmoid_scale model_prediction_type blocks_to_swap": "it is for other models than SDXL",
    "token_string init_word num_vectors_per_token": "this is a config for textual inversion",
}
OFF: dict[str, tuple[object, ...]] = {
    "zero_stage": (2,),
    "clip_skip": (1, 2),
}
"""Values besides false, 0 and the empty text that switch an option off."""


@dataclass(frozen=True)
class Foreign:
    """What happens to an option that is not in the schema."""

    outcome: Literal["no effect", "honoured", "refused"]
    remark: str


def _each(outcome: Literal["no effect", "honoured", "refused"], rows: dict[str, str]) -> dict[str, Foreign]:
    return {name: Foreign(outcome, remark) for names, remark in rows.items() for name in names.split()}


REFERENCE = _each("no effect", NO_EFFECT) | _each("refused", NOT_SUPPORTED)
FOREIGN = _each("no effect", FOREIGN_NO_EFFECT) | _each("honoured", HONOURED) | _each("refused", FOREIGN_REFUSED)


def is_off(name: str, value: object) -> bool:
    """Whether an option with this value asks for nothing; a foreign one without effect is mentioned always."""
    mentioned = name in FOREIGN and FOREIGN[name].outcome == "no effect"
    return not mentioned and (not value or value in OFF.get(name, ()))
