"""Recording of every tensor storage that is allocated and freed, to find the peak and what it consists of.

Tensors are those of torch's FakeTensorMode: they have shapes and storages, but no memory. Most operations of a step
repeat an earlier one on tensors of the same shapes. Their results are made from the earlier result, which takes a third
of the time of FakeTensorMode.
"""

import gc
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from contextlib import ExitStack
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode

SCRATCH_BYTES = {"bitsandbytes::optimizer_update_8bit_blockwise": 20, "bitsandbytes::optimizer_update_32bit": 12}
"""Bytes per element that bitsandbytes' CPU kernels take during a step: float32 copies of state, gradient and terms.
Its CUDA kernels take none."""
OPTIMIZER_STATES = "optimizer states"
CPU = torch.device("cpu")
CREATIONS = torch.ops.aten.empty.memory_format, torch.ops.aten.zeros.default
"""Operations without a tensor as argument whose results depend on nothing but the arguments."""


class Event(NamedTuple):
    """A storage that is allocated or freed, or a mark."""

    storage: int
    """Number of the storage; -1 for memory that no tensor shows."""
    change: int
    """Bytes: positive if it is allocated, negative if it is freed."""
    phase: str
    mark: str | None = None


class Recording(NamedTuple):
    """Allocations and frees of some code, to be counted again without running the code."""

    events: tuple[Event, ...]
    owners: dict[int, str]


class Allocations(TorchDispatchMode):
    """Within this context every new storage is recorded, and the moment at which it is freed."""

    def __init__(self, *, count_scratch: bool, results: dict[Hashable, Any] | None = None) -> None:
        """`count_scratch` adds SCRATCH_BYTES, which no tensor shows.

        `results` holds the shapes, strides and dtypes of the results of operations, for later contexts to use.
        """
        super().__init__()
        self._count_scratch = count_scratch
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._fake_context = ExitStack()
        self._results = {} if results is None else results
        self._attributes: dict[str, Any] = {}
        """Attributes of a new fake tensor."""
        self._numbers: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._events: list[Event] = []
        self._repeated: dict[Hashable, Recording] = {}
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

    def __enter__(self) -> "Allocations":
        if gc.isenabled():  # it would take a sixth of the time; tensors of a step are not in reference cycles
            gc.disable()
            self._fake_context.callback(gc.enable)
        self._fake_context.enter_context(self._fake)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._fake_context.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # asked for as often as all else together, and slow to compute
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if self.number(args[0]) in self._tests_for_nonzero else _any_number(args[0].dtype)
        results = self._compute(func, args, kwargs or {})
        if func is torch.ops.aten.any.default and args[0].is_floating_point():
            self._tests_for_nonzero.add(self.number(results))
        if not _is_view(func):
            for result in results if isinstance(results, list | tuple) else (results,):
                if isinstance(result, FakeTensor):
                    self.number(result)
        if self._count_scratch and (bytes_per_element := SCRATCH_BYTES.get(func.name())):
            size = bytes_per_element * args[2].numel()
            self._events += [Event(-1, size, self.phase), Event(-1, -size, self.phase)]
        return results

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The results of an operation, made from those of the same operation on tensors of the same shapes."""
        if _is_view(func) and isinstance(args[0], FakeTensor):
            with in_kernel_invocation_manager(self._fake):
                view = func(*args, **kwargs)
            if isinstance(view, Tensor):
                return self._fake_tensor(view)
            return type(view)(self._fake_tensor(each) for each in view)
        key = None if func.is_view else _key(func, args, kwargs)
        known = self._results.get(key) if key else None
        if known is None:
            results = func(*args, **kwargs)
            if key and func._schema.is_mutable:
                self._results[key] = _written(results, args, kwargs) if key == _key(func, args, kwargs) else None
            elif key:
                self._results[key] = _layouts(results, args)
            return results
        if isinstance(known, _Written):
            return None if known.argument is None else [*args, *kwargs.values()][known.argument]
        made: list[Any] = []
        for layout in known.layouts:
            if layout is None:
                made.append(None)
                continue
            size, stride, dtype = layout
            with in_kernel_invocation_manager(self._fake):
                tensor = torch.empty_strided(size, stride, dtype=dtype, device="meta")
            made.append(self._fake_tensor(tensor))
        return made[0] if known.kind is Tensor else known.kind(made)

    def _fake_tensor(self, meta: Tensor) -> FakeTensor:
        """A fake CPU tensor with the storage of a tensor on the meta device.

        FakeTensor's constructor takes most of the time of an estimate. All new fake tensors of a mode have the same
        attributes, so only the first one is made by the constructor.
        """
        if not self._attributes:
            self._attributes = vars(FakeTensor(self._fake, meta, CPU))
        fake = Tensor._make_subclass(FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=CPU)
        torch._C._set_throw_on_mutable_data_ptr(fake)
        vars(fake).update(self._attributes)
        return fake

    def number(self, tensor: Tensor) -> int:
        """The number of the tensor's storage, which is recorded if it is new."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._numbers:
            number = self._numbers[key] = len(self._sizes)
            size = self._sizes[number] = storage.nbytes()
            self._events.append(Event(number, size, self.phase))
            weakref.finalize(storage, self._record_end, key)
        return self._numbers[key]

    def _record_end(self, key: int) -> None:
        number = self._numbers.pop(key)
        self._events.append(Event(number, -self._sizes[number], self.phase))

    def set_owner(self, owner: str, tensors: Iterable[Tensor]) -> None:
        """Notes what these tensors are for."""
        for tensor in tensors:
            self.owners[self.number(tensor)] = owner

    def mark(self, name: str) -> None:
        """Notes the present moment, for `replay`."""
        self._events.append(Event(-1, 0, self.phase, name))

    def now(self) -> int:
        """The present moment, for `record`."""
        return len(self._events)

    def record(self, since: int, *, without: str | None = None) -> Recording:
        """Storages that were allocated since the moment `since`, but for those of the owner `without`."""
        events = self._events[since:]
        new = {event.storage for event in events if event.change > 0}
        kept = {number for number in new if self.owners.get(number) != without or without is None}
        owners = {number: self.owners[number] for number in kept if number in self.owners}
        return Recording(tuple(event for event in events if event.mark or event.storage in kept), owners)

    def replay(self, recording: Recording, at_mark: Callable[[str], None] = lambda _: None) -> None:
        """Counts again what was recorded, in the same order, and calls `at_mark` where the recording has a mark."""
        numbers = {-1: -1}
        for storage, change, phase, mark in recording.events:
            self.phase = phase
            if mark is not None:
                at_mark(mark)
                continue
            if storage not in numbers:
                numbers[storage] = len(self._sizes)
                self._sizes[numbers[storage]] = change
                if storage in recording.owners:
                    self.owners[numbers[storage]] = recording.owners[storage]
            self._events.append(Event(numbers[storage], change, phase))

    def repeat(self, key: Hashable, run: Callable[[], None], *, remains: str) -> None:
        """Calls `run` if this is the first call with `key`. Otherwise counts again what that call allocated.

        What the call leaves allocated belongs to the owner `remains`.
        """
        if key in self._repeated:
            self.replay(self._repeated[key])
            return
        since = self.now()
        run()
        left: dict[int, int] = defaultdict(int)
        for event in self._events[since:]:
            left[event.storage] += event.change
        self.owners |= {number: remains for number, size in left.items() if size > 0 and number not in self.owners}
        self._repeated[key] = self.record(since)

    def peak(self) -> tuple[dict[int, int], str]:
        """Bytes of each storage that was alive at the peak, by number, and the phase of the peak.

        Optimizer states are allocated during the first step. They count from its start, as in all later steps.
        """
        states = {number: self._sizes[number] for number, owner in self.owners.items() if owner == OPTIMIZER_STATES}
        events = [event for event in self._events if event.storage not in states]
        totals = list(accumulate(event.change for event in events))
        peak = max(range(len(totals)), key=totals.__getitem__)
        alive = defaultdict(int, states)
        for event in events[: peak + 1]:
            alive[event.storage] += event.change
        return alive, events[peak].phase


