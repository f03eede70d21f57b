"""The loss of each image of a batch (SDXL's training: Podell et al., arXiv 2307.01952).

    x_t = alpha_t x_0 + sigma_t e                  (objective.py)
    loss_i = weight(t_i) mean mask_i (target_i - model(x_t, t_i, caption_i, sizes_i))^2

With `contrastive_flow_matching`, the loss of the same prediction against the target of another image is subtracted
(Stoica et al., arXiv 2506.05350):

    loss_i = weight(t_i) mean mask_i (d(prediction_i, target_i) - cfm_lambda d(prediction_i, target_j))

d is the loss of `loss_type`. target_j has the latents and the noise of image j and the timestep of image i.

The mean is over all pixels, also over those that the mask hides, as in the reference (golden loss.json: masked_loss).
All random numbers are in the batch. The loss is therefore a plain function of weights and batch.
"""

from jaxtyping import Float
from torch import Tensor, nn

from sdxl_finetune.batch import Batch
from sdxl_finetune.config import LossOptions
from sdxl_finetune.diffusion.loss import elementwise_loss, huber_threshold
from sdxl_finetune.diffusion.loss_weights import loss_weight
from sdxl_finetune.diffusion.objective import Objective


def image_losses(
    model: nn.Module, batch: Batch, latents: Float[Tensor, "k c h w"], objective: Objective, options: LossOptions
) -> Float[Tensor, " k"]:
    """The weighted loss of each image, in float32.

    `model` is SDXL, possibly wrapped by accelerate. `latents` are scaled as the U-Net sees them. With
    `ip_noise_gamma` the input has more noise than the target (Ning et al., arXiv 2301.11706, algorithm 1).
    """
    latents, timesteps = latents.float(), batch.timesteps
    input_noise = batch.noise if batch.input_noise is None else batch.noise + batch.input_noise
    target = objective.target(latents, batch.noise, timesteps)
    prediction = model(
        objective.noisy(latents, input_noise, timesteps),
        timesteps,
        batch.text,
        batch.original_size,
        batch.crop_top_left,
        batch.target_size,
    )
    threshold = huber_threshold(options, objective.schedule, timesteps)
    losses = elementwise_loss(prediction, target, options.loss_type, threshold)
    if batch.negative_latents is not None and batch.negative_noise is not None:
        negative = objective.target(batch.negative_latents, batch.negative_noise, timesteps)
        losses = losses - options.cfm_lambda * elementwise_loss(prediction, negative, options.loss_type, threshold)
    if batch.mask is not None:
        losses = losses * batch.mask[:, None]
    return losses.mean(dim=(1, 2, 3)) * loss_weight(options, objective, timesteps)
