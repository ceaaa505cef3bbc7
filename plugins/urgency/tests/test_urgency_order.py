from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.policy import Call
from trimtab.urgency.config import UrgencyConfig
from trimtab.urgency.estimate import END, Estimator
from trimtab.urgency.policy import Lane, UrgencyPolicy, Waiting, due_s, latest_start_s
from trimtab.urgency.workflows import Workflow

EDD = UrgencyConfig()
PAPER = UrgencyConfig(order="urgency")


def taught(times_s: dict[str, list[float]]) -> Estimator:
    """An estimator that knows: stage ``sJ`` of the chain of class ``c`` takes ``times_s[c][J]``."""
    estimator = Estimator()
    for class_, chain in times_s.items():
        for stage, service_s in enumerate(chain):
            estimator.learn_service(class_, f"s{stage}", service_s, 10)
        # Many sightings, so that the prior for an unseen end is negligible.
        for stage in range(len(chain)):
            successor = f"s{stage + 1}" if stage + 1 < len(chain) else END
            for _ in range(500):
                estimator.learn_step(class_, f"s{stage}", successor)
    return estimator


def chain_of(make_job, class_, times_s, deadline_s):
    jobs = []
    for stage, service_s in enumerate(times_s):
        fields = {
            "workflow": class_,
            "class": class_,
            "stage": f"s{stage}",
            "deadline_s": deadline_s,
        }
        jobs.append(make_job(service_s, fields, after=tuple(jobs[-1:])))
    return jobs


def least_possible_lateness(chains, deadlines_s):
    """Brute force over all interleavings of chains on one server."""

    def best_from(now_s, at):
        if all(at[i] == len(chain) for i, chain in enumerate(chains)):
            return float("-inf")
        outcomes = []
        for i, chain in enumerate(chains):
            if at[i] == len(chain):
                continue
            then_s = now_s + chain[at[i]]
            ended = at[i] + 1 == len(chain)
            late_s = then_s - deadlines_s[i] if ended else float("-inf")
            outcomes.append(max(late_s, best_from(then_s, (*at[:i], at[i] + 1, *at[i + 1 :]))))
        return min(outcomes)

    return best_from(0.0, (0,) * len(chains))


CHAINS = st.lists(
    st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=2, max_size=4
).filter(lambda chains: sum(map(len, chains)) <= 7)


@given(chains=CHAINS, slack=st.lists(st.integers(0, 12), min_size=4, max_size=4))
def test_due_dates_minimise_the_greatest_lateness_of_chains(make_job, make_server, chains, slack):
    total_s = sum(map(sum, chains))
    deadlines_s = [total_s + extra for extra in slack[: len(chains)]]  # nobody is late: no triage
    policy = UrgencyPolicy(EDD, taught({f"w{i}": chain for i, chain in enumerate(chains)}))
    workflows = [
        chain_of(make_job, f"w{i}", chain, float(deadlines_s[i])) for i, chain in enumerate(chains)
    ]
    make_server(policy).serve(itertools.chain(*workflows))
    lateness = [
        jobs[-1].finished_s - deadline
        for jobs, deadline in zip(workflows, deadlines_s, strict=True)
    ]
    assert max(lateness) == pytest.approx(least_possible_lateness(chains, deadlines_s))


def test_due_dates_beat_the_papers_order_where_slack_misleads(make_job, make_server):
    worst = {}
    for config in (EDD, PAPER):
        policy = UrgencyPolicy(config, taught({"w0": [1.0], "w1": [10.0]}))
        jobs = [*chain_of(make_job, "w0", [1.0], 2.0), *chain_of(make_job, "w1", [10.0], 10.1)]
        make_server(policy).serve(jobs)
        worst[config.order] = max(jobs[0].finished_s - 2.0, jobs[1].finished_s - 10.1)
    assert worst == {"edd": pytest.approx(0.9), "urgency": pytest.approx(9.0)}


def random_calls(seed: int, policy: UrgencyPolicy, shift_s: float = 0.0):
    """Calls of three classes that arrive one after another; returned with their arrival."""
    rng = random.Random(seed)
    calls, now_s = [], shift_s
    for number in range(12):
        now_s += rng.random()
        fields = {
            "workflow": f"w{number}",
            "class": rng.choice("ab"),
            "stage": rng.choice(["s0", "s1"]),
            "deadline_s": rng.uniform(0.5, 40.0),
        }
        call = Call(f"c{number}", now_s, 10, 100, fields)
        policy.on_arrival(call, now_s)
        calls.append(call)
    return calls, now_s


def urgency_now(call: Call, estimator: Estimator, now_s: float) -> float:
    """The paper's U, recomputed at a moment for a call whose workflow began with it."""
    class_, stage = str(call.fields["class"]), str(call.fields["stage"])
    service_s = estimator.service_s(class_, stage)
    after_s = estimator.work_after_s(class_, stage)
    budget_s = float(call.fields["deadline_s"]) * service_s / (service_s + after_s)
    return service_s - (budget_s - (now_s - call.arrival_s))


@given(seed=st.integers(0, 10_000))
def test_the_papers_key_admits_in_the_order_of_urgency_at_every_moment(seed):
    estimator = taught({"a": [1.0, 7.0], "b": [4.0, 2.0]})
    policy = UrgencyPolicy(PAPER, estimator)
    waiting, now_s = random_calls(seed, policy)
    rng = random.Random(seed)
    while waiting:
        first = min(waiting, key=lambda call: policy.key(call, now_s))
        most_urgent = max(waiting, key=lambda call: urgency_now(call, estimator, now_s))
        assert urgency_now(first, estimator, now_s) == pytest.approx(
            urgency_now(most_urgent, estimator, now_s)
        )
        waiting.remove(first)
        policy.on_admission(first, now_s)
        now_s += rng.uniform(0.0, 20.0)


