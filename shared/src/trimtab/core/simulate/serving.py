"""The serving simulator: a cluster of engines, driven from event to event."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from trimtab.core.cost.step import EngineProfile
from trimtab.core.errors import BadInput
from trimtab.core.policy import ServingPolicy
from trimtab.core.simulate.dispatch import Dispatcher, LeastRequests, RoundRobin, Router, Sends
from trimtab.core.simulate.job import Job
from trimtab.core.simulate.replica import Replica, Role
from trimtab.core.simulate.result import ServingResult, result_of
from trimtab.core.workload import Request, fault


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """A replica of the simulated cluster."""

    profile: EngineProfile
    role: Role = "both"


@dataclass(frozen=True, slots=True)
class KvLink:
    """How KV gets from a prefill replica to a decode replica: one transfer at a time per sender."""

    bandwidth_bytes_per_s: float
    kv_bytes_per_token: float
    latency_s: float = 0.0


PolicyFactory = Callable[[], Sequence[ServingPolicy]]


def simulate(
    requests: Iterable[Request],
    replicas: Sequence[ReplicaSpec],
    *,
    dispatcher: Dispatcher | None = None,
    router: Router | None = None,
    decode_dispatcher: Dispatcher | None = None,
    policies: PolicyFactory = tuple,
    kv_link: KvLink | None = None,
    max_output_tokens: int | None = None,
) -> ServingResult:
    """Serves a workload on a cluster and says when each request was done.

    The same inputs give the same result, byte for byte: nothing here is random.

    Args:
        requests: the workload, a `Workload` or any requests.
        replicas: the engines. Where they serve several models, a request goes to those of its own.
        dispatcher: chooses the replica of each request; round robin by default.
        router: takes the dispatcher's place, and may hold requests back.
        decode_dispatcher: chooses the decode replica of each prefilled request; the least busy one
            by default.
        policies: makes the serving policies of one replica; called once for each.
        kv_link: the way from prefill to decode replicas; needed where there are such.
        max_output_tokens: the most tokens a call may generate as far as policies know.

    Raises:
        BadInput: the workload or the cluster is inconsistent, a request fits no replica, or the
            router sends one to a replica that does not serve it, or never.
    """
    cluster = _Cluster(list(requests), replicas, kv_link)
    return _Simulation(
        cluster,
        [
            Replica(number, spec.profile, spec.role, policies(), max_output_tokens)
            for number, spec in enumerate(replicas)
        ],
        dispatcher or RoundRobin(),
        decode_dispatcher or LeastRequests(),
        router,
    ).run()


class _Cluster:
    """The checked inputs of a simulation."""

    def __init__(
        self, requests: Sequence[Request], replicas: Sequence[ReplicaSpec], kv_link: KvLink | None
    ) -> None:
        self.requests = requests
        self.kv_link = kv_link
        self.models = {spec.profile.model for spec in replicas}
        self._specs = replicas
        self._check_replicas()
        self._check_requests()

    def serving(self, request: Request, roles: tuple[Role, ...]) -> list[int]:
        """The numbers of the replicas that may serve a request."""
        only = request.model if len(self.models) > 1 else None
        return [
            number
            for number, spec in enumerate(self._specs)
            if spec.role in roles and only in (None, spec.profile.model)
        ]

    def _check_replicas(self) -> None:
        roles = {spec.role for spec in self._specs}
        if not self._specs:
            raise BadInput("the cluster has no replica", fix="give at least one")
        if ("prefill" in roles) != ("decode" in roles):
            missing = "decode" if "prefill" in roles else "prefill"
            raise BadInput(f"the cluster has no {missing} replica", fix="give at least one")
        if "prefill" in roles and self.kv_link is None:
            raise BadInput(
                "prefill and decode replicas have no link between them", fix="give a kv_link"
            )

    def _check_requests(self) -> None:
        found = fault(self.requests)
        if found is not None:
            name = self.requests[found.index].request_id
            raise BadInput(found.what, where=f"request {name!r}", fix=found.fix)
        shapes: dict[str | None, EngineProfile] = {}
        for request in self.requests:
            only = request.model if len(self.models) > 1 else None
            if only not in shapes:
                shapes[only] = self._smallest(request)
            _check_fits(request, shapes[only])

    def _smallest(self, request: Request) -> EngineProfile:
        serving = self.serving(request, ("both", "prefill", "decode"))
        if not serving:
            models = ", ".join(sorted(self.models))
            raise BadInput(
                f"no replica serves the model {request.model!r}",
                where=f"request {request.request_id!r}",
                fix=f"served are {models}",
            )
        profiles = [self._specs[number].profile for number in serving]
        return min(profiles, key=_capacity_tokens)


def _capacity_tokens(profile: EngineProfile) -> int:
    limits = profile.limits
    return min(limits.max_model_len, limits.kv_blocks * limits.block_size)


def _check_fits(request: Request, profile: EngineProfile) -> None:
    needed, capacity = request.prompt_tokens + request.output_tokens, _capacity_tokens(profile)
    if needed > capacity:
        raise BadInput(
            f"it needs {needed} tokens of context, an engine of {profile.model} holds {capacity}",
            where=f"request {request.request_id!r}",
            fix="shorten it, or give the engine a larger max_model_len and more KV blocks",
        )


class _Kind:
    """The kinds of events in the order in which those of one instant happen."""

    ISSUE = 0
    ARRIVE = 1
    DELIVER = 2
    END = 3
    START = 4


class _Event(NamedTuple):
    time_s: float
    kind: int
    order: int
    """For a step: its replica; else a running number."""
    version: int = 0
    """The version of the replica's jump: a jump that was cut leaves a stale event behind."""
    job: Job | None = None


