"""Runs `trimtab bench sparse-gpu` on tiny sequences in Triton's interpreter, by a false clock.

Each look at the clock takes a second, so that everything takes one.
"""

from __future__ import annotations

from itertools import count

import torch

from trimtab.core.benchmark import Options
from trimtab.kernels.sparse import SparseShape, selected_plan
from trimtab.kernels.sparse.configurations import KERNELS, TABLES
from trimtab.sparse import gpu_bench
from trimtab.sparse.gpu_clock import HostDevice
from trimtab.sparse.roofline import Sizes

selected_plan.SelectedPlan.dense_until = lambda *_: 0  # so that what is short has far blocks
SHAPE = SparseShape(window=8, stride=4, block=16, top=3, first=1, recent=1, sliding=24)
LARGE = {"add_chunks", "by_query"}
"""Run only where more queries chose a block than one program takes, and in large groups."""
SIZES = [Sizes(12, 2, 1, 16, 16, torch.float32, SHAPE)]


def main() -> None:
    ticks = count()
    told = []
    cases = gpu_bench.run(
        Options(),
        lambda message, done=None: told.append(message),
        HostDevice(clock=lambda: float(next(ticks))),
        SIZES,
        repeats=1,
    )
    *times, error = cases
    measured = {c.metric.removesuffix("_time") for c in times}
    assert measured >= KERNELS.keys() - LARGE, KERNELS.keys() - measured
    assert measured >= {f"table_{name}" for name in TABLES}, measured
    assert all(c.case.startswith("real/cpu/12/group-2/") for c in times)
    assert all(c.unit == "s" and c.better == "lower" for c in times)
    predicted = [c for c in times if c.baseline == "what was predicted without a GPU"]
    for kernel in KERNELS.keys() - LARGE:
        assert any(c.metric == f"{kernel}_time" for c in predicted), kernel
    for case in times:
        launches = case.value
        assert launches == int(launches) >= 1, case
        if case.metric == "time":
            assert launches == 1
    for case in predicted:
        assert case.ratio == case.baseline_value / case.value > 0
        assert "% off" in (case.notes or "")
    by_name = {c.case.rpartition("/")[2] for c in times if c.metric == "time"}
    branches = ("compressed", "selected", "sliding", "native")
    assert by_name >= {f"{b}_{way}" for b in branches for way in ("forward", "backward")}
    assert by_name >= {"select", "published", "prefill_top", "prefill_by-query", "dense_forward"}
    published = {c.case.rpartition("/")[2] for c in times if c.baseline == "FSA as published"}
    assert published == {"select", "selected_forward"}
    wrong = [abs(c.baseline_value / c.value - 1) for c in predicted]
    assert abs(error.value - sum(wrong) / len(wrong)) < 1e-12
    assert (error.case, error.metric) == ("real/cpu/prediction", "mean_relative_error")
    assert told == ["12 tokens, 2 heads a KV head"]


if __name__ == "__main__":
    main()
