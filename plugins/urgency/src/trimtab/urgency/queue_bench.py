"""What the order of the waiting calls costs a scheduler step.

The queue and the policies are those of vLLM's host, driven by the same events (calls come, are
admitted and end, and their stages take other times than expected), without the model in between.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any

from trimtab.core.benchmark import Case, Options, Progress, without_collector
from trimtab.core.policy import Call, FieldValue, Outcome
from trimtab.core.policy_stack import PolicyStack
from trimtab.urgency.config import Order, UrgencyConfig
from trimtab.urgency.policy import UrgencyPolicy
from trimtab.urgency.text_to_sql.figures import percentile

WAITING = (1_000, 10_000)
STEPS = 1_500
SEEDS = 3
QUICK_STEPS = 300
QUICK_SEEDS = 2
_BY_ARRIVAL = "by-arrival"
_STEP_S = 0.02
_RUNNING = 16
_ADMITTED = 2
_RUNS = 3
_SETTLED = 50
"""Steps before the clock counts: the first see all calls come at once."""
_STAGES = ("plan", "write", "check")
_DEADLINES_S = (20.0, 40.0, 80.0, 200.0, 400.0)


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    """What the queue holds, as an engine's request does."""

    call: Call


def queue_cases(options: Options, progress: Progress) -> list[Case]:
    """The 99th percentile and the worst of the steps, against the order of arrival."""
    seeds, steps = (QUICK_SEEDS, QUICK_STEPS) if options.quick else (SEEDS, STEPS)
    cases = []
    for waiting in WAITING[:1] if options.quick else WAITING:
        progress(f"ordering {waiting} waiting calls")
        pairs = [
            (_steps_s("fcfs", waiting, steps, seed), _steps_s("edd", waiting, steps, seed))
            for seed in range(options.seed, options.seed + seeds)
        ]
        cases += [
            Case.compare(
                f"real/queue/{waiting}-waiting",
                metric,
                "s",
                "lower",
                _BY_ARRIVAL,
                [(percentile(theirs, q), percentile(ours, q)) for theirs, ours in pairs],
                notes=f"CPU time in each of {steps} steps; {_RUNS} runs, of each step the fastest",
            )
            for metric, q in (("step_p99_s", 0.99), ("worst_step_s", 1.0))
        ]
    return cases


def _steps_s(order: Order, waiting: int, steps: int, seed: int) -> list[float]:
    """What each step takes; the same steps are run again, since the machine has its moments."""
    runs = [_Drive(order, waiting, seed).steps_s(steps) for _ in range(_RUNS)]
    return sorted(map(min, zip(*runs, strict=True)))


class _Drive:
    """A queue under a steady stream of calls.

    Args:
        order: the policy's order.
        waiting: calls that wait; who is admitted is replaced.
        seed: what is drawn depends on it.
    """

    def __init__(self, order: Order, waiting: int, seed: int) -> None:
        from trimtab.hosts.vllm.waiting_queue import PolicyQueue

        self._chance = random.Random(seed)
        self._stack = PolicyStack([("urgency", UrgencyPolicy(UrgencyConfig(order=order)))])
        self._queue: Any = PolicyQueue(self._key_of)
        self._waiting = waiting
        self._requests: dict[Call, _Request] = {}
        self._running: list[_Request] = []
        self._now_s = 0.0
        self._calls = 0

    def steps_s(self, count: int) -> list[float]:
        """CPU seconds in which each step finds who is next."""
        with without_collector():
            self._fill()
            return [self._step_s() for _ in range(_SETTLED + count)][_SETTLED:]

    def _key_of(self, request: Any) -> tuple[tuple[float, ...], ...]:
        return self._stack.key(request.call, self._now_s)

    def _fill(self) -> None:
        while len(self._queue) < self._waiting:
            self._now_s += _STEP_S / 40
            self._arrive()

    def _arrive(self) -> None:
        """Two calls of a workflow come one after the other."""
        fields: dict[str, FieldValue] = {
            "workflow": f"w{self._calls // 2}",
            "class": self._chance.choice("ab"),
            "stage": self._chance.choice(_STAGES),
            "deadline_s": self._chance.choice(_DEADLINES_S) * self._chance.uniform(0.7, 1.3),
        }
        call = Call(f"c{self._calls}", self._now_s, 10, 100, fields)
        self._calls += 1
        self._stack.on_arrival(call, self._now_s)
        request = self._requests[call] = _Request(call)
        self._queue.add_request(request)

    def _step_s(self) -> float:
        self._now_s += _STEP_S
        began_s = time.thread_time()
        stale = self._stack.stale_calls(self._now_s)
        self._queue.rekey(self._requests[call] for call in stale if call in self._requests)
        self._queue.open_step(None)
        for _ in range(_ADMITTED):
            self._admit()
        took_s = time.thread_time() - began_s
        while len(self._running) > _RUNNING:
            self._end(self._running.pop(0))
        self._fill()
        return took_s

    def _admit(self) -> None:
        request: _Request = self._queue.pop_request()
        request.call.admitted_s = self._now_s
        self._stack.on_admission(request.call, self._now_s)
        self._running.append(request)

    def _end(self, request: _Request) -> None:
        request.call.output_tokens = 10
        del self._requests[request.call]
        self._stack.on_finish(request.call, Outcome.COMPLETED, self._now_s)
