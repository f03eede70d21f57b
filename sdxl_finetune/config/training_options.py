"""Options of the model, the loss, the optimizer and the hardware."""

from typing import Annotated, Literal

from pydantic import Field

from sdxl_finetune.config.data_options import HELD_OUT, HoldOutOptions
from sdxl_finetune.config.fields import (
    Arguments,
    Backend,
    BlockNumbers,
    BlockRates,
    ChunkTokens,
    FileLocation,
    FilePath,
    OnlyWith,
    Options,
    Patterns,
    Scheduler,
    StepsOrShare,
)

HUBER = OnlyWith("loss_type", ("huber", "smooth_l1"))
ObjectiveKind = Literal["noise", "velocity", "flow"]
"""Names of the objectives: the quantity that a model predicts."""
EMA = OnlyWith("ema_decay ema_half_life")


class ModelOptions(Options):
    """Model"""

    pretrained_model_name_or_path: FileLocation | None = None
    """SDXL checkpoint to start from: a file or a diffusers folder. Only what stands at an address is downloaded."""
    vae: FileLocation | None = None
    """VAE that replaces the VAE of the checkpoint: a file or a diffusers folder."""
    tokenizer_cache_dir: FilePath | None = None
    """Folder with tokenizer files. Default: the CLIP vocabulary of this package."""
    max_token_length: Annotated[int, ChunkTokens] = Field(75, ge=75)
    """Caption tokens that are read: a multiple of 75. Other values are rounded down, as in sd-scripts."""
    weighted_captions: bool = False
    """Read `(tag:1.3)` and `[tag]` in captions as weights. Off: as plain text."""
    caption_break: bool = False
    """Start a new chunk of 75 tokens at the word BREAK in captions and preview prompts. Not in sd-scripts."""
    use_zero_cond: bool = False
    """Give the U-Net zeros for empty captions, in place of the encoded empty text. Of forks of sd-scripts."""


class NoiseOptions(Options):
    """Noise and timesteps"""

    zero_terminal_snr: bool = False
    """End the noise schedule in pure noise (Lin et al., arXiv 2305.08891). Meant for `v_parameterization`."""
    noise_offset: float | None = Field(None, ge=0)
    """Strength of a random constant that is added to the noise of each latent channel. 0: off."""
    noise_offset_random_strength: Annotated[bool, OnlyWith("noise_offset")] = False
    """Draw the strength between 0 and `noise_offset` for each micro-batch."""
    adaptive_noise_scale: float | None = None
    """Adds this times the absolute mean of each latent channel to `noise_offset`. Needs `cache_latents`."""
    multires_noise_iterations: int | None = Field(None, ge=0)
    """Layers of coarser noise added to the noise. Usual: 6 to 10. 0: off."""
    multires_noise_discount: Annotated[float, OnlyWith("multires_noise_iterations")] = Field(0.3, ge=0, le=1)
    """Strength of each layer of multires noise, relative to the next finer layer."""
    ip_noise_gamma: float | None = Field(None, ge=0)
    """Strength of extra noise in the model's input only (Ning et al., arXiv 2301.11706). 0: off."""
    ip_noise_gamma_random_strength: Annotated[bool, OnlyWith("ip_noise_gamma")] = False
    """Draw the strength between 0 and `ip_noise_gamma` for each micro-batch."""
    min_timestep: int | None = Field(None, ge=0, le=999)
    """First timestep that is trained. Default: 0."""
    max_timestep: int | None = Field(None, ge=1, le=1000)
    """Timestep at which training ends; it is not trained itself. Default: 1000."""

    @property
    def timestep_range(self) -> tuple[int, int]:
        """The first timestep that is trained, and the one at which training ends."""
        return self.min_timestep or 0, 1000 if self.max_timestep is None else self.max_timestep


