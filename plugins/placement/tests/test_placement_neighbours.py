from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from trimtab.placement.grid import PodGrid, spread_of
from trimtab.placement.neighbours import beside_their_like, crossings

grids = arrays.arrays(
    np.int64,
    st.tuples(st.integers(1, 5), st.integers(1, 4)),
    elements=st.integers(0, 3),
)


def counted(grid: PodGrid) -> int:
    rows, columns = grid.shape
    return sum(
        int(grid[row, column] != grid[(row + 1) % rows, column])
        + int(column + 1 < columns and grid[row, column] != grid[row, min(column + 1, columns - 1)])
        for row in range(rows)
        for column in range(columns)
    )


@given(grids)
def test_rows_and_columns_stay_and_crossings_do_not_grow(grid: PodGrid) -> None:
    found = beside_their_like(grid)
    rows = sorted(map(tuple, found.tolist()))
    orders = itertools.permutations(range(grid.shape[1]))
    assert any(sorted(map(tuple, grid[:, list(order)].tolist())) == rows for order in orders)
    assert spread_of(found) == spread_of(grid)
    assert crossings(found) == counted(found) <= counted(grid)


@settings(max_examples=30)
@given(st.permutations(range(6)))
def test_rows_of_a_kind_come_together(order: list[int]) -> None:
    grid = np.array([[0, 0]] * 3 + [[1, 1]] * 3)[order]
    assert crossings(beside_their_like(grid)) == 4


def test_an_order_that_is_good_stays() -> None:
    grid = np.array([[1, 0], [1, 0], [0, 2]])
    assert beside_their_like(grid) is grid
