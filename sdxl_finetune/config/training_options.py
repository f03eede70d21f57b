"""Options of the model, the loss, the optimizer and the hardware."""

from typing import Annotated, Literal

from pydantic import Field

from sdxl_finetune.config.data_options import HoldOutOptions
from sdxl_finetune.config.fields import (
    Arguments,
    Backend,
    BlockRates,
    ChunkTokens,
    FilePath,
    Options,
    Scheduler,
    StepsOrShare,
)


class ModelOptions(Options):
    """Model"""

    pretrained_model_name_or_path: FilePath | None = None
    """SDXL checkpoint to start from, a file or a diffusers folder. Nothing is downloaded."""
    vae: FilePath | None = None
    """VAE to use in place of the checkpoint's, a file or a diffusers folder."""
    tokenizer_cache_dir: FilePath | None = None
    """Folder with the tokenizers' files; unset: the vocabulary that comes with this package."""
    max_token_length: Annotated[Literal[75, 150, 225], ChunkTokens] = 75
    """Caption tokens that are read, in chunks of 75; 255 is read as 225, as in the reference."""
    weighted_captions: bool = False
    """Read `(tag:1.3)` and `[tag]` in captions as weights, not as text."""


class NoiseOptions(Options):
    """Noise and timesteps"""

    zero_terminal_snr: bool = False
    """End the noise schedule in pure noise (Lin et al., arXiv 2305.08891); needs `v_parameterization`."""
    noise_offset: float | None = Field(None, ge=0)
    """Strength of one random shift per image and channel added to the noise; 0: none."""
    noise_offset_random_strength: bool = False
    """Draw the strength between 0 and `noise_offset`, anew for each micro-batch."""
    adaptive_noise_scale: float | None = None
    """Times the latent's mean absolute value, added to `noise_offset`; needs it and `cache_latents`."""
    multires_noise_iterations: int | None = Field(None, ge=0)
    """Layers of coarser noise added to the noise, 6 to 10 are usual; 0: none."""
    multires_noise_discount: float = Field(0.3, ge=0, le=1)
    """Strength of each layer of multires noise relative to the finer one."""
    ip_noise_gamma: float | None = Field(None, ge=0)
    """Strength of extra noise in the model's input alone (Ning et al., arXiv 2301.11706); 0: none."""
    ip_noise_gamma_random_strength: bool = False
    """Draw the strength between 0 and `ip_noise_gamma`, anew for each micro-batch."""
    min_timestep: int | None = Field(None, ge=0, le=999)
    """First timestep that is trained; unset: 0."""
    max_timestep: int | None = Field(None, ge=1, le=1000)
    """First timestep that is not trained any more; unset: 1000."""


class LossOptions(Options):
    """Objective and loss"""

    v_parameterization: bool = False
    """Train the model to predict velocity, not noise."""
    loss_type: Literal["l1", "l2", "huber", "smooth_l1"] = "l2"
    """Distance between prediction and target."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    """How the threshold of `huber` and `smooth_l1` depends on the timestep."""
    huber_c: float = Field(0.1, gt=0)
    """Threshold of `huber` and `smooth_l1`."""
    huber_scale: float = Field(1.0, gt=0)
    """Factor on that threshold; unused by the `snr` schedule."""
    min_snr_gamma: float | None = Field(None, ge=0)
    """Bound on the signal-to-noise ratio in loss weights, often 5 (Hang et al., arXiv 2303.09556); 0: off."""
    scale_v_pred_loss_like_noise_pred: bool = False
    """Weight a velocity loss as the noise loss would be; needs `v_parameterization`."""
    v_pred_like_loss: float | None = None
    """Add this many times a noise loss weighted as a velocity loss; not with `v_parameterization`."""
    debiased_estimation_loss: bool = False
    """Weight the loss by one over the root of the signal-to-noise ratio (Yu et al., arXiv 2310.08442)."""


class OptimizerOptions(Options):
    """Optimizer"""

    optimizer_type: str = ""
    """AdamW, AdamW8bit, Lion, Adafactor, ..., or a class path such as torch.optim.RAdam; empty: AdamW."""
    use_8bit_adam: bool = False
    """The same as `optimizer_type` AdamW8bit."""
    use_lion_optimizer: bool = False
    """The same as `optimizer_type` Lion."""
    optimizer_args: Arguments = Field(default_factory=dict)
    """Arguments of the optimizer, as `weight_decay=0.1 betas=0.9,0.99`."""
    learning_rate: float = Field(2e-06, ge=0)
    """Learning rate of the U-Net, and of text encoders that have none of their own; 0 trains no U-Net."""
    train_text_encoder: bool = False
    """Train both text encoders as well."""
    learning_rate_te1: float | None = Field(None, ge=0)
    """Learning rate of text encoder 1 (CLIP ViT-L); 0 leaves it as it is."""
    learning_rate_te2: float | None = Field(None, ge=0)
    """Learning rate of text encoder 2 (OpenCLIP ViT-bigG); 0 leaves it as it is."""
    block_lr: BlockRates | None = None
    """Learning rates of the U-Net's embeddings, 9 input, 3 middle and 9 output blocks, and last layer."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Norm that gradients are clipped to; 0: no clipping."""


