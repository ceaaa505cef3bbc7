"""How many rows fit where it is settled which pods columns have, and what nodes are then worth.

A row chooses a pod of each block of columns, few different ones. How many rows of each choice fit
into the pods is a linear programme with a constraint for each pod; of its many variables few
matter, and those are found by their prices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trimtab.core.solve.quiet_highs import QuietHighs
from trimtab.placement.grid import Demand, PodGrid
from trimtab.placement.programme import Programme
from trimtab.placement.row_choices import Pods

Numbers = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]

MOST_PODS = 62
"""Whose sets are machine words."""

_MOST_CHOICES = 100_000
_CHEAPEST = 2000
"""Choices that a programme may use."""

_FIRST, _MORE = 100, 60
"""Choices that it begins with, and that are added to it at a time."""

_ROUNDS = 12
ROUNDING = 1e-7
_MOST_WHOLE = 800
"""Choices of which whole rows are made."""


def possible_rows(blocks: Iterable[Pods], most: int) -> tuple[Whole, Whole] | None:
    """All choices of a pod of each block with at most ``most`` different ones.

    Returns:
        The pod of each block, shape (choices, blocks), and the set of pods of each choice, a bit
        for each; None where there are too many.
    """
    rows, met = np.zeros((1, 0), dtype=np.int64), np.zeros(1, dtype=np.int64)
    for pods in blocks:
        if len(rows) * len(pods) > _MOST_CHOICES:
            return None
        own = np.array(sorted(pods), dtype=np.int64)
        meets = met[:, None] | (1 << own)
        before, pod = np.nonzero(np.bitwise_count(meets) <= most)
        rows = np.concatenate([rows[before], own[pod, None]], axis=1)
        met = meets[before, pod]
    return rows, met


@dataclass(frozen=True, slots=True)
class Rest:
    """The rows that are possible but for one block.

    Attributes:
        block: its number.
        rows: the pod of each other block; shape (choices, blocks - 1).
        met: the set of pods of each choice.
        prices: of a node of each pod.
        cost: what each choice pays.
    """

    block: int
    rows: Whole
    met: Whole
    prices: Numbers
    cost: Numbers


@dataclass(frozen=True, slots=True)
class Fit:
    """How many rows fit, in fractions of them.

    Attributes:
        rows: their number; more may fit where not all choices were looked at.
        prices: of a node of each pod, in rows; no choice looked at costs less than one.
        choices: that were looked at; shape (choices, blocks).
    """

    rows: float
    prices: Numbers
    choices: Whole


class RowFit:
    """Fits rows into pods.

    Args:
        demand: the job's grid and the pods' free nodes.
        widths: columns of each block.
        most: pods of a row.
    """

    def __init__(self, demand: Demand, widths: Sequence[int], most: int) -> None:
        self.demand, self.most = demand, most
        self.widths: Numbers = np.array(widths, dtype=np.float64)
        self._capacities = np.array(demand.capacities, dtype=np.float64)
        # For programmes of few constraints, to which more variables are added when solved.
        self._solver = QuietHighs()
        self._solver.setOptionValue("presolve", "off")
        self._solver.setOptionValue("simplex_strategy", 4)
        self._solver.setOptionValue("threads", 1)

    def without(self, blocks: Sequence[Pods], block: int, prices: Numbers) -> Rest | None:
        """The choices for all other blocks; None where there are too many."""
        possible = possible_rows([*blocks[:block], *blocks[block + 1 :]], self.most)
        if possible is None:
            return None
        rows, met = possible
        return Rest(block, rows, met, prices, prices[rows] @ np.delete(self.widths, block))

    def cheapest(self, rest: Rest) -> Numbers:
        """For each pod the cost of the cheapest row that were possible if the block had it."""
        full = np.bitwise_count(rest.met) == self.most
        cost = np.full(len(rest.prices), rest.cost[~full].min(initial=np.inf))
        own = np.repeat(rest.cost[full], rest.rows.shape[1])
        np.minimum.at(cost, rest.rows[full].ravel(), own)
        cost += self.widths[rest.block] * rest.prices
        return cost

    def joined(self, rest: Rest, pods: Pods) -> Fit:
        """The fit if the block has these pods."""
        own = np.array(sorted(pods), dtype=np.int64)
        able = np.bitwise_count(rest.met[:, None] | (1 << own)) <= self.most
        cost = rest.cost[:, None] + self.widths[rest.block] * rest.prices[own]
        at, pod = np.nonzero(able & (cost <= _limit(cost[able])))
        return self._fit(np.insert(rest.rows[at], rest.block, own[pod], axis=1), cost[at, pod])

    def _fit(self, choices: Whole, cost: Numbers) -> Fit:
        self._solver.clearModel()
        no, nothing = np.zeros(0, dtype=np.int32), np.zeros(0)
        pods = len(self._capacities)
        self._solver.addRows(pods, np.full(pods, -np.inf), self._capacities, 0, no, no, nothing)
        added = np.argsort(cost, kind="stable")[:_FIRST]
        for _ in range(_ROUNDS):
            self._add(choices[added])
            self._solver.run()
            prices = -np.array(self._solver.getSolution().row_dual)
            cost = prices[choices] @ self.widths
            cheap = np.flatnonzero(cost < 1 - ROUNDING)
            if not len(cheap):
                break
            added = cheap[np.argsort(cost[cheap], kind="stable")[:_MORE]]
        return Fit(-self._solver.getInfo().objective_function_value, prices, choices)

    def _add(self, choices: Whole) -> None:
        """Rows of these choices, as columns of the programme."""
        count = len(choices)
        used = np.zeros((count, len(self._capacities)))
        at = np.repeat(np.arange(count), choices.shape[1])
        np.add.at(used, (at, choices.ravel()), np.tile(self.widths, count))
        row, pod = np.nonzero(used)
        starts = np.searchsorted(row, np.arange(count)).astype(np.int32)
        none, free = np.zeros(count), np.full(count, np.inf)
        places = pod.astype(np.int32)
        self._solver.addCols(count, none - 1, none, free, len(row), starts, places, used[row, pod])

    def whole(self, fit: Fit, nodes: int) -> PodGrid | None:
        """The pod of each row and block, in whole numbers of the cheapest choices.

        Args:
            fit: the fractions.
            nodes: of the search tree at most.
        """
        cost = fit.prices[fit.choices] @ self.widths
        choices = fit.choices[np.argsort(cost, kind="stable")[:_MOST_WHOLE]]
        programme, asked = Programme(), self.demand.rows
        rows = [programme.variable(upper=asked, whole=True) for _ in choices]
        programme.constrain([(row, 1) for row in rows], low=asked, high=asked)
        for pod, capacity in enumerate(self.demand.capacities):
            used = ((choices == pod) @ self.widths).tolist()
            terms = [(row, width) for row, width in zip(rows, used, strict=True) if width]
            programme.constrain(terms, high=capacity)
        values = programme.solve(nodes=nodes).values
        return None if values is None else np.repeat(choices, np.rint(values).astype(int), axis=0)


def _limit(cost: Numbers) -> float:
    """A cost that enough choices stay within."""
    if len(cost) <= _CHEAPEST:
        return np.inf
    return float(np.partition(cost, _CHEAPEST - 1)[_CHEAPEST - 1])