class LossOptions(Options):
    """Objective and loss"""

    masked_loss: Annotated[bool, OnlyWith("conditioning_data_dir alpha_mask")] = False
    """Multiply the loss by the masks in `conditioning_data_dir`. The average is over all pixels."""
    v_parameterization: bool = False
    """Train the model to predict velocity. Off: to predict noise."""
    flow_model: bool = False
    """Train the model as a rectified flow, to predict noise minus latents. Of forks of sd-scripts."""
    contrastive_flow_matching: bool = False
    """Push predictions off the targets of other images. Turns on `cache_latents`. Of forks of sd-scripts."""
    cfm_lambda: Annotated[float, OnlyWith("contrastive_flow_matching")] = Field(0.05, ge=0, lt=1)
    """Share of the loss against another image's target that is subtracted. Of forks of sd-scripts."""
    loss_type: Literal["l1", "l2", "huber", "smooth_l1"] = "l2"
    """Distance between prediction and target."""
    huber_schedule: Annotated[Literal["constant", "exponential", "snr"], HUBER] = "snr"
    """How the threshold of `huber` and `smooth_l1` depends on the timestep."""
    huber_c: Annotated[float, HUBER] = Field(0.1, ge=0)
    """Threshold of `huber` and `smooth_l1`."""
    huber_scale: Annotated[float, HUBER, OnlyWith("huber_schedule", ("snr",), unless=True)] = Field(1.0, gt=0)
    """Factor of that threshold. The `snr` schedule ignores it."""
    min_snr_gamma: float | None = Field(None, ge=0)
    """Limit of the signal-to-noise ratio in the loss weight (Hang et al., arXiv 2303.09556). Usual: 5. 0: off."""
    soft_min_snr_gamma: float | None = Field(None, ge=0)
    """Smooth form of `min_snr_gamma` (Crowson et al., arXiv 2401.11605). Usual: 5. 0: off. Of forks of sd-scripts."""
    loss_multiplier: float | None = Field(None, ge=0)
    """Factor of every loss. 0: off. Of forks of sd-scripts."""
    scale_v_pred_loss_like_noise_pred: bool = False
    """Weight the velocity loss like a noise loss. Needs `v_parameterization`."""
    v_pred_like_loss: float | None = None
    """Add a noise loss weighted like a velocity loss, times this. Not with `v_parameterization`."""
    debiased_estimation_loss: bool = False
    """Weight the loss by 1 / sqrt(signal-to-noise ratio) (Yu et al., arXiv 2310.08442)."""

    @property
    def objective(self) -> ObjectiveKind:
        """The quantity that the model learns to predict."""
        return "flow" if self.flow_model else "velocity" if self.v_parameterization else "noise"


class OptimizerOptions(Options):
    """Optimizer"""

    optimizer_type: str = ""
    """Optimizer: AdamW, AdamW8bit, Lion, Adafactor, ... or a class path as torch.optim.RAdam. Default: AdamW."""
    use_8bit_adam: bool = False
    """Older form of `optimizer_type` AdamW8bit."""
    use_lion_optimizer: bool = False
    """Older form of `optimizer_type` Lion."""
    optimizer_args: Arguments = Field(default_factory=dict)
    """Arguments of the optimizer, as `weight_decay=0.1 betas=0.9,0.99`."""
    learning_rate: float = Field(2e-06, ge=0)
    """Learning rate of the U-Net, and of a text encoder without a rate of its own. 0: do not train the U-Net."""
    train_text_encoder: bool = False
    """Train both text encoders as well."""
    learning_rate_te1: Annotated[float | None, OnlyWith("train_text_encoder")] = Field(None, ge=0)
    """Learning rate of text encoder 1 (CLIP ViT-L). Default: `learning_rate`. 0: do not train it."""
    learning_rate_te2: Annotated[float | None, OnlyWith("train_text_encoder")] = Field(None, ge=0)
    """Learning rate of text encoder 2 (OpenCLIP ViT-bigG). Default: `learning_rate`. 0: do not train it."""
    block_lr: BlockRates | None = None
    """Learning rates of the U-Net's blocks: embeddings, 9 input, 3 middle, 9 output blocks, last layer: 23 for SDXL."""
    freeze_unet_blocks: BlockNumbers | None = None
    """Numbers of blocks of the U-Net that are not trained, counted from 0 as in `block_lr`. Of forks of sd-scripts."""
    freeze_parameters: Patterns | None = None
    """Names of parameters that are not trained, with wildcards. Not in sd-scripts."""
    train_parameters: Patterns | None = None
    """Names of the only parameters that are trained, with wildcards. Default: all. Not in sd-scripts."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Largest norm of the gradients; larger gradients are scaled down to it. 0: off."""

    @property
    def optimizer_name(self) -> str:
        """Name of the optimizer: `optimizer_type`, or the optimizer of an older option, or AdamW."""
        if self.use_8bit_adam:
            return "AdamW8bit"
        if self.use_lion_optimizer:
            return "Lion"
        return self.optimizer_type or "AdamW"

    @property
    def is_schedule_free(self) -> bool:
        """True for an optimizer that needs no learning-rate schedule and ignores one (arXiv 2405.15682)."""
        return self.optimizer_name.lower().endswith("schedulefree")

    @property
    def is_relative_step(self) -> bool:
        """True for transformers' Adafactor if it sets its own rates (arXiv 1804.04235, section 8), as by default."""
        if self.optimizer_name.lower() not in ("adafactor", "transformers.optimization.adafactor"):
            return False
        return bool(self.optimizer_args.get("relative_step", True) or self.optimizer_args.get("warmup_init"))

    @property
    def estimates_rate(self) -> bool:
        """True for Prodigy and D-Adaptation, which multiply the learning rate by an estimate `d` of their own."""
        return self.optimizer_name.lower().rpartition(".")[2].startswith(("prodigy", "dadapt"))


