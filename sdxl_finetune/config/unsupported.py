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

_DEEPSPEED = "it belongs to deepspeed, which is not supported"
_LAUNCHER = "it belongs on the command line of accelerate launch"
_LORA = "it belongs to LoRA training, but this program trains the whole model"
_OTHER_MODELS = "it belongs to models other than SDXL: remove it"

NO_EFFECT = {
    "lowram highvram": "models are always loaded to the device that uses them",
    "no_half_vae": "the VAE always runs in float32",
    "persistent_data_loader_workers": "data-loader workers always run until the end of the run",
    "mem_eff_attn": "xformers and torch's attention save as much memory",
    "cache_info": "captions and image sizes are always kept in cache_dir",
    "disable_mmap_load_safetensors": "weights are always read once, tensor by tensor",
    "zero_stage zero3_init_flag zero3_save_16bit_model fp16_master_weights_and_gradients": _DEEPSPEED,
    "offload_optimizer_device offload_optimizer_nvme_path": _DEEPSPEED,
    "offload_param_device offload_param_nvme_path": _DEEPSPEED,
    "config_file output_config": "it belongs on the command line",
}
NOT_SUPPORTED = {
    "v2": "this program trains SDXL only: start from an SDXL checkpoint",
    "clip_skip": "SDXL always uses the last but one layer of its text encoders: remove it",
    "dataset_class": "it would run code of your own: use dataset_config",
    "masked_loss alpha_mask conditioning_data_dir": "not supported yet: train without masks",
    "face_crop_aug_range debug_dataset deepspeed": "not supported yet: remove it",
    "cache_text_encoder_outputs cache_text_encoder_outputs_to_disk": "not supported yet: remove it",
    "full_fp16": "not supported yet: use mixed_precision fp16, or full_bf16",
    "fp8_base": "not supported yet: use full_bf16",
}
FOREIGN_NO_EFFECT = {
    "no_token_padding": "captions are always padded, as in the reference's SDXL trainer",
    "sdxl sdxl_checkbox": "this program trains SDXL only",
    "epoch": "max_train_epochs is the number of epochs; the reference ignores this option too",
    "noise_offset_type": "noise_offset and multires_noise_iterations choose the kind of noise",
    "prior_loss_weight": "the reference's SDXL trainer ignores it too",
    "network_dim network_alpha network_args network_dropout network_weights dim_from_weights": _LORA,
    "conv_dim conv_alpha scale_weight_norms LoRA_type": _LORA,
    "no_metadata": "saved files always contain their metadata",
    "training_comment": "use metadata_description for a comment",
    "sample_dir sample_batch_size": "previews are saved in the folder sample of output_dir",
    "num_processes num_machines num_cpu_threads_per_process multi_gpu": _LAUNCHER,
    "gpu_ids main_process_port extra_accelerate_launch_args": _LAUNCHER,
    "dynamo_mode dynamo_use_dynamic dynamo_use_fullgraph": _LAUNCHER,
    "model_list save_as_bool headless": "it belongs to a GUI",
}
HONOURED = {"optimizer": "optimizer_type", "max_resolution": "resolution"}
FOREIGN_REFUSED = {
    "network_module": "this is a LoRA config, but this program trains the whole model: use a config without it",
    "network_train_unet_only": "remove it and train_text_encoder, to train the U-Net only",
    "network_train_text_encoder_only": "set train_text_encoder = true and learning_rate = 0 instead",
    "unet_lr": "set learning_rate, the learning rate of the U-Net, instead",
    "text_encoder_lr learning_rate_te": "set learning_rate_te1 and learning_rate_te2 instead",
    "learning_rate_te3 train_t5xxl": "SDXL has two text encoders: remove it",
    "stop_text_encoder_training": "text encoders train to the end, or not at all without train_text_encoder: remove it",
    "lr_warmup": "set lr_warmup_steps instead, to a number of steps or to a share as 0.1",
    "use_wandb": 'set log_with = "wandb" instead',
    "num_repeats class_tokens image_dir metadata_file is_reg": "it belongs in a dataset_config file: move it there",
    "batch_size": "set train_batch_size instead",
    "additional_parameters": "write each of these options as a key of its own",
    "initial_epoch initial_step skip_until_initial_step": "not supported yet: remove it",
    "perlin_noise optimizer_schedulefree_wrapper": "it does not belong to SDXL training: remove it",
    "ae clip_l clip_g t5xxl gemma2 qwen3 discrete_flow_shift guidance_scale": _OTHER_MODELS,
    "timestep_sampling weighting_scheme logit_mean logit_std mode_scale": _OTHER_MODELS,
    "sigmoid_scale model_prediction_type blocks_to_swap": _OTHER_MODELS,
    "token_string init_word num_vectors_per_token": "this is a config for textual inversion: remove it",
}
OFF: dict[str, tuple[object, ...]] = {"zero_stage": (2,), "clip_skip": (1, 2)}
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
