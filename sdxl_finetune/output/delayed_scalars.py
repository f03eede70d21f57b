"""Scalars on their way from the device to the host, so that no step waits for the device."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Arrived(Generic[T]):
    """A set on the host."""

    record: T
    scalars: dict[str, float]
    vectors: dict[str, list[float]]


@dataclass(frozen=True)
class _Set(Generic[T]):
    """A set on its way."""

    record: T
    names: list[str]
    """Names of the scalars."""
    sizes: dict[str, int]
    """Lengths of the vectors by name."""
    values: Tensor
    """All scalars, and then all vectors."""
    event: torch.cuda.Event | None
    """The end of the copy to the host; None on a CPU."""


class DelayedScalars(Generic[T]):
    """A queue of sets of scalars and vectors on the device, each with the record that it belongs to.

    A set is copied to pinned memory without waiting, and handed out `delay` pushes later. By then the copy is made, and
    waiting for its event only keeps the host from running further ahead. The delay is fixed, so that all ranks see a
    set at the same step. Scalars on the CPU are handed out at once.
    """

    def __init__(self, delay: int = 4) -> None:
        self.delay = delay
        self._queue: deque[_Set[T]] = deque()

    def push(
        self, record: T, scalars: Mapping[str, Tensor], vectors: Mapping[str, Tensor] | None = None
    ) -> list[Arrived[T]]:
        """Adds one set of tensors of one element, and of vectors, on one device.

        Returns the sets that have arrived, oldest first.
        """
        vectors = vectors or {}
        values = torch.stack([scalar.detach().float().reshape(()) for scalar in scalars.values()])
        values = torch.cat([values, *(vector.detach().float() for vector in vectors.values())])
        event = None
        if values.is_cuda:
            pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = pinned.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        sizes = {name: len(vector) for name, vector in vectors.items()}
        self._queue.append(_Set(record, list(scalars), sizes, values, event))
        return self._take(left=self.delay if event else 0)

    def flush(self) -> list[Arrived[T]]:
        """Waits for all sets in the queue and returns them, oldest first."""
        return self._take(left=0)

    def _take(self, left: int) -> list[Arrived[T]]:
        taken = []
        while len(self._queue) > left:
            given = self._queue.popleft()
            if given.event is not None:
                given.event.synchronize()
            scalars, *vectors = given.values.split([len(given.names), *given.sizes.values()])
            taken.append(
                Arrived(
                    given.record,
                    dict(zip(given.names, scalars.tolist(), strict=True)),
                    {name: vector.tolist() for name, vector in zip(given.sizes, vectors, strict=True)},
                )
            )
        return taken
