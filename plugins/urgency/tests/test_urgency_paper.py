from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.policy import Call, Outcome
from trimtab.urgency.paper.hardware import A100, A6000, CLUSTERS
from trimtab.urgency.paper.measures import Cell, Scene, in_time, sustained_load, tardiness_s
from trimtab.urgency.paper.orders import Programs, order_policies
from trimtab.urgency.paper.serving import Side, middle, serve
from trimtab.urgency.paper.traces import (
    DATABASES,
    MIXED,
    TEMPLATE,
    TRACES,
    Deadlines,
    capacity_per_s,
    template_s,
    usual_s,
    with_deadlines,
    workflows,
)

PUBLISHED_S = {
    ("A100", "retrieve"): 0.2253,
    ("A100", "keywords"): 1.1359,
    ("A100", "generate"): 18.2363,
    ("A100", "revise"): 3.3314,
    ("A100", "test"): 0.1735,
    ("A100", "write-test"): 2.5385,
    ("A100", "evaluate"): 0.8670,
    ("A6000", "retrieve"): 0.4869,
    ("A6000", "keywords"): 2.1088,
    ("A6000", "generate"): 34.2747,
    ("A6000", "revise"): 8.0309,
    ("A6000", "test"): 0.3907,
    ("A6000", "write-test"): 4.5617,
    ("A6000", "evaluate"): 1.7923,
}
PUBLISHED_TOKENS = {"trace-1": (50_500, 1981), "trace-2": (69_700, 2386), "trace-3": (65_600, 2505)}
PUBLISHED_CALLS = {"trace-1": 19.2, "trace-2": 20.7, "trace-3": 20.9}
SMALL = Cell("a100x2-a6000-l40s", "trace-1", 1.1, 4)


@pytest.mark.parametrize("gpu", [A100, A6000], ids=lambda gpu: gpu.name)
def test_stage_times_are_near_those_published(gpu):
    for name, stage in DATABASES["financial"].items():
        assert usual_s(gpu, stage) == pytest.approx(PUBLISHED_S[gpu.name, name], rel=0.25)


def test_base_of_deadlines_is_the_papers():
    assert template_s(CLUSTERS["a100x2-a6000-l40s"]) == pytest.approx(55, rel=0.05)


@pytest.mark.parametrize("name", TRACES)
def test_traces_have_the_published_statistics(name):
    requests = workflows(TRACES[name], 500, 1.0, seed=1)
    prompts, outputs = PUBLISHED_TOKENS[name]
    assert len(requests) / 500 == pytest.approx(PUBLISHED_CALLS[name], rel=0.05)
    assert sum(r.prompt_tokens for r in requests) / 500 == pytest.approx(prompts, rel=0.06)
    assert sum(r.output_tokens for r in requests) / 500 == pytest.approx(outputs, rel=0.13)


@given(seed=st.integers(0, 50), trace=st.sampled_from(list(TRACES.values())))
def test_stages_follow_one_another_and_siblings_share_what_they_wait_for(seed, trace):
    requests = workflows(trace, 4, 0.1, seed)
    assert requests == workflows(trace, 4, 0.1, seed)
    by_name = defaultdict(list)
    for request in requests:
        by_name[request.workflow].append(request)
    for calls in by_name.values():
        counts = Counter(call.stage for call in calls)
        assert (counts["retrieve"], counts["generate"], counts["test"]) == (4, 2, 3)
        assert counts["revise"] <= 10
        assert counts["evaluate"] in trace.evaluations
        assert not calls[0].depends_on
        known = {call.request_id: call for call in calls}
        for call in calls[1:]:
            assert {known[name].stage for name in call.depends_on} <= set(TEMPLATE)
        (generate,) = {c.depends_on for c in calls if c.stage == "generate"}
        assert len(generate) == 1


def test_rates_scale_arrivals_and_nothing_else():
    slow, fast = (workflows(TRACES["trace-3"], 10, rate, seed=3) for rate in (0.1, 0.2))
    assert [r.arrival_s for r in slow] == pytest.approx([2 * r.arrival_s for r in fast])
    assert [r.prompt_tokens for r in slow] == [r.prompt_tokens for r in fast]


def test_capacity_is_the_sum_of_the_gpus():
    trace = TRACES["trace-1"]
    alone = [capacity_per_s(trace, (gpu,)) for gpu in CLUSTERS["a100x2-a6000x2"]]
    assert capacity_per_s(trace, CLUSTERS["a100x2-a6000x2"]) == pytest.approx(sum(alone))
    assert capacity_per_s(trace, (A100,), 1) < capacity_per_s(trace, (A100,), 8)


def call_of(workflow: str, stage: str, arrival_s: float, deadline_s: float, prompt: int = 300):
    fields = {"workflow": workflow, "stage": stage, "deadline_s": deadline_s}
    return Call(f"{workflow}/{stage}/{arrival_s}", arrival_s, prompt, 100, fields)


def served_first(order: str, *calls: Call) -> str:
    ((policy,),) = [order_policies(order, (A100,))()]
    for call in calls:
        policy.on_arrival(call, call.arrival_s)
    return min(calls, key=lambda call: policy.key(call, 0.0)).call_id


