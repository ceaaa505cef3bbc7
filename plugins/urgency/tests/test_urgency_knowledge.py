"""What is known of workflows' visits and quantiles, and what is done with it."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from statistics import mean

import numpy as np
import pytest

from trimtab.core.cost.step import EngineLimits, EngineProfile, StepCost
from trimtab.core.policy import Call, Outcome
from trimtab.core.simulate import ReplicaSpec, simulate
from trimtab.core.workload import Request
from trimtab.urgency.config import UrgencyConfig
from trimtab.urgency.estimate import END, MOST_VISITS, Chain, Estimator, visit_of
from trimtab.urgency.policy import UrgencyPolicy

LIMITS = EngineLimits(max_num_seqs=2, max_num_batched_tokens=512, max_model_len=1024, kv_blocks=512)
PROFILE = EngineProfile(
    model="m", device="d", engine="e", limits=LIMITS, step=StepCost(base_s=0.05, decode_s=0.01)
)
ALONE_S = 2.5


def workflows(count: int, load: float, seed: int) -> list[Request]:
    """Chains of three to five stages; half with a tight deadline, half with a loose one."""
    chance = random.Random(seed)
    requests, arrival_s = [], 0.0
    for number in range(count):
        arrival_s += chance.expovariate(load * 2 / (ALONE_S * 4 / 3))
        deadline_s = ALONE_S * (chance.uniform(2, 4) if number % 2 else chance.uniform(6, 12))
        requests += [
            Request(
                f"{number}/{stage}",
                arrival_s,
                20,
                chance.randint(8, 20),
                workflow=str(number),
                stage=("plan", "write", "fix", "fix", "fix")[stage],
                deadline_s=deadline_s,
                depends_on=(f"{number}/{stage - 1}",) if stage else (),
            )
            for stage in range(chance.randint(3, 5))
        ]
    return requests


def play(policy: UrgencyPolicy, stages, name: str, now_s: float = 0.0) -> float:
    """Runs a chain of calls of one second each."""
    for stage in stages:
        call = Call("x", now_s, 1, 10, {"workflow": name, "stage": stage})
        policy.on_arrival(call, now_s)
        call.admitted_s = now_s
        policy.on_admission(call, now_s)
        now_s += 1.0
        call.output_tokens = 5
        policy.on_finish(call, Outcome.COMPLETED, now_s)
    return now_s


def test_a_repeated_stage_does_not_inflate_what_is_left():
    """Always two repairs: after the second there is nothing but the check, which a loop denies."""
    estimator = Estimator()
    policy = UrgencyPolicy(UrgencyConfig(), estimator)
    for number in range(60):
        play(policy, ["write", "fix", "fix", "check"], f"w{number}")
    after_s = {visit: estimator.work_after_s("default", visit_of("fix", visit)) for visit in (1, 2)}
    assert after_s[1] == pytest.approx(2.0, rel=0.05)
    assert after_s[2] == pytest.approx(1.0, rel=0.05)
    assert estimator.work_after_s("default", visit_of("write", 1)) == pytest.approx(3.0, rel=0.05)


def test_stages_taken_by_turns_are_told_apart_by_visit():
    estimator = Estimator()
    policy = UrgencyPolicy(UrgencyConfig(), estimator)
    for number in range(60):
        play(policy, ["check", "fix", "check", "fix", "check"], f"w{number}", 100.0 * number)
    left_s = [estimator.work_after_s("default", visit_of("check", n)) for n in (1, 2, 3)]
    assert left_s == [
        pytest.approx(4, abs=0.25),
        pytest.approx(2, abs=0.25),
        pytest.approx(0, abs=0.1),
    ]


def test_a_waiting_call_is_due_by_what_follows_its_own_visit():
    policy = UrgencyPolicy(UrgencyConfig())
    for number in range(60):
        play(policy, ["write", "fix", "fix", "check"], f"w{number}")
    due = []
    now_s = 100.0
    for stage in ("write", "fix", "fix"):
        fields = {"workflow": "mine", "stage": stage, "deadline_s": 50.0}
        call = Call("m", now_s, 1, 10, fields)
        policy.on_arrival(call, now_s)
        due.append(policy.key(call, now_s)[1])
        call.admitted_s = now_s
        policy.on_admission(call, now_s)
        policy.on_finish(call, Outcome.COMPLETED, now_s + 1.0)
        now_s += 1.0
    assert due == [pytest.approx(150.0 - rest_s, abs=0.2) for rest_s in (3.0, 2.0, 1.0)]


def test_an_unseen_visit_goes_by_the_stage():
    estimator = Estimator()
    policy = UrgencyPolicy(UrgencyConfig(), estimator)
    for number in range(20):
        play(policy, ["fix", "check"], f"w{number}")
    pooled_s = estimator.work_after_s("default", "fix")
    assert pooled_s == pytest.approx(1.0, rel=0.05)
    assert estimator.work_after_s("default", visit_of("fix", 5)) == pooled_s
    assert visit_of("fix", 1000) == visit_of("fix", MOST_VISITS)


def test_a_visit_seen_once_leans_on_the_stage():
    chain = Chain()
    for _ in range(100):
        chain.observe("fix", "check")
        chain.observe(visit_of("fix", 1), visit_of("check", 1))
        chain.observe("check", END)
    chain.observe("fix", END)
    chain.observe(visit_of("fix", 2), END)
    once_s = chain.after_s(visit_of("fix", 2), lambda stage: 1.0)
    assert 0.4 < once_s < 0.6  # one sighting of its own, one's worth of the stage's


def test_invented_visits_take_bounded_room():
    estimator = Estimator()
    policy = UrgencyPolicy(UrgencyConfig(), estimator)
    for number in range(200):
        play(policy, [f"s{number % 90}"] * 12, f"w{number}")
    chain = estimator._class("default").chain
    assert len(chain._counts) <= 128 + 65
    assert len(chain._work) <= 128 + 66


@pytest.mark.parametrize("repeat", [0.2, 0.5, 0.7])
def test_the_80_percent_quantile_of_the_work_to_come_holds_in_four_of_five_workflows(repeat):
    chance = random.Random(1)
    estimator = Estimator()
    remaining = []
    for _ in range(600):
        rounds = 0
        while chance.random() < repeat and rounds < 20:
            rounds += 1
        states = ["write", *["fix"] * rounds, END]
        for stage, successor in itertools.pairwise(states):
            estimator.learn_step("c", stage, successor)
            estimator.learn_service("c", stage, 1.0, 10)
        remaining.append(float(rounds))
    work = estimator.work_after("c", "write")
    assert work.mean_s == pytest.approx(mean(remaining[-500:]), rel=0.3)
    assert work.deviation_s == pytest.approx(float(np.std(remaining[-500:])), rel=0.35)
    assert work.stages == pytest.approx(work.mean_s, rel=0.01)
    quantile_s = work.quantile_s(0.8416)
    assert 0.68 <= mean(rest_s <= quantile_s for rest_s in remaining) <= 0.97


def test_a_chain_without_chance_has_no_spread():
    estimator = Estimator()
    for _ in range(2000):
        estimator.learn_step("c", "a", "b")
        estimator.learn_step("c", "b", END)
        estimator.learn_service("c", "a", 3.0, 10)
        estimator.learn_service("c", "b", 4.0, 10)
    work = estimator.work_after("c", "a")
    assert work.quantile_s(0.8416) == pytest.approx(4.0, rel=0.03)


def test_due_dates_leave_room_for_the_quantile_that_is_asked_for():
    def due_s(quantile: float) -> float:
        estimator = Estimator()
        for length_s in (4.0, 6.0) * 200:
            estimator.learn_service("default", "b", length_s, 10)
            estimator.learn_step("default", "a", "b")
            estimator.learn_step("default", "b", END)
        policy = UrgencyPolicy(UrgencyConfig(work_quantile=quantile), estimator)
        call = Call("1", 0.0, 1, 1, {"stage": "a", "deadline_s": 100.0, "workflow": "w"})
        policy.on_arrival(call, 0.0)
        return policy.key(call, 0.0)[1]

    assert due_s(0.5) == pytest.approx(95.0, abs=0.1)
    assert due_s(0.8) < due_s(0.5) - 1.5
    assert due_s(0.95) < due_s(0.8)


def test_quantiles_of_output_lengths_are_learnt_by_stage():
    estimator = Estimator()
    assert estimator.output_tokens("c", "a") is None
    for tokens in range(1, 64):
        estimator.learn_service("c", "a", 1.0, tokens)
    assert estimator.output_tokens("c", "a") == 32
    assert estimator.output_tokens("c", "a", 0.8) == 50
    assert estimator.output_tokens("other", "a") == 32


def test_the_given_up_come_before_those_who_can_wait_who_keep_their_share(make_job, make_server):
    estimator = Estimator()
    estimator.learn_service("default", "#1", 1.0, 10)
    policy = UrgencyPolicy(UrgencyConfig(age_cap=100.0, min_share=0.25), estimator)
    late = [make_job(1.0, {"deadline_s": 0.5}, 0.0) for _ in range(12)]
    silent = [make_job(1.0, {}) for _ in range(40)]
    started = make_server(policy).serve([*silent, *late])
    places = [started.index(job) for job in late]
    assert max(places) <= 12 / 0.75 + 3
    in_front = started[: max(places)]
    assert sum(job in silent for job in in_front) >= 0.25 * len(in_front) - 1


@pytest.mark.parametrize("load", [0.6, 1.3])
def test_knowing_nothing_is_no_worse_than_by_arrival(load):
    """The first workflows an empty estimator ever sees, over many seeds."""
    met = {"ours": [], "fcfs": []}
    latency_s = {"ours": [], "fcfs": []}
    for seed in range(12):
        requests = workflows(24, load, seed)
        runs = {
            "ours": simulate(
                requests, [ReplicaSpec(PROFILE)], policies=lambda: (UrgencyPolicy(UrgencyConfig()),)
            ),
            "fcfs": simulate(requests, [ReplicaSpec(PROFILE)]),
        }
        for name, result in runs.items():
            met[name].append(result.deadlines_met)
            latency_s[name].append(mean(w.latency_s for w in result.workflows))
    assert mean(met["ours"]) >= mean(met["fcfs"]) - 0.01
    assert mean(latency_s["ours"]) <= 1.05 * mean(latency_s["fcfs"])


def served(requests, *, by_arrival: bool):
    policies = (lambda: ()) if by_arrival else (lambda: (UrgencyPolicy(UrgencyConfig()),))
    return simulate(requests, [ReplicaSpec(PROFILE)], policies=policies)


@pytest.mark.parametrize("load", [0.6, 0.8, 0.95])
def test_where_nothing_is_late_the_tail_is_not_longer_than_by_arrival(load):
    """Deadlines that serving by arrival just meets: due dates alone would delay the loose ones."""
    tail_s = {True: 0.0, False: 0.0}
    missed = 0.0
    for seed in range(10):
        requests = workflows(60, load, seed)
        used = max(w.latency_s / w.deadline_s for w in served(requests, by_arrival=True).workflows)
        requests = [replace(r, deadline_s=r.deadline_s * used * 1.001) for r in requests]
        for by_arrival in tail_s:
            done = served(requests, by_arrival=by_arrival)
            tail_s[by_arrival] += float(np.quantile([w.latency_s for w in done.workflows], 0.95))
            missed += 1 - done.deadlines_met
    assert tail_s[False] <= 1.03 * tail_s[True]
    assert missed <= 0.02
