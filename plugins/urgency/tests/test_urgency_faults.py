"""What must hold whatever clients, clocks and loads do."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.cost.step import EngineLimits, EngineProfile, StepCost
from trimtab.core.errors import BadInput
from trimtab.core.policy import Call, Outcome, ServingPolicy
from trimtab.core.simulate import ReplicaSpec, simulate
from trimtab.core.workload import Request
from trimtab.urgency.config import UrgencyConfig
from trimtab.urgency.estimate import Estimator
from trimtab.urgency.fields import FIELDS, parse
from trimtab.urgency.policy import _LATE_SHARE, Lane, UrgencyPolicy
from trimtab.urgency.workflows import WorkflowTable

WRONG = [0, 0.0, -1.0, -math.inf, math.inf, math.nan, 1e12, 1e9, "5", True, None, [5]]


@pytest.mark.parametrize("value", WRONG)
def test_deadlines_that_are_none_are_refused_at_every_door(value):
    with pytest.raises(BadInput, match="deadline_s"):
        parse({"deadline_s": value})
    with pytest.raises(BadInput, match="X-Workflow-Deadline-Ms"):
        FIELDS["deadline_s"].from_header("deadline_s", str(value) if value != "5" else "5 s")
    policy = UrgencyPolicy(UrgencyConfig())
    with pytest.raises(BadInput):
        policy.on_arrival(Call("1", 0.0, 1, 1, {"workflow": "w", "deadline_s": value}), 0.0)
    assert not policy._calls
    assert not len(policy._workflows)


@pytest.mark.parametrize("value", [0, -1, 1e12, math.inf, math.nan])
def test_deadlines_that_are_none_are_refused_in_the_options(value):
    with pytest.raises(ValueError, match="deadline_s"):
        UrgencyConfig(default_deadline_s=value)


@given(
    jumps_s=st.lists(st.sampled_from([0.0, 0.5, 1.0, -3.0, -1e6, 1e6, 3600.0]), max_size=40),
    data=st.data(),
)
def test_a_clock_that_jumps_loses_nobody_and_poisons_nothing(jumps_s, data):
    estimator = Estimator()
    policy = UrgencyPolicy(UrgencyConfig(), estimator)
    now_s = 2e6
    waiting: list[Call] = []
    running: list[Call] = []
    for number, jump_s in enumerate(jumps_s):
        now_s += jump_s
        for _ in range(3):
            if policy.next_timer_s() <= now_s:
                policy.on_timer(now_s)
        match data.draw(st.sampled_from(["arrive", "admit", "end"])):
            case "arrive":
                fields = {"workflow": f"w{number % 3}", "stage": "s", "deadline_s": 5.0}
                waiting.append(Call(f"{number}", now_s, 1, 1, fields if number % 4 else {}))
                policy.on_arrival(waiting[-1], now_s)
            case "admit" if waiting:
                call = min(waiting, key=lambda one: policy.key(one, now_s))
                waiting.remove(call)
                call.admitted_s = now_s
                policy.on_admission(call, now_s)
                running.append(call)
            case "end" if running:
                call = running.pop(0)
                call.output_tokens = 3
                policy.on_finish(call, Outcome.COMPLETED, now_s)
        keys = [part for call in waiting for part in policy.key(call, now_s)]
        assert not any(math.isnan(part) for part in keys)
        assert estimator.service_s("default", "s") >= 0
        assert estimator.work_after_s("default", "s") >= 0
        assert estimator.quiet_s("default") >= 0
    for call in waiting + running:
        policy.on_finish(call, Outcome.ABORTED, now_s)
    assert not policy._calls


def test_a_review_comes_again_after_the_clock_was_set_back():
    policy = UrgencyPolicy(UrgencyConfig())
    policy.on_arrival(Call("1", 1e6, 1, 1, {"deadline_s": 50.0}), 1e6)
    policy.on_timer(1e6 + 0.3)
    assert policy.next_timer_s() > 1e6
    policy.on_arrival(Call("2", 5.0, 1, 1, {"deadline_s": 50.0}), 5.0)
    assert policy.next_timer_s() <= 5.3


def served_share(policy: UrgencyPolicy, tenants, admissions: int) -> dict[str, int]:
    """Admissions by tenant while each always has twenty calls waiting."""
    now_s, number = 0.0, 0
    waiting: dict[Call, str] = {}
    counts = dict.fromkeys(tenants, 0)
    for _ in range(admissions):
        for tenant, deadline_s in tenants.items():
            while sum(owner == tenant for owner in waiting.values()) < 20:
                number += 1
                fields = {"tenant": tenant, "deadline_s": deadline_s, "workflow": str(number)}
                call = Call(str(number), now_s, 1, 1, fields)
                waiting[call] = tenant
                policy.on_arrival(call, now_s)
        now_s += 0.01
        while policy.next_timer_s() <= now_s:
            policy.on_timer(now_s)
        call = min(waiting, key=lambda one: policy.key(one, now_s))
        counts[waiting.pop(call)] += 1
        call.admitted_s = now_s
        policy.on_admission(call, now_s)
        policy.on_finish(call, Outcome.COMPLETED, now_s)
    return counts


@pytest.mark.parametrize("max_share", [0.5, 0.6, 0.7, 0.9])
def test_a_tenant_that_lies_about_its_deadlines_gets_its_share_and_no_more(max_share):
    policy = UrgencyPolicy(UrgencyConfig(max_share=max_share))
    counts = served_share(policy, {"greedy": 1.0, "honest": 900.0, "patient": 950.0}, 400)
    assert counts["greedy"] <= max_share * 400 + 5
    assert counts["greedy"] >= min(max_share, 0.5) * 400 - 10
    assert counts["patient"] > 0.2 * (400 - counts["greedy"])


def test_without_a_cap_a_liar_gets_everything():
    policy = UrgencyPolicy(UrgencyConfig(max_share=1.0))
    assert served_share(policy, {"greedy": 1.0, "honest": 900.0}, 100)["greedy"] == 100


def test_a_tenant_alone_gets_everything_and_owes_nothing():
    policy = UrgencyPolicy(UrgencyConfig(max_share=0.5))
    assert served_share(policy, {"only": 10.0}, 50) == {"only": 50}


def test_a_deadline_shorter_than_the_floor_counts_as_the_floor():
    policy = UrgencyPolicy(UrgencyConfig(min_deadline_s=30.0))
    liar = Call("1", 0.0, 1, 1, {"deadline_s": 0.001})
    honest = Call("2", 0.0, 1, 1, {"deadline_s": 29.0})
    for call in (liar, honest):
        policy.on_arrival(call, 0.0)
    assert policy.key(liar, 0.0) == policy.key(honest, 0.0)


def test_tenants_workflows_of_one_name_are_apart():
    table = WorkflowTable(limit=10, ttl_s=10.0)
    mine, yours = table.of("w", "c", 0.0, "me"), table.of("w", "c", 0.0, "you")
    assert mine is not yours
    assert table.of("w", "c", 1.0, "me") is mine


def test_workflows_that_never_end_are_forgotten_and_their_records_bounded():
    policy = UrgencyPolicy(UrgencyConfig(max_workflows=100, workflow_ttl_s=50.0))
    for number in range(3000):
        now_s = float(number)
        fields = {"workflow": f"w{number}", "deadline_s": 5.0, "stage": f"s{number}"}
        call = Call(str(number), now_s, 1, 1, {**fields, "tenant": f"t{number}"})
        policy.on_arrival(call, now_s)
        call.admitted_s = now_s
        policy.on_admission(call, now_s)
        policy.on_finish(call, Outcome.COMPLETED, now_s + 0.5)
    assert len(policy._workflows) <= 101
    assert len(policy._quiet) <= 101
    assert len(policy._tenants._tenants) <= 1024
    assert not policy._moving
    assert not len(policy._triage.workflows)


@given(seed=st.integers(0, 10_000))
def test_every_call_is_admitted_within_a_bound_whatever_arrives(make_job, make_server, seed):
    """One server, a crowd that never leaves it idle, newcomers that can always still be in time.

    A call with a deadline waits at most until it is the oldest of the late ones, which have their
    share of the turns. A call without a deadline waits for those before it, one turn in
    ``min_share`` each.
    """
    rng = random.Random(seed)
    config = UrgencyConfig()
    policy = UrgencyPolicy(config)
    longest_s, jobs, at_s = 1.0, [], 0.0
    while at_s < 40.0:
        at_s += rng.uniform(0.1, 1.0)
        fields = {} if rng.random() < 0.15 else {"deadline_s": rng.choice([0.5, 2.0, 5.0])}
        jobs.append(make_job(rng.uniform(0.2, longest_s), fields, at_s))
    jobs += [make_job(0.9, {"deadline_s": 50.0}, 0.45 * n) for n in range(100)]
    make_server(policy).serve(jobs)
    for job in jobs:
        deadline_s = job.fields.get("deadline_s")
        if deadline_s is None:
            waiting = [j for j in jobs if not j.fields and j.arrival_s <= job.arrival_s]
            ahead = sum(j.started_s >= job.arrival_s for j in waiting)
            bound_s = (ahead + 2) / config.min_share * longest_s
        else:
            late_s = job.arrival_s + deadline_s
            older = [
                j
                for j in jobs
                if j.fields and j.arrival_s <= job.arrival_s and j.started_s >= late_s
            ]
            rest = _LATE_SHARE * (1 - config.min_share)
            bound_s = deadline_s + (len(older) + 3) / rest * longest_s
        assert job.started_s - job.arrival_s <= bound_s


LIMITS = EngineLimits(max_num_seqs=3, max_num_batched_tokens=256, max_model_len=512, kv_blocks=96)
PROFILE = EngineProfile(model="m", device="d", engine="e", limits=LIMITS, step=StepCost(base_s=0.1))


@given(seed=st.integers(0, 1000))
def test_no_seat_is_idle_while_a_call_waits_and_none_is_lost(seed):
    """Singles of one length keep the same number of seats busy in any order."""
    rng = random.Random(seed)
    requests = [
        Request(f"r{n}", rng.uniform(0, 8), 10, 8, deadline_s=rng.choice([None, 1.0, 30.0]))
        for n in range(40)
    ]
    ours = simulate(requests, [ReplicaSpec(PROFILE)], policies=lambda: (urgent(),))
    theirs = simulate(requests, [ReplicaSpec(PROFILE)])
    assert sorted(c.request_id for c in ours.calls) == sorted(r.request_id for r in requests)
    ends = [sorted(c.finished_s for c in result.calls) for result in (ours, theirs)]
    assert ends[0] == pytest.approx(ends[1], abs=0.21)  # two steps: arrivals cut jumps
    assert type(urgent()).admits is ServingPolicy.admits


def urgent() -> UrgencyPolicy:
    return UrgencyPolicy(UrgencyConfig())


def test_ten_thousand_waiting_cost_each_step_a_bounded_part():
    """Counted, not timed: keys made anew and workflows looked at in one step."""
    policy = UrgencyPolicy(UrgencyConfig(age_cap=1.5))
    calls = []
    for number in range(10_000):
        fields = {"workflow": f"w{number}", "deadline_s": 20.0 + number % 7, "stage": "s"}
        calls.append(Call(str(number), 0.0, 1, 10, fields))
        policy.on_arrival(calls[-1], 0.0)
    looks = 0
    looked_at = policy._rest_s

    def counted(workflow, now_s):
        nonlocal looks
        looks += 1
        return looked_at(workflow, now_s)

    policy._rest_s = counted
    now_s, most_stale, most_looks = 0.0, 0, 0
    for _ in range(1500):
        now_s += 0.03
        policy.stale.clear()
        looks = 0
        if policy.next_timer_s() <= now_s:
            policy.on_timer(now_s)
        most_stale, most_looks = max(most_stale, len(policy.stale)), max(most_looks, looks)
        call = calls.pop()
        call.admitted_s = now_s
        policy.on_admission(call, now_s)
        call.output_tokens = 5
        policy.on_finish(call, Outcome.COMPLETED, now_s + 1.0)
    assert most_stale <= 60
    assert most_looks <= 100
    places = [policy.key(call, now_s) for call in calls]
    assert not any(lane == Lane.DUE and due_s <= 27.0 for lane, due_s in places)