class _Layouts(NamedTuple):
    kind: Any
    """Tensor, or the type of the sequence that holds the results."""
    layouts: list[tuple[torch.Size, tuple[int, ...], torch.dtype] | None]


class _Written(NamedTuple):
    """The result of an operation that writes into an argument."""

    argument: int | None
    """Position of the argument that is returned, among args and kwargs; None if nothing is returned."""


def _written(results: Any, args: Any, kwargs: Any) -> _Written | None:
    """The argument that an operation returned; None if it returned anything else."""
    if results is None:
        return _Written(None)
    return next((_Written(at) for at, each in enumerate([*args, *kwargs.values()]) if each is results), None)


def _is_view(func: Any) -> bool:
    """True if the result shares the storage of the first argument. torch does not count `_unsafe_view` as a view."""
    return func.is_view or func is torch.ops.aten._unsafe_view.default


def _key(func: Any, args: Any, kwargs: Any) -> Hashable | None:
    """Everything that the results of an operation depend on; None if there may be more than its arguments."""
    if func not in CREATIONS and not any(isinstance(each, Tensor) for each in _flat(args)):
        return None
    if kwargs.get("device") not in (None, CPU):
        return None
    parts = _key_of((args, kwargs.items()))
    return (func, parts) if parts else None


def _flat(args: Any) -> Iterable[Any]:
    for arg in args:
        yield from arg if isinstance(arg, list | tuple) else (arg,)


def _key_of(value: Any) -> Hashable | None:
    if isinstance(value, FakeTensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, Tensor):
        return None
    if isinstance(value, list | tuple | type({}.items())):
        parts = tuple(map(_key_of, value))
        return None if None in parts else parts
    return type(value), value  # with the type, because 1, 1.0 and True are equal


def _layouts(results: Any, args: Any) -> _Layouts | None:
    """The layouts of the results; None if a result is not a fake tensor with a storage of its own."""
    several = isinstance(results, list | tuple)
    made = list(results) if several else [results]
    tensors = [tensor for tensor in made if tensor is not None]
    if not all(type(tensor) is FakeTensor for tensor in tensors):
        return None
    storages = [id(each.untyped_storage()) for each in tensors]
    given = {id(each.untyped_storage()) for each in _flat(args) if isinstance(each, Tensor)}
    if len(set(storages)) < len(storages) or given & set(storages):
        return None
    layouts = [None if each is None else (each.shape, each.stride(), each.dtype) for each in made]
    return _Layouts(type(results) if several else Tensor, layouts)


def _any_number(dtype: torch.dtype) -> float | int | bool:
    """Stands for a number that an optimizer reads from a tensor, because a fake tensor has none."""
    if dtype == torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 1
