"""A bound by prices: how many rows pods must touch where every column has few pods.

Every column is cut into a few parts, each in one pod, and a pod touches at least as many rows as
its tallest part has. Put a price on parts by their height. All columns together pay at least the
cheapest cut each, and a pod earns at most what its nodes hold, of which it spends one for each row
touched: for any prices, the columns' pay less the pods' greatest profits is a lower bound on the
rows touched. The best prices are a linear programme, solved by column generation; the bound is then
counted from them in whole numbers, so that no solver's rounding can lift it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog
from scipy.sparse import coo_array

from trimtab.placement.grid import Demand

Heights = tuple[int, ...]
"""Of parts, the tallest first."""

Money = npt.NDArray[np.int64]
"""In millionths of a touched row."""

ROW = 10**6
"""Money for a touched row."""

_NEVER = 2**60
_KEPT = 0.3
"""Share of the best prices so far in the next ones: they would swing wildly otherwise."""

NEAR = 0.93
"""Share of the rows in question from which on the best prices are looked for, though they will not
decide: what they leave possible may be little (`leftovers`)."""

_HOLDINGS = 4
"""Holdings of each capacity that are remembered in a round, by profit."""


@dataclass(frozen=True, slots=True)
class Holding:
    """What a pod may hold.

    Attributes:
        kind: the index of its capacity in the demand's classes.
        parts: their heights.
    """

    kind: int
    parts: Heights


@dataclass(frozen=True, slots=True)
class Market:
    """What the prices say.

    Attributes:
        rows_touched: by all pods together, at least.
        cuts: of a column, that were cheapest in some round.
        holdings: that were among the most profitable.
        prices: of a part by its height from 0 on, that gave the bound.
    """

    rows_touched: float
    cuts: tuple[Heights, ...]
    holdings: tuple[Holding, ...]
    prices: Money


def market(demand: Demand, parts: int, *, rounds: int, decided: float | None = None) -> Market:
    """Prices for columns of at most so many parts.

    Args:
        demand: the job's grid and the pods' free nodes.
        parts: pods of a column at most.
        rounds: of pricing at most.
        decided: ends when the bound passes this number of rows, or will certainly stay well below.
    """
    cuts: dict[Heights, None] = {}
    holdings: dict[Holding, None] = {}
    prices = np.arange(demand.rows + 1) * (ROW // demand.rows)
    best, best_prices = 0, prices
    for _ in range(rounds):
        cost, cut = _cheapest_cut(prices, parts)
        profit, found = _most_profitable(demand, prices)
        if demand.columns * cost - profit > best:
            best, best_prices = demand.columns * cost - profit, prices
        if decided is not None and best > decided * ROW:
            break
        known = len(cuts) + len(holdings)
        cuts[cut] = None
        holdings.update(dict.fromkeys(found))
        if len(cuts) + len(holdings) == known:
            break
        value, raw = _prices(demand, list(cuts), list(holdings))
        if value * ROW <= best + 1 or (decided is not None and value <= NEAR * decided):
            break
        prices = np.floor((1 - _KEPT) * raw * ROW + _KEPT * best_prices).astype(np.int64)
    return Market(best / ROW, tuple(cuts), tuple(holdings), best_prices)


def least_pay(prices: Money, parts: int) -> list[Money]:
    """The least that a column pays, by its parts at most and its rows."""
    rows = len(prices) - 1
    least = [np.full(rows + 1, _NEVER)]
    least[0][0] = 0
    for _ in range(parts):
        before, now = least[-1], least[-1].copy()
        for height in range(1, rows + 1):
            np.minimum(now[height:], before[:-height] + prices[height], out=now[height:])
        least.append(now)
    return least


def _cheapest_cut(prices: Money, parts: int) -> tuple[int, Heights]:
    """The least that a column of all rows pays, and how it is cut for that."""
    rows, least = len(prices) - 1, least_pay(prices, parts)
    cut: list[int] = []
    left, used = rows, parts
    while left:
        if least[used][left] < least[used - 1][left]:
            costs = least[used - 1][left - 1 :: -1] + prices[1 : left + 1]
            cut.append(int(np.argmin(costs)) + 1)
            left -= cut[-1]
        used -= 1
    return int(least[parts][rows]), tuple(sorted(cut, reverse=True))


def _most_profitable(demand: Demand, prices: Money) -> tuple[int, list[Holding]]:
    """The greatest profit of all pods together, and good holdings of each capacity."""
    earned = earnings(prices, max(capacity for capacity, _ in demand.classes))
    total, found = 0, list[Holding]()
    spent = np.arange(len(prices)) * ROW
    for kind, (capacity, number) in enumerate(demand.classes):
        profits = earned[:, capacity] - spent
        total += number * int(profits.max())
        for tallest in np.argsort(-profits, kind="stable")[:_HOLDINGS]:
            parts = _parts(earned, int(tallest), capacity)
            found += [Holding(kind, parts)] if parts else []
    return total, found


def earnings(prices: Money, most: int) -> Money:
    """The most that parts earn, by the tallest allowed and the nodes; (rows + 1, most + 1)."""
    earned = np.zeros((len(prices), most + 1), dtype=np.int64)
    for height in range(1, len(prices)):
        before = earned[height - 1]
        if height > most or prices[height] <= 0:
            earned[height] = before
            continue
        # One more part of this height each turn of so many nodes.
        turns = -(-(most + 1) // height)
        padded = np.full(turns * height, -_NEVER)
        padded[: most + 1] = before
        paid = (np.arange(turns) * prices[height])[:, None]
        best = np.maximum.accumulate(padded.reshape(turns, height) - paid, axis=0) + paid
        earned[height] = best.ravel()[: most + 1]
    return earned


def _parts(earned: Money, tallest: int, nodes: int) -> Heights:
    parts: list[int] = []
    while tallest:
        if earned[tallest, nodes] == earned[tallest - 1, nodes]:
            tallest -= 1
        else:
            parts.append(tallest)
            nodes -= tallest
    return tuple(parts)


def _prices(
    demand: Demand, cuts: list[Heights], holdings: list[Holding]
) -> tuple[float, npt.NDArray[np.float64]]:
    """The best prices if columns and pods had only these choices, and the bound they would give.

    A taller part is worth as much at least. Variables are the price of each height, the pay of a
    column, and the profit of a pod of each capacity.
    """
    rows, kinds = demand.rows, demand.classes
    entries: list[tuple[int, int, float]] = []
    limits: list[float] = []
    for cut in cuts:
        entries += [(len(limits), h - 1, -float(n)) for h, n in Counter(cut).items()]
        entries.append((len(limits), rows, 1.0))
        limits.append(0)
    for holding in holdings:
        entries += [(len(limits), h - 1, float(n)) for h, n in Counter(holding.parts).items()]
        entries.append((len(limits), rows + 1 + holding.kind, -1.0))
        limits.append(holding.parts[0])
    for height in range(1, rows):
        entries += [(len(limits), height - 1, 1.0), (len(limits), height, -1.0)]
        limits.append(0)
    at, of, weights = zip(*entries, strict=True)
    matrix = coo_array((weights, (at, of)), shape=(len(limits), rows + 1 + len(kinds)))
    costs = [0.0] * rows + [-float(demand.columns)] + [float(number) for _, number in kinds]
    bounds = [(0.0, float(rows))] * (rows + 1) + [(0.0, None)] * len(kinds)
    solved = linprog(costs, A_ub=matrix.tocsr(), b_ub=limits, bounds=bounds, method="highs")
    return -float(solved.fun), np.concatenate([[0.0], solved.x[:rows]])
