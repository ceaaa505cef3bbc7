from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.placement.arnold import arnold, solve_arnold
from trimtab.placement.bench import SETTINGS, fragmented
from trimtab.placement.certificate import fewest_pods, frontier, least_data
from trimtab.placement.grid import Candidate, Demand, Spread, fits, pareto, spread_of
from trimtab.placement.lone_columns import lone_columns
from trimtab.placement.packing import PACKINGS, RANK_ORDERS, laid, packings, random_fit
from trimtab.placement.paired_columns import may_pair
from trimtab.placement.row_paths import even_cuts, row_paths
from trimtab.placement.search import quick_search, search
from trimtab.placement.strips import promising_covers, strip_covers

ALPHAS = (0.0, 0.3, 0.5, 0.7, 1.0)


def demands(most_cells: int) -> st.SearchStrategy[Demand]:
    """Demands that fit, with up to so many cells."""

    def capacities(shape: tuple[int, int]) -> st.SearchStrategy[Demand]:
        cells = shape[0] * shape[1]
        room = st.lists(st.integers(0, cells), min_size=1, max_size=5).filter(
            lambda free: sum(free) >= cells
        )
        return room.map(lambda free: Demand(*shape, tuple(free)))

    shapes = st.tuples(st.integers(1, most_cells), st.integers(1, most_cells))
    return shapes.filter(lambda s: s[0] * s[1] <= most_cells).flatmap(capacities)


def brute_force(demand: Demand) -> set[Spread]:
    """The true front: every assignment of cells to pods, alike pods interchanged or not."""
    found: set[Spread] = set()
    pods = range(len(demand.capacities))
    for choice in itertools.product(pods, repeat=demand.cells):
        if all(choice.count(pod) <= demand.capacities[pod] for pod in pods):
            grid = np.array(choice).reshape(demand.rows, demand.columns)
            found.add(spread_of(grid))
    return {spread for spread in found if not any(other.dominates(spread) for other in found)}


def weighted(demand: Demand, alpha: float) -> float:
    front = search(demand, (alpha,))
    assert front is not None
    return front.best(alpha).spread.weighted(alpha)


def test_counted_spreads() -> None:
    grid = np.array([[0, 0, 1], [0, 2, 1]])
    assert spread_of(grid) == Spread(pipeline=3, data=2)
    assert fits(Demand(2, 3, (2, 2, 1)), np.array([[0, 0, 1], [1, 2, 0]])) is False
    assert fits(Demand(2, 3, (2, 2, 2)), np.array([[0, 0, 1], [1, 2, 2]])) is True


@pytest.mark.parametrize("seed", range(30))
def test_the_optimum_of_every_small_instance_is_found(seed: int) -> None:
    draw = random.Random(seed)
    rows, columns = draw.choice([(2, 2), (2, 3), (3, 2), (2, 4), (4, 2), (1, 8), (8, 1), (7, 1)])
    pods = draw.randint(1, 3)
    room = tuple(draw.randint(1, rows * columns) for _ in range(pods))
    room = (max(room[0], rows * columns - sum(room[1:])), *room[1:])
    demand = Demand(rows, columns, room)
    truth = brute_force(demand)
    front = search(demand, ALPHAS)
    assert front is not None
    for alpha in ALPHAS:
        best = min(spread.weighted(alpha) for spread in truth)
        assert front.best(alpha).spread.weighted(alpha) == pytest.approx(best)
        assert front.bound.least(alpha) <= best + 1e-9


@given(demands(24))
def test_no_bound_is_above_what_was_found(demand: Demand) -> None:
    front = search(demand, ALPHAS)
    assert front is not None
    for candidate in front.candidates:
        assert fits(demand, candidate.grid)
        assert spread_of(candidate.grid) == candidate.spread
        assert front.bound.allows(candidate.spread)


@given(demands(8).filter(lambda d: len(d.capacities) <= 3))
def test_the_tighter_bound_never_passes_the_truth(demand: Demand) -> None:
    for spread in brute_force(demand):
        least = least_data(demand, spread.pipeline, nodes=50, shapes=100)
        assert least is not None
        assert least <= spread.data


@given(demands(30), st.randoms(use_true_random=False))
def test_names_and_order_of_pods_do_not_matter(demand: Demand, draw: random.Random) -> None:
    shuffled = list(demand.capacities)
    draw.shuffle(shuffled)
    other = Demand(demand.rows, demand.columns, tuple(shuffled))
    for alpha in (0.3, 0.5):
        assert weighted(demand, alpha) == pytest.approx(weighted(other, alpha))


