"""What a simulated run came to: each call, each workflow, each replica, and the whole."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trimtab.core.simulate.job import Job
from trimtab.core.simulate.replica import Replica


@dataclass(frozen=True, slots=True)
class CallRecord:
    """What became of one request, or of one branch; times in seconds after the workload's start."""

    request_id: str
    workflow: str | None
    stage: str | None
    replica: int
    issued_s: float
    admitted_s: float
    first_token_s: float
    finished_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    preemptions: int
    outcome: str
    branch: int = 0
    """Which branch of its request it is; a request without branches has this one alone."""

    @property
    def latency_s(self) -> float:
        """From its issue to its last token."""
        return self.finished_s - self.issued_s

    @property
    def time_to_first_token_s(self) -> float:
        """From its issue to its first token."""
        return self.first_token_s - self.issued_s

    @property
    def time_per_output_token_s(self) -> float:
        """Mean time between its tokens after the first; 0 for a single token."""
        return (self.finished_s - self.first_token_s) / max(1, self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class WorkflowRecord:
    """A workflow from its first request's issue to its last one's end."""

    workflow: str
    started_s: float
    finished_s: float
    deadline_s: float | None
    """Relative to the start; None where there is none."""

    @property
    def latency_s(self) -> float:
        """From start to end."""
        return self.finished_s - self.started_s

    @property
    def met(self) -> bool:
        """Whether it ended within its deadline; true where there is none."""
        return self.deadline_s is None or self.latency_s <= self.deadline_s


@dataclass(frozen=True, slots=True)
class ReplicaRecord:
    """How a replica was used."""

    replica: int
    busy_s: float
    steps: int
    preemptions: int
    peak_running: int
    peak_kv_usage: float
    kv_block_s: float
    """Blocks of the KV cache that were held, times how long."""


@dataclass(frozen=True, slots=True)
class ServingResult:
    """A simulated run.

    Attributes:
        calls: the requests in the order in which they ended; each branch is a call.
        workflows: the workflows by name; a request without one counts by its own id.
        replicas: the replicas by number.
    """

    calls: tuple[CallRecord, ...]
    workflows: tuple[WorkflowRecord, ...]
    replicas: tuple[ReplicaRecord, ...]

    @property
    def makespan_s(self) -> float:
        """From the first issue to the last token."""
        if not self.calls:
            return 0.0
        return max(c.finished_s for c in self.calls) - min(c.issued_s for c in self.calls)

    @property
    def mean_latency_s(self) -> float:
        """Mean over the calls; 0 for an empty workload."""
        return sum(c.latency_s for c in self.calls) / max(1, len(self.calls))

    @property
    def requests_per_s(self) -> float:
        """Calls ended per second of the run."""
        return len(self.calls) / self.makespan_s if self.calls else 0.0

    @property
    def output_tokens_per_s(self) -> float:
        """Tokens generated per second of the run."""
        return sum(c.output_tokens for c in self.calls) / self.makespan_s if self.calls else 0.0

    @property
    def deadlines_met(self) -> float:
        """Share of the workflows that ended within their deadline."""
        return sum(w.met for w in self.workflows) / max(1, len(self.workflows))

    def latency_quantile_s(self, quantile: float) -> float:
        """A quantile of the calls' latency."""
        return (
            float(np.quantile([c.latency_s for c in self.calls], quantile)) if self.calls else 0.0
        )

    def summary(self) -> dict[str, float | int]:
        """The run in a dozen figures."""
        first = [c.time_to_first_token_s for c in self.calls if c.first_token_s >= 0]
        return {
            "requests": len(self.calls),
            "workflows": len(self.workflows),
            "makespan_s": self.makespan_s,
            "requests_per_s": self.requests_per_s,
            "output_tokens_per_s": self.output_tokens_per_s,
            "mean_latency_s": self.mean_latency_s,
            "p95_latency_s": self.latency_quantile_s(0.95),
            "mean_time_to_first_token_s": sum(first) / max(1, len(first)),
            "deadlines_met": self.deadlines_met,
            "preemptions": sum(r.preemptions for r in self.replicas),
            "peak_kv_usage": max((r.peak_kv_usage for r in self.replicas), default=0.0),
            "busy_share": sum(r.busy_s for r in self.replicas)
            / max(1e-300, self.makespan_s * len(self.replicas)),
        }

    def log(self) -> str:
        """One JSON object a line for each request in the order of their ends, then the replicas."""
        records = [asdict(call) for call in self.calls] + [asdict(r) for r in self.replicas]
        return "".join(json.dumps(record) + "\n" for record in records)

    def chrome_trace(self) -> dict[str, Any]:
        """The run for chrome://tracing or Perfetto: a process a replica, a row a request."""
        events: list[dict[str, Any]] = []
        for row, call in enumerate(self.calls):
            spans = (
                ("waits", call.issued_s, call.admitted_s),
                ("prefill", call.admitted_s, call.first_token_s),
                ("decode", call.first_token_s, call.finished_s),
            )
            for name, start_s, end_s in spans:
                if start_s >= 0 and end_s > start_s:
                    events.append(_span(name, call, row, start_s, end_s))
        return {"displayTimeUnit": "ms", "traceEvents": events}


def _span(name: str, call: CallRecord, row: int, start_s: float, end_s: float) -> dict[str, Any]:
    return {
        "name": name,
        "cat": call.stage or "request",
        "ph": "X",
        "ts": start_s * 1e6,
        "dur": (end_s - start_s) * 1e6,
        "pid": call.replica,
        "tid": row,
        "args": {"request": call.request_id, "workflow": call.workflow},
    }


def result_of(jobs: Sequence[Job], replicas: Sequence[Replica]) -> ServingResult:
    """The result of a run: its jobs in the order of their ends, and its replicas."""
    return ServingResult(
        calls=tuple(_call(job) for job in jobs),
        workflows=_workflows(jobs),
        replicas=tuple(_replica(replica) for replica in replicas),
    )


def _call(job: Job) -> CallRecord:
    request = job.request
    return CallRecord(
        request_id=request.request_id,
        workflow=request.workflow,
        stage=request.stage,
        replica=job.replica,
        issued_s=job.issued_s,
        admitted_s=job.admitted_s,
        first_token_s=job.first_token_s,
        finished_s=job.finished_s,
        prompt_tokens=request.prompt_tokens,
        output_tokens=job.generated,
        cached_tokens=job.cached_tokens,
        preemptions=job.preemptions,
        outcome=job.outcome.value,
        branch=job.branch,
    )


def _workflows(jobs: Sequence[Job]) -> tuple[WorkflowRecord, ...]:
    members: defaultdict[str, list[Job]] = defaultdict(list)
    for job in sorted(jobs, key=lambda job: job.number):
        members[job.request.workflow or job.request.request_id].append(job)
    return tuple(
        WorkflowRecord(
            workflow=name,
            started_s=min(job.issued_s for job in group),
            finished_s=max(job.finished_s for job in group),
            deadline_s=next(
                (job.request.deadline_s for job in group if job.request.deadline_s is not None),
                None,
            ),
        )
        for name, group in members.items()
    )


def _replica(replica: Replica) -> ReplicaRecord:
    return ReplicaRecord(
        replica=replica.replica,
        busy_s=replica.busy_s,
        steps=replica.steps,
        preemptions=replica.preemptions,
        peak_running=replica.peak_running,
        peak_kv_usage=1.0 - replica.least_free / replica.profile.limits.kv_blocks,
        kv_block_s=replica.kv_block_s,
    )
