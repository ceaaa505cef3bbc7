"""Columns of two or three pods: the placements that weigh data parallel groups most.

A column is cut into a tall part and lower ones. Prices (`market`) say which cuts are cheap and what
pods had best hold; whole numbers of both are an integer programme, parts are dealt to columns, and
rows are then chosen anew for the pods that each column has got (`rows_for`). Pods are thereby not
bound to the top or the bottom of the grid, as row paths are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from trimtab.placement.grid import Candidate, Demand
from trimtab.placement.prices import Heights, Market
from trimtab.placement.programme import Programme
from trimtab.placement.row_choices import Pods, rows_for

Held = list[tuple[int, int]]
"""``(height, pod)`` of each part."""


def priced_columns(demand: Demand, offers: Market, most: int, *, nodes: int) -> Candidate | None:
    """A placement whose columns are cut as offered and whose rows touch at most ``most`` pods.

    Args:
        demand: the job's grid and the pods' free nodes.
        offers: cuts of columns, and holdings of pods.
        most: pods of a row.
        nodes: of each search tree at most.

    Returns:
        None where there is none of this kind, or none was found.
    """
    chosen = _chosen(demand, offers, most, nodes)
    if chosen is None:
        return None
    held, cuts = chosen
    for tight in (True, False):
        columns = _dealt(held, cuts, tight)
        if columns is not None:
            found = rows_for(demand, columns, most, nodes=nodes, method="priced columns")
            if found is not None:
                return found
    return None


def _chosen(
    demand: Demand, offers: Market, most: int, nodes: int
) -> tuple[Held, list[Heights]] | None:
    """Whole numbers of cuts and holdings: for each height as many parts as are asked for."""
    programme, kinds = Programme(), demand.classes
    cuts = [(programme.variable(whole=True), cut) for cut in offers.cuts]
    programme.constrain(
        [(variable, 1) for variable, _ in cuts], low=demand.columns, high=demand.columns
    )
    holdings = [
        (programme.variable(holding.parts[0], upper=kinds[holding.kind][1], whole=True), holding)
        for holding in offers.holdings
    ]
    for kind, (_, number) in enumerate(kinds):
        programme.constrain([(v, 1) for v, h in holdings if h.kind == kind], high=number)
    for height in range(1, demand.rows + 1):
        given = [(v, float(sum(part >= height for part in h.parts))) for v, h in holdings]
        asked = [(v, -float(sum(part >= height for part in cut))) for v, cut in cuts]
        programme.constrain([term for term in given + asked if term[1]], low=0)
    programme.constrain([(v, h.parts[0]) for v, h in holdings], high=demand.rows * most)
    values = programme.solve(nodes=nodes).values
    if values is None:
        return None
    pods = [
        [pod for pod, free in enumerate(demand.capacities) if min(free, demand.cells) == capacity]
        for capacity, _ in kinds
    ]
    held: Held = []
    for variable, holding in holdings:
        for _ in range(round(values[variable])):
            pod = pods[holding.kind].pop()
            held += [(part, pod) for part in holding.parts]
    return held, [cut for variable, cut in cuts for _ in range(round(values[variable]))]


def _dealt(held: Held, cuts: Sequence[Heights], tight: bool) -> list[Pods] | None:
    """Deals parts to columns, the tallest first; pods that have met meet again where they can.

    Args:
        held: the parts that pods have.
        cuts: what the columns ask for.
        tight: whether parts that fit more closely go before pods that have met.
    """
    stock = sorted(held, reverse=True)
    met, left = Counter[tuple[int, int]](), Counter(pod for _, pod in held)
    columns: list[list[int]] = [[] for _ in cuts]
    asked = ((height, column) for column, cut in enumerate(cuts) for height in cut)
    for height, column in sorted(asked, reverse=True):
        own = columns[column]

        def rank(part: tuple[int, int], own: list[int] = own, height: int = height) -> object:
            again = -sum(met[part[1], pod] for pod in own)
            over = part[0] - height
            return (over, again, -left[part[1]]) if tight else (again, over, -left[part[1]])

        high = [part for part in stock if part[0] >= height]
        # Where only pods are left that the column has, one of them gets two parts of it.
        able = [part for part in high if part[1] not in own] or high[-1:]
        if not able:
            return None
        part = min(able, key=rank)  # type: ignore[arg-type]
        stock.remove(part)
        left[part[1]] -= 1
        for pod in own:
            met[part[1], pod] += 1
            met[pod, part[1]] += 1
        own.append(part[1])
    return [frozenset(pods) for pods in columns]
