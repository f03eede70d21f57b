"""The dataset index and the latents of a run, over all its processes.

Latents on the disk lie in `cache_dir`, in a folder for each VAE, and are made by all processes together; latents in
memory are made by the processes of each machine for that machine. Processes meet every so often while they encode,
so that none waits long for another, and all stop when one is asked to.
"""

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from sdxl_finetune.batch import to_images
from sdxl_finetune.config import Config, load_datasets
from sdxl_finetune.data.index import Index, build_index, report_bad_images
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.latents.encoding import (
    READERS,
    Encode,
    Encoding,
    LatentStore,
    Report,
    build_store,
    encode_images,
    foreign_npz,
    lacking,
    latent_shape,
    locate,
    name_rows,
)
from sdxl_finetune.latents.npz import find_npz
from sdxl_finetune.latents.shards import Library, ShardWriter, open_shards, remember_checked
from sdxl_finetune.model.vae import encode, pixels_per_latent, vae_identity
from sdxl_finetune.runtime.out_of_memory import OutOfMemory, is_out_of_memory
from sdxl_finetune.runtime.signals import Interrupt, StopRequest

logger = logging.getLogger(__name__)

ROUND = 60
"""Seconds after which processes meet, and what they have made is written: what is lost when they are killed."""
SAMPLES, SAMPLED = 100, 1000
"""Of the reference's files one in SAMPLED is compared with the VAE, and more only up to SAMPLES in all."""


def cache_dir(config: Config) -> Path:
    """Where the dataset index and the latents lie: cache_dir, or `cache` in output_dir."""
    assert config.output_dir is not None
    return config.cache_dir or config.output_dir / "cache"


def shared_index(config: Config, accelerator: Accelerator) -> Index:
    """The first rank looks at the files; the others map what it wrote."""
    shared: list[Index | None] = [None]
    if accelerator.is_main_process:
        skip = config.skip_cache_check
        shared = [build_index(load_datasets(config), cache_dir(config), config.on_bad_image, skip_check=skip)]
    broadcast_object_list(shared)
    assert shared[0] is not None
    return shared[0]


