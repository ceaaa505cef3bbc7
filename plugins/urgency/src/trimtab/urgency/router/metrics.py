"""The router's own metrics; every label has a bounded set of values."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from trimtab.urgency.estimate import OTHER
from trimtab.urgency.router.backends import Backend, State
from trimtab.urgency.router.journeys import Journey
from trimtab.urgency.router.tenants import Tenant

_MOST_CLASSES = 32
_LONG_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800)
_SHORT_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25)


class Metrics:
    """What ``/metrics`` shows, besides Python's own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._classes: set[str] = set()
        self._latency = self._histogram(
            "workflow_latency_seconds", "From a workflow's first call to its last's end.", "class"
        )
        self._misses = self._counter(
            "deadline_misses_total", "Workflows that ended late.", "class", "tenant"
        )
        self._workflows = self._counter(
            "workflows_total", "Workflows that have ended.", "class", "tenant"
        )
        self._dispatch = self._counter(
            "dispatch_total",
            "Calls sent: immediate, held in the queue before, or retry.",
            "instance",
            "reason",
        )
        self._queue_s = self._histogram(
            "queue_seconds", "Time in the router's queue before the first dispatch.", "tenant"
        )
        self._retries = self._counter(
            "retries_total",
            "Requests that a server failed before the first byte: lost, silent or busy.",
            "instance",
            "cause",
        )
        self._broken = self._counter(
            "broken_answers_total", "Answers ended with an error after the first byte.", "instance"
        )
        self._refused = self._counter(
            "refused_total", "Requests that the router answered itself.", "status"
        )
        self._gone = self._counter("abandoned_total", "Requests whose client has gone.")
        self._overhead_s = Histogram(
            "trimtab_router_overhead_seconds",
            "Time that a call spends in the router besides waiting.",
            buckets=_SHORT_S,
            registry=self._registry,
        )
        self._waiting = self._gauge("waiting", "Calls in the router's queue.", "tenant")
        self._running = self._gauge("in_flight", "Calls sent to a server.", "instance")
        self._up = self._gauge("up", "1 for a server that gets calls.", "instance")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"trimtab_router_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"trimtab_router_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        name = f"trimtab_router_{name}"
        return Histogram(name, text, labels, buckets=_LONG_S, registry=self._registry)

    def workflow_ended(self, journey: Journey) -> None:
        """A workflow seems over."""
        if not journey.answered:
            return
        class_ = self._class_label(journey.class_)
        self._latency.labels(class_).observe(journey.ended_s - journey.began_s)
        self._workflows.labels(class_, journey.tenant.name).inc()
        if journey.ended_s > journey.deadline_s:
            self._misses.labels(class_, journey.tenant.name).inc()

    def _class_label(self, class_: str) -> str:
        if class_ not in self._classes:
            if len(self._classes) >= _MOST_CLASSES:
                return OTHER
            self._classes.add(class_)
        return class_

    def dispatched(self, instance: str, reason: str) -> None:
        """A call was sent."""
        self._dispatch.labels(instance, reason).inc()

    def admitted(self, tenant: str, waited_s: float) -> None:
        """A call has left the queue."""
        self._queue_s.labels(tenant).observe(waited_s)

    def took(self, overhead_s: float) -> None:
        """A call has cost the router's own time."""
        self._overhead_s.observe(overhead_s)

    def retried(self, instance: str, cause: str) -> None:
        """A server has failed a request that can be sent again."""
        self._retries.labels(instance, cause).inc()

    def broke_off(self, instance: str) -> None:
        """A server has failed a request that cannot be sent again."""
        self._broken.labels(instance).inc()

    def refused(self, status: int) -> None:
        """The router has answered itself."""
        self._refused.labels(str(status)).inc()

    def abandoned(self) -> None:
        """A client has gone before its answer was complete."""
        self._gone.inc()

    def text(self, tenants: Iterable[Tenant], backends: Iterable[Backend]) -> bytes:
        """The metrics in Prometheus' text format."""
        for tenant in tenants:
            self._waiting.labels(tenant.name).set(tenant.waiting)
        for backend in backends:
            self._running.labels(backend.name).set(backend.backlog.own)
            self._up.labels(backend.name).set(backend.state is not State.DOWN)
        return generate_latest(self._registry)
