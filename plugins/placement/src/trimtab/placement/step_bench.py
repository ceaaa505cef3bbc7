"""Modelled communication of a step under our placement and under those that people use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import mean

import numpy as np

from trimtab.core.benchmark import Case
from trimtab.placement.affinity import alpha_of
from trimtab.placement.grid import Demand, PodGrid
from trimtab.placement.job import TrainingJob
from trimtab.placement.packing import RANK_ORDERS, packings, random_grids
from trimtab.placement.search import search
from trimtab.placement.step_model import Links, communication_s
from trimtab.placement.volumes import Shape

_GPUS = 8
_NODE_BYTES_PER_S = _GPUS * 50e9
_OVERSUBSCRIBED = 4
"""What a pod's nodes could send for a byte that its links to the core carry."""

_SHAPE = Shape(layers=64, hidden=8192, vocab=50_257)


def step_cases(demands: Sequence[Demand], seed: int) -> Iterator[Case]:
    """One case for each baseline, with the medians over the demands.

    Args:
        demands: grids of nodes of eight GPUs, and the pods' free nodes.
        seed: of the random placements.
    """
    pairs: dict[str, list[tuple[float, float]]] = {}
    for demand in demands:
        job = _job(demand)
        timed, alpha = _timed(demand, job), alpha_of(job)
        front = search(demand, (alpha,))
        assert front is not None, "the demands hold their job"
        ours = timed(front.best(alpha).grid)
        for name, grids in _baselines(demand, seed).items():
            pairs.setdefault(name, []).append((mean(map(timed, grids)), ours))
    for name, both in pairs.items():
        yield Case.compare(
            "model/step",
            "communication_s",
            "s",
            "lower",
            name,
            both,
            notes=f"{len(both)} clusters; flows share a core with a {_OVERSUBSCRIBED}th of what"
            " pods could send; nothing is hidden behind compute",
        )


def _job(demand: Demand) -> TrainingJob:
    return TrainingJob(
        tensor_parallel=_GPUS,
        pipeline_parallel=demand.columns,
        data_parallel=demand.rows,
        shape=_SHAPE,
    )


def _timed(demand: Demand, job: TrainingJob) -> Callable[[PodGrid], float]:
    """The time of a step's communication by the pod of each node."""
    volumes = job.step_volumes()
    assert volumes is not None, "the model's shape is given"
    pods = np.array(demand.capacities) * _NODE_BYTES_PER_S / _OVERSUBSCRIBED
    links = Links(_NODE_BYTES_PER_S, pods)

    def timed(grid: PodGrid) -> float:
        # A stage's volume goes half to the next one and half back.
        sent = _GPUS * volumes.pipeline / 2
        return communication_s(grid, links, pipeline=sent, data=_GPUS * volumes.data)

    return timed


def _baselines(demand: Demand, seed: int) -> dict[str, list[PodGrid]]:
    found = {candidate.method: [candidate.grid] for candidate in packings(demand)}
    for order in RANK_ORDERS:
        found[f"random-fit {order}"] = random_grids(demand, seed, order)
    return found
