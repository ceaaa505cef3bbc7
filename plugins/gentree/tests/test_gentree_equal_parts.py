"""Plans for reduce_scatter and all_gather: each rank owns one equal part between the phases."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trimtab.core.cluster import Cluster, Link, Node
from trimtab.core.collectives import UNIT, NetworkTree, Schedule, check_plan, programme
from trimtab.core.collectives.combine import ring
from trimtab.core.collectives.schedule import Layout
from trimtab.core.cost import Constants, PlanEvaluator
from trimtab.gentree import choose
from trimtab.gentree.backend import GroupPlans
from trimtab.gentree.equal_parts import has_equal_parts, towards_equal_parts
from trimtab.gentree.gentree import Search

EQUAL = Search(chunks=False, beside=False, equal=True)

Shape = list["Shape"] | int

small_shapes = st.recursive(
    st.integers(1, 5), lambda below: st.lists(below, min_size=1, max_size=4), max_leaves=6
)
WIDE: Shape = [[4, 5], [6, [3, 3]], [1, 2, 20]]
"""Of 44 leaves, a number that no plan cuts exactly; no two switches are alike."""

rates = st.sampled_from([(1.0,), (1.0, 0.3), (1.0, 2.0, 0.5)])


def tree(shape: Shape, rates: tuple[float, ...] = (1.0,)) -> NetworkTree:
    """Nested lists, whose numbers are hosts below one switch; links take the rates in turn."""
    nodes: list[Node] = []
    switches: list[str] = []
    links: list[Link] = []

    def connect(name: str, above: str) -> None:
        rate = rates[len(links) % len(rates)]
        links.append(Link(a=name, b=above, bandwidth_bytes_per_s=rate * 1e9))

    def add(part: Shape, path: str) -> None:
        switches.append(path)
        if isinstance(part, int):
            for _ in range(part):
                nodes.append(Node(name=f"n{len(nodes)}", device="cpu"))
                connect(nodes[-1].name, path)
            return
        for index, below in enumerate(part):
            connect(f"{path}-{index}", path)
            add(below, f"{path}-{index}")

    add(shape, "s")
    cluster = Cluster(nodes=tuple(nodes), switches=tuple(switches), links=tuple(links))
    return NetworkTree.of_cluster(cluster)


def parts_after_reduction(schedule: Schedule, length: int) -> list[list[int]]:
    """The elements of which each rank holds the whole sum behind the reduce-scatter."""
    numbers = np.random.default_rng(1).integers(1, 2**40, (schedule.ranks, length))
    held, whole = numbers.copy(), numbers.sum(axis=0)
    moments = defaultdict(list)
    for rank in range(schedule.ranks):
        for turn in programme(schedule, rank):
            if turn.phase == "reduce-scatter":
                moments[turn.place].append((rank, turn))

    def cut(position: int) -> int:
        return (length * position + UNIT // 2) // UNIT

    for _, turns in sorted(moments.items()):
        before = held.copy()
        for rank, turn in turns:
            for part in (*turn.receives, *turn.sums):
                span = slice(cut(part.begin), cut(part.end))
                sources = getattr(part, "operands", None) or [part.peer]
                held[rank, span] = before[list(sources), span].sum(axis=0)
    return [np.flatnonzero(row == whole).tolist() for row in held]


@settings(max_examples=25)
@example(WIDE, (1.0, 0.3), 1e7, 1)
@example([4, 4], (1.0,), 1e8, 3)
@example([4, 4], (1.0,), 1e3, 3)
@given(small_shapes, rates, st.sampled_from([1e3, 1e5, 1e7, 1e9]), st.integers(0, 99))
def test_each_rank_owns_one_equal_part_and_no_ring_is_faster(shape, rates, payload, seed) -> None:
    network = tree(shape, rates)
    count = network.size
    order = np.random.default_rng(seed).permutation(count).tolist()
    choice = choose(network, payload, Constants(), order=order, search=EQUAL)
    check_plan(choice.schedule)
    assert not any(step.one_shot.any() for step in choice.schedule.arrays)
    owned = parts_after_reduction(choice.schedule, 3 * count)
    assert sorted(owned) == [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(count)]
    if count > 1:
        flat = [ring([Layout.whole(leaf) for leaf in range(count)])[0]]
        limit_s = PlanEvaluator(network, Constants()).cost(flat).seconds(payload)
        assert choice.seconds <= limit_s * (1 + 1e-9)


@settings(max_examples=25)
@example(WIDE)
@given(small_shapes)
def test_towards_equal_parts_sends_up_what_others_shall_own_and_no_more(shape) -> None:
    network = tree(shape)
    steps = towards_equal_parts(network, 0)
    check_plan(Schedule.of(network.size, steps))
    owned = parts_after_reduction(Schedule.of(network.size, steps), 2 * network.size)
    assert owned == [[2 * i, 2 * i + 1] for i in range(network.size)]
    for first, last in network.spans[1:]:
        crossing = 0
        for step in steps:
            senders = defaultdict(list)
            for group, sender in zip(step.sender_group.tolist(), step.sender.tolist(), strict=True):
                senders[group].append(sender)
            columns = (step.owner_group, step.owner, step.begin, step.end)
            for group, owner, begin, end in zip(*(c.tolist() for c in columns), strict=True):
                if not first <= owner < last:
                    crossing += (end - begin) * sum(first <= s < last for s in senders[group])
        share = 1 - (last - first) / network.size
        assert crossing == pytest.approx(UNIT * share, abs=1e4)


def test_parts_that_are_not_equal_are_told() -> None:
    third, half = UNIT // 3, UNIT // 2
    for bounds, owners, equal in (
        ([0, half, UNIT], [1, 0], True),
        ([0, half + 3, UNIT], [1, 0], True),
        ([0, half + 100, UNIT], [1, 0], False),
        ([0, half, UNIT], [1, 1], False),
        ([0, third, UNIT], [0, 1], False),
    ):
        layout = Layout(np.array(bounds, dtype=np.int64), np.array(owners, dtype=np.int64))
        assert has_equal_parts(layout) is equal


@pytest.mark.parametrize("always", [False, True])
def test_kinds_of_calls_have_plans_of_their_own(always: bool) -> None:
    """Racks of three, three and two: the best AllReduce gives ranks unequal parts."""
    order = [0, 3, 6, 1, 4, 7, 2, 5]
    plans = GroupPlans(tree([3, 3, 2]), order, Constants(), always=always)
    whole, blocks = plans.schedule(2**20), plans.schedule(2**20, blocks=True)
    assert whole is not None
    assert blocks is not None
    assert blocks is plans.schedule(2**20, blocks=True)
    assert whole is plans.schedule(2**20)
    thirds = sorted(parts_after_reduction(blocks, 24))
    assert thirds == [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(8)]
    assert sorted(parts_after_reduction(whole, 24)) != thirds


def test_a_reduction_alone_is_held_against_half_a_ring() -> None:
    """Two ranks have but one way: held against both phases of a ring, it would seem to gain."""
    for constants in (Constants(alpha_s=1e-9), Constants(alpha_s=1e-9, gamma_s_per_byte=1e-6)):
        plans = GroupPlans(tree(2), range(2), constants, always=False)
        assert plans.schedule(2**20, blocks=True) is None
        plans = GroupPlans(tree(2), range(2), constants, always=True)
        assert plans.schedule(2**20, blocks=True) is not None


@settings(max_examples=15)
@example([5, 3], (1.0, 0.3), 24)
@given(small_shapes.filter(lambda shape: tree(shape).size > 1), rates, st.integers(10, 30))
def test_no_reduction_alone_is_slower_than_a_ring(shape, rates, power) -> None:
    """Dear sums are all in the reduction, so that the whole may be faster where it is not."""
    network = tree(shape, rates)
    constants = Constants(gamma_s_per_byte=1e-8, delta_s_per_byte=1e-9)
    found = GroupPlans(network, range(network.size), constants, always=True)
    schedule = found.schedule(1 << power, blocks=True)
    assert schedule is not None
    evaluator = PlanEvaluator(network, constants)
    flat = ring([Layout.whole(leaf) for leaf in range(network.size)])[0]
    own_s, ring_s = (
        sum(
            cost.latency_s + 2**power * cost.seconds_per_byte for cost in map(evaluator.step, steps)
        )
        for steps in (schedule.arrays, [flat])
    )
    assert own_s <= ring_s * (1 + 1e-9)


@settings(max_examples=15)
@example(WIDE, (1.0, 0.3), 1e7)
@example([3, 3, 2], (1.0,), 2.0**20)
@given(small_shapes, rates, st.sampled_from([1e3, 1e5, 1e7]))
def test_the_runner_finds_the_parts(shape, rates, payload) -> None:
    pytest.importorskip("torch")
    from trimtab.hosts.torch.plan_runner import PlannedRank

    network = tree(shape, rates)
    schedule = choose(network, payload, Constants(), search=EQUAL).schedule
    places = PlannedRank(schedule, 0).places
    assert places is not None
    if network.size > 1:
        assert [[place] for place in places] == parts_after_reduction(schedule, network.size)
