"""Options of loss weights that a small network learns during training."""

from typing import Annotated

from pydantic import Field

from sdxl_finetune.config.fields import Arguments, OnlyWith, Options

LEARNED = OnlyWith("edm2_loss_weighting")
SCHEDULE = OnlyWith("edm2_loss_weighting_lr_scheduler")


class LearnedWeightOptions(Options):
    """Learned loss weights"""

    edm2_loss_weighting: bool = False
    """Learn a loss weight for each noise level (Karras et al., arXiv 2312.02696). Of forks of sd-scripts."""
    edm2_loss_weighting_num_channels: Annotated[int, LEARNED] = Field(128, ge=1)
    """Channels of the network of the weights; more allow a finer curve. Of forks of sd-scripts."""
    edm2_loss_weighting_optimizer: Annotated[str, LEARNED] = Field("AdamW", min_length=1)
    """Optimizer of the network of the weights, named as in `optimizer_type`. Of forks of sd-scripts."""
    edm2_loss_weighting_optimizer_lr: Annotated[float, LEARNED] = Field(0.02, gt=0)
    """Learning rate of the network of the weights. Of forks of sd-scripts."""
    edm2_loss_weighting_optimizer_args: Annotated[Arguments, LEARNED] = Field(
        default_factory=lambda: {"weight_decay": 0.0, "betas": (0.9, 0.99)}
    )
    """Arguments of that optimizer, as in `optimizer_args`. Of forks of sd-scripts."""
    edm2_loss_weighting_max_grad_norm: Annotated[float, LEARNED] = Field(1.0, ge=0)
    """Largest norm of the gradient of the network of the weights. 0: off. Of forks of sd-scripts."""
    edm2_loss_weighting_lr_scheduler: Annotated[bool, LEARNED] = False
    """Let that learning rate rise, stay, and fall as an inverse square root. Off: constant. Of forks of sd-scripts."""
    edm2_loss_weighting_lr_scheduler_warmup_percent: Annotated[float, LEARNED, SCHEDULE] = Field(0.1, ge=0, le=1)
    """Share of all steps, 0 to 1, in which that learning rate rises from 0. Of forks of sd-scripts."""
    edm2_loss_weighting_lr_scheduler_constant_percent: Annotated[float, LEARNED, SCHEDULE] = Field(0.1, ge=0, le=1)
    """Share of all steps, 0 to 1, in which that learning rate then stays. Of forks of sd-scripts."""
    edm2_loss_weighting_lr_scheduler_decay_scaling: Annotated[float, LEARNED, SCHEDULE] = Field(1.0, ge=0)
    """Speed of the fall: the learning rate falls as steps to the power of minus half of it. Of forks of sd-scripts."""
    edm2_loss_weighting_generate_graph_every_x_steps: Annotated[int, LEARNED] = Field(100, ge=1)
    """Optimizer steps between two pictures of the learned weights in the log. Of forks of sd-scripts."""
