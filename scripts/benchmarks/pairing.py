"""Measures what pairing of noise and images costs the data loader, and how much nearer paired noise is.

    python scripts/benchmarks/pairing.py

Latents are 4 x 128 x 128 standard normal numbers, as for images of 1024 x 1024 pixels. One thread computes, as in a
data-loader worker. Each line has two figures. The first is the least CPU time of several draws of the noise of a
micro-batch. The second is the mean squared distance of noise and image, relative to unpaired noise.
"""

import statistics
import time

import torch

from sdxl_finetune.batch import Position
from sdxl_finetune.config import NoiseOptions, PairingOptions
from sdxl_finetune.diffusion.pairing import draw_paired_noise

SHAPE = (4, 128, 128)
REPEATS = {16: 20, 256: 8}


def main() -> None:
    torch.set_num_threads(1)
    for images, repeats in REPEATS.items():
        latents = torch.randn(images, *SHAPE, generator=torch.Generator().manual_seed(1))
        unpaired = 0.0
        for pairing in ({}, {"flow_use_ot": True}, {"immiscible_noise": 2 * images}, {"knn_noise_k": 64}):
            seconds, distances = [], []
            for step in range(repeats):
                place = Position(epoch=0, step=step, micro_batch=0, micro_batches_in_step=1)
                started = time.process_time()
                noise, _ = draw_paired_noise(
                    NoiseOptions(), PairingOptions(**pairing), 1, place, latents.shape, latents
                )
                seconds.append(time.process_time() - started)
                distances.append(float((noise - latents).square().mean()))
            distance = statistics.mean(distances)
            unpaired = unpaired or distance
            name = " ".join(f"{option} = {value}" for option, value in pairing.items()) or "no pairing"
            figures = f"{1000 * min(seconds):7.0f} ms, squared distance {distance / unpaired:.4f}"
            print(f"{images:4} images, {name:24} {figures}")


if __name__ == "__main__":
    main()
