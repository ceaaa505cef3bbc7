"""The benchmark's cases: their shape, and that none is left out."""

from __future__ import annotations

import pytest

from trimtab.core.benchmark import Options
from trimtab.core.collectives import check_plan
from trimtab.core.errors import TrimtabError
from trimtab.gentree import bench, real_bench, regret_bench
from trimtab.hosts.testbed import allreduce_job, call_cost_job
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


def test_large_plans_on_paper_reach_their_share_of_what_links_let_through() -> None:
    cases = list(bench.bound_cases(Options(quick=True), silent))
    assert len(cases) == 2 * len(bench.QUICK) * len(bench.ALPHAS)
    assert {case.baseline for case in cases} == {"best of all baselines"}
    assert all(case.ratio >= 1 - 1e-9 and case.value <= 1 for case in cases)
    for links, rounds in zip(cases[::2], cases[1::2], strict=True):
        assert (links.metric, links.case) == ("share_of_cut_bound", rounds.case)
        assert links.value < rounds.value
        assert links.ratio == pytest.approx(rounds.ratio)
        if "50us" in links.case:
            assert links.value > 0.85
            assert "is possible" in str(links.notes)
        else:
            assert "beyond any" in str(links.notes)


def test_twelve_networks_have_proven_rivals_of_which_none_comes_twice() -> None:
    places = regret_bench.networks()
    assert len({place.name for place in places}) == 12
    for place in places:
        assert sorted(host for host, _ in place.slots) == [n.name for n in place.network.nodes]
        found = regret_bench.rivals(place, 2**18)
        for schedule in found.values():
            check_plan(schedule)
        assert len({schedule.model_dump_json() for schedule in found.values()}) == len(found)
        assert {"ring", "co-located PS", "halving-doubling"} <= set(found)


def test_the_chosen_plan_is_told_as_a_multiple_of_the_best(monkeypatch) -> None:
    place = regret_bench.networks({2**18: 2})[5]
    asked: list[allreduce_job.Task] = []

    def run(place, module, task) -> list[str]:
        asked.append(task)
        names = {"gloo": 8.0, "gentree": 3.0, **dict.fromkeys(task.races[0].schedules, 2.0)}
        turns = [
            Timing(payload_bytes=2**18, algorithm=name, seconds=seconds)
            for name, seconds in names.items()
        ]
        return [turn.model_dump_json() for turn in turns] * 2

    monkeypatch.setattr(regret_bench, "run", run)
    (case,) = regret_bench.measured(place)
    assert (case.case, case.metric) == (f"real/regret/{place.name}/262144-bytes", "times_best")
    assert (case.baseline, case.baseline_value, case.value, case.ratio) == ("gloo", 4, 1.5, 8 / 3)
    chosen = place.plans().schedule(2**18)
    assert chosen is not None
    assert chosen not in asked[0].races[0].schedules.values()
    by_chance = {"gloo": [1.0, 1.0], "gentree": [1.25, 1.25], "ring": [2.0, 2.0]}
    passed_on = regret_bench.compared(place, 2**18, None, by_chance)
    assert passed_on.value == 1
    assert "chosen was gloo, the best of 2 was the chosen one" in str(passed_on.notes)
    mean = regret_bench.on_average([case, passed_on])
    assert (mean.value, mean.baseline_value) == (1.25, 2.4)
    assert "the worst is 1.50 on racks-4-4/interleaved" in str(mean.notes)


def test_what_links_let_through_at_best_stands_beside_real_times(monkeypatch) -> None:
    place = real_bench.interleaved({2**24: 1})
    names = ("gloo", "gentree", real_bench.RING)
    turns = [Timing(payload_bytes=2**24, algorithm=name, seconds=4.0) for name in names]
    monkeypatch.setattr(real_bench, "run", lambda *words: [t.model_dump_json() for t in turns])
    case, _ = real_bench.allreduce_cases(place)
    # Each of eight ranks sends seven eighths of the payload twice at least.
    assert case.lower_bound == pytest.approx(1.75 * 2**24 / real_bench.HOST_BYTES_PER_S)
    assert "59% of the links' bound reached" in str(case.notes)


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
