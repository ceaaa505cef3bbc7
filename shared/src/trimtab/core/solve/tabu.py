"""Tabu search over any solution space."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from trimtab.core.solve.certificate import Certificate, Limits, certify

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class TabuResult(Generic[S]):
    """The best solution met, what is proven about it, and how many steps were made."""

    best: S
    certificate: Certificate
    steps: int


def tabu_search(
    start: S,
    *,
    neighbours: Callable[[S], Iterable[tuple[Hashable, S]]],
    cost: Callable[[S], float],
    tenure: int = 10,
    max_steps: int = 1_000,
    patience: int = 200,
    lower_bound: float = -math.inf,
    limits: Limits = Limits(),
) -> TabuResult[S]:
    """Minimises a cost by always moving to the best neighbour that is not tabu.

    A move is tabu for ``tenure`` steps after it was made, unless it leads to a cost below the best
    so far (aspiration). With ordered neighbours and no time limit in reach, it is deterministic.

    Args:
        start: a feasible solution.
        neighbours: each neighbour with the attribute of the move that leads to it; making a move
            forbids that attribute, so give a move and its reverse the same one.
        cost: to be minimised; infinity for a solution that must not be entered.
        tenure: how many steps a move stays tabu.
        max_steps: steps in all.
        patience: steps in a row without a new best.
        lower_bound: no solution costs less; the search ends within the limits' gap of it.
        limits: time and gap.
    """
    started = time.perf_counter()
    current, best = start, start
    best_cost = cost(start)
    tabu_until: dict[Hashable, int] = {}
    step = best_step = 0
    while step < max_steps and step - best_step < patience:
        if time.perf_counter() - started >= limits.time_s or best_cost <= lower_bound:
            break
        step += 1
        move = _best_move(current, neighbours, cost, tabu_until, step, best_cost)
        if move is None:
            break
        attribute, current, current_cost = move
        tabu_until[attribute] = step + tenure
        if current_cost < best_cost:
            best, best_cost, best_step = current, current_cost, step
    wall_s = time.perf_counter() - started
    certificate = certify(best_cost, lower_bound, limits, wall_s, "tabu")
    return TabuResult(best, certificate, step)


def _best_move(
    current: S,
    neighbours: Callable[[S], Iterable[tuple[Hashable, S]]],
    cost: Callable[[S], float],
    tabu_until: dict[Hashable, int],
    step: int,
    best_cost: float,
) -> tuple[Hashable, S, float] | None:
    chosen: tuple[Hashable, S, float] | None = None
    for attribute, neighbour in neighbours(current):
        value = cost(neighbour)
        allowed = tabu_until.get(attribute, 0) < step or value < best_cost
        if allowed and value < math.inf and (chosen is None or value < chosen[2]):
            chosen = attribute, neighbour, value
    return chosen
