"""GenModel's general form against its closed forms, published-style tables, and a slow twin."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from itertools import accumulate, combinations, pairwise, permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.cluster import Cluster, InsideLink, Link, Node
from trimtab.core.collectives import UNIT, Layout, NetworkTree, Schedule, Step
from trimtab.core.collectives.combine import exchange, folded, ring, staged
from trimtab.core.collectives.programme import programme
from trimtab.core.cost import (
    Constants,
    GenModel,
    PlanEvaluator,
    allreduce_bound_s,
    co_located_ps,
    cut_bound_s_per_byte,
    halving_doubling,
    hierarchical_ps,
    least_accessed,
    optimality,
    reduce_broadcast,
    two_rounds_bound_s_per_byte,
)
from trimtab.core.cost import ring as ring_cost
from trimtab.core.errors import BadInput

# Constants of one public cost model of this family, from seconds for each float to seconds for each
# byte: 4 ms, 3.2 ns, .4 ns, .4 ns, .2 ns, beyond a width of 9.
MODEL = GenModel(4e-3, 0.8e-9, 1e-10, 1e-10, 0.05e-9, 9)
CONSTANTS = Constants(
    alpha_s=4e-3, gamma_s_per_byte=1e-10, delta_s_per_byte=1e-10, epsilon_ratio=1 / 16
)
FREE = Constants(alpha_s=0, delta_s_per_byte=0, epsilon_ratio=0)
BANDWIDTH = 1 / 0.8e-9


def tree(
    leaves: list[int],
    uplink: float = 10 * BANDWIDTH,
    latency_s: float = 0.0,
    devices: int = 1,
) -> NetworkTree:
    """Hosts below leaf switches below a core; a single leaf is a star."""
    names = iter(f"n{i}" for i in range(sum(leaves)))
    links: list[Link] = []
    for index, count in enumerate(leaves):
        leaf = f"leaf{index}"
        links += [_link(next(names), leaf, BANDWIDTH, latency_s) for _ in range(count)]
    switches = [f"leaf{i}" for i in range(len(leaves))]
    if len(leaves) > 1:
        links += [_link(name, "core", uplink, latency_s) for name in switches]
        switches.append("core")
    inside = InsideLink(bandwidth_bytes_per_s=20 * BANDWIDTH, latency_s=0)
    nodes = tuple(
        Node(name=f"n{i}", device="cpu", count=devices, inside=inside) for i in range(sum(leaves))
    )
    cluster = Cluster(nodes=nodes, switches=tuple(switches), links=tuple(links))
    return NetworkTree.of_cluster(cluster)


def _link(a: str, b: str, bandwidth: float, latency_s: float) -> Link:
    return Link(a=a, b=b, bandwidth_bytes_per_s=bandwidth, latency_s=latency_s)


def whole(count: int) -> list[Layout]:
    return [Layout.whole(rank) for rank in range(count)]


def seconds(network: NetworkTree, steps: list[Step], payload_bytes: float) -> float:
    return PlanEvaluator(network, CONSTANTS).cost(steps).seconds(payload_bytes)


MESSAGE_S = 3e-5


def with_messages(width: str = "rate") -> tuple[GenModel, Constants]:
    """Both forms, with what a message costs too."""
    constants = CONSTANTS.model_copy(update={"message_s": MESSAGE_S, "width": width})
    return replace(MODEL, message_s=MESSAGE_S), constants


factors = st.lists(st.integers(2, 6), min_size=1, max_size=4).filter(lambda f: math.prod(f) <= 200)
modes = st.sampled_from(["rate", "ports", "sources"])


@given(factors, modes, st.floats(1, 1e9))
def test_staged_exchange_on_a_star_is_its_closed_form(factors, width, payload) -> None:
    n = math.prod(factors)
    model, constants = with_messages(width)
    cost = PlanEvaluator(tree([n]), constants).cost(staged(whole(n), factors)[0])
    expected = model.seconds(hierarchical_ps(factors), payload)
    assert cost.seconds(payload) == pytest.approx(expected, rel=1e-12)
    assert cost.rounds == 2 * len(factors)
    assert cost.width == max(factors)


@given(st.integers(2, 60), modes, st.floats(1, 1e9))
def test_ring_on_a_star_is_its_closed_form(n, width, payload) -> None:
    model, constants = with_messages(width)
    cost = PlanEvaluator(tree([n]), constants).cost([ring(whole(n))[0]])
    assert cost.seconds(payload) == pytest.approx(model.seconds(ring_cost(n), payload), rel=1e-9)


@given(st.integers(3, 40), st.floats(1, 1e9))
def test_halving_doubling_on_a_star_is_its_closed_form(n, payload) -> None:
    power = n.bit_length() - 1
    extras = list(range(2**power, n))
    twos = [2] * power
    steps = folded(whole(n), extras, twos)[0] if extras else staged(whole(n), twos)[0]
    model, constants = with_messages()
    cost = PlanEvaluator(tree([n]), constants).cost(steps)
    expected = model.seconds(halving_doubling(n), payload)
    assert cost.seconds(payload) == pytest.approx(expected, rel=1e-9)


@given(st.integers(2, 20))
def test_reduce_broadcast_on_a_star_has_no_incast_on_its_way_back(n) -> None:
    steps = [exchange(whole(n), [1.0] + [0.0] * (n - 1))[0]]
    expected = MODEL.seconds(reduce_broadcast(n), 1e6)
    spared = (n - 1) * 1e6 * max(n - 9, 0) * MODEL.epsilon_s_per_byte
    assert seconds(tree([n]), steps, 1e6) == pytest.approx(expected - spared, rel=1e-9)
    _, constants = with_messages()
    more_s = PlanEvaluator(tree([n]), constants).cost(steps).seconds(1e6) - expected + spared
    assert more_s == pytest.approx(reduce_broadcast(n).messages * MESSAGE_S, rel=1e-9)


@pytest.mark.parametrize(
    ("n", "floats", "ring_ms", "halving_ms", "direct_ms", "best", "best_ms"),
    [
        (8, 1e7, 126.000, 94.000, 72.000, [8], 72.000),
        (12, 1e7, 161.333, 182.000, 85.667, [6, 2], 84.000),
        (12, 1e8, 821.333, 1532.000, 784.667, [6, 2], 696.000),
        (15, 1e8, 858.667, 1532.000, 909.333, [5, 3], 709.333),
        (16, 1e6, 127.500, 39.500, 17.425, [16], 17.425),
        (16, 1e8, 870.000, 782.000, 950.500, [8, 2], 706.000),
        (24, 1e7, 260.667, 195.000, 134.833, [8, 3], 86.333),
        (32, 1e8, 1023.000, 815.000, 1599.250, [8, 4], 726.000),
    ],
)
def test_one_switch(n, floats, ring_ms, halving_ms, direct_ms, best, best_ms) -> None:
    star, payload = tree([n]), 4 * floats

    def ms(steps: list[Step]) -> float:
        return 1e3 * seconds(star, steps, payload)

    assert ms([ring(whole(n))[0]]) == pytest.approx(ring_ms, abs=1e-3)
    assert ms([exchange(whole(n))[0]]) == pytest.approx(direct_ms, abs=1e-3)
    assert ms(staged(whole(n), best)[0]) == pytest.approx(best_ms, abs=1e-3)
    assert 1e3 * MODEL.seconds(halving_doubling(n), payload) == pytest.approx(halving_ms, abs=1e-3)


@pytest.mark.parametrize(
    ("leaves", "floats", "width", "direct_ms", "ring_ms"),
    [
        ([4] * 4, 1e8, "ports", 688.0, 870.0),
        ([24] * 16, 1e7, "ports", 304.0, 3143.8),
        ([24] * 16, 1e8, "ports", 2968.0, 3861.9),
        ([24] * 16, 1e8, "sources", 33208.0, 3861.9),
        ([32] * 16, 1e7, "ports", 496.0, 4167.8),
        ([32] * 16, 1e7, "sources", 5872.0, 4167.8),
        ([32] * 8 + [16] * 8, 1e8, "ports", 4781.0, 3861.9),
    ],
)
def test_two_tiers(leaves, floats, width, direct_ms, ring_ms) -> None:
    n, network = sum(leaves), tree(leaves)
    evaluator = PlanEvaluator(network, CONSTANTS.model_copy(update={"width": width}))
    direct = evaluator.cost([exchange(whole(n))[0]])
    around = evaluator.cost([ring(whole(n))[0]])
    assert 1e3 * direct.seconds(4 * floats) == pytest.approx(direct_ms, rel=1e-3)
    assert 1e3 * around.seconds(4 * floats) == pytest.approx(ring_ms, rel=1e-3)


def messages(step: Step, gather: bool) -> list[tuple[int, int, float, int]]:
    """Source, destination, size and group of each message of a step without rings."""
    found = []
    for at, owner in enumerate(step.owner.tolist()):
        size = int(step.end[at] - step.begin[at]) / UNIT
        senders = step.sender[step.sender_group == step.owner_group[at]].tolist()
        group = int(step.owner_group[at])
        found += [(s, owner, size, group) for s in senders if s != owner]
    return [(b, a, size, group) for a, b, size, group in found] if gather else found


def links_between(network: NetworkTree, a: int, b: int) -> list[tuple[str, int]]:
    """The links that a message takes, by their direction and their lower end."""

    def chain(leaf: int) -> list[int]:
        found = [network.leaves[leaf]]
        while network.parents[found[-1]] >= 0:
            found.append(network.parents[found[-1]])
        return found

    ups, downs = chain(a), chain(b)
    up = [("up", p) for p in ups if p not in downs]
    return up + [("down", p) for p in reversed(downs) if p not in ups]


def naive(network: NetworkTree, step: Step, width: str, gather: bool) -> tuple[float, int]:
    """Seconds for each byte of a step without rings, and its width, message by message."""
    loads: dict[tuple[str, int], float] = defaultdict(float)
    streams: dict[tuple[str, int], set[object]] = defaultdict(set)
    by_port: dict[tuple[object, object], set[object]] = defaultdict(set)
    for source, to, size, group in messages(step, gather):
        path = links_between(network, source, to)
        for before, link in zip([None, *path], path, strict=False):
            loads[link] += size
            if before is not None and link not in {("up", point) for point in network.hosts}:
                streams[link].add(source if width == "sources" else before)
                by_port[link, before].add((group, source))

    def seconds_per_byte(link) -> float:
        return float(network.up_s_per_byte[link[1]])

    def wide(link) -> int:
        if width != "rate":
            return 1 + len(streams[link])
        rates = (
            min(seconds_per_byte(link) / seconds_per_byte(port), len(by_port[link, port]))
            for port in streams[link]
        )
        return 1 + math.ceil(sum(rates) - 1e-9)

    slowest = 0.0
    for link, load in loads.items():
        excess = max(wide(link) - 9, 0) / 16
        slowest = max(slowest, load * float(network.up_s_per_byte[link[1]]) * (1 + excess))
    sums = [0.0] * network.size
    for at, owner in enumerate([] if gather else step.owner.tolist()):
        k = int((step.sender_group == step.owner_group[at]).sum())
        sums[owner] += int(step.end[at] - step.begin[at]) / UNIT * (2 * k if k > 1 else 0) * 1e-10
    return slowest + max(sums), max(map(wide, loads))


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4).filter(lambda n: sum(n) > 1),
    st.lists(st.integers(2, 6), min_size=1, max_size=3),
    modes,
    st.sampled_from([0.02, 0.5, 3, 10]),
    st.integers(1, 3),
    st.integers(0, 1),
)
def test_steps_on_trees_cost_what_their_messages_cost(
    leaves, factors, width, faster, devices, shots
) -> None:
    network = tree(leaves, uplink=faster * BANDWIDTH, devices=devices)
    evaluator = PlanEvaluator(network, CONSTANTS.model_copy(update={"width": width}))
    for step in staged(whole(network.size), factors, shots)[0]:
        for gather, cost in zip((False, True), evaluator.both(step), strict=True):
            if gather and step.one_shot.all():
                assert (cost.rounds, cost.latency_s, cost.seconds_per_byte) == (0, 0, 0)
                continue
            slope, widest = naive(network, step, width, gather)
            assert cost.seconds_per_byte == pytest.approx(slope, rel=1e-9)
            assert cost.width == widest


@given(st.integers(2, 24), st.data())
def test_messages_are_those_that_ranks_send(n, data) -> None:
    """Each round costs what its busiest rank sends and receives; a chunk sends it all again."""
    factors = data.draw(st.lists(st.integers(2, 6), min_size=1, max_size=3))
    shares = data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=n, max_size=n))
    folds = data.draw(st.integers(0, (n - 1) // 2))
    core = data.draw(st.sampled_from([(), (n - folds,)]))
    kinds = [
        staged(whole(n), factors)[0],
        staged(whole(n), factors, 1)[0],
        [ring(whole(n))[0]],
        [exchange(whole(n), shares if any(shares) else None)[0]],
        *([folded(whole(n), range(1, 2 * folds, 2), core)[0]] if folds else []),
    ]
    steps = data.draw(st.sampled_from(kinds))
    processors = data.draw(st.sampled_from([None, 1, 2, 3]))
    rounds = defaultdict(lambda: [0] * n)
    for rank in range(n):
        for turn in programme(Schedule.of(n, steps), rank):
            rounds[turn.phase, turn.step, turn.round][rank] += len(turn.sends) + len(turn.receives)
    expected_s = MESSAGE_S * sum(
        sum(each) / processors if processors else max(each) for each in rounds.values()
    )
    network = tree([n])
    shared = {"processors": processors}
    bare, dear = (
        PlanEvaluator(network, given.model_copy(update=shared)).cost(steps)
        for given in (CONSTANTS, with_messages()[1])
    )
    alone_s = 0 if processors else expected_s
    assert dear.latency_s - bare.latency_s == pytest.approx(alone_s, rel=1e-9, abs=1e-15)
    assert dear.messages_s == pytest.approx(expected_s, rel=1e-9, abs=1e-15)
    assert dear.seconds(0, 3) - bare.seconds(0, 3) == pytest.approx(3 * expected_s, rel=1e-9)
    long = 1e12
    assert dear.seconds(long) - bare.seconds(long) == pytest.approx(alone_s, rel=0.1, abs=1e-4)


@given(st.lists(st.integers(1, 6), min_size=2, max_size=5), st.floats(0.1, 20), st.data())
def test_no_plan_beats_the_cut_bound(leaves, faster, data) -> None:
    network = tree(leaves, uplink=faster * BANDWIDTH)
    n = sum(leaves)
    bound = cut_bound_s_per_byte(network)
    evaluator = PlanEvaluator(network, FREE)
    factors = data.draw(st.lists(st.integers(2, 6), min_size=1, max_size=3))
    for steps in (staged(whole(n), factors)[0], [ring(whole(n))[0]]):
        cost = evaluator.cost(steps)
        assert cost.busy_s_per_byte >= bound * (1 - 1e-9)
        assert min(cost.seconds(1e9, chunks) for chunks in (1, 4, 64)) >= bound * 1e9 * (1 - 1e-9)


@pytest.mark.parametrize(
    ("leaves", "uplink", "payloads"),
    [([8], 1.0, 2 * 7 / 8), ([4, 4], 1.0, 2 * 7 / 8), ([4, 4], 0.1, 10.0), ([2] * 4, 0.2, 7.5)],
)
def test_the_cut_bound_of_known_networks(leaves, uplink, payloads) -> None:
    bound = cut_bound_s_per_byte(tree(leaves, uplink=uplink * BANDWIDTH))
    assert bound * BANDWIDTH == pytest.approx(payloads)


def fewest_crossing_in_two_rounds(parts: list[set[int]]) -> int:
    """Messages of an element that cross into parts, in the best AllReduce of two rounds."""
    ranks = sorted(set().union(*parts))
    home = {rank: number for number, part in enumerate(parts) for rank in part}
    pairs = list(permutations(ranks, 2))
    everyone, best = set(ranks), 2 * len(pairs)
    for sent in product((False, True), repeat=len(pairs)):
        held = {rank: {rank} for rank in ranks}
        for (source, to), goes in zip(pairs, sent, strict=True):
            if goes:
                held[to].add(source)
        crossing = sum(home[a] != home[b] for (a, b), goes in zip(pairs, sent, strict=True) if goes)
        for rank in ranks:
            if crossing >= best:
                break
            # A sum of any of what its sender holds: together they must hold all.
            near = held[rank].union(*(held[other] for other in parts[home[rank]]))
            far = [other for other in ranks if home[other] != home[rank]]
            crossing += next(
                count
                for count in range(len(far) + 1)
                for chosen in combinations(far, count)
                if near.union(*(held[other] for other in chosen)) == everyone
            )
        best = min(best, crossing)
    return best


@pytest.mark.parametrize("sizes", [[2, 2], [1, 1, 1], [2, 1, 1]])
def test_in_two_rounds_no_fewer_messages_cross(sizes: list[int]) -> None:
    ends = list(accumulate(sizes, initial=0))
    parts = [set(range(first, last)) for first, last in pairwise(ends)]
    bound = two_rounds_bound_s_per_byte(tree(sizes, uplink=0.1 * BANDWIDTH)) * 0.1 * BANDWIDTH
    assert bound * len(sizes) == pytest.approx(2 * (sum(sizes) - max(sizes)))
    assert fewest_crossing_in_two_rounds(parts) >= bound * len(sizes) - 1e-9


def test_two_rounds_are_ruled_out_where_they_cross_too_often() -> None:
    network = tree([24] * 16)
    cut = cut_bound_s_per_byte(network)
    assert two_rounds_bound_s_per_byte(network) == pytest.approx(4.5 / BANDWIDTH)
    assert two_rounds_bound_s_per_byte(tree([24])) == pytest.approx(2 * 23 / 24 / BANDWIDTH)
    payload = 1e9
    assert allreduce_bound_s(network, CONSTANTS, payload) > payload * cut + 3 * CONSTANTS.alpha_s
    direct, _ = exchange(whole(384))
    # Direct exchange crosses into racks just as often as it must.
    free = PlanEvaluator(network, CONSTANTS.model_copy(update={"epsilon_ratio": 0.0}))
    loads = [free.step(direct, gather=gather).down_busy for gather in (False, True)]
    racks = list(network.children[0])
    assert float((loads[0] + loads[1])[racks].max()) == pytest.approx(
        two_rounds_bound_s_per_byte(network)
    )


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4).filter(lambda n: sum(n) > 1),
    st.sampled_from([0.01, 0.5, 10]),
    st.sampled_from([0.0, 1e-4, 1.0]),
    st.floats(1, 1e9),
)
def test_the_bound_knows_links_between_switches_in_any_number_of_rounds(
    leaves, faster, alpha_s, payload
) -> None:
    network = tree(leaves, uplink=faster * BANDWIDTH)
    given_constants = CONSTANTS.model_copy(update={"alpha_s": alpha_s})
    bound_s = allreduce_bound_s(network, given_constants, payload)
    assert bound_s >= payload * cut_bound_s_per_byte(network) * (1 - 1e-9)
    n, evaluator = sum(leaves), PlanEvaluator(network, given_constants)
    for steps in ([exchange(whole(n))[0]], [ring(whole(n))[0]]):
        cost = evaluator.cost(steps)
        assert min(cost.seconds(payload, chunks) for chunks in (1, 8)) >= bound_s * (1 - 1e-9)


def test_a_ring_in_the_trees_order_meets_the_bound() -> None:
    network = tree([4, 4], uplink=BANDWIDTH)
    cost = PlanEvaluator(network, Constants(delta_s_per_byte=0)).cost([ring(whole(8))[0]])
    assert cost.seconds_per_byte == pytest.approx(cut_bound_s_per_byte(network))


def test_chunks_hide_the_slower_links_behind_one_another() -> None:
    network = tree([4, 4], uplink=BANDWIDTH)
    cost = PlanEvaluator(network, Constants(delta_s_per_byte=0)).cost(staged(whole(8), [4, 2])[0])
    alone, chunked = cost.seconds(1e9), cost.seconds(1e9, cost.best_chunks(1e9))
    bound = 1e9 * cut_bound_s_per_byte(network)
    assert alone == pytest.approx(2.5 / 1.75 * bound, rel=1e-3)
    assert chunked < 1.05 * bound
    assert cost.best_chunks(1e3) == 1


@given(factors)
def test_both_optimalities(factors) -> None:
    n = math.prod(factors)
    found = optimality(n, staged(whole(n), factors)[0])
    assert found.accessed == pytest.approx(hierarchical_ps(factors).accessed)
    assert found.accessed >= least_accessed(n, found.width) - 1e-9
    assert found.accesses_least == (len(factors) == 1)
    # No plan has both where there are more ranks than may meet.
    assert not (found.accesses_least and found.is_free_of_incast(n - 1))


def test_some_staged_plans_access_least_at_their_width() -> None:
    for factors in ([8, 3], [4, 4], [8, 2]):
        n = math.prod(factors)
        assert optimality(n, staged(whole(n), factors)[0]).accesses_least_at_its_width
    assert not optimality(24, staged(whole(24), [2, 3, 4])[0]).accesses_least_at_its_width
    assert optimality(6, [ring(whole(6))[0]]).accessed == pytest.approx(3 * 5 / 6)
    assert co_located_ps(6).accessed == pytest.approx(7 / 6)


@given(st.permutations(range(12)))
def test_naming_the_children_otherwise_costs_the_same(order) -> None:
    network, (steps, _) = tree([12]), staged(whole(12), [4, 3])
    again = [step.renumbered(np.array(order)) for step in steps]
    assert seconds(network, again, 1e6) == pytest.approx(seconds(network, steps, 1e6))


def test_latency_is_that_of_the_longest_way() -> None:
    network = tree([2, 2], latency_s=1e-3)
    evaluator = PlanEvaluator(network, Constants(alpha_s=1e-2, delta_s_per_byte=0))
    near, far = staged(whole(4), [2, 2])[0]
    assert evaluator.step(near).latency_s == pytest.approx(1e-2 + 2e-3)
    assert evaluator.step(far).latency_s == pytest.approx(1e-2 + 4e-3)


class TestNetworkTree:
    def test_devices_of_a_node_hang_below_it(self) -> None:
        nodes = (Node(name="a", device="L4", count=2), Node(name="b", device="L4", count=2))
        links = (_link("a", "s", 1e9, 0), _link("b", "s", 1e9, 0))
        network = NetworkTree.of_cluster(Cluster(nodes=nodes, switches=("s",), links=links))
        assert network.leaf_names == ("a/0", "a/1", "b/0", "b/1")
        assert network.paths.shape == (3, 4)

    def test_only_the_slots_that_take_part(self) -> None:
        cluster = Cluster(
            nodes=tuple(Node(name=f"n{i}", device="cpu", count=2) for i in range(3)),
            switches=("s", "spare"),
            links=tuple(_link(f"n{i}", "s", 1e9, 0) for i in range(3))
            + (_link("s", "spare", 1, 0),),
        )
        network = NetworkTree.of_cluster(cluster, [("n2", 1), ("n0", 0), ("n0", 1)])
        assert network.leaf_names == ("n0/0", "n0/1", "n2")
        assert "spare" not in network.names

    def test_two_nodes_on_a_cable(self) -> None:
        nodes = (Node(name="a", device="cpu"), Node(name="b", device="cpu"))
        network = NetworkTree.of_cluster(Cluster(nodes=nodes, links=(_link("a", "b", 1e9, 0),)))
        free = Constants(alpha_s=0, delta_s_per_byte=0)
        cost = PlanEvaluator(network, free).cost([exchange(whole(2))[0]])
        assert cost.seconds(1e9) == pytest.approx(1.0)
        assert cut_bound_s_per_byte(network) == pytest.approx(1e-9)

    def test_a_node_alone(self) -> None:
        network = NetworkTree.of_cluster(Cluster(nodes=(Node(name="a", device="cpu"),)))
        assert network.size == 1
        assert cut_bound_s_per_byte(network) == 0

    def test_links_that_form_no_tree_are_refused(self) -> None:
        cluster = Cluster(
            nodes=tuple(Node(name=f"n{i}", device="cpu") for i in range(2)),
            switches=("s", "t"),
            links=tuple(_link(f"n{i}", s, 1e9, 0) for i in range(2) for s in "st"),
        )
        with pytest.raises(BadInput, match="form no tree"):
            NetworkTree.of_cluster(cluster)

    def test_a_device_that_is_not_there_is_refused(self) -> None:
        cluster = Cluster(nodes=(Node(name="a", device="cpu"),))
        with pytest.raises(BadInput, match="which has 1"):
            NetworkTree.of_cluster(cluster, [("a", 1)])


def test_the_latency_of_a_rank_that_is_less_deep_counts_once() -> None:
    nodes = tuple(Node(name=name, device="cpu") for name in ("near", "far"))
    ends = (("near", "core", 1e-6), ("rack", "core", 5e-6), ("far", "rack", 3e-6))
    links = tuple(_link(a, b, BANDWIDTH, latency_s) for a, b, latency_s in ends)
    network = NetworkTree.of_cluster(Cluster(nodes=nodes, switches=("core", "rack"), links=links))
    assert network.names[0] == "rack"
    cost = PlanEvaluator(network, FREE).cost([exchange(whole(2))[0]])
    # Two rounds, each up and down the slowest links of both depths: core's and near's.
    assert cost.latency_s == pytest.approx(2 * 2 * (5e-6 + 1e-6))
