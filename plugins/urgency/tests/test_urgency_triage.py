from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.urgency.by_time import ByTime
from trimtab.urgency.config import UrgencyConfig
from trimtab.urgency.estimate import Estimator
from trimtab.urgency.policy import UrgencyPolicy
from trimtab.urgency.triage import Triage, savable

CANDIDATES = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 15)).filter(lambda c: c[1] <= c[0]), max_size=8
)


def all_in_time(candidates, rate: float) -> bool:
    work_s = 0.0
    for deadline_s, remaining_s, _ in sorted(candidates):
        work_s += remaining_s
        if work_s / rate > deadline_s:
            return False
    return True


@given(pairs=CANDIDATES, rate=st.sampled_from([1.0, 2.0]))
def test_as_many_workflows_are_saved_as_any_choice_could(pairs, rate):
    candidates = [(float(due), float(length), i) for i, (due, length) in enumerate(pairs)]
    saved = savable(candidates, 0.0, rate)
    assert all_in_time([c for c in candidates if c[2] in saved], rate)
    assert len(saved) == max(
        size
        for size in range(len(candidates) + 1)
        if any(all_in_time(some, rate) for some in itertools.combinations(candidates, size))
    )


@given(pairs=CANDIDATES, start_s=st.sampled_from([0.0, 64.0, 4096.0]))
def test_who_is_saved_does_not_depend_on_when_the_clock_started(pairs, start_s):
    candidates = [(start_s + due, float(length), i) for i, (due, length) in enumerate(pairs)]
    since_zero = [(float(due), float(length), i) for i, (due, length) in enumerate(pairs)]
    assert savable(candidates, start_s, 1.0) == savable(since_zero, 0.0, 1.0)


CROWD = {f"w{number}": (10.0, 4.0) for number in range(10)}


def entered(crowd) -> Triage[str]:
    triage: Triage[str] = Triage()
    for name, (deadline_s, _) in crowd.items():
        triage.workflows.put(name, deadline_s)
    return triage


def review(triage: Triage[str], crowd, now_s: float, part: int = 1000, queued: bool = True):
    """A whole review, in parts; returns the saved, and how many parts there were."""
    saved: set[str] = set()
    parts = 0
    while not parts or triage.due_s < now_s + 0.1:
        verdicts = triage.review(now_s, part, queued=queued, rest_s=lambda name: crowd[name][1])
        saved |= {name for name, good in verdicts if good}
        parts += 1
    return saved, parts


def reviewed(*, stages: int, spare: bool = False, queued: bool = True) -> set[str]:
    """The saved of `CROWD` after a period of 4 s in which stages of 1 s each ended."""
    triage = entered(CROWD)
    review(triage, CROWD, -4.0)
    for _ in range(stages):
        triage.note_stage(1.0)
    if spare:
        triage.note_spare()
    return review(triage, CROWD, 0.0, queued=queued)[0]


def test_as_many_are_saved_as_the_measured_pace_allows():
    assert len(reviewed(stages=8)) == 5  # 2 s of work a second, 20 s until the deadline
    assert len(reviewed(stages=16)) == 10


def test_nobody_is_given_up_before_a_pace_is_known():
    assert len(reviewed(stages=7)) == 10
    assert len(reviewed(stages=8, spare=True)) == 10
    assert len(reviewed(stages=8, queued=False)) == 10


def test_reviews_stop_when_there_is_nothing_to_review_and_are_seldom_when_there_is_much():
    crowd = {f"w{number}": (100.0, 1.0) for number in range(10_000)}
    triage = entered(crowd)
    triage.expect(1.0)
    assert triage.due_s == 1.25
    review(triage, crowd, 1.25, part=100_000)
    assert triage.due_s == pytest.approx(6.5)
    for name in crowd:
        triage.workflows.discard(name)
    review(triage, crowd, 6.5)
    assert triage.due_s == float("inf")


@given(pairs=CANDIDATES, part=st.integers(1, 5))
def test_a_review_in_parts_decides_as_one_at_once(pairs, part):
    crowd = {f"w{i}": (float(due), float(length)) for i, (due, length) in enumerate(pairs)}
    outcomes = []
    for size in (part, 1000):
        triage = entered(crowd)
        review(triage, crowd, -4.0)
        for _ in range(8):
            triage.note_stage(0.5)
        saved, parts = review(triage, crowd, 0.0, size)
        outcomes.append(saved)
        assert parts <= 2 + 2 * len(crowd) // size
    candidates = [(due_s, rest_s, name) for name, (due_s, rest_s) in crowd.items()]
    assert outcomes[0] == outcomes[1] == savable(candidates, 0.0, 1.0)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-1, 5)), max_size=60))
def test_things_are_kept_by_time(changes):
    kept: ByTime[int] = ByTime()
    expected: dict[int, float] = {}
    for name, deadline_s in changes:
        if deadline_s < 0:
            kept.discard(name)
            expected.pop(name, None)
        else:
            kept.put(name, float(deadline_s))
            expected[name] = float(deadline_s)
    assert kept.first_s == min(expected.values(), default=float("inf"))
    seen, place = [], (float("-inf"), 0.0)
    while entries := kept.after(place, 2):
        seen += [(deadline_s, name) for deadline_s, _, name in entries]
        place = entries[-1][:2]
    assert [deadline_s for deadline_s, _ in seen] == sorted(expected.values())
    assert {name: deadline_s for deadline_s, name in seen} == expected
    assert len(kept) == len(expected)
    assert all(name in kept for name in expected)
    assert [kept.pop() for _ in expected] == [name for _, name in seen]
    assert not len(kept)


def test_in_a_burst_some_workflows_are_in_time_where_by_due_date_hardly_any_is(
    make_job, make_server
):
    """Thirty workflows of three stages at once, and time for thirteen of them."""

    def in_time(order: str) -> int:
        estimator = Estimator()
        for stage in range(3):
            estimator.learn_service("default", f"s{stage}", 1.0, 10)
        policy = UrgencyPolicy(UrgencyConfig(order=order), estimator)
        workflows = []
        for number in range(30):
            jobs = []
            for stage in range(3):
                fields = {"workflow": f"w{number}", "stage": f"s{stage}", "deadline_s": 20.0}
                jobs.append(make_job(1.0, fields, 0.01 * number, after=tuple(jobs[-1:])))
            workflows.append(jobs)
        make_server(policy, seats=2).serve(itertools.chain(*workflows))
        return sum(jobs[-1].finished_s <= 20.0 for jobs in workflows)

    assert in_time("fcfs") == in_time("llf") == 0
    assert in_time("edd") >= 8


def test_the_pace_counts_stages_as_long_as_they_are_now_believed_to_be(
    make_job, make_server, monkeypatch
):
    """The work that is left is counted so; by the old length the pace would seem too slow."""
    estimator = Estimator()
    for _ in range(20):
        estimator.learn_service("default", "only", 0.3, 10)
    noted = []
    monkeypatch.setattr(Triage, "note_stage", lambda triage, expected_s: noted.append(expected_s))
    fields = {"stage": "only", "deadline_s": 60.0}
    jobs = [make_job(1.0, {"workflow": f"w{number}", **fields}, 0.0) for number in range(20)]
    make_server(UrgencyPolicy(UrgencyConfig(), estimator), seats=2).serve(jobs)
    assert noted[-1] == estimator.service_s("default", "only") > 0.6
