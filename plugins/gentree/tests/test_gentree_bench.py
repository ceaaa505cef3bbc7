"""The benchmark's cases: their shape, and that none is left out."""

from __future__ import annotations

import pytest

from trimtab.core.benchmark import Options
from trimtab.core.errors import TrimtabError
from trimtab.gentree import bench, real_bench
from trimtab.hosts.testbed import call_cost_job
from trimtab.hosts.testbed.allreduce_job import Timing
from trimtab.hosts.testbed.training_job import Step


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


@pytest.mark.parametrize(
    ("torch", "told"),
    [
        (None, "real hosts are left out: torch is not installed"),
        ("here", "hosts with a network of their own are left out: not allowed here"),
    ],
)
def test_the_bench_runs_where_hosts_cannot_be_made(monkeypatch, torch, told) -> None:
    monkeypatch.setattr(real_bench, "find_spec", lambda name: torch)
    monkeypatch.setattr(real_bench, "obstacle", lambda: "not allowed here")
    said: list[str] = []

    def progress(message: str, done: float | None = None) -> None:
        said.append(message)

    assert real_bench.real_cases(Options(quick=True), progress) == []
    assert said == [told]


def test_alternating_racks_are_planned_and_each_place_has_a_rank_for_each_slot() -> None:
    for place in real_bench.places():
        assert len(place.slots) == real_bench.RANKS
        plans = place.plans()
        if "interleaved" in place.name:
            assert plans.schedule(2**22) is not None
        assert plans.schedule(2**10) is not None, place.name


def step(kind: str, backend: str, seconds: float, loss: float) -> str:
    made = Step(kind=kind, backend=backend, seconds=seconds, loss=loss)
    return made.model_dump_json()


def test_steps_become_cases_and_losses_must_agree(monkeypatch) -> None:
    lines = ["DeepSpeed info", step("ddp", "gloo", 3, 0.5), step("ddp", "gentree", 1, 0.5)]
    monkeypatch.setattr(real_bench, "run", lambda place, module, task: lines)
    (case,) = real_bench.training_cases(real_bench.interleaved())
    assert (case.case, case.metric, case.baseline, case.ratio) == (
        "real/ddp",
        "step_time_s",
        "gloo",
        3,
    )
    lines[2] = step("ddp", "gentree", 1, 0.51)
    with pytest.raises(TrimtabError, match="ddp trains otherwise over plans"):
        real_bench.training_cases(real_bench.interleaved())


def test_the_base_backend_is_timed_where_it_is_chosen(monkeypatch) -> None:
    place = real_bench.places()[-1]
    timed = [
        Timing(payload_bytes=2**26, algorithm=name, seconds=seconds)
        for name, seconds in (("gloo", 2.0), ("gentree", 2.0), (real_bench.RING, 4.0))
    ]
    lines = [timing.model_dump_json() for timing in timed]
    monkeypatch.setattr(real_bench, "run", lambda place, module, task: lines)
    against_gloo, against_ring = real_bench.allreduce_cases(place)
    assert (against_gloo.ratio, against_ring.ratio) == (1, 2)
    assert (against_gloo.baseline, against_ring.baseline) == ("gloo", real_bench.RING)
    assert against_gloo.case == "real/loopback-8/67108864-bytes"
    assert "the base backend was chosen" in str(against_gloo.notes)


def test_the_cpu_time_of_a_call_is_told_by_a_plan_and_passed_on(monkeypatch) -> None:
    ways = {"gloo": 2.0, real_bench.PLANNED: 4.0, real_bench.PASSED_ON: 2.0}
    turns = [call_cost_job.CallCost(way=way, cpu_s=cpu_s) for way, cpu_s in ways.items()]
    lines = [turn.model_dump_json() for turn in turns] * 2
    monkeypatch.setattr(real_bench, "run", lambda place, module, task: lines)
    cases = {case.case: case for case in real_bench.call_cost_cases()}
    planned = cases["real/loopback-4/1024-bytes/by-a-plan"]
    assert (planned.metric, planned.baseline, planned.ratio) == ("cpu_per_call_s", "gloo", 0.5)
    assert cases["real/loopback-4/1024-bytes/passed-on"].ratio == 1
