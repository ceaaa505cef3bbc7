"""GenModel's closed forms against a step simulator that moves real contributions."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.cost import (
    Collective,
    GenModel,
    co_located_ps,
    exposed_transfer_s,
    halving_doubling,
    hierarchical_ps,
    kv_transfer_s,
    least_accessed,
    reduce_broadcast,
    ring,
)
from trimtab.core.errors import BadInput

Step = list[tuple[int, int, int]]  # source, destination, block; one payload is `ranks` blocks


@dataclass
class Totals:
    rounds: int = 0
    traffic: float = 0.0
    reduced: float = 0.0
    accessed: float = 0.0
    width: int = 0
    messages: int = 0


def execute(ranks: int, reduce: list[Step], gather: list[Step]) -> Totals:
    """Runs the steps on sets of contributions and counts what the busiest rank does in each."""
    held = [[{rank} for _ in range(ranks)] for rank in range(ranks)]
    total = Totals()
    for step, adds in [(s, True) for s in reduce] + [(s, False) for s in gather]:
        before = [[set(block) for block in row] for row in held]
        arrivals: dict[tuple[int, int], list[set[int]]] = defaultdict(list)
        received: dict[int, int] = defaultdict(int)
        sent: dict[int, int] = defaultdict(int)
        senders: dict[int, set[int]] = defaultdict(set)
        for source, to, block in step:
            arrivals[to, block].append(before[source][block])
            received[to] += 1
            sent[source] += 1
            senders[to].add(source)
        reduced: dict[int, int] = defaultdict(int)
        accessed: dict[int, int] = defaultdict(int)
        for (to, block), parts in arrivals.items():
            if adds:
                for part in parts:
                    assert not held[to][block] & part, "a contribution was added twice"
                    held[to][block] = held[to][block] | part
                reduced[to] += len(parts)
                accessed[to] += len(parts) + 2
            else:
                held[to][block] = set(parts[0])
        total.rounds += 1
        total.traffic += max(*received.values(), *sent.values()) / ranks
        total.reduced += max(reduced.values(), default=0) / ranks
        total.accessed += max(accessed.values(), default=0) / ranks
        total.width = max(total.width, 1 + max(len(s) for s in senders.values()))
        # What goes from one rank to another in a step is one message.
        pairs = {(source, to) for source, to, _ in step}
        total.messages += max(sum(rank in pair for pair in pairs) for rank in range(ranks))
    everyone = set(range(ranks))
    assert all(block == everyone for row in held for block in row)
    return total


def mirrored(reduce: list[Step]) -> list[Step]:
    return [[(to, source, block) for source, to, block in step] for step in reversed(reduce)]


def ring_steps(n: int) -> list[Step]:
    return [[(r, (r + 1) % n, (r - s) % n) for r in range(n)] for s in range(n - 1)]


def direct_steps(factors: list[int]) -> list[Step]:
    """Direct exchange digit by digit, digit 0 the fastest."""
    n = math.prod(factors)
    steps: list[Step] = []
    stride = 1
    for f in factors:
        step: Step = []
        for a, b in itertools.permutations(range(n), 2):
            same_group = a // (stride * f) == b // (stride * f) and a % stride == b % stride
            if same_group:
                # b keeps the blocks whose digits up to this one are its own.
                step += [(a, b, k) for k in range(n) if (k - b) % (stride * f) == 0]
        steps.append(step)
        stride *= f
    return steps


def check(collective: Collective, totals: Totals) -> None:
    assert collective.rounds == totals.rounds
    assert sum(share for share, _ in collective.traffic) == pytest.approx(totals.traffic)
    assert collective.reduced == pytest.approx(totals.reduced)
    assert collective.accessed == pytest.approx(totals.accessed)
    assert max(width for _, width in collective.traffic) == totals.width
    assert collective.messages == totals.messages


@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_ring(n: int) -> None:
    check(ring(n), execute(n, ring_steps(n), mirrored(ring_steps(n))))


@pytest.mark.parametrize("factors", [[2], [5], [2, 3], [3, 2], [2, 2, 2], [4, 2]])
def test_direct_exchange(factors: list[int]) -> None:
    steps = direct_steps(factors)
    check(hierarchical_ps(factors), execute(math.prod(factors), steps, mirrored(steps)))


@pytest.mark.parametrize("n", [2, 4, 8])
def test_halving_doubling_of_a_power_of_two(n: int) -> None:
    steps = direct_steps([2] * (n.bit_length() - 1))
    check(halving_doubling(n), execute(n, steps, mirrored(steps)))


@pytest.mark.parametrize("n", [3, 5, 6])
def test_halving_doubling_folds_the_rest(n: int) -> None:
    core = 2 ** (n.bit_length() - 1)
    # The extra ranks send their payload to a partner, which adds it, and get the sum back. The core
    # cuts the payload by its own size, so it is counted apart.
    steps = direct_steps([2] * (core.bit_length() - 1))
    alone = execute(core, steps, mirrored(steps))
    collective = halving_doubling(n)
    assert collective.rounds == alone.rounds + 2
    assert collective.traffic == ((pytest.approx(alone.traffic + 2), 2),)
    assert collective.reduced == pytest.approx(alone.reduced + 1)
    assert collective.accessed == pytest.approx(alone.accessed + 3)
    assert collective.messages == alone.messages + 2


@pytest.mark.parametrize("n", [2, 3, 6])
def test_reduce_broadcast(n: int) -> None:
    step = [(r, 0, block) for r in range(1, n) for block in range(n)]
    check(reduce_broadcast(n), execute(n, [step], mirrored([step])))


factors = st.lists(st.integers(2, 6), min_size=1, max_size=4)


@given(factors)
def test_every_factorisation_moves_and_reduces_the_same(factors: list[int]) -> None:
    n = math.prod(factors)
    collective = hierarchical_ps(factors)
    assert sum(share for share, _ in collective.traffic) == pytest.approx(2 * (n - 1) / n)
    assert collective.reduced == pytest.approx((n - 1) / n)
    assert collective.accessed >= least_accessed(n, max(factors)) - 1e-9


@given(st.integers(2, 64))
def test_one_stage_accesses_least(n: int) -> None:
    assert co_located_ps(n) == hierarchical_ps([n])
    assert co_located_ps(n).accessed == pytest.approx(least_accessed(n, n))
    assert co_located_ps(n).accessed <= ring(n).accessed + 1e-12


@given(factors, st.floats(1, 1e9), st.integers(2, 12))
def test_seconds_grow_with_every_constant(factors: list[int], payload: float, limit: int) -> None:
    collective = hierarchical_ps(factors)
    model = GenModel(1e-5, 1e-9, 1e-10, 1e-10, 1e-10, limit)
    seconds = model.seconds(collective, payload)
    for worse in (
        GenModel(2e-5, 1e-9, 1e-10, 1e-10, 1e-10, limit),
        GenModel(1e-5, 2e-9, 1e-10, 1e-10, 1e-10, limit),
        GenModel(1e-5, 1e-9, 2e-10, 1e-10, 1e-10, limit),
        GenModel(1e-5, 1e-9, 1e-10, 2e-10, 1e-10, limit),
    ):
        assert worse.seconds(collective, payload) > seconds
    no_incast = GenModel(1e-5, 1e-9, 1e-10, 1e-10, 0.0, limit).seconds(collective, payload)
    assert (seconds > no_incast) == (max(factors) > limit)


def test_incast_and_memory_access_conflict() -> None:
    incast = GenModel(4e-3, 3.2e-9, 4e-10, 4e-10, 2e-10, 9)
    flat, staged = co_located_ps(24), hierarchical_ps([8, 3])
    assert staged.accessed > flat.accessed
    assert incast.seconds(staged, 1e8) < incast.seconds(flat, 1e8)
    free = GenModel(4e-3, 3.2e-9, 4e-10, 4e-10, 0.0)
    assert free.seconds(flat, 1e8) < free.seconds(staged, 1e8)


def test_one_rank_costs_nothing() -> None:
    model = GenModel(1e-5, 1e-9, 1e-10, 1e-10, 1e-10)
    for plan in (ring(1), co_located_ps(1), halving_doubling(1), reduce_broadcast(1)):
        assert model.seconds(plan, 1e6) == 0


def test_no_ranks_are_refused() -> None:
    for plan in (ring, co_located_ps, halving_doubling, reduce_broadcast):
        with pytest.raises(BadInput):
            plan(0)


@given(st.floats(0.001, 1), st.floats(0.001, 1), st.integers(1, 100))
def test_layers_sent_one_by_one_hide_behind_the_prefill(
    transfer_s: float, prefill_s: float, layers: int
) -> None:
    sent_s = 0.0
    for layer in range(1, layers + 1):
        sent_s = max(sent_s, layer * prefill_s / layers) + transfer_s / layers
    exposed = exposed_transfer_s(transfer_s, prefill_s, layers)
    assert exposed == pytest.approx(sent_s - prefill_s, abs=1e-9)


def test_kv_transfer() -> None:
    assert kv_transfer_s(1e9, 5e8, 0.5) == pytest.approx(2.5)
    assert kv_transfer_s(1e9, 5e8, 0.5, links=2) == pytest.approx(1.5)
    with pytest.raises(BadInput):
        kv_transfer_s(1e9, 0)
