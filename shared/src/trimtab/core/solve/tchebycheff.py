"""Several objectives at once: weighted Tchebycheff scalarisation and the Pareto front.

Minimising the largest weighted distance to the ideal point reaches every Pareto point for some
weights, those in dents of the front too, which a weighted sum never does (Bowman 1976; the
augmentation term of Steuer and Choo 1983 keeps weakly dominated points out).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import pulp

AUGMENTATION = 1e-4


def tchebycheff(
    values: Sequence[float],
    weights: Sequence[float],
    ideal: Sequence[float],
    *,
    augmentation: float = AUGMENTATION,
) -> float:
    """The augmented weighted Tchebycheff distance of objective values, all to be minimised.

    Args:
        values: one value for each objective.
        weights: how much each counts; scale by the objective's range to make them comparable.
        ideal: each objective's best value on its own.
        augmentation: the share of the weighted sum that is added.
    """
    distances = [w * (v - i) for v, w, i in zip(values, weights, ideal, strict=True)]
    return max(distances) + augmentation * sum(distances)


def minimise_tchebycheff(
    problem: pulp.LpProblem,
    objectives: Sequence[pulp.LpAffineExpression],
    weights: Sequence[float],
    ideal: Sequence[float],
    *,
    augmentation: float = AUGMENTATION,
) -> None:
    """Makes the augmented weighted Tchebycheff distance the objective of a MILP.

    The problem gets one variable and one constraint for each objective; its sense is minimise.
    """
    largest = pulp.LpVariable("tchebycheff_distance")
    distances = [w * (o - i) for o, w, i in zip(objectives, weights, ideal, strict=True)]
    for index, distance in enumerate(distances):
        problem += largest >= distance, f"tchebycheff_distance_{index}"
    problem.sense = pulp.LpMinimize
    problem.setObjective(largest + augmentation * pulp.lpSum(distances))


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """The indices of the points that no other point dominates, all objectives minimised.

    Of equal points the first is kept. The order is that of the points.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (tuple(points[i]), i)):
        # In lexicographic order only a point met before can dominate this one.
        if not any(_covers(points[kept], points[index]) for kept in front):
            front.append(index)
    return sorted(front)


def _covers(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True))


def weight_grid(objectives: int, steps: int) -> Iterator[tuple[float, ...]]:
    """All weight vectors whose entries are multiples of ``1/steps`` and sum to 1."""
    for bars in combinations(range(steps + objectives - 1), objectives - 1):
        edges = (-1, *bars, steps + objectives - 1)
        yield tuple((b - a - 1) / steps for a, b in pairwise(edges))
