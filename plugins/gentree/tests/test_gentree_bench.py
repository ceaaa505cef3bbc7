"""The benchmark's cases: their shape, and that none is left out."""

from __future__ import annotations

import pytest

from trimtab.core.benchmark import Options
from trimtab.core.collectives import NetworkTree
from trimtab.gentree import bench, real_bench
from trimtab.gentree.backend import GroupPlans
from trimtab.gentree.planner import leaf_order


def silent(message: str, done: float | None = None) -> None:
    del message, done


@pytest.fixture(scope="module")
def cases():
    return list(bench.simulator_cases(Options(quick=True), silent))


def test_every_tree_regime_width_size_and_baseline_has_a_case(cases) -> None:
    baselines = {
        "ring",
        "co-located PS",
        "halving-doubling",
        "hierarchical",
        "best of all baselines",
        "gentree as published",
    }
    assert {case.baseline for case in cases} == baselines
    cells = len(bench.QUICK) * len(bench.ALPHAS) * len(bench.WIDTHS) * len(bench.FLOATS)
    assert len(cases) == cells * len(baselines)


def test_no_plan_is_behind_the_best_baseline_or_beats_the_bound(cases) -> None:
    for case in cases:
        if case.baseline != "gentree as published":
            assert case.ratio >= 1 - 1e-9, case
        assert case.lower_bound is not None
        assert case.value >= case.lower_bound * (1 - 1e-9)


def test_large_payloads_on_paper_come_near_the_bound(cases) -> None:
    large = [c for c in cases if "alpha-50us" in c.case and "1e+08" in c.case]
    assert min(c.lower_bound / c.value for c in large) > 0.85


def test_the_bench_runs_where_hosts_cannot_be_made(monkeypatch) -> None:
    monkeypatch.setattr(real_bench, "obstacle", lambda: "not allowed here")
    told: list[str] = []

    def progress(message: str, done: float | None = None) -> None:
        told.append(message)

    assert real_bench.real_cases(Options(quick=True), progress) == []
    assert told == ["real hosts are left out: not allowed here"]


def test_alternating_racks_are_planned_and_racks_in_order_are_not_worse_than_gloo() -> None:
    network = real_bench._network([4, 4])
    slots = [(f"h{number}", 0) for number in real_bench.INTERLEAVED]
    tree = NetworkTree.of_cluster(network, slots)
    order = leaf_order(tree, slots)
    plans = GroupPlans(tree, order, real_bench.CONSTANTS, always=False)
    assert plans.schedule(2**22) is not None
    assert order == list(real_bench.INTERLEAVED)
