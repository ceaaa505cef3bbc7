from __future__ import annotations

import itertools
import random
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.policy import Call, Outcome
from trimtab.urgency.config import UrgencyConfig
from trimtab.urgency.estimate import END, OTHER, Chain, Estimator, Window
from trimtab.urgency.policy import Lane, UrgencyPolicy
from trimtab.urgency.workflows import WorkflowTable


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=200), st.floats(0.0, 1.0))
def test_a_window_knows_the_quantiles_of_its_last_values(values, q):
    window = Window()
    for value in values:
        window.add(value)
    kept = sorted(values[-64:])
    assert len(window) == len(kept)
    assert window.quantile(q) == kept[int(q * (len(kept) - 1))]
    assert window.mean() <= 4 * median(kept) or len(kept) % 2 == 0


@given(value=st.floats(0.01, 100.0), outlier=st.floats(10.0, 1e9), at=st.integers(0, 8))
def test_one_wild_value_does_not_poison_the_mean(value, outlier, at):
    window = Window()
    for place in range(9):
        window.add(value * outlier if place == at else value)
    assert value <= window.mean() <= value * (8 + 4) / 9 * (1 + 1e-9)


def test_a_window_follows_a_change():
    window = Window()
    for value in [1.0] * 100 + [5.0] * 64:
        window.add(value)
    assert window.mean() == 5.0


def test_the_work_after_a_chain_of_stages_is_their_sum():
    chain = Chain()
    for _ in range(400):
        chain.observe("a", "b")
        chain.observe("b", "c")
        chain.observe("c", END)
    times_s = {"a": 1.0, "b": 2.0, "c": 4.0}
    assert chain.after_s("a", times_s.__getitem__) == pytest.approx(6.0, rel=1e-3)
    assert chain.after_s("b", times_s.__getitem__) == pytest.approx(4.0, rel=1e-3)
    assert chain.after_s("c", times_s.__getitem__) == 0.0


@given(repeat=st.floats(0.05, 0.9), seed=st.integers(0, 100))
def test_a_loop_costs_its_expected_number_of_rounds(repeat, seed):
    """``write -> check -> (fix -> check)*``: fixes are geometric, so R is known in closed form."""
    rng = random.Random(seed)
    chain = Chain()
    goes_on = 0
    checks = 0
    while checks < 300:
        chain.observe("write", "check")
        checks += 1
        while rng.random() < repeat:
            goes_on += 1
            checks += 1
            chain.observe("check", "fix")
            chain.observe("fix", "check")
        chain.observe("check", END)
    share = goes_on / checks
    times_s = {"write": 9.0, "check": 1.0, "fix": 3.0}
    rounds = share / (1 - share)
    expected_s = rounds * (times_s["fix"] + times_s["check"])
    # Within the prior's weight and the window of forgetting.
    assert chain.after_s("check", times_s.__getitem__) == pytest.approx(expected_s, rel=0.25)
    assert chain.after_s("write", times_s.__getitem__) == pytest.approx(1.0 + expected_s, rel=0.25)


def test_a_loop_without_an_end_so_far_is_finite():
    chain = Chain()
    for _ in range(100):
        chain.observe("a", "a")
    assert 0 < chain.after_s("a", lambda stage: 1.0) < 2000


def test_estimates_fall_back_from_stage_to_class_to_length():
    estimator = Estimator()
    assert estimator.service_s("c", "s", longest=500) == 0.0
    estimator.learn_service("other", "t", 8.0, 100)
    assert estimator.service_s("c", "s", longest=50) == pytest.approx(4.0)
    assert estimator.service_s("c", "s", longest=5000) == pytest.approx(8.0)
    estimator.learn_service("c", "u", 3.0, 10)
    assert estimator.service_s("c", "s") == 3.0
    estimator.learn_service("other", "s", 2.0, 10)
    assert estimator.service_s("c", "s") == 2.0
    estimator.learn_service("c", "s", 1.0, 10)
    assert estimator.service_s("c", "s") == 1.0
    assert estimator.service_s("c", "s", output_tokens=40) == pytest.approx(4.0)


def test_invented_labels_take_bounded_memory():
    estimator = Estimator(max_classes=4, max_stages=3)
    for number in range(100):
        class_ = f"c{number}"
        for label in range(10):
            stage = estimator.stage_of(class_, f"s{label}")
            assert stage == (f"s{label}" if label < 3 else OTHER)
            estimator.learn_service(class_, stage, 1.0, 1)
        assert len(estimator) <= 4
    assert estimator.service_s("c99", "s1") == 1.0


def test_workflows_are_forgotten_when_idle_for_long_or_too_many_but_never_while_at_work():
    table = WorkflowTable(limit=3, ttl_s=10.0)
    busy = table.of("busy", "c", 0.0)
    busy.calls[Call("1", 0.0, 1, 1)] = None
    for number in range(50):
        table.of(f"w{number}", "c", 1.0 + number / 100)
        assert len(table) <= 4
    assert table.of("busy", "c", 2.0) is busy
    kept = table.of("w49", "c", 2.0)
    assert table.of("w49", "c", 11.9) is kept
    busy.calls.clear()
    assert table.of("w49", "c", 30.0) is not kept


