"""GenTree against published-style figures, the algorithms of libraries, and the cut bound."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from trimtab.core.cluster import Cluster, Link, Node
from trimtab.core.collectives import (
    UNIT,
    NetworkTree,
    PlanFault,
    Schedule,
    Turn,
    check_plan,
    programme,
)
from trimtab.core.collectives.programme import Receive, Send, Sum
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


MOST_LEAVES = 64
WIDEST: Shape = [[4, 5], [6, [3, 3]], [1, 2, 40]]
"""A tree of so many leaves, of which no two switches are alike."""


def parted(draw: st.DrawFn, count: int, depth: int) -> Shape:
    if depth == 0 or count == 1 or draw(st.booleans()):
        return count
    places = st.lists(st.integers(1, count - 1), max_size=6, unique=True).map(sorted)
    ends = [0, *draw(places), count]
    return [parted(draw, end - begin, depth - 1) for begin, end in pairwise(ends)]


@st.composite
def shapes(draw: st.DrawFn, least: int = 1) -> Shape:
    """Trees of up to 64 leaves below up to four tiers, with chains and unequal children."""
    return parted(draw, draw(st.integers(least, MOST_LEAVES)), 3)


sizes = st.sampled_from([1e3, 1e5, 1e7, 1e9])


@settings(max_examples=14)
@example(WIDEST, 1e7, "sources", [1.0, 0.3])
@given(
    shapes(),
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
        assert choice.seconds <= seconds * (1 + 1e-9), name


@settings(max_examples=8)
@given(shapes(), sizes)
def test_the_papers_plans_are_proven_too(shape, payload) -> None:
    network = tree(shape)
    grown = GenTree(network, CONSTANTS, payload, PAPER).best()
    check_plan(Schedule.of(network.size, grown.steps))
    best = choose(network, payload, CONSTANTS).seconds
    assert best <= grown.seconds(payload, chunks=False) * 1.02


def summed(schedule: Schedule, length: int = 61) -> bool:
    """Whether numbers that are sent and added as the plan says become their sums everywhere."""
    numbers = np.random.default_rng(schedule.ranks).integers(1, 2**40, (schedule.ranks, length))
    held = numbers.copy()
    turns = [(rank, t) for rank in range(schedule.ranks) for t in programme(schedule, rank)]

    def span(part: Send | Receive | Sum) -> slice:
        return slice(length * part.begin // UNIT, length * part.end // UNIT)

    def when(turn: Turn) -> tuple[bool, int, int]:
        gathers = turn.phase == "all-gather"
        return gathers, -turn.step if gathers else turn.step, turn.round

    for moment in sorted({when(turn) for _, turn in turns}):
        before = held.copy()
        for rank, turn in (t for t in turns if when(t[1]) == moment):
            for message in turn.receives:
                held[rank, span(message)] = before[message.peer, span(message)]
            for total in turn.sums:
                held[rank, span(total)] = before[list(total.operands), span(total)].sum(axis=0)
    return bool((held == numbers.sum(axis=0)).all())


def spoilt(draw: st.DrawFn, schedule: Schedule) -> Schedule:
    """The plan with one thing of one group changed, which may still be an AllReduce."""
    data = json.loads(schedule.model_dump_json())
    at = draw(st.integers(0, len(data["steps"]) - 1))
    groups = data["steps"][at]
    group = groups[draw(st.integers(0, len(groups) - 1))]
    some = st.integers(0, len(group["senders"]) - 1)
    kind = draw(st.sampled_from(["drop", "twice", "swap", "sender", "cut"]))
    if kind == "drop":
        groups.remove(group)
    elif kind == "twice":
        data["steps"].append(groups)
    elif kind == "swap":
        data["steps"][at], data["steps"][0] = data["steps"][0], data["steps"][at]
    elif kind == "sender":
        changed = list(group["senders"])
        changed[draw(some)] = draw(st.integers(0, schedule.ranks - 1))
        if not group["ring"]:
            group["owners"] = group["owners"] or group["senders"]
        group["senders"] = changed
    else:
        group["cuts"] = [group["cuts"][0], *group["cuts"][:-2], group["cuts"][-1]]
    return Schedule.model_validate(data)


@settings(max_examples=25)
@given(st.data())
def test_what_the_checker_passes_adds_up_and_what_does_not_add_up_it_refuses(data) -> None:
    network = tree(data.draw(shapes(least=2)))
    order = data.draw(st.permutations(range(network.size)))
    payload = data.draw(sizes)
    grown = GenTree(network, CONSTANTS, payload, PAPER).best()
    sound = Schedule.of(network.size, [s.renumbered(np.array(order)) for s in grown.steps])
    check_plan(sound)
    assert summed(sound)
    other = spoilt(data.draw, sound)
    try:
        check_plan(other)
    except PlanFault:
        event("refused")
    else:
        event("passed")
        assert summed(other)


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
