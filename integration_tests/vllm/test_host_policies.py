"""What policies may do through the host: order, admit, end; and what happens when one fails."""

from __future__ import annotations

import gc
import logging
import math
import random
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.scheduler import Scheduler as SyncScheduler
from vllm.v1.engine import FinishReason
from vllm.v1.request import RequestStatus

from trimtab.core.policy import CallField, Outcome, ServingPolicy
from trimtab.hosts.vllm import options
from trimtab.hosts.vllm.dry_engine import DryEngine
from trimtab.hosts.vllm.scheduler import Scheduler

pytestmark = pytest.mark.integration

FIELDS = {"rank": CallField(float, "test", minimum=-1e9, maximum=1e9)}


@pytest.fixture
def engine_with(monkeypatch):
    """Makes an engine whose host drives the given policies."""

    def make(*policies, **settings_):
        entries = [(type(policy).__name__, policy) for policy in policies]
        monkeypatch.setattr(options, "policies", lambda config: entries)
        monkeypatch.setattr(options, "call_fields", lambda: FIELDS)
        return DryEngine(Scheduler, **{"max_num_seqs": 1, **settings_})

    return make


def admissions(engine, limit=10_000):
    """The requests in the order of their first admission, until all have finished."""
    order = []
    for _ in range(limit):
        scheduled, _outputs = engine.step()
        order.extend(new.req_id for new in scheduled.scheduled_new_reqs)
        if not engine.scheduler.get_num_unfinished_requests():
            return order
    raise AssertionError("the engine does not come to an end")


class ByRank(ServingPolicy):
    def key(self, call, now_s):
        return call.fields.get("rank", 0.0)


class Recorder(ServingPolicy):
    """Notes what happens to each call."""

    def __init__(self):
        super().__init__()
        self.arrived, self.admitted, self.finished = [], [], []

    def on_arrival(self, call, now_s):
        self.arrived.append(call.call_id)

    def on_admission(self, call, now_s):
        self.admitted.append(call.call_id)

    def on_finish(self, call, outcome, now_s):
        self.finished.append((call.call_id, outcome))


def test_the_queue_follows_the_key(engine_with):
    engine = engine_with(ByRank())
    ranks = [3.0, 1.0, 2.0, 1.0, 0.0]
    for index, rank in enumerate(ranks):
        engine.add(f"r{index}", [5] * 10, 3, xargs={"trimtab.rank": rank})
    assert admissions(engine) == ["r4", "r1", "r3", "r2", "r0"]


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(1, 40)), min_size=1, max_size=25))
@settings(max_examples=30, deadline=None)
def test_the_order_is_the_sorted_one(calls):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "policies", lambda config: [("by-rank", ByRank())])
        patch.setattr(options, "call_fields", lambda: FIELDS)
        engine = DryEngine(Scheduler, max_num_seqs=1)
        for index, (rank, length) in enumerate(calls):
            engine.add(f"{index:02}", [5] * 10, length, xargs={"trimtab.rank": rank})
        by_rank = sorted(range(len(calls)), key=lambda i: (calls[i][0], i))
        assert admissions(engine) == [f"{i:02}" for i in by_rank]


def test_stale_calls_are_asked_for_their_key_again(engine_with):
    class Flipping(ByRank):
        sign, calls = 1, ()

        def on_arrival(self, call, now_s):
            self.calls = (*self.calls, call)

        def key(self, call, now_s):
            return self.sign * call.fields["rank"]

    policy = Flipping()
    engine = engine_with(policy)
    for index in range(4):
        engine.add(f"r{index}", [5] * 10, 3, xargs={"trimtab.rank": index})
    engine.step()
    policy.sign = -1
    policy.stale.update(policy.calls)
    assert admissions(engine) == ["r3", "r2", "r1"]
    assert not policy.stale


def test_asking_again_for_unchanged_keys_changes_nothing(engine_with):
    class Restless(ByRank):
        """Thinks at every step that every key may have changed."""

        waiting = ()

        def on_arrival(self, call, now_s):
            self.waiting = (*self.waiting, call)

        def on_step(self, progressed, now_s):
            self.stale.update(self.waiting)
            return ()

    engine = engine_with(Restless())
    for index in range(20):
        engine.add(f"{index:02}", [5] * 10, 6, xargs={"trimtab.rank": index % 2})
    assert admissions(engine) == [f"{i:02}" for i in (*range(0, 20, 2), *range(1, 20, 2))]


def test_timers_run_when_due(engine_with):
    class Timed(ByRank):
        due, rung = -math.inf, 0

        def next_timer_s(self):
            return self.due

        def on_timer(self, now_s):
            self.rung += 1
            self.due = math.inf

    policy = Timed()
    engine = engine_with(policy)
    engine.add("r", [5] * 10, 5)
    admissions(engine)
    assert policy.rung == 1


def test_a_refused_call_lets_others_pass_and_is_asked_about_again(engine_with):
    class OnePass(ServingPolicy):
        refusals = 0

        def admits(self, call, load, now_s):
            if call.call_id == "r1" and self.refusals < 3:
                self.refusals += 1
                return False
            return True

    engine = engine_with(OnePass(), max_num_seqs=4)
    for index in range(4):
        engine.add(f"r{index}", [5] * 10, 10)
    assert admissions(engine) == ["r0", "r2", "r3", "r1"]


