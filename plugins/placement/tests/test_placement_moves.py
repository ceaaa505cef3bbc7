from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest

from trimtab.core.cluster import Cluster
from trimtab.core.plan import Plan
from trimtab.placement.grid import Demand
from trimtab.placement.job import TrainingJob
from trimtab.placement.planner import plan_placement
from trimtab.placement.search import search

LINK = {"bandwidth_bytes_per_s": 50e9}

Pods = list[tuple[int, int]]
"""The free and the movable nodes of each."""


def job(**values: Any) -> TrainingJob:
    return TrainingJob.model_validate({"tensor_parallel": 8} | values)


def used(plan: Plan) -> set[str]:
    return {slot.node for slot in plan.ranks}


def network(pods: Pods) -> Cluster:
    nodes, links = [], []
    for pod, (free, movable) in enumerate(pods):
        links.append({"a": f"p{pod}", "b": "core"} | LINK)
        for number in range(free + movable):
            name = f"n{pod}-{number}"
            # Movable ones come first, so that the order of names does not spare them.
            labels = {"state": "movable"} if number < movable else {}
            nodes.append({"name": name, "device": "cpu", "count": 8, "labels": labels})
            links.append({"a": name, "b": f"p{pod}"} | LINK)
    switches = ["core", *(f"p{pod}" for pod in range(len(pods)))]
    return Cluster.model_validate({"nodes": nodes, "links": links, "switches": switches})


def planned(pods: Pods, rows: int, columns: int, alpha: float, **more: int) -> Plan:
    training = job(pipeline_parallel=columns, data_parallel=rows, alpha=alpha, **more)
    return plan_placement(network(pods), training)


def moved(plan: Plan) -> list[str]:
    found = plan.details["moves"]
    assert isinstance(found, list)
    return list(map(str, found))


def brute_force(pods: Pods, rows: int, columns: int, alpha: float) -> tuple[float, int, bool]:
    """The least weighted spread with all moves, the fewest moves for it, and whether it is proven.

    Every number of moves in every pod is tried.
    """
    best, fewest, proven = float("inf"), 0, False
    for moves in sorted(product(*(range(movable + 1) for _, movable in pods)), key=sum):
        room = tuple(free + more for (free, _), more in zip(pods, moves, strict=True))
        front = search(Demand(rows, columns, room), (alpha,))
        if front is None:
            continue
        value = front.best(alpha).spread.weighted(alpha)
        if value < best - 1e-9:
            best, fewest = value, sum(moves)
        proven = front.proves((alpha,))
    return best, fewest, proven


KNOWN: list[tuple[Pods, int, int, float]] = [
    ([(3, 2), (3, 4), (1, 4)], 2, 4, 0.2),
    ([(2, 3), (5, 2), (3, 2), (6, 3)], 4, 3, 0.3),
    ([(0, 3), (2, 3), (4, 1), (1, 4)], 4, 4, 0.2),
    ([(2, 1), (4, 1), (1, 2), (2, 0)], 4, 3, 0.2),
]


def drawn(seed: int) -> tuple[Pods, int, int, float]:
    draw = random.Random(seed)
    while True:
        rows, columns = draw.randint(2, 4), draw.randint(2, 3)
        pods = [(draw.randint(0, rows * columns // 2), draw.randint(0, 3)) for _ in range(3)]
        if all(map(sum, pods)) and sum(map(sum, pods)) >= rows * columns:
            return pods, rows, columns, draw.choice((0.2, 0.3, 0.5, 0.7))


@pytest.mark.parametrize(
    ("pods", "rows", "columns", "alpha"), [*KNOWN, *(drawn(seed) for seed in range(25))]
)
def test_as_few_nodes_move_as_brute_force_moves(
    pods: Pods, rows: int, columns: int, alpha: float
) -> None:
    plan = planned(pods, rows, columns, alpha)
    best, fewest, proven = brute_force(pods, rows, columns, alpha)
    assert plan.objective.value == pytest.approx(best)
    assert len(moved(plan)) == fewest
    assert (plan.objective.status == "optimal") == proven
    assert set(moved(plan)) <= used(plan)


def test_the_bound_is_that_of_all_nodes_that_may_be_taken() -> None:
    """Staying is as good as moving here, and the free nodes alone would promise more."""
    pods: Pods = [(4, 4), (4, 0), (4, 0)]
    plan = planned(pods, 4, 3, 0.5)
    everything = search(Demand(4, 3, (8, 4, 4)), (0.5,))
    assert everything is not None
    assert plan.objective.bound == pytest.approx(everything.bound.least(0.5))


def test_spares_are_cleared_too() -> None:
    plan = planned([(4, 2), (2, 0)], 4, 1, 0.5, spares_per_pod=1)
    assert plan.details["spares"] == {"p0": ["n0-0"]}
    assert moved(plan) == ["n0-0"]


def test_no_node_moves_that_the_layout_inside_a_pod_could_leave() -> None:
    """Leaves of free and of movable nodes: pods have free nodes enough, spread over leaves."""
    nodes, links = [], []
    for leaf in range(4):
        links.append({"a": f"leaf{leaf}", "b": f"spine{leaf // 2}"} | LINK)
        for number in range(4):
            name = f"n{leaf}-{number}"
            labels = {"state": "movable"} if number < 2 and leaf < 2 else {}
            nodes.append({"name": name, "device": "cpu", "count": 8, "labels": labels})
            links.append({"a": name, "b": f"leaf{leaf}"} | LINK)
    links += [{"a": f"spine{spine}", "b": "core"} | LINK for spine in range(2)]
    switches = [*(f"leaf{leaf}" for leaf in range(4)), "spine0", "spine1", "core"]
    cluster = Cluster.model_validate({"nodes": nodes, "links": links, "switches": switches})
    # 9 nodes do not fit into a pod of 8: one pod gives 8 and the other 1, or each of them some.
    plan = plan_placement(cluster, job(data_parallel=8, alpha=0.5))
    assert moved(plan) == []
    plan = plan_placement(cluster, job(pipeline_parallel=3, data_parallel=4, alpha=0.5))
    assert moved(plan) == []


def test_many_pods_give_few_nodes() -> None:
    """On so many pods not every way to share moves out is tried.

    Two columns of 36 rows lie in five pods each at best, whose free nodes are 30.
    """
    plan = planned([(6, 2)] * 12, 36, 2, 0.3)
    assert plan.expected["data_spread"].value == 5
    assert len(moved(plan)) == 2 * 6


def test_groups_are_kept_whole_by_moves() -> None:
    """Free nodes hold seven of eight blocks of two whole; a move makes room for the eighth."""
    training = job(tensor_parallel=16, data_parallel=8, alpha=0.5)
    plan = plan_placement(network([(7, 1), (7, 0), (3, 0)]), training)
    assert plan.details["split_blocks"] == 0
    assert len(moved(plan)) == 1
    plan = plan_placement(network([(7, 0), (7, 0), (3, 0)]), training)
    assert plan.details["split_blocks"] == 1
    assert any("1 of 8 such blocks" in warning for warning in plan.warnings)