NAMES = itertools.count()


def play(policy: UrgencyPolicy, waves, now_s: float = 0.0, service_s: float = 1.0) -> float:
    """Runs a workflow of waves of parallel calls, given as their stages."""
    workflow = f"w{next(NAMES)}"
    for wave in waves:
        sent = [
            Call("x", now_s, 1, 10, {"workflow": workflow, **({"stage": s} if s else {})})
            for s in wave
        ]
        for call in sent:
            policy.on_arrival(call, now_s)
            call.admitted_s = now_s
            policy.on_admission(call, now_s)
        now_s += service_s
        for call in sent:
            call.output_tokens = 5
            policy.on_finish(call, Outcome.COMPLETED, now_s)
    return now_s


def test_a_quiet_workflow_counts_as_over_until_its_next_call():
    estimator = Estimator()
    policy = UrgencyPolicy(UrgencyConfig(), estimator)

    def after_plan_s() -> float:
        return round(estimator.work_after_s("default", "plan"), 1)

    for _ in range(200):
        play(policy, [["plan"], ["write"]])
    assert after_plan_s() == 1.0
    quiet = Call("x", 10.0, 1, 10, {"workflow": "quiet", "stage": "plan"}, admitted_s=10.0)
    for number in range(100):
        quiet.fields["workflow"] = f"quiet {number}"
        policy.on_arrival(quiet, 10.0)
        policy.on_finish(quiet, Outcome.COMPLETED, 11.0)
    play(policy, [["other"]], 11.5)
    play(policy, [["other"]], 12.5)
    assert after_plan_s() == 0.7
    for number in range(100):
        back = {"workflow": f"quiet {number}", "stage": "write"}
        call = Call("x", 13.0, 1, 10, back, admitted_s=13.0)
        policy.on_arrival(call, 13.0)
        policy.on_finish(call, Outcome.COMPLETED, 14.0)
    assert after_plan_s() == 1.0


def test_parallel_siblings_are_one_step_of_a_chain():
    estimator = Estimator()
    policy = UrgencyPolicy(UrgencyConfig(), estimator)
    play(policy, [["plan"], ["write", "write", "write"], ["judge"]])
    # plan -> write -> judge -> end, each seen once, so all shares are 1 but for the prior.
    assert estimator.work_after_s("default", "judge") == 0.0
    assert estimator.work_after_s("default", "write") == pytest.approx(1.0, rel=0.1)
    assert estimator.work_after_s("default", "plan") == pytest.approx(2.0, rel=0.2)


def test_calls_without_stage_are_counted():
    estimator = Estimator()
    play(UrgencyPolicy(UrgencyConfig(), estimator), [[None], [None, None], [None]])
    assert estimator.work_after_s("default", "#2") == pytest.approx(1.0, rel=0.1)
    assert estimator.work_after_s("default", "#1") == pytest.approx(2.0, rel=0.2)
    assert estimator.work_after_s("default", "#4") == 0.0


def test_calls_without_workflow_say_nothing_about_what_follows():
    estimator = Estimator()
    policy = UrgencyPolicy(UrgencyConfig(), estimator)
    play(policy, [["plan"], ["write"]])
    known_s = estimator.work_after_s("default", "plan")
    for _ in range(50):
        single = Call("x", 0.0, 1, 1, {"stage": "plan"}, admitted_s=0.0)
        policy.on_arrival(single, 0.0)
        policy.on_finish(single, Outcome.COMPLETED, 1.0)
    assert estimator.work_after_s("default", "plan") == known_s


@pytest.mark.parametrize("outcome", [Outcome.ABORTED, Outcome.FAILED])
def test_nothing_is_learnt_from_calls_that_did_not_end_well(outcome):
    estimator = Estimator()
    policy = UrgencyPolicy(UrgencyConfig(), estimator)
    call = Call("x", 0.0, 1, 1, {"stage": "plan"}, admitted_s=0.0)
    policy.on_arrival(call, 0.0)
    policy.on_finish(call, outcome, 100.0)
    assert estimator.service_s("default", "plan") == 0.0


def test_keys_are_made_anew_only_when_an_estimate_has_shifted():
    estimator = Estimator()
    policy = UrgencyPolicy(UrgencyConfig(), estimator)
    now_s = play(policy, [["plan"], ["write"]])
    waiting = Call("w", now_s, 1, 1, {"workflow": "v", "stage": "plan", "deadline_s": 100.0})
    policy.on_arrival(waiting, now_s)
    before = policy.key(waiting, now_s)
    for _ in range(4):
        play(policy, [["plan"], ["write"]], now_s, service_s=1.1)
    assert waiting not in policy.stale
    assert policy.key(waiting, now_s) == before
    for _ in range(64):
        play(policy, [["plan"], ["write"]], now_s, service_s=9.0)
    policy.on_timer(policy.next_timer_s())
    assert waiting in policy.stale
    assert policy.key(waiting, now_s) < before
    assert policy.key(waiting, now_s)[0] == Lane.DUE