def test_orders_rank_as_they_are_described():
    loose_early = call_of("financial/0", "retrieve", 0.0, 900.0)
    tight_late = call_of("financial/1", "generate", 10.0, 100.0, prompt=9000)
    assert served_first("priority", loose_early, tight_late) == tight_late.call_id
    assert served_first("edf", loose_early, tight_late) == tight_late.call_id
    assert served_first("sjf", loose_early, tight_late) == loose_early.call_id
    assert served_first("urgency", loose_early, tight_late) == loose_early.call_id
    assert served_first("llf", loose_early, tight_late) == tight_late.call_id


def test_attained_service_puts_the_served_last_and_the_starved_first():
    ((policy,),) = [order_policies("plas", (A100,))()]

    def attain(workflow: str, waited_s: float, served_s: float) -> float:
        call = call_of(workflow, "retrieve", 0.0, 100.0)
        policy.on_arrival(call, 0.0)
        call.admitted_s = waited_s
        policy.on_finish(call, Outcome.COMPLETED, waited_s + served_s)
        follower = call_of(workflow, "generate", waited_s + served_s, 100.0)
        policy.on_arrival(follower, follower.arrival_s)
        key = policy.key(follower, follower.arrival_s)
        assert isinstance(key, float)
        return key

    new = call_of("financial/0", "retrieve", 0.0, 100.0)
    policy.on_arrival(new, 0.0)
    assert policy.key(new, 0.0) == 0.0
    assert attain("financial/1", 1.0, 20.0) > attain("financial/2", 1.0, 3.0) > 0.0
    assert attain("financial/3", 100.0, 20.0) == 0.0


def test_template_is_each_workflows_own_and_forgets_revisions_at_the_first_test():
    programs = Programs((A100, A6000))
    first = programs.of(call_of("financial/0", "retrieve", 0.0, 100.0))
    for stage in (*TEMPLATE[:6], "revise", "revise", "revise", "revise", "revise", "test"):
        first.enter(stage)
    assert first.rest == ["write-test", "test", "evaluate", "test"]
    other = programs.of(call_of("financial/1", "retrieve", 5.0, 100.0))
    assert other.rest == list(TEMPLATE)
    generate = call_of("financial/0", "generate", 1.0, 100.0)
    gpus = mean(usual_s(gpu, DATABASES["financial"]["generate"]) for gpu in (A100, A6000))
    assert programs.usual_s(generate, "generate") == pytest.approx(gpus)


@pytest.mark.parametrize(
    "order", ["fcfs", "priority", "sjf", "edf", "plas", "urgency", "edd", "llf"]
)
def test_every_order_serves_every_call_and_is_deterministic(order):
    cluster = CLUSTERS[SMALL.cluster]
    requests = with_deadlines(SMALL.requests(8, 5), Deadlines(SMALL.base_s, 3.0, MIXED))
    side = Side(order, "least-requests", order=order)
    result = serve(side, cluster, requests, 4)
    assert sorted(c.request_id for c in result.calls) == sorted(r.request_id for r in requests)
    assert result.log() == serve(side, cluster, requests, 4).log()


def test_figures_leave_out_the_first_and_the_last_workflows():
    requests = workflows(TRACES["trace-1"], 10, 1.0, seed=2)
    result = serve(Side("rr", "round-robin"), (A100,), requests)
    started = sorted(w.started_s for w in result.workflows)
    assert [w.started_s for w in middle(result)] == started[2:8]


def test_smallest_scale_is_met_and_a_smaller_one_is_not():
    scene = Scene(SMALL, 15, 7)
    blind = Side("lr", "least-requests")
    scale = scene.scale_met(blind)
    assert in_time(scene.run(blind, scale * (1 + 1e-9))) >= 0.95
    assert in_time(scene.run(blind, scale * 0.99)) < 0.95
    aware = Side("ours", "auto", held="llf")
    scale = scene.scale_met(aware)
    assert in_time(scene.run(aware, scale)) >= 0.95
    classes = Scene(SMALL, 15, 7, MIXED)
    scale = classes.scale_met(blind)
    assert in_time(classes.run(blind, scale)) >= 0.95
    assert {r.deadline_s for r in classes.run(blind, scale)} == {
        SMALL.base_s * scale * factor for factor in MIXED
    }


def test_looser_deadlines_sustain_more():
    side = Side("lr", "least-requests")
    loads = [
        sustained_load(side, SMALL.cluster, SMALL.trace, scale=scale, count=12, seed=3)
        for scale in (1.9, 4.0)
    ]
    assert loads[0] < loads[1]


def test_tardiness_is_what_exceeds_the_deadline():
    scene = Scene(SMALL, 5, 1)
    record = replace(scene.run(Side("lr", "least-requests"), 1.0)[0], deadline_s=10.0)
    assert tardiness_s(record) == pytest.approx(record.latency_s - 10.0)
    assert tardiness_s(replace(record, deadline_s=None)) == 0.0
