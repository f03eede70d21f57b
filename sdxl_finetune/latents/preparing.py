"""Preparing the latents of a run over all its processes.

Latents on the disk lie in `cache_dir`, in one folder for each VAE, and all processes encode them together. Latents in
memory are encoded by the processes of each machine for that machine. While they encode, the processes meet every
minute, so that none waits long for another, and all stop when one is asked to stop.
"""

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from sdxl_finetune.config import Config
from sdxl_finetune.data.index import Index, report_bad_images
from sdxl_finetune.errors import Problem, UserError
from sdxl_finetune.latents.encoding import Encoder, Encoding, Report, encode_images, find_foreign_npz
from sdxl_finetune.latents.keys import RowKeys, latent_shape, row_keys
from sdxl_finetune.latents.npz import find_npz
from sdxl_finetune.latents.shards import Library, Shard, ShardWriter, open_shards, remember_checked
from sdxl_finetune.latents.store import LatentStore, build_store, find_places, missing_rows
from sdxl_finetune.runtime.signals import Interrupt, StopRequest

logger = logging.getLogger(__name__)

ROUND = 60
"""Seconds after which the processes meet and write their latents. A kill loses at most this time."""
READERS = 16
"""Threads at most that read and decode images for the VAE; more would only compete."""
SAMPLED, SAMPLES = 1000, 100
"""One in SAMPLED of the reference's .npz files is compared with the VAE, at most SAMPLES where there are more."""


def prepare(
    index: Index, encoder: Encoder, config: Config, accelerator: Accelerator, stop: StopRequest | None = None
) -> tuple[Index, LatentStore]:
    """Returns the latents of all images in use, and the index without the images that could not be read.

    Latents that exist are found again; the missing ones are encoded. What was encoded is kept if this is interrupted.
    Raises UserError, OutOfMemory, and Interrupt once `stop` was requested.
    """
    scale, scratch = encoder.pixels_per_latent, config.cache_folder
    folder, identity, shards = None, "", []
    if config.cache_latents_to_disk:
        identity = encoder.identity()
        folder = scratch / "latents" / identity
        with accelerator.main_process_first():
            shards = open_shards(folder, identity, check=accelerator.is_main_process)
    else:
        _check_memory(index, scale)
    keys = row_keys(index)
    library = Library(shards)
    places = find_places(index, keys, library)
    rows = missing_rows(index, places)
    reports: list[Report] = []
    if sum(gather_object([len(rows)])):
        made, reports = _encode_missing(index, keys, rows, encoder, config, accelerator, stop, shards)
        shards = sorted([*shards, *made], key=lambda shard: shard.path.name)
        library = Library(shards)
        places = find_places(index, keys, library)
        if folder and accelerator.is_main_process:
            remember_checked(folder, shards)
    _log_counts(reports, int(index.used.sum()) - len(rows), scratch if folder else None)
    bad = _bad_images(index, reports)
    if accelerator.is_main_process or config.on_bad_image == "stop":
        report_bad_images(list(bad.values()), config.on_bad_image)
    index = index.without(bad)
    store = build_store(index, places, library.files, pixels_per_latent=scale, scratch=scratch)
    if len(missing_rows(index, places)) or not all(path.exists() for path in store.files):
        message = "a process does not see latents that another process wrote: use one folder that all machines share"
        raise UserError(Problem(message, key="cache_dir", value=str(scratch)))
    return index, store