class LrOptions(Options):
    """Learning-rate schedule"""

    lr_scheduler: Scheduler = "constant"
    """Learning-rate schedule after warm-up. `adafactor` and `adafactor:RATE` are for Adafactor."""
    lr_scheduler_type: str = ""
    """Class of torch.optim.lr_scheduler, or a class path. Replaces `lr_scheduler`."""
    lr_scheduler_args: Arguments = Field(default_factory=dict)
    """Arguments of that class or of the schedule, as `T_max=100`."""
    lr_warmup_steps: Annotated[
        StepsOrShare, OnlyWith("lr_scheduler", ("constant", "piecewise_constant", "adafactor"), unless=True)
    ] = 0
    """Optimizer steps in which the learning rate rises from 0. 0.1 or "10%": that share of all steps."""
    lr_decay_steps: Annotated[StepsOrShare, OnlyWith("lr_scheduler", ("warmup_stable_decay",))] = 0
    """Optimizer steps of the final fall of warmup_stable_decay. 0.1 or "10%": that share of all steps."""
    lr_scheduler_num_cycles: Annotated[
        int, OnlyWith("lr_scheduler", ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"))
    ] = Field(1, ge=0)
    """Cycles of the cosine schedules."""
    lr_scheduler_power: Annotated[float, OnlyWith("lr_scheduler", ("polynomial",))] = Field(1.0, ge=0)
    """Power of the polynomial schedule."""
    lr_scheduler_timescale: Annotated[int | None, OnlyWith("lr_scheduler", ("inverse_sqrt",))] = Field(None, ge=1)
    """Timescale of inverse_sqrt in optimizer steps. Default: the warm-up steps, or 10,000 without."""
    lr_scheduler_min_lr_ratio: Annotated[
        float | None, OnlyWith("lr_scheduler", ("cosine_with_min_lr", "cosine_with_restarts", "warmup_stable_decay"))
    ] = Field(None, ge=0, le=1)
    """Lowest rate of cosine_with_min_lr, cosine_with_restarts and warmup_stable_decay, as a share of the highest."""
    lr_scheduler_cycle_decay: Annotated[float, OnlyWith("lr_scheduler", ("cosine_with_restarts",))] = Field(
        1.0, gt=0, le=1
    )
    """Highest rate of each cycle of cosine_with_restarts, as a share of the cycle before. Not in sd-scripts."""


class EmaOptions(Options):
    """EMA of the weights"""

    ema_decay: float | None = Field(None, ge=0, le=1)
    """Share of the EMA that stays at each step, as 0.999. Default: no EMA. Not in sd-scripts."""
    ema_half_life: float | None = Field(None, ge=1)
    """Decay of the EMA as a half-life in images; excludes `ema_decay`. Default: no EMA. Not in sd-scripts."""
    ema_previews: Annotated[bool, EMA] = True
    """Draw previews with the EMA, if there is one. Not in sd-scripts."""
    ema_validation: Annotated[bool, EMA] = True
    """Validate the EMA, if there is one. Not in sd-scripts."""
    ema_save: Annotated[bool, EMA] = True
    """Save the EMA in checkpoints, if there is one. Training states hold both. Not in sd-scripts."""
    ema_on_cpu: Annotated[bool, EMA] = False
    """Keep the EMA in host memory. Slower, but saves 4 bytes of GPU memory per parameter. Not in sd-scripts."""


class ValidationOptions(HoldOutOptions):
    """Validation"""

    validate_every_n_steps: Annotated[int | None, HELD_OUT, OnlyWith("validate_every_n_epochs", unless=True)] = Field(
        None, ge=0
    )
    """Validate every N optimizer steps. 0: only before and after training."""
    validate_every_n_epochs: Annotated[int | None, HELD_OUT] = Field(None, ge=0)
    """Validate every N epochs. Default: 1 if `validate_every_n_steps` is not set. If both are set, epochs win."""
    max_validation_steps: Annotated[int | None, HELD_OUT] = Field(None, ge=1)
    """Largest number of batches in a validation. Default: all."""
    validation_timesteps: Annotated[int, HELD_OUT] = Field(4, ge=1, le=1000)
    """Evenly spread timesteps at which each held-out image is validated. Not in sd-scripts."""


class LengthOptions(Options):
    """Length of the run"""

    max_train_epochs: int | None = Field(None, ge=1, le=10**9)
    """Epochs of the whole run. Wins over `max_train_steps`."""
    max_train_steps: Annotated[int, OnlyWith("max_train_epochs", unless=True)] = Field(1600, ge=0, le=10**9)
    """Optimizer steps of the whole run. 0: `max_train_epochs` says how long the run is."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Micro-batches per optimizer step."""
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    """Seed of all random numbers. Default: drawn at random, printed and saved."""


class HardwareOptions(Options):
    """Precision, memory and devices"""

    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Data type of the computation. `no`: float32."""
    full_bf16: bool = False
    """Keep weights and gradients in bf16. Needs `mixed_precision` bf16."""
    full_fp16: bool = False
    """Keep weights and gradients in fp16. Needs `mixed_precision` fp16. For GPUs without bf16."""
    exact_masters: Annotated[bool, OnlyWith("full_bf16 full_fp16")] = True
    """With `full_bf16` or `full_fp16`: train float32 master weights, 2 bytes more per weight. Not in sd-scripts."""
    fused_backward_pass: bool = False
    """Step each parameter inside the backward pass, as soon as it has a gradient, and free the gradient."""
    fused_optimizer_groups: int | None = Field(None, ge=0)
    """Any number above 0 means `fused_backward_pass`, which needs no groups. 0: off."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass. Saves memory; about a quarter slower."""
    xformers: bool = False
    """Compute attention with xformers, or with torch if xformers is not installed."""
    diffusers_xformers: bool = False
    """Other name of `xformers`."""
    sdpa: bool = False
    """Compute attention with torch's scaled_dot_product_attention. This is also the default."""
    torch_compile: bool = False
    """Compile the U-Net's transformer blocks. The first step is slow, later steps are faster."""
    dynamo_backend: Annotated[
        Literal[
            "eager",
            "aot_eager",
            "inductor",
            "aot_ts_nvfuser",
            "nvprims_nvfuser",
            "cudagraphs",
            "ofi",
            "fx2trt",
            "onnxrt",
            "tensort",
            "ipex",
            "tvm",
        ],
        Backend,
        OnlyWith("torch_compile"),
    ] = "inductor"
    """Backend of `torch_compile`. `no`, which GUIs write, means the default. Current torch has the first three."""
    ddp_timeout: int | None = Field(None, ge=1)
    """Minutes that a process waits for other processes. Default: set by accelerate."""
    ddp_gradient_as_bucket_view: bool = False
    """Several processes: let gradients share memory with the buffers that sum them."""
    ddp_static_graph: bool = False
    """Several processes: tell torch that every step uses the same parameters."""

    @property
    def is_fused(self) -> bool:
        """True if the optimizer steps inside the backward pass. Either of the reference's two options asks for this."""
        return self.fused_backward_pass or bool(self.fused_optimizer_groups)

    @property
    def keeps_masters(self) -> bool:
        """True if each 16-bit weight is the rounding of a float32 master weight."""
        return (self.full_bf16 or self.full_fp16) and self.exact_masters
