"""The cluster simulator: jobs that want whole nodes, and a policy that gives them out.

It jumps from event to event: a job is announced, arrives or ends. What a policy may know of a job
is a `JobRequest`; how long it really takes stays with the simulator.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from trimtab.core.errors import BadInput, TrimtabError

Nodes = NDArray[np.int64]
"""Indices of nodes."""
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What is known of a job before it ran.

    Attributes:
        job_id: unique in the trace.
        arrival_s: when it may start.
        nodes: how many whole nodes it wants.
        limit_s: it is ended after this long; None for no limit.
        priority: the larger goes first.
        preemptible: whether it may be ended and begun again.
        department: who sent it, for what predicts durations.
        announced_s: when it was announced, before it arrives; None if it was not.
        pipeline_stages: columns of its grid of nodes, where it is a training job.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    job_id: str
    arrival_s: float
    nodes: int
    limit_s: float | None = None
    priority: int = 0
    preemptible: bool = False
    department: str = ""
    announced_s: float | None = None
    pipeline_stages: int = 1


@dataclass(frozen=True, slots=True)
class ClusterJob:
    """A job of a trace: its request, and how long it takes if nobody ends it."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    request: JobRequest
    duration_s: float

    @property
    def held_s(self) -> float:
        """How long it holds its nodes: its duration, or its limit where that is shorter."""
        limit_s = self.request.limit_s
        return self.duration_s if limit_s is None else min(self.duration_s, limit_s)


class Running(NamedTuple):
    """A job that holds nodes."""

    request: JobRequest
    started_s: float
    nodes: Nodes


@dataclass(frozen=True, slots=True)
class ClusterState:
    """What a policy sees.

    Attributes:
        now_s: the time.
        pod_of: the pod of each node; shape (nodes,).
        free: whether each node is free; shape (nodes,).
        waiting: the jobs that arrived, by id, in that order; a preempted one is again the last.
        running: the jobs that hold nodes, by id.
        announced: the jobs that were announced and did not arrive yet, by id.
    """

    now_s: float
    pod_of: Nodes
    free: Flags
    waiting: Mapping[str, JobRequest]
    running: Mapping[str, Running]
    announced: Mapping[str, JobRequest]


class Start(NamedTuple):
    """Start a waiting job on free nodes, in the order of its grid's rows."""

    job_id: str
    nodes: Nodes


class Preempt(NamedTuple):
    """End a preemptible job; it waits again and loses what it did."""

    job_id: str


class ClusterPolicy(Protocol):
    """Decides which waiting jobs start where."""

    def decide(self, state: ClusterState) -> Sequence[Start | Preempt]:
        """What is done now, in this order; called after the events of one instant."""

    def on_wait(self, request: JobRequest) -> None:
        """A job begins to wait: it arrived, or was preempted."""

    def on_end(self, request: JobRequest, held_s: float, completed: bool) -> None:
        """A job ended after it held its nodes for ``held_s``, by itself or at its limit."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job.

    Attributes:
        job: the job.
        started_s, ended_s: of the run that ended by itself or at its limit.
        nodes: where that was.
        lost_s: time of the runs that were preempted.
    """

    job: ClusterJob
    started_s: float
    ended_s: float
    nodes: tuple[int, ...]
    lost_s: float = 0.0

    @property
    def wait_s(self) -> float:
        """From its arrival to the start of that run."""
        return self.started_s - self.job.request.arrival_s


@dataclass(frozen=True)
class ClusterResult:
    """The outcome of each job, and how many nodes were held when.

    Attributes:
        outcomes: by job id, in the order of their ends.
        pods: nodes of each pod.
        held: ``(time_s, nodes)``: from this time on so many nodes were held.
    """

    outcomes: Mapping[str, Outcome]
    pods: tuple[int, ...]
    held: tuple[tuple[float, int], ...]

    def allocation(self, start_s: float, end_s: float) -> float:
        """The share of all nodes that was held between two times, on average."""
        times_s = np.array([time_s for time_s, _ in self.held] + [math.inf])
        widths_s = np.diff(np.clip(times_s, start_s, end_s))
        nodes = np.array([nodes for _, nodes in self.held], dtype=float)
        return float(widths_s @ nodes) / ((end_s - start_s) * sum(self.pods))

    def held_at(self, time_s: float) -> int:
        """Nodes held by jobs that started before a time and end after it."""
        return sum(
            len(outcome.nodes)
            for outcome in self.outcomes.values()
            if outcome.started_s < time_s < outcome.ended_s
        )


