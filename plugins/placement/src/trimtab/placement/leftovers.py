"""What the best prices leave possible, where their bound all but decides.

A placement that touches few rows pays for each column at least the cheapest cut, and each of its
pods earns at most the greatest profit. What its columns pay more and its pods earn less, together,
is what it lies above the bound. Where only so many rows may be touched, no cut and no holding may
therefore miss the best by more than the distance from the bound to that number. Where few are left,
they are all listed, and whether whole numbers of them make up a grid is a small integer programme:
where it has no solution, there is no placement. Where there are more, the parts of all pods with
the same capacity and the same tallest part are only counted by height.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np

from trimtab.placement.grid import Demand
from trimtab.placement.prices import ROW, Heights, Holding, Market, Money, earnings, least_pay
from trimtab.placement.programme import Programme

_STEPS = 3000
"""Of listing cuts, and of listing holdings."""

_MOST_SUMMED = 6500
"""Variables of the programme that does without a list of holdings."""


def may_touch(demand: Demand, parts: int, most: int, offers: Market, *, nodes: int) -> bool:
    """Whether there may be a placement that touches at most so many rows.

    Args:
        demand: the job's grid and the pods' free nodes.
        parts: pods of a column at most.
        most: rows touched by all pods together.
        offers: what the prices say for as many parts.
        nodes: of the search tree at most.

    Returns:
        False where it is proven that there is none.
    """
    gap = most * ROW - _bound(demand, parts, offers.prices)
    if gap < 0:
        return False
    cuts = near_cuts(offers.prices, parts, gap, steps=_STEPS)
    if cuts is None:
        return True
    holdings = near_holdings(demand, offers.prices, gap, steps=_STEPS)
    if holdings is not None:
        return _programme(demand, most, cuts, holdings).solve(nodes=nodes).feasible
    programme = summed(demand, most, cuts, offers.prices, gap)
    if len(programme.costs) > _MOST_SUMMED:
        return True
    return programme.solve(nodes=nodes).feasible


def _bound(demand: Demand, parts: int, prices: Money) -> int:
    """In money and whole numbers, so that nothing is lost to rounding."""
    pay = int(least_pay(prices, parts)[parts][demand.rows])
    earned = earnings(prices, max(capacity for capacity, _ in demand.classes))
    spent = np.arange(len(prices)) * ROW
    profits = (number * int((earned[:, free] - spent).max()) for free, number in demand.classes)
    return demand.columns * pay - sum(profits)


def near_cuts(prices: Money, parts: int, gap: int, *, steps: int) -> list[Heights] | None:
    """The cuts of a column that cost at most ``gap`` more than the cheapest; None if too many."""
    rows, least = len(prices) - 1, least_pay(prices, parts)
    most = int(least[parts][rows]) + gap
    found: list[Heights] = []
    open_cuts: list[tuple[Heights, int, int]] = [((), rows, most)]
    while open_cuts:
        done, left, money = open_cuts.pop()
        steps -= 1
        if steps < 0:
            return None
        if not left:
            found.append(done)
        elif len(done) < parts:
            rest = least[parts - len(done) - 1]
            for height in range(1, min(left, done[-1] if done else left) + 1):
                kept = money - int(prices[height])
                if rest[left - height] <= kept:
                    open_cuts.append(((*done, height), left - height, kept))
    return found


def near_holdings(demand: Demand, prices: Money, gap: int, *, steps: int) -> list[Holding] | None:
    """What pods may hold to earn at most ``gap`` less than the most profitable; None if too much.

    A pod that holds nothing earns nothing, which may be near enough as well.
    """
    earned = earnings(prices, max(capacity for capacity, _ in demand.classes))
    spent = np.arange(len(prices)) * ROW
    found: list[Holding] = []
    for kind, (capacity, _) in enumerate(demand.classes):
        least = int((earned[:, capacity] - spent).max()) - gap
        if least <= 0:
            found.append(Holding(kind, ()))
        tallest = np.arange(1, min(capacity, demand.rows) + 1)
        able = earned[tallest, capacity] - tallest * ROW >= least
        unfilled: list[tuple[Heights, int, int]] = [
            ((height,), capacity - height, least + height * ROW - int(prices[height]))
            for height in tallest[able].tolist()
        ]
        while unfilled:
            done, left, short = unfilled.pop()
            steps -= 1
            if steps < 0:
                return None
            if short <= 0:
                found.append(Holding(kind, done))
            if len(done) < demand.columns:
                heights = np.arange(1, min(left, done[-1]) + 1)
                able = prices[heights] + earned[heights, left - heights] >= short
                unfilled += [
                    ((*done, height), left - height, short - int(prices[height]))
                    for height in heights[able].tolist()
                ]
    return found


def _programme(
    demand: Demand, most: int, cuts: list[Heights], holdings: list[Holding]
) -> Programme:
    """Whole numbers of cuts and holdings with the same parts, for all columns and all pods."""
    programme = Programme()
    parts = _asked(programme, demand, cuts)
    pods: list[list[tuple[int, float]]] = [[] for _ in demand.classes]
    touched: list[tuple[int, float]] = []
    for holding in holdings:
        number = demand.classes[holding.kind][1]
        variable = programme.variable(upper=number, whole=True)
        pods[holding.kind].append((variable, 1))
        touched += [(variable, holding.parts[0])] if holding.parts else []
        for height, number in Counter(holding.parts).items():
            parts[height].append((variable, number))
    for own, (_, number) in zip(pods, demand.classes, strict=True):
        programme.constrain(own, low=number, high=number)
    for terms in parts.values():
        programme.constrain(terms, low=0, high=0)
    programme.constrain(touched, high=most)
    return programme


def _asked(
    programme: Programme, demand: Demand, cuts: list[Heights]
) -> dict[int, list[tuple[int, float]]]:
    """A whole number of each cut; the parts they ask for by height, counted negative."""
    parts: dict[int, list[tuple[int, float]]] = defaultdict(list)
    columns: list[tuple[int, float]] = []
    for cut in cuts:
        variable = programme.variable(upper=demand.columns, whole=True)
        columns.append((variable, 1))
        for height, number in Counter(cut).items():
            parts[height].append((variable, -number))
    programme.constrain(columns, low=demand.columns, high=demand.columns)
    return parts


def summed(demand: Demand, most: int, cuts: list[Heights], prices: Money, gap: int) -> Programme:
    """As above without a list of holdings; whatever has a solution above has one here.

    Args:
        demand: the job's grid and the pods' free nodes.
        most: rows touched by all pods together.
        cuts: of columns, all that are near enough.
        prices: of parts by height.
        gap: the money by which cuts and pods may miss the best.
    """
    programme = Programme()
    parts, touched = _asked(programme, demand, cuts), list[tuple[int, float]]()
    earned = earnings(prices, max(capacity for capacity, _ in demand.classes))
    spent = np.arange(len(prices)) * ROW
    for capacity, number in demand.classes:
        least = int((earned[:, capacity] - spent).max()) - gap
        idle = programme.variable(upper=number if least <= 0 else 0, whole=True)
        own: list[tuple[int, float]] = [(idle, 1)]
        for tallest in range(1, min(capacity, demand.rows) + 1):
            needed = least + tallest * ROW
            if earned[tallest, capacity] < needed:
                continue
            pods = programme.variable(upper=number, whole=True)
            own.append((pods, 1))
            touched.append((pods, tallest))
            heights = np.arange(1, min(tallest, capacity - tallest) + 1)
            left = capacity - tallest - heights
            near = prices[tallest] + prices[heights] + earned[tallest, left] >= needed
            held = {
                height: programme.variable(whole=True)
                for height in sorted({tallest, *heights[near].tolist()})
            }
            for height, variable in held.items():
                parts[height].append((variable, 1))
                alike = min(demand.columns, capacity // height)
                programme.constrain([(variable, 1), (pods, -alike)], high=0)
            programme.constrain([(held[tallest], 1), (pods, -1)], low=0)
            used = [(variable, float(height)) for height, variable in held.items()]
            programme.constrain([*used, (pods, -capacity)], high=0)
            counted = [(variable, 1.0) for variable in held.values()]
            programme.constrain([*counted, (pods, -demand.columns)], high=0)
        programme.constrain(own, low=number, high=number)
    for terms in parts.values():
        programme.constrain(terms, low=0, high=0)
    programme.constrain(touched, high=most)
    return programme
