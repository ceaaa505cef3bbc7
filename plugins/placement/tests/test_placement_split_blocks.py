from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.placement.grid import Demand, PodGrid, fits, spread_of
from trimtab.placement.split_blocks import fewest_split, search_blocks


def split_in(grid: PodGrid, size: int) -> int:
    """The blocks of a grid that lie in more than one pod."""
    blocks = grid.reshape(len(grid) // size, size, -1)
    return sum(
        len(set(blocks[row, :, column])) > 1 for row, column in np.ndindex(blocks[:, 0].shape)
    )


def brute_force(demand: Demand, size: int, alpha: float) -> tuple[int, float]:
    """The fewest split blocks, and the least weighted spread among placements that split as few."""
    pods, cells = len(demand.capacities), demand.cells
    number = np.arange(pods**cells)
    flat = np.stack([number // pods**cell % pods for cell in range(cells)], axis=1)
    held = np.stack([(flat == pod).sum(axis=1) for pod in range(pods)], axis=1)
    grids = flat[(held <= np.array(demand.capacities)).all(axis=1)]
    grids = grids.reshape(-1, demand.rows, demand.columns)
    blocks = grids.reshape(-1, demand.rows // size, size, demand.columns)
    split = (blocks != blocks[:, :, :1]).any(axis=2).sum(axis=(1, 2))
    at = [grids == pod for pod in range(pods)]
    rows = sum(here.any(axis=2).astype(int) for here in at).max(axis=1)
    columns = sum(here.any(axis=1).astype(int) for here in at).max(axis=1)
    weighted = alpha * columns + (1 - alpha) * rows
    return int(split.min()), float(weighted[split == split.min()].min())


def drawn(seed: int) -> tuple[Demand, int, float]:
    """A demand whose pods hold it, and not all of its blocks whole."""
    draw = random.Random(seed)
    while True:
        size, rows, columns = draw.choice((2, 2, 3, 4)), draw.randint(1, 4), draw.randint(1, 4)
        cells = rows * size * columns
        if cells > 9:
            continue
        pods = tuple(draw.randint(1, cells) for _ in range(draw.randint(2, 4)))
        demand = Demand(rows * size, columns, pods)
        if fewest_split(demand, size):
            return demand, size, draw.choice((0.0, 0.2, 0.3, 0.5, 0.7, 1.0))


@pytest.mark.parametrize("seed", range(40))
def test_few_blocks_are_split_as_brute_force_splits_them(seed: int) -> None:
    demand, size, alpha = drawn(seed)
    found = search_blocks(demand, size, alpha)
    assert found is not None
    best, bound = found.front.best(alpha), found.front.bound.least(alpha)
    split, least = brute_force(demand, size, alpha)
    assert fits(demand, best.grid)
    assert found.split == split == split_in(best.grid, size)
    assert best.spread.weighted(alpha) == pytest.approx(least)
    assert bound <= least + 1e-9


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 4),
    size=st.integers(1, 5),
    pods=st.lists(st.integers(0, 30), min_size=1, max_size=6),
)
def test_every_candidate_splits_only_what_must_be_split(
    rows: int, columns: int, size: int, pods: list[int]
) -> None:
    demand = Demand(rows * size, columns, tuple(pods))
    found = search_blocks(demand, size, 0.3, "quick")
    if sum(pods) < demand.cells:
        assert found is None
        return
    assert found is not None
    # Whatever pods hold, a block is whole in one of them or in none.
    assert found.split == max(0, rows * columns - sum(free // size for free in pods))
    for candidate in found.front.candidates:
        assert fits(demand, candidate.grid)
        assert candidate.spread == spread_of(candidate.grid)
        assert split_in(candidate.grid, size) == found.split


def test_the_same_input_gives_the_same_grid() -> None:
    demand = Demand(28, 3, (23, 23, 23, 23))
    one, other = (search_blocks(demand, 4, 0.5, "quick") for _ in range(2))
    assert one is not None
    assert other is not None
    assert one.split == 21 - 4 * 5
    assert (one.front.best(0.5).grid == other.front.best(0.5).grid).all()
