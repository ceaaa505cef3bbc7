"""What a queueing policy did for a large announced job, and to the jobs around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from trimtab.core.errors import BadInput
from trimtab.core.simulate.cluster_jobs import (
    ClusterJob,
    ClusterPolicy,
    ClusterResult,
    FifoBestFit,
    simulate_cluster,
)
from trimtab.placement.job_time import Ended
from trimtab.placement.reservation import (
    Learner,
    ReservationOptions,
    ReservationQueue,
    spread_on,
)

POLICIES = ("reserve", "fifo-best-fit", "reserve-no-backfill")
SMALL_NODES = 8
"""Jobs of at most so many nodes count as small."""


@dataclass(frozen=True, slots=True)
class QueueFigures:
    """One announced job under one policy.

    Attributes:
        job_id: the job.
        nodes: how many it wants.
        retained_nodes: nodes that others held when it arrived: of those reserved for it, or where
            nothing is reserved those that it lacked.
        wait_s: from its arrival to its start.
        pipeline_spread, data_spread: the least that its nodes allow, in pods.
        allocation: share of all nodes held between its announcement and its arrival.
        small_jobs: how many small jobs arrived in that time.
        small_wait_s, small_wait_p95_s: how long they waited.
    """

    job_id: str
    nodes: int
    retained_nodes: int
    wait_s: float
    pipeline_spread: int
    data_spread: int
    allocation: float
    small_jobs: int
    small_wait_s: float
    small_wait_p95_s: float


@dataclass(frozen=True, slots=True)
class QueueRun:
    """A policy's run of a trace: the figures of each announced job, and the whole result."""

    policy: str
    figures: tuple[QueueFigures, ...]
    result: ClusterResult

    def as_json(self, *, points: int = 200) -> dict[str, object]:
        """Plain data; the allocation over time at so many times from first to last."""
        times_s = np.array([time_s for time_s, _ in self.result.held])
        held = np.array([nodes for _, nodes in self.result.held])
        at_s = np.linspace(times_s[0], times_s[-1], points)
        share = held[np.searchsorted(times_s, at_s, side="right") - 1] / sum(self.result.pods)
        waits_s = [outcome.wait_s for outcome in self.result.outcomes.values()]
        return {
            "policy": self.policy,
            "jobs": len(waits_s),
            "mean_wait_s": float(np.mean(waits_s)),
            "announced": [asdict(figures) for figures in self.figures],
            "allocation": {"time_s": at_s.round(1).tolist(), "share": share.round(4).tolist()},
        }


def run_queue(
    name: str,
    jobs: Sequence[ClusterJob],
    pods: Sequence[int],
    *,
    options: ReservationOptions,
    history: Sequence[Ended] = (),
    learner: Learner | None = None,
) -> QueueRun:
    """Runs a trace under a policy of a name.

    Args:
        name: one of `POLICIES`.
        jobs: the trace, announced jobs among them.
        pods: nodes of each pod.
        options: of the reservation queue.
        history: jobs that ended before the trace begins.
        learner: makes the predictor; the best that is installed by default.

    Raises:
        BadInput: there is no such policy, or a job is faulty.
    """
    policy = _policy(name, options, history, learner)
    result = simulate_cluster(jobs, pods, policy)
    announced = [job for job in jobs if job.request.announced_s is not None]
    figures = tuple(_figures(job, result, policy, options.alpha) for job in announced)
    return QueueRun(name, figures, result)


def _policy(
    name: str, options: ReservationOptions, history: Sequence[Ended], learner: Learner | None
) -> ClusterPolicy:
    if name == "fifo-best-fit":
        return FifoBestFit()
    if name not in POLICIES:
        raise BadInput(f"there is no policy {name!r}", fix=f"known are {', '.join(POLICIES)}")
    chosen = options.model_copy(update={"backfill": name == "reserve"})
    if learner is None:
        return ReservationQueue(chosen, history=history)
    return ReservationQueue(chosen, history=history, learner=learner)


def _figures(
    job: ClusterJob, result: ClusterResult, policy: ClusterPolicy, alpha: float
) -> QueueFigures:
    request = job.request
    outcome = result.outcomes[request.job_id]
    announced_s = request.arrival_s if request.announced_s is None else request.announced_s
    pod_of = np.repeat(np.arange(len(result.pods)), result.pods)
    spread = spread_on(request, pod_of[list(outcome.nodes)].tolist(), alpha)
    waits_s = [
        other.wait_s
        for other in result.outcomes.values()
        if other.job.request.nodes <= SMALL_NODES
        and announced_s <= other.job.request.arrival_s < request.arrival_s
    ]
    return QueueFigures(
        job_id=request.job_id,
        nodes=request.nodes,
        retained_nodes=_retained(job, result, policy),
        wait_s=outcome.wait_s,
        pipeline_spread=spread.pipeline,
        data_spread=spread.data,
        allocation=result.allocation(announced_s, request.arrival_s)
        if announced_s < request.arrival_s
        else 0.0,
        small_jobs=len(waits_s),
        small_wait_s=float(np.mean(waits_s)) if waits_s else 0.0,
        small_wait_p95_s=float(np.quantile(waits_s, 0.95)) if waits_s else 0.0,
    )


def _retained(job: ClusterJob, result: ClusterResult, policy: ClusterPolicy) -> int:
    if isinstance(policy, ReservationQueue) and job.request.job_id in policy.arrivals:
        return policy.arrivals[job.request.job_id].retained
    free = sum(result.pods) - result.held_at(job.request.arrival_s)
    return max(0, job.request.nodes - free)
