"""The training objective: denoising score matching as SDXL was trained (Podell et al., arXiv 2307.01952).

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e          (Ho et al., arXiv 2006.11239, equation 4)
    loss_i = weight(t_i) mean (target_i - model(x_t, t_i, caption_i, sizes_i))^2

The choices of target, loss and loss weight are the reference's. All random numbers are in the batch. The objective is
therefore a plain function of weights and batch.
"""

from jaxtyping import Float
from torch import Tensor, nn

from sdxl_finetune.batch import Batch
from sdxl_finetune.config import LossOptions
from sdxl_finetune.diffusion.loss import elementwise_loss, huber_threshold
from sdxl_finetune.diffusion.loss_weights import loss_weight
from sdxl_finetune.diffusion.schedule import Schedule, add_noise, velocity


def image_losses(
    model: nn.Module, batch: Batch, latents: Float[Tensor, "k 4 h w"], schedule: Schedule, options: LossOptions
) -> Float[Tensor, " k"]:
    """The weighted loss of each image, in float32.

    `model` is SDXL, possibly wrapped by accelerate. `latents` are multiplied by the VAE's scaling factor. With
    `ip_noise_gamma` the input has more noise than the target (Ning et al., arXiv 2301.11706, algorithm 1).
    """
    latents, timesteps = latents.float(), batch.timesteps
    input_noise = batch.noise if batch.input_noise is None else batch.noise + batch.input_noise
    noisy = add_noise(schedule, latents, input_noise, timesteps)
    target = velocity(schedule, latents, batch.noise, timesteps) if options.v_parameterization else batch.noise
    prediction = model(
        noisy,
        timesteps,
        batch.text,
        batch.original_size,
        batch.crop_top_left,
        batch.target_size,
    )
    threshold = huber_threshold(options, schedule, timesteps)
    losses = elementwise_loss(prediction, target, options.loss_type, threshold)
    return losses.mean(dim=(1, 2, 3)) * loss_weight(options, schedule, timesteps)