@given(seed=st.integers(0, 10_000), shift_s=st.sampled_from([0.125, 1024.0, 2.0**20]))
@pytest.mark.parametrize("order", ["edd", "urgency", "llf", "srpt", "fcfs"])
def test_the_order_does_not_depend_on_when_the_clock_started(order, seed, shift_s):
    def ranks(start_s: float) -> list[str]:
        policy = UrgencyPolicy(
            UrgencyConfig(order=order), taught({"a": [1.0, 7.0], "b": [4.0, 2.0]})
        )
        calls, now_s = random_calls(seed, policy, start_s)
        return [c.call_id for c in sorted(calls, key=lambda call: policy.key(call, now_s))]

    assert ranks(shift_s) == ranks(0.0)


@given(
    seed=st.integers(0, 10_000),
    earlier_s=st.floats(2.0, 40.0),
    gain_s=st.floats(0.0, 40.0),
)
@pytest.mark.parametrize("order", ["edd", "urgency", "llf"])
def test_an_earlier_deadline_never_ranks_later(order, seed, earlier_s, gain_s):
    def rank(deadline_s: float) -> int:
        policy = UrgencyPolicy(UrgencyConfig(order=order), taught({"a": [1.0, 0.5], "b": [4.0, 2]}))
        calls, now_s = random_calls(seed, policy)
        mine = Call("mine", now_s, 10, 100, {"class": "a", "stage": "s0", "deadline_s": deadline_s})
        policy.on_arrival(mine, now_s)
        return sorted([*calls, mine], key=lambda call: policy.key(call, now_s)).index(mine)

    assert rank(earlier_s) <= rank(earlier_s + gain_s)


@given(chain=st.lists(st.floats(0.1, 20.0), min_size=1, max_size=6), left_s=st.floats(1.0, 500.0))
def test_stage_budgets_add_up_to_the_time_left(chain, left_s):
    """With exact estimates and every stage ending on its budget, the last ends at the deadline."""
    workflow = Workflow("a", 0.0, "w", allowed_s=left_s)
    now_s = 0.0
    for stage, service_s in enumerate(chain):
        call = Call(f"c{stage}", now_s, 10, 100)
        waiting = Waiting(call, workflow, f"s{stage}", service_s, after_s=sum(chain[stage + 1 :]))
        now_s = latest_start_s(waiting, left_s) + service_s
    assert now_s == pytest.approx(left_s)


def test_the_modified_due_date_leaves_room_for_the_work_to_come():
    waiting = Waiting(Call("c", 0.0, 1, 1), Workflow("a", 0.0, "w"), "s0", 5.0, after_s=3.0)
    assert due_s(waiting, 20.0) == 17.0


def test_without_deadlines_the_order_is_that_of_arrival():
    policy = UrgencyPolicy(EDD)
    calls = []
    for number in range(50):
        call = Call(f"c{number}", float(number), 10, 100, {"workflow": f"w{number % 7}"})
        policy.on_arrival(call, float(number))
        calls.append(call)
    assert sorted(calls, key=lambda call: policy.key(call, 50.0)) == calls


def test_equal_deadlines_are_served_by_the_workflows_arrival_while_nothing_is_known():
    policy = UrgencyPolicy(EDD)
    calls = []
    for number in range(9):
        fields = {"workflow": f"w{number % 3}", "deadline_s": 30.0}
        call = Call(f"c{number}", float(number), 10, 100, fields)
        policy.on_arrival(call, float(number))
        calls.append(call)
    order = [
        call.fields["workflow"] for call in sorted(calls, key=lambda call: policy.key(call, 9.0))
    ]
    assert order == ["w0"] * 3 + ["w1"] * 3 + ["w2"] * 3


def test_deadlines_are_counted_from_the_workflows_first_call():
    policy = UrgencyPolicy(EDD)
    fields = {"workflow": "w", "deadline_s": 10.0}
    first, second = Call("1", 0.0, 1, 1, fields), Call("2", 4.0, 1, 1, fields)
    policy.on_arrival(first, 0.0)
    policy.on_arrival(second, 4.0)
    assert policy.key(second, 4.0) == (Lane.DUE, 10.0)


def test_a_changed_deadline_moves_the_workflows_waiting_calls():
    policy = UrgencyPolicy(EDD)
    first = Call("1", 0.0, 1, 1, {"workflow": "w", "deadline_s": 10.0})
    second = Call("2", 1.0, 1, 1, {"workflow": "w", "deadline_s": 5.0})
    policy.on_arrival(first, 0.0)
    policy.on_arrival(second, 1.0)
    assert first in policy.stale
    assert policy.key(first, 1.0) == policy.key(second, 1.0) == (Lane.DUE, 5.0)


def test_the_default_and_the_least_deadline_come_from_the_options():
    policy = UrgencyPolicy(UrgencyConfig(default_deadline_s=60.0, min_deadline_s=8.0))
    silent, greedy = Call("1", 0.0, 1, 1), Call("2", 0.0, 1, 1, {"deadline_s": 0.5})
    for call in (silent, greedy):
        policy.on_arrival(call, 0.0)
    assert policy.key(silent, 0.0) == (Lane.DUE, 60.0)
    assert policy.key(greedy, 0.0) == (Lane.DUE, 8.0)
