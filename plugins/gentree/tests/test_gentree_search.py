"""GenTree against published-style figures, the algorithms of libraries, and the cut bound."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.cluster import Cluster, Link, Node
from trimtab.core.collectives import NetworkTree, Schedule, check_plan
from trimtab.core.cost import Constants, PlanEvaluator, cut_bound_s_per_byte
from trimtab.gentree import choose
from trimtab.gentree.baselines import baselines
from trimtab.gentree.gentree import PAPER, GenTree
from trimtab.gentree.schemes import factorisations

# Constants of a public cost model of this family, for floats of 4 bytes.
CONSTANTS = Constants(
    alpha_s=4e-3, gamma_s_per_byte=1e-10, delta_s_per_byte=1e-10, epsilon_ratio=1 / 16
)
BANDWIDTH = 1 / 0.8e-9

Shape = list["Shape"] | int


def tree(shape: Shape, rates: list[float] | None = None) -> NetworkTree:
    """The network of nested lists, whose numbers are hosts below one switch; uplinks are faster."""
    nodes: list[Node] = []
    switches: list[str] = []
    links: list[Link] = []

    def add(part: Shape, path: str) -> None:
        switches.append(path)
        if isinstance(part, int):
            for _ in range(part):
                name = f"n{len(nodes)}"
                rate = 1.0 if rates is None else rates[len(nodes) % len(rates)]
                nodes.append(Node(name=name, device="cpu"))
                links.append(link(name, path, rate * BANDWIDTH))
            return
        for index, below in enumerate(part):
            links.append(link(f"{path}-{index}", path, 10 * BANDWIDTH))
            add(below, f"{path}-{index}")

    add(shape, "s")
    cluster = Cluster(nodes=tuple(nodes), switches=tuple(switches), links=tuple(links))
    return NetworkTree.of_cluster(cluster)


def link(a: str, b: str, bandwidth: float) -> Link:
    return Link(a=a, b=b, bandwidth_bytes_per_s=bandwidth, latency_s=0)


@pytest.mark.parametrize(
    ("shape", "floats", "width", "expected_ms"),
    [
        ([4] * 4, 1e8, "ports", 716.0),
        ([8] * 8, 1e7, "ports", 88.0),
        ([8] * 8, 1e7, "sources", 98.3),
        ([24] * 16, 1e7, "ports", 106.67),
        ([24] * 16, 1e8, "ports", 850.67),
        ([24] * 16, 1e8, "sources", 877.58),
        ([32] * 16, 1e7, "ports", 110.25),
        ([32] * 16, 1e7, "sources", 131.24),
        ([32] * 16, 1e8, "ports", 886.5),
    ],
)
def test_the_papers_recursion(shape, floats, width, expected_ms) -> None:
    constants = CONSTANTS.model_copy(update={"width": width})
    grown = GenTree(tree(shape), constants, 4 * floats, PAPER).best()
    assert 1e3 * grown.seconds(4 * floats, chunks=False) == pytest.approx(expected_ms, rel=1e-3)


shapes: st.SearchStrategy[Shape] = st.recursive(
    st.integers(1, 7), lambda below: st.lists(below, min_size=1, max_size=4), max_leaves=8
)
sizes = st.sampled_from([1e3, 1e5, 1e7, 1e9])


def leaves(shape: Shape) -> int:
    return shape if isinstance(shape, int) else sum(map(leaves, shape))


@settings(max_examples=12)
@given(
    shapes.filter(lambda s: leaves(s) <= 40),
    sizes,
    st.sampled_from(["rate", "ports", "sources"]),
    st.sampled_from([None, [1.0, 0.3], [1.0, 2.0, 0.5]]),
)
def test_every_plan_is_proven_and_none_is_worse_than_what_libraries_have(
    shape, payload, width, rates
) -> None:
    network = tree(shape, rates)
    constants = CONSTANTS.model_copy(update={"width": width})
    choice = choose(network, payload, constants)
    check_plan(choice.schedule)
    assert choice.seconds >= choice.bound_s * (1 - 1e-9)
    for name, seconds in choice.baselines_s.items():
        if name != "hierarchical":
            assert choice.seconds <= seconds * (1 + 1e-9), name


@settings(max_examples=8)
@given(shapes.filter(lambda s: leaves(s) <= 40), sizes)
def test_the_papers_plans_are_proven_too(shape, payload) -> None:
    network = tree(shape)
    grown = GenTree(network, CONSTANTS, payload, PAPER).best()
    check_plan(Schedule.of(network.size, grown.steps))
    best = choose(network, payload, CONSTANTS).seconds
    assert best <= grown.seconds(payload, chunks=False) * 1.02


def test_the_order_of_ranks_is_the_plans() -> None:
    network = tree([4, 4])
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    choice = choose(network, 4e6, CONSTANTS, order=order)
    check_plan(choice.schedule)
    assert choice.seconds == pytest.approx(choose(network, 4e6, CONSTANTS).seconds)
    scattered, sorted_ = choice.baselines_s["ring"], choose(network, 4e6, CONSTANTS).baselines_s
    assert scattered >= sorted_["ring"]


def test_a_slow_host_folds_into_another() -> None:
    network = tree(8, [0.1, 1, 1, 1, 1, 1, 1, 1])
    constants = Constants(alpha_s=1e-6, delta_s_per_byte=0)
    choice = choose(network, 1e9, constants)
    assert "slow" in choice.switches[-1][1]
    assert choice.seconds < 1.15 * choice.bound_s
    evaluator = PlanEvaluator(network, constants)
    others = baselines(network, range(8)).values()
    assert all(choice.seconds < 0.7 * evaluator.cost(steps).seconds(1e9) for steps in others)


@pytest.mark.parametrize("shape", [8, [4, 4], [2, 3, 5], [[2, 2], [4, 4]]])
def test_large_payloads_come_near_the_bound(shape) -> None:
    network = tree(shape)
    choice = choose(network, 2.0**28, Constants(delta_s_per_byte=0))
    assert choice.bound_s / choice.seconds > 0.85


def test_a_rank_alone() -> None:
    choice = choose(tree(1), 1e6, CONSTANTS)
    assert choice.seconds == 0
    assert choice.schedule.steps == ()


def test_more_time_on_each_constant_never_saves_any() -> None:
    network, payload = tree([3, 5]), 1e7
    base = choose(network, payload, CONSTANTS).seconds
    for change in ({"alpha_s": 8e-3}, {"gamma_s_per_byte": 3e-10}, {"epsilon_ratio": 0.5}):
        assert choose(network, payload, CONSTANTS.model_copy(update=change)).seconds >= base - 1e-12


@given(st.integers(2, 200))
def test_factorisations(count: int) -> None:
    found = list(factorisations(count))
    assert all(math.prod(factors) == count and min(factors) > 1 for factors in found)
    assert len(set(found)) == len(found)


def test_four_thousand_servers() -> None:
    network = tree([[16] * 16] * 16)
    choice = choose(network, 4e7, CONSTANTS)
    evaluator = PlanEvaluator(network, CONSTANTS)
    assert choice.cost.seconds(4e7) == pytest.approx(
        evaluator.cost(choice.schedule.arrays).seconds(4e7), rel=1e-9
    )
    assert choice.bound_s > 4e7 * cut_bound_s_per_byte(network) + 2 * CONSTANTS.alpha_s
    assert choice.seconds <= min(choice.baselines_s.values())