def fault(job: ClusterJob, nodes: int | None = None) -> BadInput | None:
    """What is wrong with a job, or with a job for a cluster of so many nodes."""
    request = job.request
    checks: list[tuple[bool, str, object, str]] = [
        (
            math.isfinite(job.duration_s) and job.duration_s > 0,
            "duration_s",
            job.duration_s,
            "a number above 0",
        ),
        (math.isfinite(request.arrival_s), "arrival_s", request.arrival_s, "a finite number"),
        (request.nodes >= 1, "nodes", request.nodes, "at least 1"),
        (
            request.limit_s is None or request.limit_s > 0,
            "limit_s",
            request.limit_s,
            "a number above 0",
        ),
        (
            request.announced_s is None or request.announced_s <= request.arrival_s,
            "announced_s",
            request.announced_s,
            "a time before its arrival",
        ),
        (
            request.pipeline_stages >= 1 and request.nodes % request.pipeline_stages == 0,
            "pipeline_stages",
            request.pipeline_stages,
            f"a divisor of its {request.nodes} nodes",
        ),
    ]
    for right, key, value, fix in checks:
        if not right:
            return BadInput(f"{key} of job {request.job_id!r} is {value}", fix=f"give {fix}")
    if nodes is not None and request.nodes > nodes:
        return BadInput(
            f"job {request.job_id!r} wants {request.nodes} nodes and the cluster has {nodes}",
            fix="give a larger cluster, or leave the job out",
        )
    return None


def simulate_cluster(
    jobs: Sequence[ClusterJob], pods: Sequence[int], policy: ClusterPolicy
) -> ClusterResult:
    """Runs all jobs of a trace to their end.

    The same inputs give the same result: nothing here is random.

    Args:
        jobs: the trace, in any order.
        pods: nodes of each pod.
        policy: gives out the nodes.

    Raises:
        BadInput: a job is faulty, given twice, or wants more nodes than there are.
        TrimtabError: the policy gave out a node that is not free, or leaves jobs waiting for ever.
    """
    _check(jobs, sum(pods))
    run = _Run(jobs, pods, policy)
    while run.events:
        run.step()
    if run.waiting:
        stuck = next(iter(run.waiting))
        raise TrimtabError(f"the policy {type(policy).__name__} never starts job {stuck!r}.")
    return ClusterResult(run.outcomes, tuple(pods), tuple(run.held))


def _check(jobs: Sequence[ClusterJob], nodes: int) -> None:
    seen: set[str] = set()
    for job in jobs:
        found = fault(job, nodes)
        if found is not None:
            raise found
        if job.request.job_id in seen:
            raise BadInput(
                f"the job {job.request.job_id!r} is given twice", fix="give each an id of its own"
            )
        seen.add(job.request.job_id)


# What ends at an instant frees its nodes for what arrives then.
_END, _ANNOUNCE, _ARRIVE = range(3)


class _Event(NamedTuple):
    time_s: float
    kind: int
    order: int
    job_id: str
    run: int


