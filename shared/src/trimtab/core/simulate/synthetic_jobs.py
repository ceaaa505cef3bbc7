"""Made-up traces of cluster jobs with a seed: days and nights, departments, limits, sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.core.errors import BadInput
from trimtab.core.simulate.cluster_jobs import ClusterJob, JobRequest

DAY_S = 86400.0


@dataclass(frozen=True, slots=True)
class Department:
    """Who sends jobs, and what they are like.

    Attributes:
        name: what the jobs' ``department`` says.
        share: its part of all jobs; shares need not sum to 1.
        median_s: median duration.
        sigma: standard deviation of the duration's logarithm.
        sizes: nodes that a job may want; small ones are likelier, by the inverse square root.
        preemptible: the share of its jobs that may be ended and begun again.
    """

    name: str
    share: float
    median_s: float
    sigma: float
    sizes: tuple[int, ...]
    preemptible: float = 0.0


DEPARTMENTS: tuple[Department, ...] = (
    Department("evaluation", 0.4, 900.0, 0.6, (1, 2, 4), 0.1),
    Department("data", 0.27, 1800.0, 0.7, (1, 2, 4, 8)),
    Department("finetuning", 0.26, 3600.0, 0.6, (2, 4, 8, 16)),
    Department("research", 0.064, 5400.0, 0.7, (1, 2, 4, 8, 16, 32)),
    Department("pretraining", 0.006, 28800.0, 0.6, (8, 16)),
)

_LIMITS_S = tuple(hours * 3600.0 for hours in (0.5, 1, 2, 4, 8, 12, 24, 48, 96, 168))
_NIGHT = 0.5
"""Arrivals are this share above and below their mean at the busiest and the quietest hour."""


def synthetic_jobs(
    nodes: int,
    *,
    seed: int,
    days: float = 2.0,
    load: float = 0.95,
    departments: Sequence[Department] = DEPARTMENTS,
    limited: float = 0.9,
) -> list[ClusterJob]:
    """A trace of jobs whose arrivals follow the hours of the day.

    Durations are lognormal by department. Users ask for two to five times what a job takes, rounded
    up to a usual limit; a few give none.

    Args:
        nodes: of the cluster; no job wants more than a quarter.
        seed: of all that is drawn.
        days: how long jobs arrive.
        load: node-seconds wanted, as a share of those there are.
        departments: who sends jobs.
        limited: the share of jobs with a limit.

    Raises:
        BadInput: there are no nodes, no time, or no load.
    """
    for key, value in (("nodes", nodes), ("days", days), ("load", load)):
        if not (math.isfinite(value) and value > 0):
            raise BadInput(f"{key} is {value}", fix="give a number above 0")
    rng = np.random.default_rng(seed)
    shares = np.array([department.share for department in departments])
    jobs: list[ClusterJob] = []
    wanted_node_s = load * nodes * days * DAY_S
    while wanted_node_s > 0:
        department = departments[int(rng.choice(len(departments), p=shares / shares.sum()))]
        job = _job(f"j{len(jobs)}", department, nodes, days, limited, rng)
        wanted_node_s -= job.request.nodes * job.held_s
        jobs.append(job)
    return sorted(jobs, key=lambda job: job.request.arrival_s)


def _job(
    job_id: str,
    department: Department,
    nodes: int,
    days: float,
    limited: float,
    rng: np.random.Generator,
) -> ClusterJob:
    sizes = np.array([size for size in department.sizes if size <= max(1, nodes // 4)] or [1])
    weights = sizes**-0.5
    duration_s = max(60.0, department.median_s * math.exp(department.sigma * rng.normal()))
    asked_s = duration_s * rng.uniform(2, 5)
    limit_s = next((limit for limit in _LIMITS_S if limit >= asked_s), _LIMITS_S[-1])
    request = JobRequest(
        job_id=job_id,
        arrival_s=_arrival_s(days, rng),
        nodes=int(rng.choice(sizes, p=weights / weights.sum())),
        limit_s=limit_s if rng.random() < limited else None,
        preemptible=bool(rng.random() < department.preemptible),
        department=department.name,
    )
    return ClusterJob(request, round(duration_s, 1))


def _arrival_s(days: float, rng: np.random.Generator) -> float:
    """A time by rejection: quietest at 4 in the morning, busiest at 16."""
    while True:
        time_s = rng.uniform(0, days * DAY_S)
        rate = 1 - _NIGHT * math.cos(2 * math.pi * (time_s / DAY_S - 4 / 24))
        if rng.uniform(0, 1 + _NIGHT) < rate:
            return round(float(time_s), 1)