def test_no_policy_can_stop_the_engine(engine_with):
    class Closed(ServingPolicy):
        def admits(self, call, load, now_s):
            return False

    engine = engine_with(Closed(), max_num_seqs=4)
    for index in range(3):
        engine.add(f"r{index}", [5] * 10, 4)
    assert admissions(engine) == ["r0", "r1", "r2"]


def test_a_call_ended_by_a_policy_frees_its_blocks_and_tells_the_client(engine_with):
    class Impatient(Recorder):
        def on_step(self, progressed, now_s):
            return [call for call in progressed if call.output_tokens >= 3]

    policy = Impatient()
    engine = engine_with(policy, max_num_seqs=2, prefix_caching=False)
    free = engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    engine.add("long", [5] * 100, 50)
    outputs = [engine.step()[1] for _ in range(3)]
    last = outputs[-1][0].outputs
    assert [o.finish_reason for o in last] == [None, FinishReason.STOP]
    assert engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free
    assert policy.finished == [("long", Outcome.ENDED_BY_POLICY)]
    assert not engine.scheduler.has_unfinished_requests()


def test_a_call_that_is_over_keeps_its_count_and_not_vllms_request(engine_with):
    class Keeper(Recorder):
        def on_arrival(self, call, now_s):
            self.arrived.append(call)

        def on_step(self, progressed, now_s):
            return ()

    policy = Keeper()
    engine = engine_with(policy)
    gone = weakref.ref(engine.add("one", [5] * 10, 7))
    admissions(engine)
    engine.drain()
    del engine
    gc.collect()
    assert gone() is None
    assert policy.arrived[0].output_tokens == 7


@pytest.mark.parametrize(
    "method",
    ["on_arrival", "key", "admits", "on_step", "on_admission", "on_finish", "next_timer_s"],
)
def test_a_policy_that_raises_is_left_out_once_and_nothing_is_lost(engine_with, caplog, method):
    def fail(self, *args):
        self.asked += 1
        if self.asked > 2:
            raise RuntimeError("broken on purpose")
        return {"key": -self.asked, "admits": True, "on_step": (), "next_timer_s": math.inf}.get(
            method
        )

    failing = type("Failing", (ServingPolicy,), {method: fail, "asked": 0})()
    recorder = Recorder()
    engine = engine_with(failing, recorder, max_num_seqs=2)
    names = [f"r{i}" for i in range(8)]
    with caplog.at_level(logging.ERROR, "trimtab"):
        for name in names:
            engine.add(name, [5] * 10, 6)
        order = admissions(engine)
    assert sorted(order) == names
    assert sorted(call_id for call_id, _ in recorder.finished) == names
    assert {outcome for _, outcome in recorder.finished} == {Outcome.CUT}
    assert sum("switched off" in record.message for record in caplog.records) == 1


def test_after_a_failed_key_the_order_is_vllms_own(engine_with):
    class Broken(ServingPolicy):
        def key(self, call, now_s):
            if call.call_id == "r4":
                return None
            return -call.arrival_s

    engine = engine_with(Broken())
    for index in range(6):
        engine.add(f"r{index}", [5] * 10, 3, arrival_time=float(index))
    assert admissions(engine) == [f"r{i}" for i in range(6)]
    assert type(engine.scheduler.waiting) is type(DryEngine(SyncScheduler).scheduler.waiting)


def test_a_bad_field_reaches_no_policy(engine_with, caplog):
    engine = engine_with(ByRank())
    engine.add("bad", [5] * 10, 3, xargs={"trimtab.rank": "first", "trimtab.nobody": 1, "other": 2})
    engine.add("good", [5] * 10, 3, xargs={"trimtab.rank": -1})
    assert admissions(engine) == ["good", "bad"]
    assert any("trimtab.rank" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("async_scheduling", [False, True])
def test_every_call_ends_exactly_once_and_no_block_leaks(engine_with, policy, async_scheduling):
    class Erratic(Recorder):
        """Orders, refuses and ends at random."""

        def __init__(self):
            super().__init__()
            self.random = random.Random(0)

        def key(self, call, now_s):
            return self.random.random()

        def admits(self, call, load, now_s):
            return self.random.random() < 0.7

        def on_step(self, progressed, now_s):
            return [call for call in progressed if self.random.random() < 0.02]

    erratic = Erratic()
    engine = engine_with(
        erratic,
        blocks=40,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        policy=policy,
        async_scheduling=async_scheduling,
        prefix_caching=False,
    )
    pool = engine.scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    choose = random.Random(1)
    for index in range(200):
        engine.add(
            f"r{index}",
            [5] * choose.randrange(1, 150),
            choose.randrange(1, 60),
            priority=choose.randrange(3),
        )
        if index % 7 == 0:
            engine.scheduler.finish_requests(
                f"r{choose.randrange(index + 1)}", RequestStatus.FINISHED_ABORTED
            )
        for _ in range(choose.randrange(4)):
            engine.step()
    while engine.scheduler.get_num_unfinished_requests():
        engine.step()
    engine.drain()
    ended = [call_id for call_id, _ in erratic.finished]
    assert sorted(ended) == sorted(erratic.arrived)
    assert len(set(ended)) == 200
    assert {outcome for _, outcome in erratic.finished} == {
        Outcome.CUT,
        Outcome.ABORTED,
        Outcome.ENDED_BY_POLICY,
    }
    assert pool.get_num_free_blocks() == free
