"""Stages that take part of both tiers, and two plans side by side, against brute force."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from trimtab.core.collectives import Layout, NetworkTree, Schedule, check_plan
from trimtab.core.collectives.combine import SHARES
from trimtab.core.cost import Constants, PlanEvaluator
from trimtab.gentree import choose
from trimtab.gentree.bench import constants, two_tiers
from trimtab.gentree.gentree import Search
from trimtab.gentree.grids import GridCosts, Pair, grids

WIDTHS = ["rate", "ports", "sources"]


def network(ranks: int, children: int, uplinks_faster: float = 10) -> NetworkTree:
    return NetworkTree.of_cluster(two_tiers((ranks,) * children, uplinks_faster))


def parties(count: int) -> list[Layout]:
    return [Layout.whole(rank) for rank in range(count)]


def seconds(evaluator: PlanEvaluator, plan, payload: float, *, chunks: bool) -> float:
    cost = evaluator.cost(plan.build(parties(evaluator.tree.size))[0])
    return cost.seconds(payload, cost.best_chunks(payload) if chunks else 1)


@pytest.mark.parametrize(("ranks", "children"), [(4, 4), (6, 2), (3, 5)])
def test_grids_are_all_ways_to_take_factors_of_both(ranks: int, children: int) -> None:
    found = [grid.stages for grid in grids(ranks, children)]
    assert len(set(found)) == len(found)
    sizes = [
        [(a, b) for a in range(1, ranks + 1) for b in range(1, children + 1) if (a, b) != (1, 1)]
    ]
    naive = set()
    for count in (1, 2, 3):
        for stages in product(*sizes * count):
            inside = across = 1
            for a, b in stages:
                inside, across = inside * a, across * b
            if (inside, across) == (ranks, children):
                naive.add(stages)
    assert set(found) == naive


@settings(max_examples=25)
@given(st.integers(2, 6), st.integers(2, 6), st.data())
def test_every_grid_and_every_pair_is_proven(ranks: int, children: int, data) -> None:
    every = list(grids(ranks, children))
    one, other = (data.draw(st.sampled_from(every)) for _ in range(2))
    longer, shorter = sorted((one, other), key=lambda grid: -len(grid.stages))
    pair = Pair(longer, shorter, data.draw(st.integers(1, SHARES - 1)), data.draw(st.booleans()))
    for plan in (one, pair):
        steps, layout = plan.build(parties(ranks * children))
        check_plan(Schedule.of(ranks * children, steps))
        assert set(layout.owners.tolist()) == set(range(ranks * children))
    shots = data.draw(st.tuples(*(st.integers(0, len(g.stages)) for g in (longer, shorter))))
    for steps, _ in (
        longer.build(parties(ranks * children), shots[0]),
        pair.build(parties(ranks * children), shots),
    ):
        check_plan(Schedule.of(ranks * children, steps))


@settings(max_examples=12)
@given(
    st.sampled_from([(4, 4), (6, 2), (4, 6)]),
    st.sampled_from(WIDTHS),
    st.sampled_from([1, 10]),
    st.sampled_from([1e5, 1e7, 1e9]),
    st.booleans(),
    st.sampled_from([0.0, 2e-4]),
    st.sampled_from([None, 4]),
)
def test_the_best_grid_by_the_estimate_is_the_best_by_the_evaluator(
    shape, width, faster, payload, chunks, message_s, processors
) -> None:
    tree, given_constants = network(*shape, faster), constants(1e-3, width)
    changes = {"message_s": message_s, "processors": processors}
    given_constants = given_constants.model_copy(update=changes)
    evaluator = PlanEvaluator(tree, given_constants)
    costs = GridCosts(evaluator, 0, *shape, payload_bytes=payload, chunks=chunks)
    best_s = min(seconds(evaluator, grid, payload, chunks=chunks) for grid in grids(*shape))
    (first,) = costs.best(1)
    assert seconds(evaluator, first, payload, chunks=chunks) == pytest.approx(best_s, rel=1e-6)


@pytest.mark.parametrize("width", WIDTHS)
def test_no_pair_is_much_better_than_the_one_that_is_found(width: str) -> None:
    shape, payload = (4, 2), 4e5
    tree = network(*shape, 1)
    evaluator = PlanEvaluator(tree, constants(1e-4, width))
    costs = GridCosts(evaluator, 0, *shape, payload_bytes=payload, chunks=False)
    every = list(grids(*shape))
    alone_s = min(seconds(evaluator, grid, payload, chunks=False) for grid in every)
    brute_s = min(
        seconds(evaluator, Pair(one, other, share, late), payload, chunks=False)
        for one, other in product(every, every)
        if len(other.stages) <= len(one.stages)
        for late in (False, True)
        for share in range(SHARES // 2, SHARES, SHARES // 16)
    )
    pair = costs.side_by_side(alone_s)
    found_s = alone_s if pair is None else seconds(evaluator, pair, payload, chunks=False)
    assert brute_s < 0.98 * alone_s
    assert found_s <= 1.01 * brute_s


@pytest.mark.parametrize("processors", [None, 2])
def test_the_estimate_of_a_pair_is_no_more_than_the_truth(processors) -> None:
    payload, tree = 1e6, network(4, 4)
    changes = {"message_s": 1e-5, "processors": processors}
    evaluator = PlanEvaluator(tree, constants(1e-4, "ports").model_copy(update=changes))
    costs = GridCosts(evaluator, 0, 4, 4, payload_bytes=payload, chunks=False)
    pairs = costs.pairs(1.0)
    assert pairs
    for estimate_s, pair in pairs:
        assert estimate_s <= seconds(evaluator, pair, payload, chunks=False) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("shape", "faster", "alpha_s", "payload"),
    [((8, 4), 1, 1e-3, 3e5), ((8, 4), 1, 2e-3, 1e6)],
)
def test_two_plans_side_by_side_end_in_one_shot(shape, faster, alpha_s, payload) -> None:
    tree, given_constants = network(*shape, faster), constants(alpha_s, "ports")
    choice = choose(tree, payload, given_constants)
    check_plan(choice.schedule)
    plain = choose(tree, payload, given_constants, search=Search(one_shot=False))
    alone = choose(tree, payload, given_constants, search=Search(beside=False))
    assert choice.seconds < 0.99 * min(plain.seconds, alone.seconds)
    assert "beside" in choice.switches[-1][1]
    assert choice.switches[-1][1].endswith("in one shot")


@pytest.mark.parametrize(("leaf", "width"), [(24, "sources"), (32, "ports")])
def test_two_plans_share_a_payload_where_links_between_switches_would_idle(leaf, width) -> None:
    tree, payload = network(leaf, 16), 4e6
    choice = choose(tree, payload, constants(4e-3, width), search=Search(one_shot=False))
    check = Schedule.model_validate_json(choice.schedule.model_dump_json())
    assert "beside" in choice.switches[-1][1]
    assert min(choice.baselines_s.values()) / choice.seconds >= 1.2
    again = PlanEvaluator(tree, constants(4e-3, width)).cost(check.arrays)
    assert again.seconds(payload, check.chunks) == pytest.approx(choice.seconds, rel=1e-6)
    apart = Search(beside=False, one_shot=False)
    assert (
        choice.seconds < 0.99 * choose(tree, payload, constants(4e-3, width), search=apart).seconds
    )
    assert choose(tree, payload, constants(4e-3, width)).seconds <= choice.seconds


@settings(max_examples=15)
@given(
    st.integers(2, 6),
    st.integers(2, 5),
    st.sampled_from([0.5, 1, 4]),
    st.sampled_from(WIDTHS),
    st.sampled_from([1e5, 1e6, 1e7]),
)
def test_what_is_chosen_is_proven_and_none_is_slower_for_a_wider_search(
    ranks, children, faster, width, payload
) -> None:
    tree, given_constants = network(ranks, children, faster), constants(1e-4, width)
    choice = choose(tree, payload, given_constants)
    check_plan(choice.schedule)
    event("beside" if "beside" in choice.switches[-1][1] else "alone")
    assert choice.seconds >= choice.bound_s * (1 - 1e-9)
    single = choose(tree, payload, given_constants, search=Search(beside=False))
    assert choice.seconds <= single.seconds * (1 + 1e-9)


def test_a_grid_gains_where_incast_between_switches_is_dear() -> None:
    tree = network(8, 8)
    choice = choose(tree, 4e7, constants(4e-3, "sources"))
    assert choice.switches[-1][1] == "flat 4*2x2*4"
    check_plan(choice.schedule)


def test_children_that_differ_make_no_grid() -> None:
    tree = NetworkTree.of_cluster(two_tiers((4, 4, 3)))
    choice = choose(tree, 4e6, Constants(width="ports"))
    assert "*" not in choice.switches[-1][1]
