"""What times work on a GPU, and each Triton kernel in it; on a CPU the same for tests."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from time import perf_counter
from types import ModuleType
from typing import Any, Protocol

import torch

from trimtab.core.errors import BadInput, Unsupported
from trimtab.kernels.sparse.configurations import KERNELS, TABLES, configuration
from trimtab.kernels.sparse.launch import interpreted

_TABLES = "triton_tables"

Work = Callable[[], object]
Seconds = Callable[[], float]

_CACHE_BYTES = 256 * 2**20
"""More than the L2 cache of any GPU; written before each timed call."""


class Device(Protocol):
    """Where kernels run, and what times them."""

    name: str
    """As its driver tells it."""
    where: torch.device

    def mark(self, work: Work) -> Seconds:
        """Runs work; what is returned waits for it and tells how long it took."""

    def seconds(self, work: Work) -> float:
        """How long one call takes that finds no data in a cache."""


class GpuDevice:
    """The current GPU, timed by events.

    Raises:
        Unsupported: there is none.
        BadInput: Triton would interpret its kernels.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise Unsupported(
                "torch sees no GPU here, and this benchmark times kernels on one",
                fix="run it where torch.cuda.is_available() is true, or `trimtab bench"
                " sparse-static`, which needs none",
            )
        if interpreted():
            raise BadInput("TRITON_INTERPRET is 1", fix="unset it, so that kernels run on the GPU")
        self.where = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.where)
        self._flush = torch.empty(_CACHE_BYTES, dtype=torch.uint8, device=self.where)

    def mark(self, work: Work) -> Seconds:
        """By two events around the work."""
        event: Callable[..., Any] = torch.cuda.Event
        begin, end = (event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()

        def seconds() -> float:
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3

        return seconds

    def seconds(self, work: Work) -> float:
        """The GPU is busy with the cache while the host launches, so that launches cost little."""
        self._flush.zero_()
        return self.mark(work)()


@dataclass(frozen=True)
class HostDevice:
    """The CPU, on which Triton interprets kernels: the same benchmark, with times worth nothing."""

    name: str = "cpu"
    where: torch.device = field(default_factory=lambda: torch.device("cpu"))
    clock: Callable[[], float] = perf_counter

    def mark(self, work: Work) -> Seconds:
        """By the clock before and after."""
        begin = self.clock()
        work()
        taken = self.clock() - begin
        return lambda: taken

    def seconds(self, work: Work) -> float:
        """Caches are left as they are."""
        return self.mark(work)()


def kernel_name(function: str, constants: Mapping[str, Any]) -> str:
    """The name in `KERNELS` of what a launcher starts, or of `TABLES` behind ``table_``.

    Args:
        function: the kernel's, with its module, ``module.function``.
        constants: what it is launched with.
    """
    module, _, own = function.partition(".")
    if module == _TABLES:
        return f"table_{own}"
    return next(
        name
        for name, of in KERNELS.items()
        if f"{of.module}.{of.function}" == function
        and all(constants.get(key) == value for key, value in telling(name).items())
    )


@cache
def telling(name: str) -> Mapping[str, Any]:
    """The constants by which a kernel is told from others of the same function."""
    own = configuration(name, "cuda", (64, 64)).constants
    return {key: own[key] for key in ("PASS", "NORMALISED", "BY_QUERY") if key in own}


@dataclass(frozen=True)
class _Timed:
    """A kernel that is marked at every launch."""

    function: str
    kernel: Any
    device: Device
    marks: dict[str, list[Seconds]]

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            mark = self.device.mark(lambda: self.kernel[grid](*args, **options))
            self.marks[kernel_name(self.function, options)].append(mark)

        return launch


def each_kernel(device: Device, work: Work) -> dict[str, float]:
    """Seconds of each Triton kernel in some work, added up over its launches; by `kernel_name`."""
    marks: dict[str, list[Seconds]] = defaultdict(list)
    with _marked(device, marks):
        work()
    return {name: sum(seconds() for seconds in of) for name, of in marks.items()}


@contextmanager
def _marked(device: Device, marks: dict[str, list[Seconds]]) -> Iterator[None]:
    """Puts `_Timed` where launchers look for kernels, for as long as this lasts."""
    before: list[tuple[ModuleType, str, Any]] = []
    for name in KERNELS:
        telling(name)  # reads the kernels that are about to be replaced
    replaced = {(of.module, of.function) for of in KERNELS.values()}
    for module_name, function in replaced | {(_TABLES, name) for name in TABLES}:
        module = import_module(f"trimtab.kernels.sparse.{module_name}")
        before.append((module, function, getattr(module, function)))
    try:
        for module, function, kernel in before:
            name = f"{module.__name__.rpartition('.')[2]}.{function}"
            setattr(module, function, _Timed(name, kernel, device, marks))
        yield
    finally:
        for module, function, kernel in before:
            setattr(module, function, kernel)