class LrOptions(Options):
    """Learning rate over time"""

    lr_scheduler: Scheduler = "constant"
    """Course of the learning rate after warm-up; `adafactor:RATE` goes with that optimizer's own rates."""
    lr_scheduler_type: str = ""
    """Class of torch.optim.lr_scheduler, or a class path, in place of `lr_scheduler`."""
    lr_scheduler_args: Arguments = Field(default_factory=dict)
    """Arguments of that class or schedule, as `T_max=100`."""
    lr_warmup_steps: StepsOrShare = 0
    """Optimizer steps in which the rate rises from 0, or their share of all steps as 0.1 or "10%"."""
    lr_decay_steps: StepsOrShare = 0
    """Optimizer steps of the final fall in warmup_stable_decay, or their share of all steps."""
    lr_scheduler_num_cycles: int = Field(1, ge=1)
    """Cycles of the cosine schedules."""
    lr_scheduler_power: float = Field(1.0, ge=0)
    """Power of the polynomial schedule."""
    lr_scheduler_timescale: int | None = Field(None, ge=1)
    """Steps of the inverse_sqrt schedule's scale; unset: the warm-up steps."""
    lr_scheduler_min_lr_ratio: float | None = Field(None, ge=0, le=1)
    """Lowest rate of cosine_with_min_lr and warmup_stable_decay, as a share of the highest."""


class EmaOptions(Options):
    """EMA of the weights"""

    ema_decay: float | None = Field(None, ge=0, le=1)
    """Share of a moving average of the weights that stays at each step, as 0.999; unset: no average. (Ours.)"""
    ema_half_life: float | None = Field(None, ge=1)
    """The same in images: after so many, what was learned counts half in the average. (Ours.)"""
    ema_previews: bool = True
    """Draw previews with the average, if there is one. (Ours.)"""
    ema_validation: bool = True
    """Validate the average, if there is one. (Ours.)"""
    ema_save: bool = True
    """Save the average, if there is one; states hold both. (Ours.)"""
    ema_on_cpu: bool = False
    """Keep the average in the machine's memory: slower, and 4 bytes a parameter less on a GPU. (Ours.)"""


class ValidationOptions(HoldOutOptions):
    """Validation"""

    validate_every_n_steps: int | None = Field(None, ge=0)
    """Validate after every so many optimizer steps; 0: only before and after training."""
    validate_every_n_epochs: int | None = Field(None, ge=0)
    """Validate after every so many epochs; unset, and no steps either: after each. Wins over steps."""
    max_validation_steps: int | None = Field(None, ge=1)
    """Batches of a validation, at most; unset: all."""
    validation_timesteps: int = Field(4, ge=1, le=1000)
    """Timesteps, evenly spread, at which each held out image is looked at. (Ours.)"""


class LengthOptions(Options):
    """Length of the run"""

    max_train_epochs: int | None = Field(None, ge=1)
    """Times that all images are seen; wins over `max_train_steps`."""
    max_train_steps: int = Field(1600, ge=1)
    """Optimizer steps of the whole run."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Micro-batches per optimizer step."""
    seed: int | None = Field(None, ge=0)
    """Where all random numbers come from; unset: drawn once, printed and saved."""


class HardwareOptions(Options):
    """Precision, memory and devices"""

    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Type of the arithmetic; `no` is float32."""
    full_bf16: bool = False
    """Compute with weights and gradients in bf16 as well; needs `mixed_precision` bf16."""
    exact_masters: bool = True
    """With `full_bf16`, train exact float32 weights, 2 bytes more for each; false rounds them away. (Ours.)"""
    fused_backward_pass: bool = False
    """Step on each tensor within the backward pass, as soon as it has its gradient, and free that."""
    fused_optimizer_groups: int | None = Field(None, ge=0)
    """Any number: the same as `fused_backward_pass`, which has no need of groups; 0: off."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a quarter slower."""
    xformers: bool = False
    """Attention by xformers, or by torch where xformers is not installed."""
    diffusers_xformers: bool = False
    """The same as `xformers`."""
    sdpa: bool = False
    """Attention by torch's scaled_dot_product_attention, which is also used when nothing is chosen."""
    torch_compile: bool = False
    """Compile the U-Net's transformer blocks: a slow first step, faster ones after it."""
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
    ] = "inductor"
    """What `torch_compile` compiles with; `no`, as GUIs write, is the default. Today's torch has the first three."""
    ddp_timeout: int | None = Field(None, ge=1)
    """Minutes that a process waits for the others; unset: accelerate's choice."""
    ddp_gradient_as_bucket_view: bool = False
    """Let several processes share gradient memory with the buffers that they are summed in."""
    ddp_static_graph: bool = False
    """Tell torch that each step uses the same parameters."""

    @property
    def is_fused(self) -> bool:
        """True if the optimizer steps inside the backward pass. Either of the reference's two options asks for this."""
        return self.fused_backward_pass or bool(self.fused_optimizer_groups)

    @property
    def keeps_masters(self) -> bool:
        """True if each bf16 weight is the rounding of an exact float32 master weight."""
        return self.full_bf16 and self.exact_masters
