"""The reservation queue against FIFO with best fit, and against a reservation without backfill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from trimtab.core.benchmark import Case, Options, Progress
from trimtab.core.simulate.cluster_jobs import ClusterJob, JobRequest
from trimtab.core.simulate.synthetic_jobs import synthetic_jobs
from trimtab.placement.job_time import Ended, GroupTimes, KnownTimes
from trimtab.placement.queue_figures import QueueFigures, run_queue
from trimtab.placement.reservation import ReservationOptions

_HOUR_S = 3600.0
_PODS = (50,) * 10
_NODES, _STAGES = 304, 8
"""The large job: 38 rows of 8 stages, 61 % of the cluster, as 1,200 nodes of 2,000 in the paper."""
_KNOWING = "reserve with every time known"
_BASELINES = ("fifo-best-fit", "reserve-no-backfill", _KNOWING)
_HISTORY_DAYS = 3.0


def queue_cases(options: Options, progress: Progress) -> list[Case]:
    """The cases of brief B5: a job announced at 14:00 that arrives at 18:00, over seeds."""
    seeds = range(options.seed, options.seed + (4 if options.quick else 20))
    runs: dict[str, list[QueueFigures]] = {name: [] for name in ("reserve", *_BASELINES)}
    for number, seed in enumerate(seeds):
        progress("queueing around a large job", number / len(seeds))
        jobs, history = scenario(seed)
        for name, figures in runs.items():
            knows = partial(_knowing, jobs)
            run = run_queue(
                "reserve" if name == _KNOWING else name,
                jobs,
                _PODS,
                options=ReservationOptions(),
                history=history,
                learner=knows if name == _KNOWING else GroupTimes,
            )
            figures.append(run.figures[0])
    return [case for name in _BASELINES for case in _cases(name, runs[name], runs["reserve"])]


def scenario(seed: int) -> tuple[list[ClusterJob], list[Ended]]:
    """A day of jobs with the large one among them, and three other days to learn times from."""
    before = synthetic_jobs(sum(_PODS), seed=10_000 + seed, days=_HISTORY_DAYS, load=0.85)
    jobs = synthetic_jobs(sum(_PODS), seed=seed, days=1.0, load=0.85)
    large = JobRequest(
        job_id="large",
        arrival_s=18 * _HOUR_S,
        nodes=_NODES,
        priority=1000,
        announced_s=14 * _HOUR_S,
        pipeline_stages=_STAGES,
    )
    history = [(job.request, job.held_s) for job in before]
    return [*jobs, ClusterJob(large, 12 * _HOUR_S)], history


def _knowing(jobs: Sequence[ClusterJob], ended: Sequence[Ended]) -> KnownTimes:
    """What no predictor can beat: the part of a loss that is the reservation's, not its own."""
    return KnownTimes((job.request, job.held_s) for job in jobs)


def _cases(
    baseline: str, theirs: Sequence[QueueFigures], ours: Sequence[QueueFigures]
) -> Iterator[Case]:
    name = f"simulator/queue-{sum(_PODS)}-nodes"
    clean = sum(figures.retained_nodes == 0 for figures in ours)
    their_clean = sum(figures.retained_nodes == 0 for figures in theirs)
    pairs = list(zip(theirs, ours, strict=True))
    yield Case.compare(
        name,
        "retained_nodes_plus_1",
        "nodes",
        "lower",
        baseline,
        [(a.retained_nodes + 1, b.retained_nodes + 1) for a, b in pairs],
        lower_bound=1,
        notes=f"no node retained in {clean} of {len(ours)} seeds, theirs in {their_clean}",
    )
    yield Case.compare(
        name,
        "idle_share_before_arrival",
        "1",
        "lower",
        baseline,
        [(1 - a.allocation, 1 - b.allocation) for a, b in pairs],
        notes="from announcement to arrival; under FIFO the large job waits after it instead",
    )
    yield Case.compare(
        name,
        "small_job_wait_plus_60",
        "s",
        "lower",
        baseline,
        [(a.small_wait_s + 60, b.small_wait_s + 60) for a, b in pairs],
        lower_bound=60,
    )
    yield Case.compare(
        name,
        "large_job_wait_plus_60",
        "s",
        "lower",
        baseline,
        [(a.wait_s + 60, b.wait_s + 60) for a, b in pairs],
        lower_bound=60,
    )
    alpha = ReservationOptions().alpha
    yield Case.compare(
        name,
        "weighted_spread",
        "1",
        "lower",
        baseline,
        [(_weighted(a, alpha), _weighted(b, alpha)) for a, b in pairs],
    )


def _weighted(figures: QueueFigures, alpha: float) -> float:
    return alpha * figures.data_spread + (1 - alpha) * figures.pipeline_spread
