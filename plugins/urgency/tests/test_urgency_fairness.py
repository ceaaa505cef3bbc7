from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.policy import Call, Outcome
from trimtab.urgency.config import UrgencyConfig
from trimtab.urgency.estimate import Estimator
from trimtab.urgency.policy import Lane, Share, UrgencyPolicy, extended_s


def knowing(service_s: float) -> Estimator:
    estimator = Estimator()
    estimator.learn_service("default", "#1", service_s, 10)
    return estimator


def test_a_workflow_that_cannot_be_in_time_is_due_at_the_next_date_that_it_can_keep():
    policy = UrgencyPolicy(UrgencyConfig(age_cap=1.5), knowing(10.0))
    first, hopeless, timely, silent = (
        Call(str(number), 0.0, 1, 1, {} if deadline_s is None else {"deadline_s": deadline_s})
        for number, deadline_s in enumerate((1.0, 5.0, 10.5, None))
    )
    for call in (first, hopeless, timely, silent):
        policy.on_arrival(call, 0.0)
    assert policy.key(first, 0.0)[0] == Lane.PROMOTED  # the share of the late
    assert policy.key(hopeless, 0.0) == (Lane.DUE, pytest.approx(5.0 * 1.5**2))
    assert policy.key(timely, 0.0) == (Lane.DUE, 10.5)


def test_later_dates_follow_by_timer_while_a_call_waits():
    policy = UrgencyPolicy(UrgencyConfig(age_cap=3.0), knowing(10.0))
    policy.on_arrival(Call("0", 0.0, 1, 1, {"deadline_s": 1.0}), 0.0)
    call = Call("1", 0.0, 1, 1, {"deadline_s": 20.0})
    policy.on_arrival(call, 0.0)
    places = [(0.0, policy.key(call, 0.0)[1])]
    while (now_s := policy.next_timer_s()) < 100.0:
        policy.stale.clear()
        policy.on_timer(now_s)
        due_s = policy.key(call, now_s)[1]
        if due_s != places[-1][1]:
            places.append((now_s, due_s))
            assert call in policy.stale
    # Each time 0.9 of its length before it is due.
    assert places == [(0.0, 20.0), (pytest.approx(11.0), 60.0), (pytest.approx(51.0), 180.0)]


@given(
    allowed_s=st.floats(0.01, 100),
    age_cap=st.floats(1.1, 10),
    needed_s=st.floats(-1, 1000),
)
def test_what_is_allowed_grows_until_it_suffices_and_no_further(allowed_s, age_cap, needed_s):
    extended = extended_s(allowed_s, age_cap, needed_s)
    assert extended >= needed_s * (1 - 1e-9)
    assert extended == allowed_s or extended <= age_cap * needed_s * (1 + 1e-9)
    assert extended >= allowed_s


def test_a_late_workflow_is_served_whatever_else_arrives(make_job, make_server):
    """Adversary: more work than the server can do, all of it due before the victim ever is."""
    estimator = knowing(1.0)
    estimator.learn_service("default", "long", 30.0, 10)
    victim = make_job(30.0, {"deadline_s": 20.0, "stage": "long"}, 5.0)
    flood = [make_job(1.0, {"deadline_s": 4.0}, 0.9 * number) for number in range(200)]
    started = make_server(UrgencyPolicy(UrgencyConfig(), estimator)).serve([*flood, victim])
    assert started.index(victim) <= 60


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_calls_without_deadline_get_their_share_while_others_crowd_in(make_job, make_server, share):
    policy = UrgencyPolicy(UrgencyConfig(min_share=share), knowing(1.0))
    silent = [make_job(1.0, {}) for _ in range(40)]
    bound = [make_job(1.0, {"deadline_s": 5000.0}) for _ in range(400)]
    started = make_server(policy).serve([*bound, *silent])
    places = [number for number, job in enumerate(started) if job in silent]
    for served, place in enumerate(places):
        assert place <= (served + 1) / share
    assert started.index(silent[0]) < started.index(silent[-1])


def test_no_share_means_none(make_job, make_server):
    policy = UrgencyPolicy(UrgencyConfig(min_share=0.0), knowing(1.0))
    silent = [make_job(1.0, {}) for _ in range(3)]
    bound = [make_job(1.0, {"deadline_s": 5000.0}) for _ in range(30)]
    assert make_server(policy).serve([*silent, *bound])[-3:] == silent


