"""What a benchmark reports: one object, one case for each baseline and metric."""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from statistics import median
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict


class Case(BaseModel):
    """A metric measured for a baseline and for ours in the same run.

    ``ratio`` is above 1 when ours is better, whichever way the metric points; ``ratio_low`` and
    ``ratio_high`` are its extremes over repeats or seeds.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    case: str
    metric: str
    unit: str
    better: Literal["lower", "higher"]
    baseline: str
    baseline_value: float
    value: float
    ratio: float
    ratio_low: float
    ratio_high: float
    lower_bound: float | None = None
    notes: str | None = None

    @classmethod
    def compare(
        cls,
        case: str,
        metric: str,
        unit: str,
        better: Literal["lower", "higher"],
        baseline: str,
        pairs: Sequence[tuple[float, float]],
        *,
        lower_bound: float | None = None,
        notes: str | None = None,
    ) -> Case:
        """The case of paired repeats ``(baseline, ours)``: medians, and the ratio's extremes."""
        ratios = [a / b if better == "lower" else b / a for a, b in pairs]
        return cls(
            case=case,
            metric=metric,
            unit=unit,
            better=better,
            baseline=baseline,
            baseline_value=median(a for a, _ in pairs),
            value=median(b for _, b in pairs),
            ratio=median(ratios),
            ratio_low=min(ratios),
            ratio_high=max(ratios),
            lower_bound=lower_bound,
            notes=notes,
        )


class Machine(BaseModel):
    """The machine a benchmark ran on; absolute times compare only within one report."""

    cpu: str
    cores: int
    python: str

    @classmethod
    def here(cls) -> Machine:
        """This machine."""
        return cls(
            cpu=platform.processor() or platform.machine(),
            cores=os.cpu_count() or 1,
            python=platform.python_version(),
        )


class Report(BaseModel):
    """What ``trimtab bench NAME --json`` prints."""

    bench: str
    version: str
    seed: int
    machine: Machine
    cases: list[Case]


class Progress(Protocol):
    """Where a benchmark says what it does; written to standard error."""

    def __call__(self, message: str, done: float | None = None) -> None:
        """Show ``message``, and the share of the work that is done, 0 to 1, where it is known."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked of a benchmark. ``quick`` must finish in under 60 s."""

    seed: int = 0
    quick: bool = False


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark that a plugin offers under ``trimtab bench NAME``."""

    name: str
    summary: str
    run: Callable[[Options, Progress], list[Case]]


@contextmanager
def without_collector() -> Iterator[None]:
    """For timings: without the garbage collector, whose turn is nobody's fault.

    Engines freeze their heap when they have started.
    """
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def report(benchmark: Benchmark, options: Options, progress: Progress) -> Report:
    """Runs a benchmark and wraps its cases."""
    return Report(
        bench=benchmark.name,
        version=version("trimtab-core"),
        seed=options.seed,
        machine=Machine.here(),
        cases=benchmark.run(options, progress),
    )