def encode_dataset(
    config: Config, index: Index, vae: AutoencoderKL, accelerator: Accelerator, stop: StopRequest | None = None
) -> tuple[Index, LatentStore | None]:
    """With cache_latents the latents of all images, and the index without those that could not be read; the VAE then
    leaves the device. What was made before is found again, and what is made is kept if it is interrupted. Raises
    UserError, OutOfMemory, and Interrupt once `stop` was asked for.
    """
    if not config.cache_latents:
        vae.to(accelerator.device)
        return index, None
    folder, identity, shards = None, "", []
    if config.cache_latents_to_disk:
        identity = vae_identity(vae)
        folder = cache_dir(config) / "latents" / identity
        with accelerator.main_process_first():
            shards = open_shards(folder, identity, check=accelerator.is_main_process)
    else:
        _check_memory(index, pixels_per_latent(vae))
    names, library = name_rows(index), Library(shards)
    rows = lacking(index, locate(index, names, library))
    bad: dict[int, Problem] = {}
    reports: list[Report] = []
    if sum(gather_object([len(rows)])):
        first = accelerator.process_index - accelerator.local_process_index  # rank of the machine
        here = gather_object([first]).count(first)
        every = slice(accelerator.process_index, None, accelerator.num_processes)
        every = every if folder else slice(accelerator.local_process_index, None, here)
        vae.to(accelerator.device)
        job = Encoding(
            index=index,
            names=names,
            known=library,
            encode=_encode_on(accelerator.device, vae),
            pixels_per_latent=pixels_per_latent(vae),
            batch_size=config.vae_batch_size,
            threads=max(1, min(READERS, (os.cpu_count() or 1) // here)),
            npz=folder is not None,
        )
        with ShardWriter(folder, identity, accelerator.process_index, cache_dir(config)) as writer:
            _encode(job, rows[every], writer, stop)
        vae.to("cpu")
        made = gather_object([(first, writer.shards, job.report)])
        shards += [shard for machine, own, _ in made if folder or machine == first for shard in own]
        reports = [report for _, _, report in made]
        for report in reports:
            bad |= report.bad
            twins = {row: report.bad[of] for row, of in report.twins.items() if of in report.bad}
            bad |= {row: replace(problem, file=str(index[row].path)) for row, problem in twins.items()}
        if folder and accelerator.is_main_process:
            remember_checked(folder, shards)
    _describe(reports, int(index.used.sum()) - len(rows), cache_dir(config) if folder else None)
    if accelerator.is_main_process or config.on_bad_image == "stop":
        report_bad_images(list(bad.values()), config.on_bad_image)
    index = index.without(bad)
    scale = pixels_per_latent(vae)
    store = build_store(index, names, shards, pixels_per_latent=scale, scratch=cache_dir(config))
    if len(lacking(index, store.places)) or not all(path.exists() for path in store.files):
        message = "a process does not see latents that another wrote: cache_dir has to be one folder for all machines"
        raise UserError(Problem(message, file=str(cache_dir(config))))
    return index, store


def _encode(job: Encoding, rows: np.ndarray, writer: ShardWriter, stop: StopRequest | None) -> None:
    """This process's part of encoding; raises Interrupt, on all of them, once one is asked to stop."""
    job = replace(job, npz=job.npz and _trusts_npz(job, rows))
    rank = PartialState().process_index
    total, active = sum(gather_object([len(rows)])), True
    with (
        closing(encode_images(job, rows, writer)) as images,
        tqdm(total=total, desc="encoding", unit=" images", disable=True if rank else None) as progress,
    ):
        while active:
            started, finished, busy = time.monotonic(), 0, False
            for count in images:
                finished += count
                progress.update(count)
                busy = stop is None or stop.number is None
                if not busy or time.monotonic() > started + ROUND:
                    break
            else:
                busy = False
            writer.flush()
            others = gather_object([(busy, finished, stop and stop.number)])
            progress.update(sum(count for _, count, _ in others) - finished)
            if numbers := [number for _, _, number in others if number is not None]:
                raise Interrupt(numbers[0])
            active = any(busy for busy, _, _ in others)


def _trusts_npz(job: Encoding, rows: np.ndarray) -> bool:
    """Whether the reference's files beside the images, if there are any, were made by this VAE."""
    beside = np.array([row for row in rows.tolist() if find_npz(job.index[row])], np.int64)
    sample = np.concatenate([beside[:3], beside[3 :: max(SAMPLED, len(beside) // SAMPLES)]])
    spoilt = gather_object([foreign_npz(job, sample)])
    foreign = [path for path in spoilt if path]
    if foreign:
        logger.warning("%s is not of this VAE and image: none of the reference's .npz files is used", foreign[0])
    return bool(len(beside)) and not foreign


def _encode_on(device: torch.device, vae: AutoencoderKL) -> Encode:
    """The VAE for `encode_images`: on a GPU it computes while the host goes on."""
    gpu = device.type == "cuda"

    def start(pixels: Tensor, noise: Tensor) -> Callable[[], Tensor]:
        if gpu:
            pixels, noise = pixels.pin_memory(), noise.pin_memory()
        try:
            images = to_images(pixels.to(device, non_blocking=True))
            latents = encode(vae, images, noise.to(device, non_blocking=True)).half()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            count, height, width, _ = pixels.shape
            remedy = "lower vae_batch_size" if count > 1 else "use a lower max_bucket_reso or resolution"
            batch = f"{count} image{'s' * (count > 1)} of {width}x{height}"
            raise OutOfMemory(f"out of memory encoding {batch}: {remedy}") from error
        arrived = latents.to("cpu", non_blocking=True)  # on a GPU, into pinned memory
        event = torch.cuda.current_stream(device).record_event() if gpu else None

        def wait() -> Tensor:
            if event is not None:
                event.synchronize()
            return arrived

        return wait

    return start


def _check_memory(index: Index, scale: int) -> None:
    sizes = np.array([2 * math.prod(latent_shape(bucket, scale)) for bucket in index.buckets])
    size = int((sizes[index.bucket] * (1 + index.flips))[index.used].sum())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        message = f"the latents take {size / 1e9:.1f} GB and this machine has {memory / 1e9:.1f} GB of memory"
        raise UserError(Problem(f"{message}: use cache_latents_to_disk", key="cache_latents", value=True))


def _describe(reports: Sequence[Report], kept: int, where: Path | None) -> None:
    """Says what became of the images, and once for each reason which files of the reference were not taken."""
    counts = sum((report.counts for report in reports), Counter({"there already": kept}))
    images = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    logger.info("latents of images in %s: %s", where or "memory", images)
    for reason in sorted({reason for report in reports for reason in report.unfit}):
        paths = [path for report in reports for path in report.unfit.get(reason, [])]
        logger.warning("%d .npz files of the reference are not taken: %s (%s)", len(paths), reason, paths[0])
