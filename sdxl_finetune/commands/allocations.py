"""Recording of every tensor storage that is allocated and freed, to find the peak and what it consists of."""

import weakref
from collections import defaultdict
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SCRATCH_BYTES = {"bitsandbytes::optimizer_update_8bit_blockwise": 20, "bitsandbytes::optimizer_update_32bit": 12}
"""Bytes per element that bitsandbytes' CPU kernels take during a step: float32 copies of state, gradient and terms.
Its CUDA kernels take none."""
OPTIMIZER_STATES = "optimizer states"


class Allocations(TorchDispatchMode):
    """Within this context every new storage is recorded, and the moment at which it is freed."""

    def __init__(self, *, count_scratch: bool) -> None:
        """`count_scratch` adds SCRATCH_BYTES, which no tensor shows."""
        super().__init__()
        self._count_scratch = count_scratch
        self._numbers: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._events: list[tuple[int, int, str]] = []
        """Number of the storage, change in bytes, and phase, in the order of time."""
        self._tests_for_nonzero: set[int] = set()
        """Storages that answer if any number of a tensor differs from 0. The answer for weights is yes, and Prodigy
        asks. Other questions of this kind ask for errors, and the answer is no."""
        self.owners: dict[int, str] = {}
        """Purpose of a storage, by its number. Storages of the step itself have no entry."""
        self.phase = ""
        """The part of the step that runs now."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the check takes time in every call, and dynamo is not used here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # asked for as often as all else together, and slow to compute
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if self.number(args[0]) in self._tests_for_nonzero else _any_number(args[0].dtype)
        results = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.any.default and args[0].is_floating_point():
            self._tests_for_nonzero.add(self.number(results))
        if not func.is_view:
            for result in results if isinstance(results, list | tuple) else (results,):
                if isinstance(result, Tensor):
                    self.number(result)
        if self._count_scratch and (bytes_per_element := SCRATCH_BYTES.get(func.name())):
            size = bytes_per_element * args[2].numel()
            self._events += [(-1, size, self.phase), (-1, -size, self.phase)]
        return results

    def number(self, tensor: Tensor) -> int:
        """The number of the tensor's storage, which is recorded if it is new."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._numbers:
            number = self._numbers[key] = len(self._sizes)
            size = self._sizes[number] = storage.nbytes()
            self._events.append((number, size, self.phase))
            weakref.finalize(storage, self._record_end, key)
        return self._numbers[key]

    def _record_end(self, key: int) -> None:
        number = self._numbers.pop(key)
        self._events.append((number, -self._sizes[number], self.phase))

    def set_owner(self, owner: str, tensors: Iterable[Tensor]) -> None:
        """Notes what these tensors are for."""
        for tensor in tensors:
            self.owners[self.number(tensor)] = owner

    def peak(self) -> tuple[dict[int, int], str]:
        """Bytes of each storage that was alive at the peak, by number, and the phase of the peak.

        Optimizer states are allocated during the first step. They count from its start, as in all later steps.
        """
        states = {number: self._sizes[number] for number, owner in self.owners.items() if owner == OPTIMIZER_STATES}
        events = [event for event in self._events if event[0] not in states]
        totals = list(accumulate(size for _, size, _ in events))
        peak = max(range(len(totals)), key=totals.__getitem__)
        alive = defaultdict(int, states)
        for number, size, _ in events[: peak + 1]:
            alive[number] += size
        return alive, events[peak][2]


def _any_number(dtype: torch.dtype) -> float | int | bool:
    """Stands for a number that an optimizer reads from a tensor, because a fake tensor has none."""
    if dtype == torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 1