class _Simulation:
    def __init__(
        self,
        cluster: _Cluster,
        replicas: list[Replica],
        dispatcher: Dispatcher,
        decode_dispatcher: Dispatcher,
        router: Router | None,
    ) -> None:
        self._cluster = cluster
        self._replicas = replicas
        self._dispatcher = dispatcher
        self._decode_dispatcher = decode_dispatcher
        self._router = router
        groups = Job.all_of(cluster.requests)
        self._branches = {group[0].request.request_id: group for group in groups}
        self._open = {request_id: len(group) for request_id, group in self._branches.items()}
        self._held: dict[str, Job] = {}
        self._started: set[str] = set()
        self._dependents: defaultdict[str, list[Job]] = defaultdict(list)
        self._order = sum(self._open.values())
        self._done: list[Job] = []
        self._link_free_s = [0.0] * len(replicas)
        self._destination: dict[Job, tuple[Replica, Replica]] = {}
        self._starting = [False] * len(replicas)
        self._choices: dict[tuple[str | None, bool], list[Replica]] = {}
        self._events = self._first_events()

    def run(self) -> ServingResult:
        handlers = (self._issue, self._arrive, self._deliver, self._end_step, self._start_step)
        events = self._events
        while events:
            event = heapq.heappop(events)
            handlers[event[1]](event)
        if self._held:
            raise BadInput(f"the router never sent {len(self._held)} of the requests")
        return result_of(self._done, self._replicas)

    def _first_events(self) -> list[_Event]:
        events = []
        for job, *_ in self._branches.values():
            for name in job.request.depends_on:
                self._dependents[name].append(job)
            if not job.request.depends_on:
                events.append(_Event(job.request.arrival_s, _Kind.ISSUE, job.number, 0, job))
        heapq.heapify(events)
        return events

    def _push(self, time_s: float, kind: int, job: Job) -> None:
        self._order += 1
        heapq.heappush(self._events, _Event(time_s, kind, self._order, 0, job))

    def _candidates(self, request: Request, *, decode: bool) -> list[Replica]:
        key = (request.model, decode)
        if key not in self._choices:
            roles: tuple[Role, ...] = ("decode",) if decode else ("both", "prefill")
            numbers = self._cluster.serving(request, roles)
            self._choices[key] = [self._replicas[number] for number in numbers]
        return self._choices[key]

    def _issue(self, event: _Event) -> None:
        job, now_s = event.job, event.time_s
        assert job is not None
        for branch in self._branches[job.request.request_id]:
            branch.issued_s = now_s
        if self._router is not None:
            self._held[job.request.request_id] = job
            self._send_all(self._router.on_arrival(job.request, now_s), now_s)
            return
        candidates = self._candidates(job.request, decode=False)
        index = self._dispatcher.choose(job.request, candidates, now_s)
        self._send(job, candidates[index], now_s)

    def _send_all(self, sends: Sends, now_s: float) -> None:
        for request, number in sends:
            job = self._held.pop(request.request_id, None)
            replica = self._replicas[number]
            if job is None or replica not in self._candidates(request, decode=False):
                raise BadInput(
                    f"the router sends it to replica {number}",
                    where=f"request {request.request_id!r}",
                    fix="send each request once, to a replica that serves it",
                )
            self._send(job, replica, now_s)

    def _send(self, job: Job, replica: Replica, now_s: float) -> None:
        job.replica = replica.replica
        overhead_s = replica.profile.request_overhead_s
        if overhead_s:
            replica.incoming += 1
            self._push(now_s + overhead_s, _Kind.ARRIVE, job)
        else:
            self._enqueue(job, replica, now_s)

    def _arrive(self, event: _Event) -> None:
        job = event.job
        assert job is not None
        replica = self._replicas[job.replica]
        replica.incoming -= 1
        self._enqueue(job, replica, event.time_s)

    def _enqueue(self, job: Job, replica: Replica, now_s: float) -> None:
        """Queues a request's call, or all of its branches."""
        for branch in self._branches[job.request.request_id]:
            self._queue(branch, replica, now_s)

    def _queue(self, job: Job, replica: Replica, now_s: float) -> None:
        replica.arrive(job, now_s)
        if replica.idle:
            self._wake(replica, now_s)
        elif replica.cut(job, now_s):
            self._schedule_end(replica)

    def _wake(self, replica: Replica, now_s: float) -> None:
        number = replica.replica
        if not self._starting[number]:
            self._starting[number] = True
            heapq.heappush(self._events, _Event(now_s, _Kind.START, number))

    def _schedule_end(self, replica: Replica) -> None:
        replica.version += 1
        heapq.heappush(
            self._events, _Event(replica.end_s, _Kind.END, replica.replica, replica.version)
        )

    def _start_step(self, event: _Event) -> None:
        replica = self._replicas[event.order]
        self._starting[event.order] = False
        if replica.start(event.time_s):
            self._schedule_end(replica)
        relieved = replica.take_relieved()
        if relieved:
            self._conclude(relieved, event.time_s)

    def _end_step(self, event: _Event) -> None:
        replica = self._replicas[event.order]
        if event.version != replica.version:
            return
        now_s = event.time_s
        ended = replica.finish(now_s)
        for job in ended.prefilled:
            self._transfer(job, replica, now_s)
        over = self._leave(ended.finished, now_s)
        if self._router is not None:
            for job in ended.started:
                if job.request.request_id not in self._started:
                    self._started.add(job.request.request_id)
                    self._send_all(self._router.on_first_token(job.request, now_s), now_s)
        self._tell_router(over, now_s)
        self._wake(replica, now_s)

    def _conclude(self, jobs: Sequence[Job], now_s: float) -> None:
        self._tell_router(self._leave(jobs, now_s), now_s)

    def _leave(self, jobs: Sequence[Job], now_s: float) -> list[Request]:
        """Notes the end of calls; the requests that ended with them."""
        over = []
        for job in jobs:
            self._done.append(job)
            request = job.request
            self._open[request.request_id] -= 1
            if not self._open[request.request_id]:
                over.append(request)
                self._release_dependents(request, now_s)
        return over

    def _tell_router(self, over: Sequence[Request], now_s: float) -> None:
        if self._router is not None:
            for request in over:
                self._send_all(self._router.on_end(request, now_s), now_s)

    def _release_dependents(self, request: Request, now_s: float) -> None:
        for dependent in self._dependents.get(request.request_id, ()):
            dependent.missing -= 1
            if not dependent.missing:
                ready_s = now_s + dependent.request.gap_s
                self._push(max(ready_s, dependent.request.arrival_s), _Kind.ISSUE, dependent)

    def _transfer(self, job: Job, source: Replica, now_s: float) -> None:
        link = self._cluster.kv_link
        assert link is not None
        candidates = self._candidates(job.request, decode=True)
        target = candidates[self._decode_dispatcher.choose(job.request, candidates, now_s)]
        target.incoming += 1
        self._destination[job] = (source, target)
        sent_bytes = job.computed * link.kv_bytes_per_token
        start_s = max(now_s, self._link_free_s[source.replica])
        end_s = start_s + sent_bytes / link.bandwidth_bytes_per_s
        self._link_free_s[source.replica] = end_s
        self._push(end_s + link.latency_s, _Kind.DELIVER, job)

    def _deliver(self, event: _Event) -> None:
        job = event.job
        assert job is not None
        source, target = self._destination.pop(job)
        source.handed_over(job)
        if source.idle:
            self._wake(source, event.time_s)
        target.incoming -= 1
        job.kv_arrives = True
        job.tokens = job.request.prompt_tokens + job.generated
        self._queue(job, target, event.time_s)