def _encode_missing(
    index: Index,
    keys: RowKeys,
    rows: np.ndarray,
    encoder: Encoder,
    config: Config,
    accelerator: Accelerator,
    stop: StopRequest | None,
    shards: Sequence[Shard],
) -> tuple[list[Shard], list[Report]]:
    """Encodes this process's share of `rows`; returns the new shards that this process can read, and all reports."""
    folder = config.cache_folder / "latents" / encoder.identity() if config.cache_latents_to_disk else None
    first_rank = accelerator.process_index - accelerator.local_process_index  # of this machine
    ranks_here = gather_object([first_rank]).count(first_rank)
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    share = share if folder else slice(accelerator.local_process_index, None, ranks_here)
    identity = folder.name if folder else ""
    with (
        encoder.on_device() as encode,
        ShardWriter(folder, identity, accelerator.process_index, config.cache_folder) as writer,
    ):
        job = Encoding(
            index=index,
            keys=keys,
            known=Library(shards),
            encode=encode,
            pixels_per_latent=encoder.pixels_per_latent,
            batch_size=config.vae_batch_size,
            threads=max(1, min(READERS, (os.cpu_count() or 1) // ranks_here)),
            use_npz=folder is not None,
        )
        _encode_in_rounds(job, rows[share], writer, accelerator.process_index, stop)
    made = gather_object([(first_rank, writer.shards, job.report)])
    readable = [shard for machine, own, _ in made if folder or machine == first_rank for shard in own]
    return readable, [report for _, _, report in made]


def _encode_in_rounds(
    job: Encoding, rows: np.ndarray, writer: ShardWriter, rank: int, stop: StopRequest | None
) -> None:
    """Encodes these rows. Raises Interrupt on all processes once one was asked to stop."""
    job = replace(job, use_npz=job.use_npz and _trusts_npz(job, rows))
    total, active = sum(gather_object([len(rows)])), True
    with (
        closing(encode_images(job, rows, writer)) as images,
        tqdm(total=total, desc="encoding", unit=" images", disable=True if rank else None) as progress,
    ):
        while active:
            started, finished, has_more = time.monotonic(), 0, False
            for count in images:
                finished += count
                progress.update(count)
                has_more = stop is None or stop.number is None
                if not has_more or time.monotonic() > started + ROUND:
                    break
            else:
                has_more = False
            writer.flush()
            all_ranks = gather_object([(has_more, finished, stop and stop.number)])
            progress.update(sum(count for _, count, _ in all_ranks) - finished)
            if numbers := [number for _, _, number in all_ranks if number is not None]:
                raise Interrupt(numbers[0])
            active = any(has_more for has_more, _, _ in all_ranks)


def _trusts_npz(job: Encoding, rows: np.ndarray) -> bool:
    """True if there are .npz files of the reference beside the images, and this VAE has made them."""
    beside = np.array([row for row in rows.tolist() if find_npz(job.index[row])], np.int64)
    sample = np.concatenate([beside[:3], beside[3 :: max(SAMPLED, len(beside) // SAMPLES)]])
    foreign = [path for path in gather_object([find_foreign_npz(job, sample)]) if path]
    if foreign:
        message = "%s was made by another VAE or of another image: none of the reference's .npz files is used"
        logger.warning(message, foreign[0])
    return bool(len(beside)) and not foreign


def _check_memory(index: Index, pixels_per_latent: int) -> None:
    sizes = np.array([2 * math.prod(latent_shape(bucket, pixels_per_latent)) for bucket in index.buckets])
    size = int((sizes[index.bucket] * (1 + index.flips))[index.used].sum())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        message = f"the latents take {size / 1e9:.1f} GB, and this machine has {memory / 1e9:.1f} GB of memory"
        raise UserError(Problem(f"{message}: set cache_latents_to_disk", key="cache_latents", value=True))


def _bad_images(index: Index, reports: Sequence[Report]) -> dict[int, Problem]:
    """The problems of all processes by row. A duplicate of a bad image is bad too."""
    bad: dict[int, Problem] = {}
    for report in reports:
        bad |= report.bad
        for row, owner in report.duplicates.items():
            if owner in report.bad:
                bad[row] = replace(report.bad[owner], file=str(index[row].path))
    return bad


def _log_counts(reports: Sequence[Report], kept: int, folder: Path | None) -> None:
    """Logs how many latents were found and made, and for each reason which .npz files were not used."""
    counts = sum((report.counts for report in reports), Counter({"there already": kept}))
    images = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    logger.info("latents of images in %s: %s", folder or "memory", images)
    for reason in sorted({reason for report in reports for reason in report.rejected}):
        paths = [path for report in reports for path in report.rejected.get(reason, [])]
        logger.warning("%d .npz files of the reference are not used: %s (%s)", len(paths), reason, paths[0])
