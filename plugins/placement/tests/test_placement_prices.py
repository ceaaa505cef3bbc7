"""Prices, the columns made from them, and a second formulation of what they bound."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.placement.bench import fragmented
from trimtab.placement.grid import Demand, Spread, fits, spread_of
from trimtab.placement.leftovers import may_touch, near_cuts, near_holdings, summed
from trimtab.placement.priced_columns import priced_columns
from trimtab.placement.prices import ROW, Heights, Money, market
from trimtab.placement.programme import Programme
from trimtab.placement.row_choices import rows_for


def small(draw: random.Random) -> Demand:
    rows, columns = draw.choice([(2, 2), (2, 3), (3, 2), (4, 2), (2, 4)])
    pods = draw.randint(1, 3)
    room = [draw.randint(1, rows * columns) for _ in range(pods)]
    room[0] = max(room[0], rows * columns - sum(room[1:]))
    return Demand(rows, columns, tuple(room))


def fewest_rows_touched(demand: Demand) -> dict[int, int]:
    """The truth, over all placements: by the most pods of a column, the fewest rows touched."""
    least: dict[int, int] = {}
    for choice in itertools.product(range(len(demand.capacities)), repeat=demand.cells):
        if all(choice.count(pod) <= free for pod, free in enumerate(demand.capacities)):
            grid = np.array(choice).reshape(demand.rows, demand.columns)
            parts = spread_of(grid).data
            touched = sum(len(set(row)) for row in grid.tolist())
            least[parts] = min(touched, least.get(parts, touched))
    return least


@pytest.mark.parametrize("seed", range(8))
def test_no_placement_touches_fewer_rows_than_the_prices_say(seed: int) -> None:
    demand = small(random.Random(seed))
    for parts, touched in fewest_rows_touched(demand).items():
        assert market(demand, parts, rounds=50).rows_touched <= touched + 1e-9


def partitions(total: int, parts: int, tallest: int) -> Iterator[Heights]:
    """All ways to fill a number exactly with so many parts at most, the tallest first."""
    if total == 0:
        yield ()
    elif parts:
        for height in range(1, min(total, tallest) + 1):
            for rest in partitions(total - height, parts - 1, height):
                yield (height, *rest)


@settings(max_examples=40)
@given(st.integers(0, 10**6))
def test_what_is_near_the_best_is_listed_in_full(seed: int) -> None:
    draw = random.Random(seed)
    demand = Demand(draw.randint(1, 6), draw.randint(1, 3), tuple(draw.sample(range(1, 10), 2)))
    steps = [draw.randint(-ROW // 10, ROW) for _ in range(demand.rows)]
    prices, parts = np.array([0, *itertools.accumulate(steps)]), draw.randint(1, 3)
    gap = draw.randint(0, ROW)
    pays = {
        cut: int(prices[list(cut)].sum()) for cut in partitions(demand.rows, parts, demand.rows)
    }
    cuts = near_cuts(prices, parts, gap, steps=10_000)
    assert cuts is not None
    assert set(cuts) >= {cut for cut, pay in pays.items() if pay <= min(pays.values()) + gap}
    listed = near_holdings(demand, prices, gap, steps=10_000)
    assert listed is not None
    for kind, (capacity, _) in enumerate(demand.classes):
        profits = {
            held: int(prices[list(held)].sum()) - ROW * max(held, default=0)
            for used in range(capacity + 1)
            for held in partitions(used, demand.columns, demand.rows)
        }
        near = {h for h, profit in profits.items() if profit >= max(profits.values()) - gap}
        # More columns than there are might earn more, so that what is listed may lack the best.
        own = {holding.parts for holding in listed if holding.kind == kind}
        assert own <= set(profits)
        if max(profits.values()) == best_profit(prices, capacity):
            assert own == near
        else:
            assert own <= near


def best_profit(prices: Money, capacity: int) -> int:
    """Of a pod that might have parts of any number of columns."""
    rows = len(prices) - 1
    return max(
        int(prices[list(held)].sum()) - ROW * max(held, default=0)
        for used in range(capacity + 1)
        for held in partitions(used, capacity, rows)
    )


@pytest.mark.parametrize("seed", range(8))
def test_what_placements_touch_is_never_ruled_out(seed: int) -> None:
    demand = small(random.Random(seed))
    for parts, touched in fewest_rows_touched(demand).items():
        offers = market(demand, parts, rounds=50)
        assert may_touch(demand, parts, touched, offers, nodes=100)


@pytest.mark.parametrize("seed", range(8))
def test_parts_by_height_are_enough_for_what_placements_touch(seed: int) -> None:
    demand = small(random.Random(seed))
    for parts, touched in fewest_rows_touched(demand).items():
        offers = market(demand, parts, rounds=50)
        gap = round((touched - offers.rows_touched) * ROW)
        cuts = near_cuts(offers.prices, parts, gap, steps=1000)
        assert cuts is not None
        programme = summed(demand, touched, cuts, offers.prices, gap)
        assert programme.solve(nodes=100).feasible


def test_parts_by_height_forbid_what_prices_allow() -> None:
    """The bound is 525.6 of 534 rows, and leaves more holdings than are listed."""
    demand = Demand(89, 8, (17, 75, 40, 82, 73, 29, 41, 60, 69, 81, 63, 72, 85, 37, 38, 33, 6))
    offers = market(demand, 2, rounds=100)
    assert 525 < offers.rows_touched < 526
    assert not may_touch(demand, 2, 534, offers, nodes=100)


def test_prices_leave_too_few_holdings_for_whole_columns() -> None:
    """The bound is 139.7 rows, and no whole columns are that good."""
    demand = next(d for d in fragmented(0, 141) if (d.rows, len(d.capacities)) == (35, 21))
    offers = market(demand, 3, rounds=100)
    assert 139 < offers.rows_touched < 140
    assert not may_touch(demand, 3, 140, offers, nodes=100)
    assert may_touch(demand, 3, 141, offers, nodes=100)


def explicit(demand: Demand, spread: Spread) -> Programme:
    """Another formulation, cell by cell: it has a solution where a placement does."""
    programme, pods = Programme(), range(len(demand.capacities))
    cell = {
        (i, j, k): programme.variable(upper=1, whole=True)
        for i in range(demand.rows)
        for j in range(demand.columns)
        for k in pods
    }
    for i, j in itertools.product(range(demand.rows), range(demand.columns)):
        programme.constrain([(cell[i, j, k], 1) for k in pods], low=1, high=1)
    for k in pods:
        held = [(cell[i, j, kk], 1) for i, j, kk in cell if kk == k]
        programme.constrain(held, high=demand.capacities[k])
    for lines, of, most in (
        (range(demand.rows), 0, spread.pipeline),
        (range(demand.columns), 1, spread.data),
    ):
        for line in lines:
            touched = [programme.variable(upper=1, whole=True) for _ in pods]
            programme.constrain([(variable, 1) for variable in touched], high=most)
            for at, variable in cell.items():
                if at[of] == line:
                    programme.constrain([(variable, 1), (touched[at[2]], -1)], high=0)
    return programme


@pytest.mark.parametrize("seed", range(3))
def test_what_prices_forbid_has_no_solution_in_another_formulation(seed: int) -> None:
    draw = random.Random(seed)
    demand = Demand(6, 4, tuple(draw.randint(5, 10) for _ in range(4)))
    for spread in (Spread(r, c) for r in (1, 2, 3) for c in (1, 2, 3)):
        touched = market(demand, spread.data, rounds=50).rows_touched
        turned = market(demand.transposed, spread.pipeline, rounds=50).rows_touched
        if touched > demand.rows * spread.pipeline or turned > demand.columns * spread.data:
            assert not explicit(demand, spread).solve(nodes=2000).feasible


def test_a_placement_that_neither_strips_nor_row_paths_have() -> None:
    capacities = (28, 14, 52, 43, 49, 30, 20, 32, 58, 57, 57, 39, 15, 11, 47, 52, 37, 47, 48, 29)
    demand = Demand(41, 16, (*capacities, 49, 15, 51, 53))
    found = priced_columns(demand, market(demand, 2, rounds=40), 7, nodes=300)
    assert found is not None
    assert fits(demand, found.grid)
    assert found.spread == Spread(pipeline=7, data=2)


def test_columns_of_three_pods_some_of_which_give_two_parts() -> None:
    capacities = (4, 16, 43, 22, 57, 52, 59, 60, 53, 55, 30, 32, 49, 36, 48, 22, 8, 6, 9, 26)
    demand = Demand(95, 8, (*capacities, 28, 45, 30, 28, 54, 45, 48))
    found = priced_columns(demand, market(demand, 3, rounds=40), 6, nodes=50)
    assert found is not None
    assert fits(demand, found.grid)
    assert found.spread == Spread(pipeline=6, data=3)


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_rows_are_found_for_the_columns_of_any_placement(seed: int) -> None:
    draw = random.Random(seed)
    rows, columns = draw.randint(1, 8), draw.randint(1, 5)
    grid = np.array([[draw.randrange(4) for _ in range(columns)] for _ in range(rows)])
    demand = Demand(rows, columns, tuple(np.bincount(grid.ravel(), minlength=4).tolist()))
    kinds = [frozenset(column) for column in grid.T.tolist()]
    most = spread_of(grid).pipeline
    found = rows_for(demand, kinds, most, nodes=300, method="rows")
    assert found is not None
    assert found.spread.pipeline <= most
    assert all(
        set(column) <= kind for column, kind in zip(found.grid.T.tolist(), kinds, strict=True)
    )