def test_late_workflows_do_not_drag_the_others_down(make_job, make_server):
    """A burst of hopeless calls before a stream of easy ones."""

    def in_time(order: str) -> int:
        policy = UrgencyPolicy(UrgencyConfig(order=order), knowing(1.0))
        hopeless = [make_job(1.0, {"deadline_s": 3.0}) for _ in range(40)]
        easy = [make_job(1.0, {"deadline_s": 8.0}, float(at)) for at in range(0, 80, 2)]
        make_server(policy).serve([*hopeless, *easy])
        return sum(job.finished_s - job.arrival_s <= 8.0 for job in easy)

    assert in_time("edd") >= 25
    assert in_time("fcfs") <= 10
    assert in_time("urgency") <= 10


def test_a_preempted_call_resumes_before_all_others():
    policy = UrgencyPolicy(UrgencyConfig())
    preempted = Call("1", 0.0, 1, 1)
    urgent = Call("2", 0.0, 1, 1, {"deadline_s": 1.0})
    for call in (preempted, urgent):
        policy.on_arrival(call, 0.0)
    policy.on_admission(preempted, 0.1)
    assert policy.key(preempted, 0.2) < policy.key(urgent, 0.2)
    policy.on_admission(preempted, 0.3)
    policy.on_finish(preempted, Outcome.COMPLETED, 0.4)


def test_resuming_is_no_admission_that_others_get_a_share_of():
    policy = UrgencyPolicy(UrgencyConfig(min_share=0.5))
    silent = [Call(f"s{number}", 0.0, 1, 1) for number in range(3)]
    preempted = Call("p", 0.0, 1, 1, {"deadline_s": 9.0})
    policy.on_arrival(silent[0], 0.0)  # takes the credit that the share starts with
    policy.on_arrival(preempted, 0.0)
    for now_s in (0.1, 0.2):
        policy.on_admission(preempted, now_s)
    for call in silent[1:]:
        policy.on_arrival(call, 0.3)
    lanes = [policy.key(call, 0.3)[0] for call in silent]
    assert lanes == [Lane.PROMOTED, Lane.PROMOTED, Lane.PATIENT]


@given(
    events=st.lists(st.sampled_from(["join", "leave", "other", "take"]), max_size=200),
    share=st.sampled_from([0.1, 0.33, 0.5, 0.67]),
)
def test_a_share_is_never_exceeded_and_its_queue_is_in_order(events, share):
    lane = Share(share)
    waiting: list[Call] = []
    taken, others = 0, 0
    for number, event in enumerate(events):
        if event == "join":
            waiting.append(Call(str(number), 0.0, 1, 1))
            lane.join(waiting[-1], float(number))
        elif event == "leave" and waiting:
            lane.leave(waiting.pop())
        elif event == "other":
            lane.note_other()
            others += 1
        elif event == "take" and (call := lane.take_due()) is not None:
            assert call is waiting.pop(0)
            taken += 1
        assert taken <= 2 + others * share / (1 - share) + 1e-6


@given(st.data())
def test_nothing_is_left_behind_once_every_call_has_gone(data):
    """Any sequence of arrivals, admissions, timers, ends: the policy's own records stay in step."""
    policy = UrgencyPolicy(UrgencyConfig(), knowing(2.0))
    waiting: list[Call] = []
    running: list[Call] = []
    now_s = 0.0
    for number in range(data.draw(st.integers(0, 40))):
        now_s += data.draw(st.floats(0.0, 5.0))
        event = data.draw(st.sampled_from(["arrive", "admit", "end", "abort"]))
        if event == "arrive":
            fields = {"deadline_s": data.draw(st.floats(0.5, 30.0))} if number % 3 else {}
            call = Call(str(number), now_s, 1, 1, {"workflow": f"w{number % 4}", **fields})
            policy.on_arrival(call, now_s)
            waiting.append(call)
        elif event == "admit" and waiting:
            call = min(waiting, key=lambda c: policy.key(c, now_s))
            waiting.remove(call)
            call.admitted_s = now_s
            policy.on_admission(call, now_s)
            running.append(call)
        elif event == "end" and running:
            policy.on_finish(running.pop(0), Outcome.COMPLETED, now_s)
        elif event == "abort" and waiting:
            policy.on_finish(waiting.pop(0), Outcome.ABORTED, now_s)
        while policy.next_timer_s() <= now_s:
            policy.on_timer(now_s)
        assert all(policy.key(call, now_s)[0] >= Lane.PROMOTED for call in waiting)
    for call in waiting + running:
        policy.on_finish(call, Outcome.ABORTED, now_s)
    policy.on_timer(float("inf"))
    assert not policy._calls
    assert not policy._groups
    assert not len(policy._timers)
    assert not len(policy._triage.workflows)
    assert not policy._moving
    assert policy._bound == 0
