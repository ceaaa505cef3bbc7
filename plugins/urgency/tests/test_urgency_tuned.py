from __future__ import annotations

import logging
import os

import pytest

from trimtab.core.errors import BadInput
from trimtab.core.policy import Call
from trimtab.urgency import tuned
from trimtab.urgency.config import TunedDispatch, TunedOptions, UrgencyConfig
from trimtab.urgency.policy import Lane, UrgencyPolicy

EVERYTHING = TunedOptions(
    order="llf",
    age_cap=2.0,
    best_case=0.8,
    work_quantile=0.8,
    dispatch=TunedDispatch(rule="paper", alpha=0.3),
)


@pytest.mark.parametrize("options", [TunedOptions(), EVERYTHING, TunedOptions(order="fcfs")])
def test_options_come_back_from_their_file(tmp_path, options):
    path = tmp_path / "urgency.yaml"
    tuned.write(path, options, "two\nlines")
    assert tuned.read(path) == options
    assert path.read_text().startswith("# two\n# lines\n")


def test_what_a_file_leaves_out_stays_as_configured():
    config = UrgencyConfig(age_cap=9.0, min_share=0.3)
    over = TunedOptions(order="srpt").over(config)
    assert (over.order, over.age_cap, over.min_share) == ("srpt", 9.0, 0.3)
    assert EVERYTHING.over(config).work_quantile == 0.8


def two_calls(policy: UrgencyPolicy) -> list[Call]:
    """The first has all the time, the second little."""
    calls = [
        Call("1", 0.0, 1, 1, {"deadline_s": 100.0}),
        Call("2", 1.0, 1, 1, {"deadline_s": 10.0}),
    ]
    for call in calls:
        policy.on_arrival(call, call.arrival_s)
    return calls


def order(policy: UrgencyPolicy, calls: list[Call], now_s: float) -> list[str]:
    while policy.next_timer_s() <= now_s:
        policy.on_timer(now_s)
    return [c.call_id for c in sorted(calls, key=lambda call: policy.key(call, now_s))]


def test_a_policy_follows_its_file_while_calls_wait(tmp_path):
    path = tmp_path / "urgency.yaml"
    policy = UrgencyPolicy(UrgencyConfig(tuned=path))
    calls = two_calls(policy)
    assert order(policy, calls, 2.0) == ["2", "1"]
    tuned.write(path, TunedOptions(order="fcfs"))
    assert order(policy, calls, 2.5) == ["2", "1"]  # looked at a second after the last look
    policy.stale.clear()
    assert order(policy, calls, 3.1) == ["1", "2"]
    assert policy.stale == set(calls)
    tuned.write(path, TunedOptions(order="edd", age_cap=3.0))
    assert order(policy, calls, 4.2) == ["2", "1"]


def test_all_waiting_calls_follow_however_many_there_are(tmp_path):
    path = tmp_path / "urgency.yaml"
    policy = UrgencyPolicy(UrgencyConfig(tuned=path))
    calls = []
    for number in range(300):
        fields = {"deadline_s": 1000.0 - number, "workflow": f"w{number}"}
        calls.append(Call(f"{number:03}", 0.001 * number, 1, 1, fields))
        policy.on_arrival(calls[-1], 0.001 * number)
    tuned.write(path, TunedOptions(order="fcfs"))
    most = 0
    for step in range(100):
        policy.stale.clear()
        if policy.next_timer_s() <= 2.0 + 0.01 * step:
            policy.on_timer(2.0 + 0.01 * step)
        most = max(most, len(policy.stale))
    assert sorted(calls, key=lambda call: policy.key(call, 3.0)) == calls
    assert most < 60  # a part in each step


@pytest.mark.parametrize("text", ["order: best\n", "{", "", "order: 1e400", "unknown: 1\n", "- 1"])
def test_a_broken_file_is_logged_once_and_changes_nothing(tmp_path, caplog, text):
    path = tmp_path / "urgency.yaml"
    tuned.write(path, TunedOptions(order="fcfs"))
    policy = UrgencyPolicy(UrgencyConfig(tuned=path))
    calls = two_calls(policy)
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        for step in range(5):
            os.utime(path, ns=(step, step))
            assert order(policy, calls, 2.0 + 2.0 * step) == ["1", "2"]
    assert len(caplog.records) == 1
    with pytest.raises(BadInput):
        tuned.read(path)
    tuned.write(path, TunedOptions(order="edd"))
    assert order(policy, calls, 20.0)[0] in ("1", "2")
    assert policy.key(calls[1], 20.0)[0] == Lane.PROMOTED  # by due date it is late by now


def test_a_missing_file_is_logged_once(tmp_path, caplog):
    policy = UrgencyPolicy(UrgencyConfig(tuned=tmp_path / "none.yaml"))
    calls = two_calls(policy)
    with caplog.at_level(logging.WARNING):
        for now_s in (2.0, 4.0, 6.0):
            assert order(policy, calls, now_s) == ["2", "1"]
    assert len(caplog.records) <= 1


def test_a_clock_set_back_does_not_keep_the_file_unread(tmp_path):
    path = tmp_path / "urgency.yaml"
    policy = UrgencyPolicy(UrgencyConfig(tuned=path))
    policy.on_arrival(Call("0", 1e6, 1, 1), 1e6)
    tuned.write(path, TunedOptions(order="fcfs"))
    calls = two_calls(policy)
    assert order(policy, calls, 2.0) == ["1", "2"]
