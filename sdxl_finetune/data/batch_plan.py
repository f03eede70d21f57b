"""Which images are trained on, when, and together: a function of the seed and the epoch.

Every occurrence of every image (num_repeats of them) is in exactly one global batch of its epoch; a global batch
is up to batch size x ranks images of one bucket, so that all ranks work on one shape. The batches of an epoch
follow each other in random order and are grouped into accumulation windows, one an optimizer step, of which the
last of an epoch may be short; none crosses into the next epoch. Any step can be gone to directly.
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
    """What the loader is asked for: the images of one micro-batch over all ranks."""

    position: Position
    items: Int32[np.ndarray, " k"]
    """Rows of the index; an image's place here is its slot."""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """The batches of one epoch, in order."""

    rows: Int32[np.ndarray, " occurrences"]
    """Rows of the index, those of one batch next to each other."""
    starts: Int64[np.ndarray, " batches"]
    sizes: Int64[np.ndarray, " batches"]

    def batch(self, number: int) -> Int32[np.ndarray, " k"]:
        start = self.starts[number]
        return self.rows[start : start + self.sizes[number]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The order of all epochs of a run."""

    bucket: Int32[np.ndarray, " n"]
    """Each image's bucket."""
    repeats: Int32[np.ndarray, " n"]
    """How often each image is used in an epoch."""
    batch_sizes: Int64[np.ndarray, " buckets"]
    """Images of a whole global batch of each bucket."""
    areas: Int64[np.ndarray, " buckets"]
    """Pixels of an image in each bucket."""
    accumulation: int
    """Micro-batches of one optimizer step (gradient_accumulation_steps)."""
    seed: int
    origin: tuple[int, int] = (0, 0)
    """The step and the epoch that the plan begins with: a run whose images changed goes on under a new plan."""

    @cached_property
    def batches_per_epoch(self) -> int:
        return int((-(-self._occurrences // self.batch_sizes)).sum())

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.batches_per_epoch // self.accumulation)

    def place(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and which of its windows the step is; for the count of steps that are done, the
        number of epochs that are done, and the steps made in the next.
        """
        epochs, window = divmod(step - self.origin[0], self.steps_per_epoch)
        return self.origin[1] + epochs, window

    def steps_until(self, epochs: int) -> int:
        """Steps of a run when so many epochs are done."""
        return self.origin[0] + max(0, epochs - self.origin[1]) * self.steps_per_epoch

    def epoch(self, epoch: int) -> Epoch:
        """The batches of `epoch`. The first of the plan is the one with the most pixels, so that a run for which
        the memory is too small ends in its first minute.
        """
        rng = position_rng(self.seed, "order", epoch)
        rows = np.repeat(np.arange(len(self.bucket), dtype=np.int32), self.repeats)
        rng.shuffle(rows)
        buckets = self.bucket[rows]
        # Sorting 16-bit numbers is a counting sort, several times as fast.
        if len(self.areas) <= np.iinfo(np.uint16).max:
            buckets = buckets.astype(np.uint16)
        rows = rows[np.argsort(buckets, kind="stable")]
        counts = -(-self._occurrences // self.batch_sizes)
        bucket = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        ends = np.cumsum(self._occurrences)
        starts = (ends - self._occurrences)[bucket] + within * self.batch_sizes[bucket]
        sizes = np.minimum(self.batch_sizes[bucket], ends[bucket] - starts)
        order = rng.permutation(len(starts))
        if epoch == self.origin[1]:
            first = int(np.argmax((self.areas[bucket] * sizes)[order]))
            order[: first + 1] = np.roll(order[: first + 1], 1)
        return Epoch(rows=rows, starts=starts[order], sizes=sizes[order])

    def micro_batches(self, first_step: int, last_step: int) -> Iterator[MicroBatch]:
        """Those of optimizer steps `first_step` to `last_step` (not included), over as many epochs as that takes."""
        current = -1
        for step in range(first_step, last_step):
            epoch, window = self.place(step)
            if epoch != current:
                current, order = epoch, self.epoch(epoch)
            first = window * self.accumulation
            numbers = range(first, min(first + self.accumulation, self.batches_per_epoch))
            for micro, number in enumerate(numbers):
                position = Position(epoch=epoch, step=step, micro=micro, micros=len(numbers))
                yield MicroBatch(position, order.batch(number))

    @cached_property
    def _occurrences(self) -> Int64[np.ndarray, " buckets"]:
        """Images of each bucket in an epoch, with repeats."""
        return np.bincount(self.bucket, self.repeats, len(self.areas)).astype(np.int64)


def build_plan(index: Index, *, ranks: int, accumulation: int, seed: int, origin: tuple[int, int] = (0, 0)) -> Plan:
    """The plan of a run of `ranks` processes, each with the batch size of the images' dataset."""
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
