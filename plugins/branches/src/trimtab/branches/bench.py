"""``trimtab bench branches``: simulated, in vLLM's scheduler on a virtual clock, and for real."""

from __future__ import annotations

from trimtab.branches import real_bench, simulated_bench, step_bench, virtual_bench
from trimtab.core.benchmark import Case, Options, Progress


def run(options: Options, progress: Progress) -> list[Case]:
    """The cases of all tiers, and what a step costs."""
    return [
        case
        for tier in (simulated_bench, virtual_bench, step_bench, real_bench)
        for case in tier.cases(options, progress)
    ]
