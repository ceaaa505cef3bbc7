"""``trimtab bench sparse-static``: the GPU kernels, compiled for real targets without a GPU."""

from __future__ import annotations

from trimtab.core.benchmark import Case, Options, Progress
from trimtab.kernels.sparse.static_report import TARGETS, configurations, measure

_MOST_REGISTERS = {"sm_80": 255, "sm_90": 255, "gfx942": 512}


def run(options: Options, progress: Progress) -> list[Case]:
    """One case a kernel and target: its registers against what a thread can have.

    ``quick`` compiles for one target and head size.
    """
    targets = ("sm_90",) if options.quick else tuple(TARGETS)
    found = [c for c in configurations() if not options.quick or c.head_size == (128, 128)]
    cases = []
    for number, configuration in enumerate(found):
        for target in targets:
            progress(f"compiling {configuration.kernel} for {target}", number / len(found))
            used, most = measure(configuration, target), _MOST_REGISTERS[target]
            d, d_v = used.head_size
            ratio = most / used.registers
            cases.append(
                Case(
                    case=f"model/{target}/{used.kernel}/d-{d}-{d_v}",
                    metric="registers",
                    unit="1",
                    better="lower",
                    baseline="what a thread can have",
                    baseline_value=most,
                    value=used.registers,
                    ratio=ratio,
                    ratio_low=ratio,
                    ratio_high=ratio,
                    notes=f"{used.spilled_bytes} B spilled, {used.shared_bytes} B shared,"
                    f" {used.tensor_instructions} tensor instructions of {used.instructions}",
                )
            )
    return cases
