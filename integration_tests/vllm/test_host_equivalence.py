"""With no policy the host schedules exactly as vLLM does: every SchedulerOutput is compared."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler as SyncScheduler
from vllm.v1.request import RequestStatus

from trimtab.hosts.vllm.dry_engine import DryEngine
from trimtab.hosts.vllm.scheduler import Scheduler

pytestmark = pytest.mark.integration

ARRIVAL = st.tuples(
    st.just("add"),
    st.integers(1, 150),  # prompt tokens
    st.integers(1, 80),  # output tokens
    st.integers(-2, 2),  # priority
    st.integers(0, 3),  # which shared prefix
)
ABORT = st.tuples(st.just("abort"), st.integers(0, 30))
STEPS = st.tuples(st.just("step"), st.integers(1, 12))
RESET = st.tuples(st.just("reset"))
SCRIPT = st.lists(st.one_of(ARRIVAL, ARRIVAL, STEPS, ABORT, RESET), min_size=5, max_size=60)


def run(scheduler_cls, script, **settings_):
    engine = DryEngine(scheduler_cls, **settings_)
    outputs, added = [], 0
    for event in script:
        match event:
            case ("add", prompt, length, priority, prefix):
                tokens = [10 + prefix] * prompt
                engine.add(
                    f"r{added}", tokens, length, priority=priority, arrival_time=float(added)
                )
                added += 1
            case ("abort", index):
                engine.scheduler.finish_requests(f"r{index}", RequestStatus.FINISHED_ABORTED)
            case ("reset",):
                engine.drain()
                engine.scheduler.reset_prefix_cache(reset_running_requests=True)
            case ("step", count):
                outputs.extend(engine.step() for _ in range(count))
    while engine.scheduler.get_num_unfinished_requests():
        outputs.append(engine.step())
    return outputs


def without_times(outputs):
    """A step's outputs less the wall-clock times in their events and statistics."""
    return [
        (
            scheduled,
            [
                (o.request_id, o.new_token_ids, o.finish_reason)
                for e in by_client.values()
                for o in e.outputs
            ],
        )
        for scheduled, by_client in outputs
    ]


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize(
    ("upstream", "async_scheduling"), [(SyncScheduler, False), (AsyncScheduler, True)]
)
@given(
    script=SCRIPT,
    blocks=st.integers(18, 60),
    max_num_seqs=st.integers(1, 6),
    max_num_batched_tokens=st.sampled_from([32, 64, 512]),
    prefix_caching=st.booleans(),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
def test_no_policy_is_vllm(
    policy,
    upstream,
    async_scheduling,
    script,
    blocks,
    max_num_seqs,
    max_num_batched_tokens,
    prefix_caching,
):
    engine = {
        "blocks": blocks,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "policy": policy,
        "async_scheduling": async_scheduling,
        "prefix_caching": prefix_caching,
    }
    assert without_times(run(Scheduler, script, **engine)) == without_times(
        run(upstream, script, **engine)
    )


def test_the_comparison_can_fail():
    """Two requests in the other order give another log, so equality above means something."""
    one = [("add", 20, 5, 0, 0), ("add", 30, 5, 0, 1)]
    engine = {"blocks": 40, "max_num_seqs": 1, "policy": "fcfs", "async_scheduling": False}
    assert without_times(run(Scheduler, one, **engine)) != without_times(
        run(Scheduler, one[::-1], **engine)
    )


def test_preemption_is_among_what_is_compared():
    script = [("add", 100, 80, 0, 0), ("add", 100, 80, 0, 1), ("add", 100, 80, 0, 2)]
    engine = {"blocks": 24, "max_num_seqs": 3, "policy": "fcfs", "async_scheduling": False}
    ours, theirs = run(Scheduler, script, **engine), run(SyncScheduler, script, **engine)
    assert any(scheduled.preempted_req_ids for scheduled, _ in ours)
    assert without_times(ours) == without_times(theirs)
