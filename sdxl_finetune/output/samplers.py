"""Samplers of previews: diffusers' classes on the noise schedule of the training, and the loop that runs them.

The names are those of sd-scripts. With zero terminal SNR every sampler starts at timestep 999 (Lin et al., arXiv
2305.08891, section 3.3).

A flow is an ordinary differential equation dx/dt = v (Liu et al., arXiv 2209.03003, equation 1), which Euler's and
Heun's method solve. Steps are even in time before the shift, from pure noise at timestep 1000. This is the schedule
"simple" of ComfyUI with the node ModelSamplingSD3, but for times that ComfyUI rounds to thousandths. The U-Net gets
timesteps that are not rounded, as there.
"""

import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from jaxtyping import Float, Num
from torch import Tensor

from sdxl_finetune.batch import TIMESTEPS
from sdxl_finetune.diffusion.objective import Objective
from sdxl_finetune.diffusion.schedule import FIRST_BETA, LAST_BETA, DiscreteSchedule

SAMPLERS: Mapping[str, tuple[str, str]] = {
    "ddim": ("DDIMScheduler", "DDIM"),
    "pndm": ("PNDMScheduler", "PLMS"),
    "lms": ("LMSDiscreteScheduler", "LMS"),
    "euler": ("EulerDiscreteScheduler", "Euler"),
    "euler_a": ("EulerAncestralDiscreteScheduler", "Euler a"),
    "heun": ("HeunDiscreteScheduler", "Heun"),
    "dpm_2": ("KDPM2DiscreteScheduler", "DPM2"),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", "DPM2 a"),
    "dpmsolver": ("DPMSolverMultistepScheduler", "dpmsolver"),
    "dpmsolver++": ("DPMSolverMultistepScheduler", "DPM++ 2M"),
    "dpmsingle": ("DPMSolverSinglestepScheduler", "dpmsingle"),
}
"""Class in diffusers and name in AUTOMATIC1111 of each sampler of sd-scripts. A sampler k_x is the same as x.

AUTOMATIC1111 does not have dpmsolver and dpmsingle, so these keep their name.
"""
FLOW_SAMPLERS: Mapping[str, str] = {
    **dict.fromkeys(("ddim", "pndm", "lms", "euler", "euler_a"), "euler"),
    **dict.fromkeys(("heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle"), "heun"),
}
"""Sampler of a flow that stands in for each sampler. Those of second order become heun, with two predictions a step.

On the path of a flow DDIM is Euler's method. The DPM solvers of diffusers round the timesteps of a flow and begin at
999, so Heun's method stands in for them.
"""
FLOW_CLASSES = {"euler": FlowMatchEulerDiscreteScheduler, "heun": FlowMatchHeunDiscreteScheduler}
SMALLEST_ALPHA_BAR = 2.0**-24
"""Replaces a last alpha-bar of 0, because samplers that use sigma would divide by it. diffusers uses this value too."""


def used_sampler(name: str, objective: Objective) -> str:
    """The sampler that draws models with this objective where `name`, a value of `sample_sampler`, is asked for."""
    name = name.removeprefix("k_")
    return FLOW_SAMPLERS[name] if objective.kind == "flow" else name


def sampler_remarks(names: Collection[str], objective: Objective) -> Iterator[str]:
    """Yields a remark for each of the samplers that are asked for where another one draws."""
    for name in sorted(set(names)):
        used = used_sampler(name, objective)
        if used != name.removeprefix("k_"):
            title = SAMPLERS[used][1]
            yield f"sampler {name}: flow models are drawn with {title} instead. Ask for euler or heun to choose"


def build_sampler(name: str, objective: Objective, shift: float = 1.0) -> Any:
    """Builds the diffusers sampler for a value of `sample_sampler`, for a model with this objective.

    `shift` is the ratio r by which the times of a flow are shifted (see `diffusion.timesteps.shifted`).
    """
    name = used_sampler(name, objective)
    schedule = objective.schedule
    if not isinstance(schedule, DiscreteSchedule):
        return FLOW_CLASSES[name](num_train_timesteps=TIMESTEPS, shift=shift)
    sampler_class = getattr(diffusers, SAMPLERS[name][0])
    settings: dict[str, Any] = {
        "num_train_timesteps": TIMESTEPS,
        "beta_start": FIRST_BETA,
        "beta_end": LAST_BETA,
        "beta_schedule": "scaled_linear",
        "prediction_type": objective.rules.prediction_type,
        # Clipping to [-1, 1] is meant for pixels. It would cut off a third of all latent values.
        "clip_sample": False,
    }
    if name.startswith("dpmsolver"):
        settings["algorithm_type"] = name
    if name == "dpmsolver":
        settings["final_sigmas_type"] = "sigma_min"  # the only value that works; sd-scripts fails here
    if name == "dpmsingle":
        settings["lower_order_final"] = True  # diffusers would set it too, with a warning each time
    if schedule.ends_in_noise:
        alphas_cumprod = schedule.alphas_cumprod.double().cpu().numpy().clip(SMALLEST_ALPHA_BAR)
        settings["trained_betas"] = (1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])).tolist()
        settings["timestep_spacing"] = "trailing"
    accepted = inspect.signature(sampler_class).parameters
    with warnings.catch_warnings():
        # diffusers warns that it will remove dpmsolver. Configs of sd-scripts name it, so it stays available.
        warnings.filterwarnings("ignore", ".*algorithm_type", FutureWarning)
        return sampler_class(**{name: value for name, value in settings.items() if name in accepted})


def denoise(
    predict: Callable[[Float[Tensor, "n 4 h w"], Num[Tensor, ""]], Float[Tensor, "n 4 h w"]],
    sampler: Any,
    steps: int,
    noise: Float[Tensor, "n 4 h w"],
    generators: list[torch.Generator],
) -> Float[Tensor, "n 4 h w"]:
    """Turns `noise` of unit variance into latents, in `steps` steps of `sampler`.

    A sampler that adds noise draws it for each image from that image's generator.
    """
    if isinstance(sampler, tuple(FLOW_CLASSES.values())):
        return _follow(predict, sampler, steps, noise)
    sampler.set_timesteps(steps, device=noise.device)
    random = {"generator": generators} if "generator" in inspect.signature(sampler.step).parameters else {}
    latents = noise * sampler.init_noise_sigma
    for timestep in sampler.timesteps:
        # Some samplers use timesteps between two integers, but the U-Net was trained on integers only.
        prediction = predict(sampler.scale_model_input(latents, timestep), timestep.round().long())
        latents = sampler.step(prediction, timestep, latents, **random).prev_sample
    return latents


def _follow(
    predict: Callable[[Float[Tensor, "n 4 h w"], Num[Tensor, ""]], Float[Tensor, "n 4 h w"]],
    sampler: Any,
    steps: int,
    noise: Float[Tensor, "n 4 h w"],
) -> Float[Tensor, "n 4 h w"]:
    """Follows a flow from noise to latents, at the times 1, 1 - 1 / steps, ... before the shift."""
    # diffusers would end at a thousandth instead and so spend the last step on nearly nothing.
    sampler.sigma_min = 1 / steps
    sampler.set_timesteps(steps, device=noise.device)
    latents = noise.float()
    for timestep in sampler.timesteps:
        latents = sampler.step(predict(latents, timestep).float(), timestep, latents).prev_sample
    return latents