@given(demands(8).filter(lambda d: len(d.capacities) <= 3), st.integers(0, 2), st.integers(1, 4))
def test_more_free_nodes_never_make_it_worse(demand: Demand, pod: int, more: int) -> None:
    room = list(demand.capacities)
    room[pod % len(room)] += more
    richer = Demand(demand.rows, demand.columns, tuple(room))
    for alpha in ALPHAS:
        assert weighted(richer, alpha) <= weighted(demand, alpha) + 1e-9


@given(demands(8).filter(lambda d: len(d.capacities) <= 3))
def test_swapping_rows_and_columns_swaps_the_weights(demand: Demand) -> None:
    for alpha in ALPHAS:
        turned = weighted(demand.transposed, 1 - alpha)
        assert weighted(demand, alpha) == pytest.approx(turned)


@pytest.mark.parametrize(
    ("demand", "alpha", "optimum"),
    [
        (Demand(6, 4, (5, 1, 2, 5, 4, 7)), 0.1, 2.2),
        (Demand(24, 4, (23, 39, 29, 8)), 0.3, 2.0),
        (Demand(10, 4, (10, 5, 5, 5, 6, 5, 5)), 0.1, 2.2),
        (Demand(7, 8, (25, 2, 20, 9)), 0.3, 2.0),
    ],
)
def test_uneven_pods_are_no_harder_turned_or_renamed(
    demand: Demand, alpha: float, optimum: float
) -> None:
    renamed = Demand(demand.rows, demand.columns, demand.capacities[::-1])
    turned = search(demand.transposed, (1 - alpha,))
    assert weighted(demand, alpha) == pytest.approx(optimum)
    assert weighted(renamed, alpha) == pytest.approx(optimum)
    assert turned is not None
    assert turned.best(1 - alpha).spread.weighted(1 - alpha) == pytest.approx(optimum)
    assert turned.gap(1 - alpha) == 0


@pytest.mark.parametrize(
    ("setting", "front"),
    [
        ("paper-i", {(1, 2), (2, 1)}),
        ("paper-ii", {(1, 2), (2, 1)}),
        ("paper-iii", {(1, 5), (2, 2), (4, 1)}),
    ],
)
def test_fronts_of_the_papers_settings(setting: str, front: set[tuple[int, int]]) -> None:
    found = search(SETTINGS[setting], tuple(a / 10 for a in range(11)))
    assert found is not None
    assert {(c.spread.pipeline, c.spread.data) for c in found.candidates} == front
    assert all(found.gap(a / 10) == 0 for a in range(11))


@pytest.mark.parametrize(
    ("demand", "front"),
    [
        (Demand(150, 8, (96,) * 13), {(1, 13), (2, 7), (3, 5), (4, 4)}),
        (Demand(150, 8, (95,) * 13 + (94,) * 12), {(1, 14), (2, 7), (3, 5), (4, 4), (8, 2)}),
    ],
)
def test_strips_reach_the_known_fronts(demand: Demand, front: set[tuple[int, int]]) -> None:
    found = pareto(list(strip_covers(demand)))
    spreads = {(c.spread.pipeline, c.spread.data) for c in found}
    assert front <= spreads


def test_row_paths_beat_strips() -> None:
    """Even strips need ten pods in a column here, ranges of different widths eight."""
    demand = next(d for d in fragmented(1, 12) if (d.rows, d.columns) == (138, 4))
    strips = pareto(list(strip_covers(demand)))
    assert min(c.spread.data for c in strips if c.spread.pipeline <= 2) == 10
    found = row_paths(demand, Spread(2, 8), cuts=even_cuts(4, 8), nodes=40)
    assert found is not None
    assert fits(demand, found.grid)
    assert found.spread.pipeline <= 2
    assert found.spread.data <= 8
    assert frontier(demand).least_data[1] == 8


def test_ragged_ranges_use_what_whole_widths_leave_over() -> None:
    """Two pods of five columns' worth and a row of three: whole widths lose a cell each."""
    demand = Demand(5, 4, (7, 7, 6))
    for spread in (Spread(2, 2), Spread(2, 3), Spread(3, 2)):
        found = row_paths(demand, spread, cuts=even_cuts(4, 4), nodes=200, ragged=True)
        if found is not None:
            assert fits(demand, found.grid)
            assert found.spread.pipeline <= spread.pipeline
            assert found.spread.data <= spread.data
    exact = row_paths(demand, Spread(2, 3), cuts=even_cuts(4, 4), nodes=200, ragged=True)
    whole = row_paths(demand, Spread(2, 3), cuts=even_cuts(4, 4), nodes=200)
    assert exact is not None
    assert whole is None