class _Run:
    """One simulation under way."""

    def __init__(
        self, jobs: Sequence[ClusterJob], pods: Sequence[int], policy: ClusterPolicy
    ) -> None:
        self.events: list[_Event] = []
        self.waiting: dict[str, JobRequest] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.held: list[tuple[float, int]] = []
        self._policy = policy
        self._jobs = {job.request.job_id: job for job in jobs}
        self._running: dict[str, Running] = {}
        self._announced: dict[str, JobRequest] = {}
        self._pod_of: Nodes = np.repeat(np.arange(len(pods)), pods)
        self._free: Flags = np.ones(len(self._pod_of), dtype=bool)
        self._lost_s: dict[str, float] = {}
        self._runs: dict[str, int] = {}
        self._pushed = 0
        for job in sorted(jobs, key=lambda job: job.request.arrival_s):
            request = job.request
            self._push(request.arrival_s, _ARRIVE, request.job_id)
            if request.announced_s is not None:
                self._push(request.announced_s, _ANNOUNCE, request.job_id)

    def step(self) -> None:
        """Lets all events of the next instant happen, then asks the policy."""
        now_s = self.events[0].time_s
        while self.events and self.events[0].time_s == now_s:
            self._happen(heapq.heappop(self.events))
        for action in tuple(self._policy.decide(self._state(now_s))):
            if isinstance(action, Start):
                self._start(action, now_s)
            else:
                self._preempt(action, now_s)
        self.held.append((now_s, int((~self._free).sum())))

    def _state(self, now_s: float) -> ClusterState:
        return ClusterState(
            now_s,
            self._pod_of,
            self._free.copy(),
            MappingProxyType(self.waiting),
            MappingProxyType(self._running),
            MappingProxyType(self._announced),
        )

    def _push(self, time_s: float, kind: int, job_id: str = "", run: int = 0) -> None:
        self._pushed += 1
        heapq.heappush(self.events, _Event(time_s, kind, self._pushed, job_id, run))

    def _happen(self, event: _Event) -> None:
        job_id = event.job_id
        if event.kind == _ANNOUNCE:
            self._announced[job_id] = self._jobs[job_id].request
        elif event.kind == _ARRIVE:
            self._announced.pop(job_id, None)
            self._wait(self._jobs[job_id].request)
        elif event.kind == _END and self._runs[job_id] == event.run and job_id in self._running:
            self._end(job_id, event.time_s)

    def _end(self, job_id: str, now_s: float) -> None:
        request, started_s, nodes = self._running.pop(job_id)
        job = self._jobs[job_id]
        self._free[nodes] = True
        lost_s = self._lost_s.get(job_id, 0.0)
        self.outcomes[job_id] = Outcome(job, started_s, now_s, tuple(nodes.tolist()), lost_s)
        self._policy.on_end(request, now_s - started_s, job.held_s == job.duration_s)

    def _start(self, start: Start, now_s: float) -> None:
        request = self.waiting.pop(start.job_id, None)
        nodes = np.asarray(start.nodes, dtype=np.int64)
        if request is None:
            raise TrimtabError(f"the policy starts job {start.job_id!r}, which does not wait.")
        if len(np.unique(nodes)) != request.nodes or not self._free[nodes].all():
            raise TrimtabError(
                f"the policy gives job {start.job_id!r} nodes that are not free, or not as many as "
                f"it wants."
            )
        self._free[nodes] = False
        self._running[start.job_id] = Running(request, now_s, nodes)
        run = self._runs[start.job_id] = self._runs.get(start.job_id, 0) + 1
        self._push(now_s + self._jobs[start.job_id].held_s, _END, start.job_id, run)

    def _preempt(self, action: Preempt, now_s: float) -> None:
        running = self._running.pop(action.job_id, None)
        if running is None or not running.request.preemptible:
            raise TrimtabError(
                f"the policy preempts job {action.job_id!r}, which does not run or may not be."
            )
        self._free[running.nodes] = True
        self._lost_s[action.job_id] = (
            self._lost_s.get(action.job_id, 0.0) + now_s - running.started_s
        )
        self._wait(running.request)

    def _wait(self, request: JobRequest) -> None:
        self.waiting[request.job_id] = request
        self._policy.on_wait(request)


def best_fit(free: Flags, pod_of: Nodes, nodes: int) -> Nodes | None:
    """Free nodes for a job: of the fullest pod that has enough, else of the emptiest pods.

    Args:
        free: which nodes may be taken; shape (all nodes,).
        pod_of: the pod of each node; shape (all nodes,).
        nodes: how many are wanted.

    Returns:
        Indices in the order of pods, or None where too few are free.
    """
    candidates = np.flatnonzero(free)
    if len(candidates) < nodes:
        return None
    count = np.bincount(pod_of[candidates], minlength=int(pod_of[-1]) + 1)
    enough = np.flatnonzero(count >= nodes)
    if len(enough):
        pod = enough[np.argmin(count[enough])]
        fitting: Nodes = candidates[pod_of[candidates] == pod][:nodes]
        return fitting
    order = np.lexsort((candidates, pod_of[candidates], -count[pod_of[candidates]]))
    spread: Nodes = candidates[order][:nodes]
    return spread


class FifoBestFit:
    """First come, first served within a priority; each job by best fit, and none overtakes."""

    def __init__(self) -> None:
        self._queue: list[JobRequest] = []

    def decide(self, state: ClusterState) -> list[Start | Preempt]:
        """See `ClusterPolicy`."""
        free = state.free.copy()
        starts: list[Start | Preempt] = []
        for request in self._queue:
            nodes = best_fit(free, state.pod_of, request.nodes)
            if nodes is None:
                break
            free[nodes] = False
            starts.append(Start(request.job_id, nodes))
        del self._queue[: len(starts)]
        return starts

    def on_wait(self, request: JobRequest) -> None:
        """See `ClusterPolicy`."""
        insort(self._queue, request, key=lambda r: (-r.priority, r.arrival_s))

    def on_end(self, request: JobRequest, held_s: float, completed: bool) -> None:
        """See `ClusterPolicy`."""
