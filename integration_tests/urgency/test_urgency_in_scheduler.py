"""Urgency inside vLLM's scheduler: the order of admissions, and nothing lost on the way."""

from __future__ import annotations

import random

import pytest

from trimtab.core.benchmark import Options
from trimtab.hosts.vllm.dry_engine import DryEngine
from trimtab.hosts.vllm.scheduler import Scheduler
from trimtab.urgency import queue_bench

pytestmark = pytest.mark.integration


def engine_with(seats: int, **options: object) -> DryEngine:
    return DryEngine(
        Scheduler, max_num_seqs=seats, additional_config={"trimtab": {"urgency": options}}
    )


def admissions(engine: DryEngine) -> list[str]:
    """The requests in the order of their first admission, until all have finished."""
    order: list[str] = []
    while engine.scheduler.get_num_unfinished_requests():
        scheduled, _ = engine.step()
        order.extend(new.req_id for new in scheduled.scheduled_new_reqs)
    return order


def test_waiting_calls_are_admitted_by_deadline_and_the_others_by_arrival():
    engine = engine_with(seats=1, min_share=0)
    deadlines = [900, None, 300, None, 600]
    for number, deadline_s in enumerate(deadlines):
        xargs = {} if deadline_s is None else {"trimtab.deadline_s": deadline_s}
        engine.add(f"r{number}", [1, 2, 3], 2, xargs=xargs)
    assert admissions(engine) == ["r2", "r4", "r0", "r1", "r3"]


@pytest.mark.parametrize("order", ["edd", "urgency", "llf", "srpt", "fcfs"])
def test_every_call_is_served_once_under_every_order(order):
    rng = random.Random(7)
    engine = engine_with(seats=3, order=order)
    for number in range(150):
        xargs = {"trimtab.workflow": f"w{number % 20}", "trimtab.stage": rng.choice("abc")}
        if rng.random() < 0.7:
            xargs["trimtab.deadline_s"] = rng.choice([0.001, 0.01, 1.0, 100.0])
        engine.add(f"r{number}", [rng.randrange(1, 900)] * 20, rng.randint(1, 5), xargs=xargs)
        if rng.random() < 0.5:
            engine.step()
    admissions(engine)
    assert engine.scheduler.get_num_unfinished_requests() == 0
    assert engine.scheduler._stack.names == ["urgency"]


def test_a_field_that_no_door_has_checked_does_not_reach_the_policy():
    engine = engine_with(seats=1)
    engine.add("bad", [1, 2, 3], 2, xargs={"trimtab.deadline_s": "soon"})
    assert admissions(engine) == ["bad"]
    assert engine.scheduler._stack.names == ["urgency"]


def test_the_benchmark_measures_the_queue_against_that_by_arrival(monkeypatch):
    monkeypatch.setattr(queue_bench, "WAITING", (200,))
    monkeypatch.setattr(queue_bench, "QUICK_STEPS", 5)
    measured = queue_bench._steps_s

    def counted(order, waiting, steps, seed):
        # What is measured is no test's to assert: each step counts for its order.
        taken_s = measured(order, waiting, steps, seed)
        assert taken_s == sorted(taken_s)
        assert taken_s[0] >= 0
        return [{"fcfs": 2.0, "edd": 3.0}[order]] * len(taken_s)

    monkeypatch.setattr(queue_bench, "_steps_s", counted)
    cases = queue_bench.queue_cases(Options(quick=True), lambda message, done=None: None)
    assert [case.metric for case in cases] == ["step_p99_s", "worst_step_s"]
    assert all((case.value, case.baseline_value) == (3.0, 2.0) for case in cases)
