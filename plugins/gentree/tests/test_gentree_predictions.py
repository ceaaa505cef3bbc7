"""Errors of predictions on sizes that were not fitted, and the regime in which plans gain most."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from trimtab.core.benchmark import Options
from trimtab.core.cost import GenModel, Run
from trimtab.gentree import bench, prediction_bench


def runs_of(model: GenModel, sizes: Sequence[int]) -> list[Run]:
    shapes = [("staged", (n,)) for n in range(2, 9)] + [("ring", (8,))]
    shapes += [("sum", (k,)) for k in range(2, 9)]
    found = []
    for algorithm, groups in shapes:
        for size in sizes:
            run = Run(algorithm=algorithm, groups=groups, payload_bytes=size, seconds=(1.0,))
            seconds = (model.seconds(run.collective, size),) * 3
            found.append(run.model_copy(update={"seconds": seconds}))
    return found


def test_predictions_are_of_sizes_that_were_not_fitted() -> None:
    """Runs that the model fits wrongly count where they are held out, and there alone."""
    true = GenModel(1e-3, 8e-8, 1e-10, 3e-10, 1e-8, 2)
    sizes, held_out = (2**18, 2**19, 2**20), (2**19,)
    runs = runs_of(true, sizes)
    case = prediction_bench.compared("deep-queues", runs, held_out, seed=0)
    assert (case.case, case.metric, case.better) == (
        "model/deep-queues",
        "prediction_error",
        "lower",
    )
    assert case.value < 1e-6 < 0.02 < case.baseline_value
    slower = [
        run.model_copy(update={"seconds": (2 * run.median_s,)})
        if run.payload_bytes in held_out
        else run
        for run in runs
    ]
    case = prediction_bench.compared("deep-queues", slower, held_out, seed=0)
    assert case.value == pytest.approx(0.5, abs=1e-6)


def test_no_predictions_where_hosts_cannot_be_made(monkeypatch) -> None:
    monkeypatch.setattr(prediction_bench, "obstacle", lambda: "not allowed here")
    assert (
        prediction_bench.prediction_cases(Options(quick=True), lambda message, done=None: None)
        == []
    )


def test_where_incast_and_memory_are_dear_no_algorithm_of_a_library_suits() -> None:
    cases = list(bench.dear_cases(Options(), lambda message, done=None: None))
    best = {c.case.rsplit("/")[-1]: c.ratio for c in cases if c.baseline == "best of all baselines"}
    assert best["no-chunks"] > 7.4
    assert best["chunks"] > best["no-chunks"]
    assert all(c.lower_bound is not None and c.value > c.lower_bound for c in cases)
