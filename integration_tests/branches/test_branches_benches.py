"""The benchmarks that need vLLM but no model, made small: what they run and what they report."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from trimtab.branches import step_bench, virtual_bench
from trimtab.branches.figures import EXPECTED_ACCURACY, METRICS
from trimtab.branches.sides import (
    BEST_OF_N,
    EARLY_STOP,
    OURS,
    PAPER,
    PRUNING,
    SELF_CONSISTENCY,
    STEP,
    VANILLA,
)
from trimtab.core.benchmark import Options

pytestmark = pytest.mark.integration


def quiet(message, done=None):
    """Takes what a benchmark says of how far it is."""


def test_the_virtual_bench_compares_both_of_ours_with_every_baseline_in_every_metric(monkeypatch):
    monkeypatch.setattr(virtual_bench, "QUICK_QUESTIONS", 3)
    monkeypatch.setattr(virtual_bench, "QUICK_SEEDS", 2)
    cases = virtual_bench.cases(Options(seed=1, quick=True), quiet)
    everybody = {
        *(s.name for s in (VANILLA, SELF_CONSISTENCY, BEST_OF_N, EARLY_STOP, PRUNING, STEP)),
        "deepconf-threshold",
    }
    expected = Counter(
        (f"virtual/{where}/{ours.name}", rival, metric.name)
        for where, rivals in (
            *((rate, everybody) for rate in virtual_bench.QUICK_RATES),
            *((f"auroc-{auroc:g}", {BEST_OF_N.name}) for auroc in virtual_bench.QUICK_AUROCS),
        )
        for ours in (PAPER, OURS)
        for rival in rivals
        for metric in (*METRICS, *((EXPECTED_ACCURACY,) if where.startswith("auroc") else ()))
    )
    assert Counter((c.case, c.baseline, c.metric) for c in cases) == expected
    for case in cases:
        assert case.ratio_low <= case.ratio <= case.ratio_high
        assert math.isfinite(case.ratio)
        assert case.ratio > 0


def test_what_is_served_are_the_draws():
    crowd = virtual_bench.KIND.draw(3, 2.0, 5)
    alone = virtual_bench.serve(crowd, VANILLA, virtual_bench.KIND.score_every)
    assert alone.tokens == sum(question.lengths[0] for question in crowd)
    whole = virtual_bench.serve(crowd, SELF_CONSISTENCY, virtual_bench.KIND.score_every)
    assert whole.tokens == sum(sum(question.lengths) for question in crowd)
    ours = virtual_bench.serve(crowd, OURS, virtual_bench.KIND.score_every)
    assert 0 < ours.tokens < whole.tokens
    for served in (alone, whole, ours):
        assert len(served.latencies_s) == len(served.right) == 3
        assert 0 < served.busy_s <= served.until_s
    assert sum(ours.ends.values()) == 3 * OURS.branches


def test_the_step_bench_compares_the_plugin_with_the_bare_host(monkeypatch):
    for name, size in {
        "GROUPS": 2,
        "BRANCHES": 2,
        "SCORE_EVERY": 4,
        "TURN": 2,
        "QUICK_REPEATS": 2,
    }.items():
        monkeypatch.setattr(step_bench, name, size)
    cases = step_bench.cases(Options(quick=True), quiet)
    assert [case.case for case in cases] == [
        "real/step/256-branches",
        "real/step/256-calls-that-do-not-ask",
    ]
    for case in cases:
        assert (case.metric, case.unit, case.better) == ("step_cpu", "s", "lower")
        assert case.baseline == "the host without policies"
        assert case.baseline_value > 0
        assert case.value > 0
        assert case.ratio_low <= case.ratio <= case.ratio_high
        assert "us more" in case.notes
