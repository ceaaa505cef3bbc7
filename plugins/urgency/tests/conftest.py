"""A server of a few seats that drives a policy as the hosts do."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count

import pytest

from trimtab.core.policy import Call, FieldValue, Outcome, SortKey
from trimtab.urgency.policy import UrgencyPolicy


@dataclass(eq=False)
class Job:
    """A call to be, how long it takes, and the jobs that must end before it is sent."""

    service_s: float
    fields: dict[str, FieldValue]
    arrival_s: float = 0.0
    after: tuple[Job, ...] = ()
    started_s: float = -1.0
    finished_s: float = -1.0


class Server:
    """Serves jobs without preemption, always the waiting call of the smallest key."""

    def __init__(self, policy: UrgencyPolicy, seats: int = 1) -> None:
        self.policy, self.seats = policy, seats
        self.waiting: dict[Call, tuple[SortKey, int]] = {}
        self.jobs: dict[Call, Job] = {}
        self._ids = count()

    def serve(self, jobs: Iterable[Job]) -> list[Job]:
        """Runs all jobs to their end; returns them in the order of their starts."""
        jobs = list(jobs)
        unsent = {job: len(job.after) for job in jobs}
        events = [(job.arrival_s, next(self._ids), job) for job in jobs if not job.after]
        heapq.heapify(events)
        running: dict[Job, Call] = {}
        started: list[Job] = []
        while events:
            now_s, _, job = heapq.heappop(events)
            if job in running:
                self._finish(running.pop(job), job, now_s)
                for later in jobs:
                    if job in later.after:
                        unsent[later] -= 1
                        if not unsent[later]:
                            at_s = max(now_s, later.arrival_s)
                            heapq.heappush(events, (at_s, next(self._ids), later))
            else:
                self._arrive(job, now_s)
            if events and events[0][0] == now_s:
                continue
            while self.waiting and len(running) < self.seats:
                call = self._admit(now_s)
                job = self.jobs[call]
                running[job] = call
                started.append(job)
                heapq.heappush(events, (now_s + job.service_s, next(self._ids), job))
        return started

    def _arrive(self, job: Job, now_s: float) -> None:
        number = next(self._ids)
        call = Call(f"c{number}", now_s, 10, 100, job.fields)
        self.jobs[call] = job
        self.policy.on_arrival(call, now_s)
        self.waiting[call] = (self.policy.key(call, now_s), number)

    def refresh(self, now_s: float) -> None:
        """What a host does before a step."""
        if self.policy.next_timer_s() <= now_s:
            self.policy.on_timer(now_s)
        for call in self.policy.stale & self.waiting.keys():
            self.waiting[call] = (self.policy.key(call, now_s), self.waiting[call][1])
        self.policy.stale.clear()

    def _admit(self, now_s: float) -> Call:
        self.refresh(now_s)
        call = min(self.waiting, key=lambda c: self.waiting[c])
        del self.waiting[call]
        call.admitted_s = self.jobs[call].started_s = now_s
        self.policy.on_admission(call, now_s)
        return call

    def _finish(self, call: Call, job: Job, now_s: float) -> None:
        job.finished_s = now_s
        call.output_tokens = 10
        self.policy.on_finish(call, Outcome.COMPLETED, now_s)
        self.policy.stale.discard(call)


@pytest.fixture(scope="session")
def make_job() -> type[Job]:
    """The class of jobs, for tests that cannot import a conftest."""
    return Job


@pytest.fixture(scope="session")
def make_server() -> Callable[..., Server]:
    """The class of servers."""
    return Server
