"""What must hold of every choice: its scale, its extremes, and the same bytes again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trimtab.core.collectives import NetworkTree, Schedule, programme
from trimtab.core.collectives.combine import staged
from trimtab.core.collectives.schedule import UNIT, Layout
from trimtab.core.cost import Constants, PlanEvaluator
from trimtab.gentree import choose
from trimtab.gentree.baselines import baselines
from trimtab.gentree.gentree import GenTree, Search
from trimtab.gentree.schemes import factorisations

Shape = list["Shape"] | int

shapes = st.recursive(
    st.integers(1, 6), lambda below: st.lists(below, min_size=1, max_size=3), max_leaves=5
)
payloads = st.sampled_from([1e3, 1e5, 1e7, 1e9])

LATENCY_AND_BANDWIDTH = Constants(
    alpha_s=3e-5, gamma_s_per_byte=0, delta_s_per_byte=0, epsilon_ratio=0, message_s=0
)


def tree(shape: Shape, slower: float = 1.0) -> NetworkTree:
    """Nested lists, whose numbers are ranks below one switch, with links of three rates in turn."""
    names, parents, leaves = ["s"], [-1], list[int]()

    def add(part: Shape, above: int) -> None:
        below: list[Shape | None] = [None] * part if isinstance(part, int) else [*part]
        for each in below:
            names.append(f"p{len(names)}")
            parents.append(above)
            point = len(names) - 1
            if each is None:
                leaves.append(point)
            else:
                add(each, point)

    add(shape, 0)
    count = len(names)
    seconds = slower * 1e-9 * np.array([0.0, *(1 + i % 3 for i in range(count - 1))])
    latency_s = slower * 1e-6 * np.array([0.0, *(1 + i % 2 for i in range(count - 1))])
    return NetworkTree(tuple(names), tuple(parents), seconds, seconds, latency_s, tuple(leaves))


@settings(max_examples=12)
@example([5, 3], 1e5, -30)
@given(shapes, payloads, st.sampled_from([-30, -3, 1, 10]))
def test_all_times_scaled_the_choice_is_the_same_and_takes_so_many_times_as_long(
    shape, payload, power
) -> None:
    factor = 2.0**power  # so that no product is rounded
    constants = Constants(
        alpha_s=3e-5, gamma_s_per_byte=1e-10, delta_s_per_byte=2e-10, message_s=1e-6
    )
    scaled = constants.model_copy(
        update={
            name: factor * getattr(constants, name)
            for name in ("alpha_s", "gamma_s_per_byte", "delta_s_per_byte", "message_s")
        }
    )
    one = choose(tree(shape), payload, constants)
    other = choose(tree(shape, factor), payload, scaled)
    assert other.seconds == pytest.approx(factor * one.seconds, rel=1e-12)
    assert other.bound_s == pytest.approx(factor * one.bound_s, rel=1e-9)
    assert other.switches == one.switches
    assert other.schedule == one.schedule


@settings(max_examples=20)
@given(st.integers(2, 40), payloads, st.sampled_from([0.0, 1e-10]))
def test_where_rounds_are_dear_and_incast_is_free_all_send_to_all(count, payload, gamma) -> None:
    star = NetworkTree(
        ("s", *(f"p{i}" for i in range(count))),
        (-1, *[0] * count),
        np.array([0.0, *[1e-9] * count]),
        np.array([0.0, *[1e-9] * count]),
        np.zeros(count + 1),
        tuple(range(1, count + 1)),
    )
    constants = LATENCY_AND_BANDWIDTH.model_copy(update={"alpha_s": 1e3, "gamma_s_per_byte": gamma})
    choice = choose(star, payload, constants)
    assert choice.switches[-1] == ("s", f"{count}, last 1 in one shot")
    assert (choice.cost.rounds, choice.schedule.chunks) == (1, 1)
    without = choose(star, payload, constants, search=Search(one_shot=False))
    assert without.switches[-1] == ("s", str(count))
    assert (without.cost.rounds, without.schedule.chunks) == (2, 1)
    evaluator = PlanEvaluator(star, constants)
    parties = [Layout.whole(rank) for rank in range(count)]
    for factors in factorisations(count):
        cost = evaluator.cost(staged(parties, factors)[0])
        assert max(choice.seconds, without.seconds) <= cost.seconds(payload) * (1 + 1e-9)


def test_ranks_that_share_processors_send_fewer_messages_in_all() -> None:
    network = tree([8])
    constants = LATENCY_AND_BANDWIDTH.model_copy(update={"message_s": 1e-4})
    apart = choose(network, 1e3, constants)
    shared = choose(network, 1e3, constants.model_copy(update={"processors": 2}))
    messages = [
        sum(len(t.sends) for r in range(8) for t in programme(one.schedule, r))
        for one in (apart, shared)
    ]
    assert messages[1] == 14 < messages[0]
    assert apart.cost.rounds == 3


@settings(max_examples=15)
@given(shapes.filter(lambda shape: tree(shape).size > 2), payloads, st.integers(1, 8))
def test_what_is_chosen_costs_what_the_whole_costs_on_shared_processors(
    shape, payload, processors
) -> None:
    changes = {"message_s": 1e-5, "processors": processors}
    constants = LATENCY_AND_BANDWIDTH.model_copy(update=changes)
    network = tree(shape)
    choice = choose(network, payload, constants)
    cost = PlanEvaluator(network, constants).cost(choice.schedule.arrays)
    assert choice.seconds == pytest.approx(cost.seconds(payload, choice.schedule.chunks))
    assert choice.seconds >= choice.bound_s * (1 - 1e-9)
    ends = sum(
        len(turn.sends) + len(turn.receives)
        for rank in range(network.size)
        for turn in programme(choice.schedule, rank)
    )
    assert cost.messages_s == pytest.approx(1e-5 * ends / processors)


def test_subtrees_share_their_processors_before_they_are_compared() -> None:
    """Below each of many switches few messages win, as all of them are handled by one processor."""
    changes = {"alpha_s": 1e-6, "message_s": 1e-4, "processors": 1}
    constants = LATENCY_AND_BANDWIDTH.model_copy(update=changes)
    network = tree([4] * 8)
    steps = {
        name: GenTree(network, constants, 1e3, Search(flat=flat)).best().cost
        for name, flat in (("flat", True), ("below switches", False))
    }
    least = 2 * 31 * 2 * 1e-4
    assert steps["flat"].messages_s == pytest.approx(least)
    assert steps["below switches"].messages_s == pytest.approx(least)


def latency_and_bandwidth_s(network: NetworkTree, schedule: Schedule, payload: float) -> float:
    """Message by message: each round costs its latency, and the time of its busiest link."""
    chains = []
    for leaf in network.leaves:
        chain = [leaf]
        while network.parents[chain[-1]] >= 0:
            chain.append(network.parents[chain[-1]])
        chains.append(chain[:-1])
    rounds: dict[int, dict[tuple[str, int], int]] = defaultdict(lambda: defaultdict(int))
    for rank in range(schedule.ranks):
        for turn in programme(schedule, rank):
            for sent in turn.sends:
                mine, others = set(chains[rank]), set(chains[sent.peer])
                for way, points in (("up", mine - others), ("down", others - mine)):
                    for point in points:
                        rounds[turn.place][way, point] += sent.end - sent.begin
    seconds = 0.0
    for loads in rounds.values():
        busiest = max(load * network.up_s_per_byte[point] for (_, point), load in loads.items())
        seconds += LATENCY_AND_BANDWIDTH.alpha_s + payload * float(busiest) / UNIT
    return seconds


@settings(max_examples=20)
@example([[2, 3], 4], 1e5)
@given(shapes.filter(lambda shape: tree(shape).size > 1), payloads)
def test_without_sums_and_incast_plans_rank_by_latency_and_bandwidth(shape, payload) -> None:
    network = replace(tree(shape), latency_s=np.zeros(len(tree(shape).names)))
    choice = choose(network, payload, LATENCY_AND_BANDWIDTH)
    one_piece = choice.schedule.model_copy(update={"chunks": 1})
    own_s = latency_and_bandwidth_s(network, one_piece, payload)
    assert choice.cost.seconds(payload) == pytest.approx(own_s, rel=1e-6)
    assert choice.seconds <= own_s * (1 + 1e-6)
    for name, steps in baselines(network, range(network.size)).items():
        plain = Schedule.of(network.size, steps)
        plain_s = latency_and_bandwidth_s(network, plain, payload)
        assert choice.baselines_s[name] == pytest.approx(plain_s, rel=1e-6), name
        assert choice.seconds <= plain_s * (1 + 1e-6), name


def planned() -> str:
    """A choice with ties to break, written out."""
    choice = choose(tree([[4, 4], [2, 3], 6]), 1e6, Constants())
    return choice.schedule.model_dump_json() + repr((choice.switches, choice.seconds))


def test_plans_are_the_same_bytes_whatever_strings_hash_to() -> None:
    script = f"import runpy; print(runpy.run_path({__file__!r})['planned'](), end='')"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, check=True, text=True
    )
    assert done.stdout == planned()