@pytest.mark.parametrize("seed", [3, 4])
def test_never_behind_any_baseline(seed: int) -> None:
    for demand in fragmented(seed, 4):
        front = quick_search(demand)
        assert front is not None
        rivals = [*packings(demand)]
        for draw in range(3):
            taken = random_fit(demand, draw)
            assert taken is not None
            rivals += [
                c
                for order in RANK_ORDERS
                if (c := Candidate.built(demand, laid(demand, taken, order), "random"))
            ]
        for alpha in ALPHAS:
            published = arnold(demand, alpha)
            assert published is not None
            ours = front.best(alpha).spread.weighted(alpha)
            assert ours <= min(c.spread.weighted(alpha) for c in [*rivals, published]) + 1e-9


@pytest.mark.parametrize("name", PACKINGS)
def test_packings_take_free_nodes_only(name: str) -> None:
    for demand in fragmented(5, 5):
        taken = PACKINGS[name](demand)
        assert taken is not None
        assert len(taken) == demand.cells
        for order in RANK_ORDERS:
            assert fits(demand, laid(demand, taken, order))


def test_best_fit_takes_the_smallest_pod_that_holds_the_rest() -> None:
    taken = PACKINGS["best-fit"](Demand(2, 3, (9, 7, 2)))
    assert taken is not None
    assert set(taken.tolist()) == {1}


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize(
    "demand", [Demand(6, 2, (6, 6, 6)), Demand(5, 3, (7, 6, 5)), Demand(4, 4, (9, 6, 6))]
)
def test_the_closed_form_is_the_programmes_optimum(demand: Demand, alpha: float) -> None:
    answer, closed = solve_arnold(demand, alpha), arnold(demand, alpha)
    assert closed is not None
    pods = len(np.unique(closed.grid))
    assert answer.certificate.status == "optimal"
    published = alpha * pods + (1 - alpha) * closed.spread.pipeline
    assert answer.certificate.objective == pytest.approx(published)


def test_a_demand_that_does_not_fit_has_no_front() -> None:
    assert search(Demand(4, 4, (5, 5, 5)), (0.3,)) is None
    assert search(Demand(4, 4, (0, 0)), (0.3,)) is None
    assert fewest_pods(Demand(4, 4, (5, 5, 5))) is None
    assert arnold(Demand(4, 4, (5, 5, 5)), 0.3) is None


def test_pods_without_free_nodes_are_passed_over() -> None:
    front = search(Demand(2, 2, (0, 4, 0)), ALPHAS)
    assert front is not None
    assert front.best(0.5).spread == Spread(1, 1)
    assert set(front.best(0.5).grid.ravel().tolist()) == {1}


@given(demands(8).filter(lambda d: len(d.capacities) <= 3), st.integers(1, 3))
def test_columns_that_need_not_share_pods_are_found_or_proven_impossible(
    demand: Demand, most: int
) -> None:
    possible = any(spread.data <= most for spread in brute_force(demand))
    lone = lone_columns(demand, most, nodes=100)
    assert lone.possible is possible
    if lone.found is not None:
        assert fits(demand, lone.found.grid)
        assert lone.found.spread.data <= most
    assert (lone.found is not None) is possible


@given(demands(8).filter(lambda d: len(d.capacities) <= 3))
def test_columns_pair_exactly_where_some_placement_pairs_them(demand: Demand) -> None:
    truth = any(spread.data <= 2 for spread in brute_force(demand))
    assert may_pair(demand, nodes=100) is truth


def test_pods_that_pair_too_badly_for_columns_of_two() -> None:
    """Twenty-two pods of 921 nodes for eight columns of 99, in at best seven pairs and chains."""
    demand = fragmented(0, 2)[1]
    assert (demand.rows, demand.columns, len(demand.capacities)) == (99, 8, 22)
    assert not may_pair(demand, nodes=300)
    assert may_pair(Demand(99, 7, demand.capacities), nodes=300)


def test_a_pipeline_of_a_pod_for_each_stage_lets_columns_use_two_pods() -> None:
    """Sixteen pods that strips pair badly: columns of 99 cells, each of two pods."""
    room = (44, 55, 20, 97, 80, 30, 71, 60, 49, 62, 88, 25, 68, 40, 53, 42)
    demand = Demand(99, 8, room)
    lone = lone_columns(demand, 2, nodes=300)
    assert lone.found is not None
    assert lone.found.spread == Spread(pipeline=8, data=2)
    assert fits(demand, lone.found.grid)


@given(demands(30))
def test_promising_strips_are_strips_and_none_is_beaten_by_another(demand: Demand) -> None:
    promising = pareto(promising_covers(demand))
    everything = {candidate.spread for candidate in strip_covers(demand)}
    assert {candidate.spread for candidate in promising} <= everything
    assert bool(promising) == bool(everything)
