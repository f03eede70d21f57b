"""Preparing the latents of a run over all its processes (together.py)."""

import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from sdxl_finetune.batch import LatentSize
from sdxl_finetune.config import Config
from sdxl_finetune.data.index import Index
from sdxl_finetune.data.remarks import report_bad_images
from sdxl_finetune.data.unusable import save_undecodable
from sdxl_finetune.errors import Problem, Tally
from sdxl_finetune.latents.alone import again_if_filled
from sdxl_finetune.latents.encoding import Encoder, Encoding, Report, encode_images, find_foreign_npz
from sdxl_finetune.latents.keys import RowKeys, row_keys
from sdxl_finetune.latents.library import Library
from sdxl_finetune.latents.npz import find_npz
from sdxl_finetune.latents.shards import Kind, Shard
from sdxl_finetune.latents.store import LatentStore, build_store, find_places, missing_rows
from sdxl_finetune.latents.together import (
    Team,
    check_complete,
    check_disk,
    check_memory,
    encode_in_rounds,
    find_team,
    join_shards,
    open_together,
    readable_shards,
)
from sdxl_finetune.runtime.signals import StopRequest
from sdxl_finetune.storage import Location

logger = logging.getLogger(__name__)

READERS = 16
"""Threads at most that read and decode images for the VAE; more would only compete."""
SAMPLED, SAMPLES = 1000, 100
"""One in SAMPLED of the reference's .npz files is compared with the VAE, at most SAMPLES where there are more."""


@again_if_filled
def prepare(
    index: Index, encoder: Encoder, config: Config, accelerator: Accelerator, stop: StopRequest | None = None
) -> tuple[Index, LatentStore]:
    """Returns the latents of all images in use, and the index without the images that could not be read.

    Latents that exist are found again; the missing ones are encoded. What was encoded is kept if this is interrupted.
    Raises UserError, OutOfMemory, and Interrupt once `stop` was requested.
    """
    size, scratch = encoder.latent_size, config.cache_folder
    kind = Kind("latents", encoder.identity() if config.cache_latents_to_disk else "")
    if not config.cache_latents_to_disk:
        check_memory(latent_bytes(index, size), "the latents", "cache_latents")
    team = find_team(accelerator, kind, config, on_disk=config.cache_latents_to_disk)
    shards = open_together(team, accelerator)
    keys = row_keys(index)
    library = Library(shards)
    places = find_places(index, keys, library)
    rows = missing_rows(index, places)
    reports: list[Report] = []
    if sum(gather_object([len(rows)])):
        if team.shelf:
            check_disk(latent_bytes(index, size, rows), "the latents that are not cached yet", team.shelf.folder)
        made, reports = _encode_missing(index, keys, rows, encoder, config, team, stop, library)
        library = Library(join_shards(team, shards, made))
        places = find_places(index, keys, library)
    _log_counts(reports, int(index.used.sum()) - len(rows), team.shelf.folder if team.shelf else None)
    bad = _bad_images(index, reports)
    undecodable = {row: message for report in reports for row, message in report.undecodable.items()}
    if accelerator.is_main_process and undecodable:
        save_undecodable(scratch, index.stat_hashes[list(undecodable)], list(undecodable.values()))
    if accelerator.is_main_process or config.on_bad_image == "stop":
        report_bad_images(Tally(bad.values()), config.on_bad_image)
    index = index.without(bad)
    store = build_store(index, places, library.files, team.copies, latent_size=size, scratch=scratch)
    check_complete(team, complete=not len(missing_rows(index, places)))
    return index, store


def _encode_missing(
    index: Index,
    keys: RowKeys,
    rows: np.ndarray,
    encoder: Encoder,
    config: Config,
    team: Team,
    stop: StopRequest | None,
    known: Library,
) -> tuple[list[Shard], list[Report]]:
    """Encodes this process's share of `rows`; returns the new shards that this process can read, and all reports."""
    rows = rows[team.share]
    with encoder.on_device() as encode, team.writer() as writer:
        job = Encoding(
            index=index,
            keys=keys,
            known=known,
            encode=encode,
            latent_size=encoder.latent_size,
            batch_size=config.vae_batch_size,
            threads=max(1, min(READERS, (os.cpu_count() or 1) // team.ranks_here)),
        )
        job = replace(job, use_npz=team.shelf is not None and _trusts_npz(job, rows))
        encode_in_rounds(encode_images(job, rows, writer), len(rows), writer, team, stop, "images")
    return readable_shards(team, writer.shards), gather_object([job.report])


def _trusts_npz(job: Encoding, rows: np.ndarray) -> bool:
    """True if there are .npz files of the reference beside the images, and this VAE has made them."""
    beside = np.array([row for row in rows.tolist() if find_npz(job.index[row])], np.int64)
    sample = np.concatenate([beside[:3], beside[3 :: max(SAMPLED, len(beside) // SAMPLES)]])
    foreign = [path for path in gather_object([find_foreign_npz(job, sample)]) if path]
    if foreign:
        message = "%s was made by another VAE or of another image: none of the reference's .npz files is used"
        logger.warning(message, foreign[0])
    return bool(len(beside)) and not foreign


def latent_bytes(index: Index, size: LatentSize, rows: np.ndarray | None = None) -> int:
    """Bytes of the latents of all images in use or of the images in these rows, mirrored ones included."""
    sizes = np.array([2 * math.prod(size.of(bucket)) for bucket in index.buckets])
    of_images = sizes[index.bucket] * (1 + index.flips)
    return int(of_images[index.used if rows is None else rows].sum())


def _bad_images(index: Index, reports: Sequence[Report]) -> dict[int, Problem]:
    """The problems of all processes by row. A duplicate of a bad image is bad too."""
    bad: dict[int, Problem] = {}
    for report in reports:
        bad |= report.bad
        for row, owner in report.duplicates.items():
            if owner in report.bad:
                bad[row] = replace(report.bad[owner], file=str(index[row].path))
    return bad


def _log_counts(reports: Sequence[Report], kept: int, folder: Location | None) -> None:
    """Logs how many latents were found and made, and for each reason which .npz files were not used."""
    counts = sum((report.counts for report in reports), Counter({"there already": kept}))
    images = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    logger.info("latents of images in %s: %s", folder or "memory", images)
    for reason in sorted({reason for report in reports for reason in report.rejected}):
        paths = [path for report in reports for path in report.rejected.get(reason, [])]
        logger.warning("%d .npz files of the reference are not used: %s (%s)", len(paths), reason, paths[0])
