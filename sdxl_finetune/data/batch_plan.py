"""The batch plan: which images are trained together, in which order, as a function of seed and epoch.

Each image is in exactly `num_repeats` global batches of every epoch. A global batch holds up to batch size x ranks
images of one bucket, so that all ranks work on one shape. The batches of an epoch are in random order. Each optimizer
step takes `gradient_accumulation_steps` of them. The last step of an epoch may take fewer, because a step never takes
batches of two epochs. The plan can start at any step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int32, Int64

from sdxl_finetune.batch import Position
from sdxl_finetune.data.index import Index
from sdxl_finetune.seeding import position_rng


@dataclass(frozen=True)
class MicroBatch:
    """The images of one micro-batch, over all ranks."""

    position: Position
    rows: Int32[np.ndarray, " k"]
    """Rows of the index. The place of an image in this array is its slot."""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """The global batches of one epoch, in order."""

    rows: Int32[np.ndarray, " occurrences"]
    """Rows of the index. The rows of one batch are neighbours."""
    starts: Int64[np.ndarray, " batches"]
    sizes: Int64[np.ndarray, " batches"]

    def batch(self, number: int) -> Int32[np.ndarray, " k"]:
        start = self.starts[number]
        return self.rows[start : start + self.sizes[number]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The order of all epochs of a run."""

    bucket: Int32[np.ndarray, " n"]
    """Bucket of each image."""
    repeats: Int32[np.ndarray, " n"]
    """How often each image is used in an epoch."""
    batch_sizes: Int64[np.ndarray, " buckets"]
    """Images of a full global batch of each bucket."""
    areas: Int64[np.ndarray, " buckets"]
    """Pixels of an image in each bucket."""
    accumulation: int
    """Micro-batches of one optimizer step (gradient_accumulation_steps)."""
    seed: int
    origin: tuple[int, int] = (0, 0)
    """Step and epoch that the plan starts with. A run that resumes with other images continues under a new plan."""

    @cached_property
    def batches_per_epoch(self) -> int:
        return int((-(-self._images_of_bucket // self.batch_sizes)).sum())

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.batches_per_epoch // self.accumulation)

    def place(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and the number of the step within that epoch, both from 0.

        For a number of finished steps, these are the finished epochs and the finished steps of the next epoch.
        """
        epochs, step_in_epoch = divmod(step - self.origin[0], self.steps_per_epoch)
        return self.origin[1] + epochs, step_in_epoch

    def steps_until(self, epochs: int) -> int:
        """Optimizer steps from the start of training until `epochs` epochs are finished."""
        return self.origin[0] + max(0, epochs - self.origin[1]) * self.steps_per_epoch

    def epoch(self, epoch: int) -> Epoch:
        """The batches of an epoch.

        The plan starts with the batch that has the most pixels. A run that needs too much memory then fails in its
        first minute.
        """
        rng = position_rng(self.seed, "order", epoch)
        rows = np.repeat(np.arange(len(self.bucket), dtype=np.int32), self.repeats)
        rng.shuffle(rows)
        bucket_of_row = self.bucket[rows]
        # numpy sorts 16-bit numbers by counting, which is several times as fast.
        if len(self.areas) <= np.iinfo(np.uint16).max:
            bucket_of_row = bucket_of_row.astype(np.uint16)
        rows = rows[np.argsort(bucket_of_row, kind="stable")]
        batches = -(-self._images_of_bucket // self.batch_sizes)
        bucket = np.repeat(np.arange(len(batches)), batches)
        number_in_bucket = np.arange(batches.sum()) - np.repeat(np.cumsum(batches) - batches, batches)
        ends = np.cumsum(self._images_of_bucket)
        starts = (ends - self._images_of_bucket)[bucket] + number_in_bucket * self.batch_sizes[bucket]
        sizes = np.minimum(self.batch_sizes[bucket], ends[bucket] - starts)
        order = rng.permutation(len(starts))
        if epoch == self.origin[1]:
            largest = int(np.argmax((self.areas[bucket] * sizes)[order]))
            order[: largest + 1] = np.roll(order[: largest + 1], 1)
        return Epoch(rows=rows, starts=starts[order], sizes=sizes[order])

    def micro_batches(self, first_step: int, last_step: int) -> Iterator[MicroBatch]:
        """The micro-batches of optimizer steps `first_step` <= step < `last_step`, in order, over all their epochs."""
        current = -1
        for step in range(first_step, last_step):
            epoch, step_in_epoch = self.place(step)
            if epoch != current:
                current, batches = epoch, self.epoch(epoch)
            first = step_in_epoch * self.accumulation
            numbers = range(first, min(first + self.accumulation, self.batches_per_epoch))
            for micro_batch, number in enumerate(numbers):
                position = Position(epoch=epoch, step=step, micro_batch=micro_batch, micro_batches_in_step=len(numbers))
                yield MicroBatch(position, batches.batch(number))

    @cached_property
    def _images_of_bucket(self) -> Int64[np.ndarray, " buckets"]:
        """Images of each bucket in an epoch, with repeats."""
        return np.bincount(self.bucket, self.repeats, len(self.areas)).astype(np.int64)


def build_plan(index: Index, *, ranks: int, accumulation: int, seed: int, origin: tuple[int, int] = (0, 0)) -> Plan:
    """The batch plan of a run of `ranks` processes, with the batch size of each image's dataset."""
    sizes = [dataset.batch_size * ranks for dataset in index.datasets]
    return Plan(
        bucket=index.bucket,
        repeats=index.repeats,
        batch_sizes=np.array([sizes[bucket.dataset] for bucket in index.buckets], np.int64),
        areas=np.array([bucket.width * bucket.height for bucket in index.buckets], np.int64),
        accumulation=accumulation,
        seed=seed,
        origin=origin,
    )
