"""Flows that share links, event by event, against GenModel's evaluator, and the bound on both."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.cluster import Cluster, Link, Node
from trimtab.core.collectives import Layout, NetworkTree, Schedule, Step
from trimtab.core.collectives.combine import exchange, folded, ring, staged
from trimtab.core.collectives.schedule import merged
from trimtab.core.cost import (
    Constants,
    PlanEvaluator,
    allreduce_bound_s,
    cut_bound_s_per_byte,
)
from trimtab.core.simulate.collective_flows import simulated_s

RATE = 1.25e9
CONSTANTS = Constants(
    alpha_s=1e-4, gamma_s_per_byte=1e-10, delta_s_per_byte=1e-10, incast_threshold=3
)


def tree(leaves: list[int], uplink: float = 2 * RATE, latency_s: float = 1e-5) -> NetworkTree:
    names = iter(f"n{i}" for i in range(sum(leaves)))
    links, switches = [], []
    for index, count in enumerate(leaves):
        switches.append(f"leaf{index}")
        links += [_link(next(names), f"leaf{index}", RATE, latency_s) for _ in range(count)]
    if len(leaves) > 1:
        links += [_link(name, "core", uplink, latency_s) for name in switches]
        switches.append("core")
    nodes = tuple(Node(name=f"n{i}", device="cpu") for i in range(sum(leaves)))
    return NetworkTree.of_cluster(
        Cluster(nodes=nodes, switches=tuple(switches), links=tuple(links))
    )


def _link(a: str, b: str, bandwidth: float, latency_s: float) -> Link:
    return Link(a=a, b=b, bandwidth_bytes_per_s=bandwidth, latency_s=latency_s)


def whole(count: int) -> list[Layout]:
    return [Layout.whole(rank) for rank in range(count)]


def hierarchical(leaves: list[int]) -> list[Step]:
    """Direct exchange below each switch, then among them."""
    parties, first = whole(sum(leaves)), 0
    below = []
    for count in leaves:
        step, layout = exchange(parties[first : first + count])
        below.append(([step], layout))
        first += count
    last, _ = exchange([layout for _, layout in below])
    return [*merged(steps for steps, _ in below), last]


def both(network: NetworkTree, steps: list[Step], payload: float, **changes) -> tuple[float, float]:
    constants = CONSTANTS.model_copy(update=changes)
    schedule = Schedule.of(network.size, steps)
    cost = PlanEvaluator(network, constants).cost(steps)
    return simulated_s(schedule, network, constants, payload), cost.seconds(payload)


modes = st.sampled_from(["rate", "ports", "sources"])


@settings(max_examples=15)
@given(
    st.lists(st.integers(2, 4), min_size=1, max_size=3).filter(lambda f: math.prod(f) <= 16),
    modes,
    st.sampled_from([1e3, 1e6, 1e8]),
    st.integers(0, 3),
)
def test_where_all_ranks_do_alike_both_formulations_give_one_time(
    factors, width, payload, shots
) -> None:
    count = math.prod(factors)
    plan, _ = staged(whole(count), factors, min(shots, len(factors)))
    flows, steps = both(tree([count]), plan, payload, width=width)
    assert flows == pytest.approx(steps, rel=1e-6)


@pytest.mark.parametrize("width", ["rate", "ports", "sources"])
@pytest.mark.parametrize("payload", [1e4, 1e7])
def test_equal_racks_and_rings_too(width: str, payload: float) -> None:
    racks = tree([4, 4, 4])
    for network, steps in ((racks, hierarchical([4, 4, 4])), (tree([7]), [ring(whole(7))[0]])):
        flows, expected = both(network, steps, payload, width=width)
        assert flows == pytest.approx(expected, rel=1e-6)


@settings(max_examples=12)
@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=3).filter(lambda s: sum(s) <= 9),
    st.sampled_from([1e4, 1e7]),
)
def test_uneven_plans_stay_near_and_never_beat_the_bound(leaves, payload) -> None:
    """Ranks that need not wait for the slowest finish earlier; a fair share may be late."""
    network, count = tree(leaves), sum(leaves)
    extras = list(range(1, 2 * (count - 2 ** (count.bit_length() - 1)), 2))
    twos = [2] * (count.bit_length() - 1)
    plans = [hierarchical(leaves), [exchange(whole(count))[0]], staged(whole(count), [2, count])[0]]
    plans += [folded(whole(count), extras, twos)[0]] if extras and count > 3 else []
    for steps in plans:
        flows, expected = both(network, steps, payload)
        assert 0.5 * expected < flows < 1.3 * expected
        bound_s = allreduce_bound_s(network, CONSTANTS, payload)
        assert bound_s <= min(flows, expected) * (1 + 1e-9)


def test_chunks_overlap_but_share_links_and_meet_one_another() -> None:
    """Without incast they save a tenth here; where it is dear, they lose more."""
    network, payload = tree([4, 4]), 1e8
    steps = hierarchical([4, 4])
    for epsilon, share in ((0.0, 0.9), (1.0, 1.43)):
        constants = CONSTANTS.model_copy(update={"epsilon_ratio": epsilon})
        cost = PlanEvaluator(network, constants).cost(steps)
        flows = [
            simulated_s(Schedule.of(8, steps, chunks), network, constants, payload)
            for chunks in (1, 4, 16)
        ]
        assert flows[0] == pytest.approx(cost.seconds(payload), rel=1e-6)
        assert min(flows[1:]) == pytest.approx(share * flows[0], rel=0.05)
        assert min(flows) >= allreduce_bound_s(network, constants, payload)


def test_the_order_of_ranks_decides_which_links_are_shared() -> None:
    network = tree([4, 4], uplink=RATE)
    around = Schedule.of(8, [ring(whole(8))[0]])
    near = simulated_s(around, network, CONSTANTS, 1e8)
    far = simulated_s(around, network, CONSTANTS, 1e8, order=[0, 4, 1, 5, 2, 6, 3, 7])
    assert far > 3 * near


def test_a_rank_alone_needs_no_time() -> None:
    assert simulated_s(Schedule.of(1, []), tree([1]), CONSTANTS, 1e6) == 0
    assert allreduce_bound_s(tree([1]), CONSTANTS, 1e6) == 0


@given(st.integers(2, 9), st.sampled_from([0.0, 1e-5, 1e-2]), st.sampled_from([1.0, 1e5, 1e9]))
def test_no_plan_is_below_the_bound_of_rounds_links_and_memory(count, alpha_s, payload) -> None:
    network = tree([count])
    constants = CONSTANTS.model_copy(update={"alpha_s": alpha_s, "epsilon_ratio": 0.0})
    bound_s = allreduce_bound_s(network, constants, payload)
    assert bound_s >= payload * cut_bound_s_per_byte(network)
    evaluator = PlanEvaluator(network, constants)
    for steps in ([exchange(whole(count))[0]], [ring(whole(count))[0]]):
        cost = evaluator.cost(steps)
        for chunks in (1, 2, 8, 64):
            assert bound_s <= cost.seconds(payload, chunks) * (1 + 1e-9)
    direct = evaluator.cost([exchange(whole(count))[0]])
    # Without incast, direct exchange is best from two rounds' worth of data on.
    if payload == 1e9 and alpha_s:
        assert bound_s > 0.97 * direct.seconds(payload, direct.best_chunks(payload))
