from __future__ import annotations

import pytest

from trimtab.core.benchmark import Options
from trimtab.urgency.paper import simulated_cases
from trimtab.urgency.paper.cases import LEAST_REQUESTS, OURS, VLLM, Plan


@pytest.fixture(scope="module")
def said():
    return []


@pytest.fixture(scope="module")
def cases(said):
    return simulated_cases(Options(quick=True), lambda message, done=None: said.append(done))


def ratio(cases, where: str, metric: str, baseline: str) -> float:
    (case,) = [c for c in cases if (c.case, c.metric, c.baseline) == (where, metric, baseline)]
    return case.ratio


def test_full_plan_has_every_cluster_trace_and_load():
    plan = Plan.of(Options())
    assert len(plan.cells) == len({cell.name for cell in plan.cells}) == 2 * 3 * 5
    assert plan.seeds >= 5


def test_each_metric_is_compared_with_every_baseline(cases):
    by_metric: dict[str, set[str]] = {}
    for case in cases:
        if case.case == "paper/mean-over-cells/urgency":
            by_metric.setdefault(case.metric, set()).add(case.baseline)
    assert {
        VLLM.name,
        LEAST_REQUESTS.name,
        "product",
        "least-work",
        "plas",
        "paper-or-ratio-best-alpha",
        "paper-best-alpha+urgency",
        "best-of-all-baselines",
    } <= by_metric["deadline_scale"]
    assert {"in_time", "p50_latency_s", "p95_latency_s", "p99_latency_s"} <= by_metric.keys()
    for case in cases:
        assert case.ratio_low <= case.ratio <= case.ratio_high


def test_ours_beats_what_vllm_does_behind_round_robin(cases):
    assert ratio(cases, "paper/mean-over-cells/urgency", "deadline_scale", VLLM.name) > 1.5
    assert ratio(cases, "paper/mean-over-cells/urgency", "p95_latency_s", VLLM.name) > 1.5
    assert OURS.knows_deadlines
    assert not VLLM.knows_deadlines


def test_progress_is_told_from_start_to_end(cases, said):
    assert said[0] == 0
    assert said == sorted(said)
    assert said[-1] < 1
