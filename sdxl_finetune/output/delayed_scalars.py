"""Scalars on their way from the device to the host, so that no step waits for the device."""

from collections import deque
from collections.abc import Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class DelayedScalars(Generic[T]):
    """A queue of sets of scalars on the device, each with the record that it belongs to.

    A set is copied to pinned memory without waiting, and handed out `delay` pushes later. By then the copy is made, and
    waiting for its event only keeps the host from running further ahead. The delay is fixed, so that all ranks see a
    set at the same step. Scalars on the CPU are handed out at once.
    """

    def __init__(self, delay: int = 4) -> None:
        self.delay = delay
        self._queue: deque[tuple[T, list[str], Tensor, torch.cuda.Event | None]] = deque()

    def push(self, record: T, scalars: Mapping[str, Tensor]) -> list[tuple[T, dict[str, float]]]:
        """Adds one set of tensors of one element on one device; returns the sets that have arrived, oldest first."""
        values = torch.stack([scalar.detach().float().reshape(()) for scalar in scalars.values()])
        event = None
        if values.is_cuda:
            pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = pinned.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._queue.append((record, list(scalars), values, event))
        return self._take(left=self.delay if event else 0)

    def flush(self) -> list[tuple[T, dict[str, float]]]:
        """Waits for all sets in the queue and returns them, oldest first."""
        return self._take(left=0)

    def _take(self, left: int) -> list[tuple[T, dict[str, float]]]:
        taken = []
        while len(self._queue) > left:
            record, names, values, event = self._queue.popleft()
            if event is not None:
                event.synchronize()
            taken.append((record, dict(zip(names, values.tolist(), strict=True))))
        return taken
