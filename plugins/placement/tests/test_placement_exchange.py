"""Rows that fit between columns whose pods are settled, and the search for such pods."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.placement.bench import fragmented
from trimtab.placement.exchange import exchanged
from trimtab.placement.grid import Demand, Spread, fits, spread_of
from trimtab.placement.programme import Programme
from trimtab.placement.row_choices import Pods
from trimtab.placement.row_fit import RowFit, possible_rows
from trimtab.placement.search import search

PODS = 5


@st.composite
def blocks_of_pods(draw: st.DrawFn) -> list[Pods]:
    pods = st.frozensets(st.integers(0, PODS - 1), min_size=1, max_size=3)
    return draw(st.lists(pods, min_size=1, max_size=5))


def every_row(blocks: list[Pods], most: int) -> list[tuple[int, ...]]:
    return [row for row in itertools.product(*map(sorted, blocks)) if len(set(row)) <= most]


def test_all_rows_that_are_possible_are_listed_once() -> None:
    blocks = [frozenset({0, 1}), frozenset({1, 2}), frozenset({0, 3})]
    possible = possible_rows(blocks, 2)
    assert possible is not None
    rows, met = possible
    assert rows.tolist() == [[0, 1, 0], [0, 2, 0], [1, 1, 0], [1, 1, 3]]
    assert met.tolist() == [0b11, 0b101, 0b11, 0b1010]
    assert possible_rows([frozenset(range(20))] * 4, 4) is None


@settings(max_examples=60)
@given(
    blocks_of_pods(),
    st.integers(1, 4),
    st.lists(st.integers(0, 9), min_size=PODS, max_size=PODS),
    st.randoms(use_true_random=False),
)
def test_as_many_rows_fit_as_the_whole_programme_says(
    blocks: list[Pods], most: int, room: list[int], draw: random.Random
) -> None:
    widths = [draw.randint(1, 3) for _ in blocks]
    possible = every_row(blocks, most)
    rows, block = (
        RowFit(Demand(9, sum(widths), tuple(room)), widths, most),
        draw.choice(range(len(blocks))),
    )
    rest = rows.without(blocks, block, np.array([draw.random() for _ in room]))
    assert rest is not None
    fit = rows.joined(rest, blocks[block])
    assert sorted(map(tuple, fit.choices.tolist())) == sorted(possible)
    if not possible:
        return
    programme = Programme()
    each = [programme.variable(-1.0) for _ in possible]
    for pod, free in enumerate(room):
        used = [sum(w for w, p in zip(widths, row, strict=True) if p == pod) for row in possible]
        programme.constrain(zip(each, used, strict=True), high=free)
    assert fit.rows == pytest.approx(-programme.solve().bound, abs=1e-6)
    # The prices are the proof: all nodes together are worth the rows, and each row is worth one.
    assert fit.prices @ room == pytest.approx(fit.rows, abs=1e-6)
    assert all(fit.prices[list(row)] @ widths >= 1 - 1e-6 for row in possible)


@settings(max_examples=60)
@given(blocks_of_pods(), st.integers(1, 4), st.randoms(use_true_random=False))
def test_what_a_further_pod_would_cost(blocks: list[Pods], most: int, draw: random.Random) -> None:
    widths = [draw.randint(1, 3) for _ in blocks]
    prices = np.array([draw.random() for _ in range(PODS)])
    rows, block = RowFit(Demand(9, sum(widths), (9,) * PODS), widths, most), len(blocks) - 1
    rest = rows.without(blocks, block, prices)
    assert rest is not None
    for pod, cost in enumerate(rows.cheapest(rest).tolist()):
        would_be = every_row([*blocks[:-1], frozenset({pod})], most)
        costs = [float(prices[list(row)] @ widths) for row in would_be]
        assert cost == pytest.approx(min(costs, default=np.inf))


def narrowest(demand: Demand) -> set[Spread]:
    """All spreads of placements, by trying every one."""
    found: set[Spread] = set()
    for choice in itertools.product(range(len(demand.capacities)), repeat=demand.cells):
        if all(choice.count(pod) <= free for pod, free in enumerate(demand.capacities)):
            found.add(spread_of(np.array(choice).reshape(demand.rows, demand.columns)))
    return found


def test_exchanges_find_most_of_what_there_is_and_nothing_else() -> None:
    """Begun from random pods; where two columns must change at once, nothing may be found."""
    had = missed = 0
    for seed in range(12):
        draw = random.Random(seed)
        rows, columns = draw.choice([(2, 3), (3, 2), (4, 2), (2, 4)])
        room = [draw.randint(1, rows * columns // 2 + 1) for _ in range(3)]
        room[0] = max(room[0], rows * columns - sum(room[1:]))
        demand = Demand(rows, columns, tuple(room))
        truth = narrowest(demand)
        for spread in (Spread(r, c) for r in (1, 2, 3) for c in (1, 2, 3)):
            begin = [frozenset(draw.sample(range(3), spread.data)) for _ in range(columns)]
            found = exchanged(demand, spread, begin, programmes=200, nodes=100)
            if not any(s == spread or s.dominates(spread) for s in truth):
                assert found is None
            elif found is None:
                missed += 1
            else:
                had += 1
                assert fits(demand, found.grid)
                assert found.spread == spread_of(found.grid)
                assert found.spread == spread or found.spread.dominates(spread)
    assert had > 4 * missed, (had, missed)


def test_a_placement_that_no_family_has_is_found_by_exchanges_and_equal_each_time() -> None:
    demand = fragmented(0, 26)[25]
    front = search(demand, (0.9,))
    assert front is not None
    found = front.best(0.9)
    assert (found.method, found.spread) == ("exchanged pods", Spread(pipeline=7, data=2))
    assert fits(demand, found.grid)
    assert front.gap(0.9) == 0
    narrow = next(c for c in front.candidates if c.spread == Spread(pipeline=4, data=3))
    columns = [frozenset(column[:2]) for column in narrow.grid.T.tolist()]
    again = [exchanged(demand, found.spread, columns, programmes=1000, nodes=300) for _ in range(2)]
    assert again[0] is not None
    assert again[1] is not None
    assert np.array_equal(again[0].grid, again[1].grid)


def test_more_pods_than_a_set_can_hold_are_left_alone() -> None:
    demand = Demand(64, 2, (2,) * 64)
    columns = [frozenset({0, 1})] * 2
    assert exchanged(demand, Spread(1, 2), columns, programmes=9, nodes=9) is None
