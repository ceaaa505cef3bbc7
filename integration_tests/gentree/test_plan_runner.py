"""What runs plans, over a base group whose messages come as early or as late as they may."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.cluster import Cluster, Link, Node
from trimtab.core.collectives import NetworkTree, Schedule, Step
from trimtab.core.collectives.combine import (
    SHARES,
    beside,
    concentrated,
    exchange,
    folded,
    ring,
    staged,
)
from trimtab.core.collectives.schedule import Layout
from trimtab.core.cost import Constants
from trimtab.hosts.torch.plan_runner import PeerLost, PlannedRank, PlanRunner, adding

pytestmark = pytest.mark.integration

PATIENCE = timedelta(seconds=7)
POISON = 0x55
"""Each byte of room that is asked for and not yet filled."""


@dataclass(eq=False)
class Half:
    """One side of a message; the content is what its sender had when it began."""

    source: int
    to: int
    tag: int
    tensor: Any
    content: Any = None
    done: bool = False
    waited: bool = False

    @property
    def rank(self) -> int:
        """Whose side it is."""
        return self.to if self.content is None else self.source


class Stopped(BaseException):
    """Ends a rank's thread; not an error that the runner may take for a peer's."""


@dataclass
class Network:
    """Moves messages between ranks of which one runs at a time: nothing happens by chance.

    A message can come as soon as both sides have asked, and is over for both then: the sender's
    tensor is read, and the receiver's written, in that moment. Whose turn it is, and which message
    comes, is drawn.

    Attributes:
        ranks: how many there are.
        seed: of the draws.
        early: whether what can come comes at once, or only when all ranks wait; None for by chance.
        favourite: the rank that runs whenever it can.
        halves: of messages that are under way.
        own: where each rank's payload lies; what it receives elsewhere is room.
        longest: how many messages a rank had coming at most.
    """

    ranks: int
    seed: int
    early: bool | None
    favourite: int | None = None
    halves: list[Half] = field(default_factory=list)
    own: list[range] = field(default_factory=list)
    fault: BaseException | None = None
    longest: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._gates = [threading.Semaphore(0) for _ in range(self.ranks)]
        self._back = threading.Semaphore(0)
        self._waits: list[Half | None] = [None] * self.ranks
        self._over = [False] * self.ranks
        self.posted = 0

    def run(self, work: Callable[[int], None]) -> None:
        """Does the work of all ranks to its end.

        Raises:
            AssertionError: no rank can go on, or one broke a rule; or what a rank raised.
        """
        threads = [threading.Thread(target=self._rank, args=(r, work)) for r in range(self.ranks)]
        for thread in threads:
            thread.start()
        try:
            while self.fault is None and not all(self._over):
                self._move()
        except AssertionError as error:
            self.fault = self.fault or error
        for rank, thread in enumerate(threads):
            self._gates[rank].release()
            thread.join()
        if self.fault is not None:
            raise self.fault

    def _rank(self, rank: int, work: Callable[[int], None]) -> None:
        try:
            self._gates[rank].acquire()
            if self.fault is None:
                work(rank)
        except Stopped:
            pass
        except BaseException as error:
            self.fault = self.fault or error
        self._over[rank] = True
        self._back.release()

    def _move(self) -> None:
        able = [r for r in range(self.ranks) if not self._over[r] and self._able(r)]
        matched = self._matched()
        moves = self.early if self.early is not None else self._random.random() < 0.5
        if matched and (moves or not able):
            self._deliver(*self._random.choice(matched))
            return
        waits = [f"{h.source}->{h.to} {h.tag:x}" for h in self._waits if h is not None]
        assert able, f"no rank can go on; they wait for {waits}"
        rank = self.favourite if self.favourite in able else self._random.choice(able)
        self._gates[rank].release()
        self._back.acquire()

    def _able(self, rank: int) -> bool:
        half = self._waits[rank]
        return half is None or half.done

    def _matched(self) -> list[tuple[Half, Half]]:
        coming = {
            (h.source, h.to, h.tag): h for h in self.halves if h.content is None and not h.done
        }
        found = []
        for sent in self.halves:
            key = (sent.source, sent.to, sent.tag)
            if sent.content is not None and not sent.done and key in coming:
                found.append((sent, coming[key]))
        return found

    def _deliver(self, sent: Half, received: Half) -> None:
        where = f"{sent.source}->{sent.to}"
        assert len(sent.tensor) == len(received.tensor), f"{where}: not of one length"
        assert sent.tensor.dtype == received.tensor.dtype, where
        now = bytes_of(sent.tensor)
        assert torch.equal(now, sent.content), f"{where}: changed while it was sent"
        received.tensor.copy_(sent.tensor)
        sent.done = received.done = True

    def post(self, half: Half, rank: int) -> None:
        """Begins a message on one side."""
        assert half.source != half.to
        assert len(half.tensor), "an empty message"
        self.halves = [h for h in self.halves if not h.waited]
        received = half.content is None
        for other in self.halves:
            if (other.content is None) == received:
                key, same = ((h.source, h.to, h.tag) for h in (half, other))
                assert key != same, f"two messages under way have the tag {half.tag:x}"
            if received and other.content is None and other.to == rank:
                assert not overlap(half.tensor, other.tensor), "two messages come to one place"
        if received and half.tensor.data_ptr() not in self.own[rank]:
            bytes_of(half.tensor, copy=False).fill_(POISON)
        self.halves.append(half)
        self.posted += 1
        coming = sum(h.to == rank and h.content is None for h in self.halves)
        self.longest = max(self.longest, coming)
        self._pause(rank)

    def wait(self, half: Half, rank: int) -> None:
        """Waits for the end of a message, once: gloo would wait for its next end."""
        assert not half.waited, f"rank {rank} waits twice"
        self._waits[rank] = half
        self._pause(rank)
        assert half.done
        half.waited, self._waits[rank] = True, None

    def over(self, rank: int) -> None:
        """Says that a rank's call has returned: its payload is the caller's again."""
        left = [h for h in self.halves if h.rank == rank and not h.waited]
        assert not left, f"rank {rank} has {len(left)} messages under way"

    def _pause(self, rank: int) -> None:
        self._back.release()
        self._gates[rank].acquire()
        if self.fault is not None:
            raise Stopped


class Base:
    """One rank's side of the network, as the runner wants it."""

    def __init__(self, network: Network, rank: int) -> None:
        self._network, self._rank = network, rank

    def send(self, tensors: Sequence[Any], peer: int, tag: int) -> Any:
        (tensor,) = tensors
        return self._begin(Half(self._rank, peer, tag, tensor, bytes_of(tensor)))

    def recv(self, tensors: Sequence[Any], peer: int, tag: int) -> Any:
        (tensor,) = tensors
        return self._begin(Half(peer, self._rank, tag, tensor))

    def _begin(self, half: Half) -> Any:
        self._network.post(half, self._rank)
        return Work(self._network, self._rank, half)


@dataclass
class Work:
    network: Network
    rank: int
    half: Half

    def wait(self, timeout: timedelta) -> bool:
        assert timeout == PATIENCE
        self.network.wait(self.half, self.rank)
        return True


def bytes_of(tensor: Any, *, copy: bool = True) -> Any:
    flat = tensor.view(torch.uint8)
    return flat.clone() if copy else flat


def span(tensor: Any) -> range:
    return range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)


def overlap(one: Any, other: Any) -> bool:
    a, b = span(one), span(other)
    return a.start < b.stop and b.start < a.stop


def parties(count: int) -> list[Layout]:
    return [Layout.whole(rank) for rank in range(count)]


Plan = tuple[list[Step], Layout]
"""The steps of a reduce-scatter, and who owns what behind them."""

How = tuple[int, bool | None, int | None]


def one_plan(draw: st.DrawFn, within: Sequence[Layout]) -> Plan:
    """A plan of one of the kinds there are among some parties."""
    count = len(within)
    kinds = ["staged", "ring", "weighted", "moved"] + ["folded"] * (count > 2)
    kind = draw(st.sampled_from(kinds))
    factors = draw(st.lists(st.integers(2, 5), min_size=1, max_size=3))
    if kind == "ring":
        step, layout = ring(within)
        return [step], layout
    if kind == "weighted":
        weights = st.lists(st.integers(0, 5), min_size=count, max_size=count).filter(any)
        step, layout = exchange(within, draw(weights))
        return [step], layout
    if kind == "moved":
        steps, layout = staged(within, factors)
        owners = list(dict.fromkeys(int(p.owners[0]) for p in within))
        moved = concentrated(layout, owners[: draw(st.integers(1, len(owners)))])
        return (steps, layout) if moved is None else ([*steps, moved[0]], moved[1])
    if kind == "folded":
        places = st.integers(0, count - 1)
        extras = draw(st.lists(places, min_size=1, max_size=count // 2, unique=True))
        return folded(within, extras, draw(st.sampled_from([(), tuple(factors)])))
    return staged(within, factors)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """A plan of its own kind below each switch and above them, or two such side by side.

    Some plans end in one shot.
    """
    count = draw(st.integers(2, 9))
    ranks = [parties(count)[rank] for rank in draw(st.permutations(range(count)))]
    plan = grown(draw, ranks)
    if draw(st.integers(0, 3)) == 0:
        other = grown(draw, draw(st.permutations(ranks)))
        share = draw(st.integers(1, SHARES - 1))
        plan = beside(plan, other, share, late=draw(st.booleans()))
    return Schedule.of(count, plan[0], draw(st.integers(1, 6)))


def grown(draw: st.DrawFn, ranks: Sequence[Layout]) -> Plan:
    cut = draw(st.integers(1, len(ranks)))
    below = [one_plan(draw, part) for part in (ranks[:cut], ranks[cut:]) if len(part) > 1]
    alone: list[Plan] = [([], part[0]) for part in (ranks[:cut], ranks[cut:]) if len(part) == 1]
    subtrees = [*below, *alone]
    if len(subtrees) == 1:
        return subtrees[0]
    steps = [
        Step.together([step for step in together if step is not None])
        for together in itertools.zip_longest(*(plan[0] for plan in subtrees))
    ]
    above = [layout for _, layout in subtrees]
    more, layout = staged(above, (2,), 1) if draw(st.booleans()) else one_plan(draw, above)
    return [*steps, *more], layout


@st.composite
def in_one_shot(draw: st.DrawFn) -> Schedule:
    """Stages of which the last ones, or all, are one-shot."""
    factors = draw(st.sampled_from([(2,), (3,), (7,), (9,), (2, 2), (2, 3), (4, 2), (2, 2, 2)]))
    count = prod(factors)
    ranks = [parties(count)[rank] for rank in draw(st.permutations(range(count)))]
    steps, _ = staged(ranks, factors, draw(st.integers(1, len(factors))))
    return Schedule.of(count, steps, draw(st.integers(1, 4)))


hows = st.tuples(
    st.integers(0, 2**32),
    st.sampled_from([True, False, None]),
    st.one_of(st.none(), st.integers(0, 8)),
)
"""The seed of a network, whether its messages come early, and its favourite."""

lengths = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]), st.sampled_from([31, 97, 211, 499])
)

NAMES = ("float64", "float32", "bfloat16", "int64")
COMBINES = {
    "sum": (lambda a, b: a.add_(b), True),
    "prod": (lambda a, b: a.mul_(b), False),
    "max": (lambda a, b: torch.maximum(a, b, out=a), False),
}


def fresh(ranks: int, length: int, dtype: Any, seed: int) -> list[Any]:
    """What each rank gives: a sum is wrong where one of these lacks or is there twice."""
    generator = torch.Generator().manual_seed(seed % 2**31)
    if dtype == torch.int64:
        whole = torch.randint(-(2**40), 2**40, (ranks, length), generator=generator)
    else:
        whole = torch.randn(ranks, length, generator=generator, dtype=torch.float64).to(dtype)
        # Of two zeros, a maximum is the one that came first.
        whole[:, ::5] = whole[:, ::5].sign() * 0.0
    return [row.clone() for row in whole]


def check(given: Sequence[Any], result: Any, op: str) -> None:
    """The result against numbers that are added (multiplied, compared) one after the other."""
    ranks, whole = len(given), torch.stack(list(given))
    if whole.dtype == torch.int64:
        slow = {"sum": whole.sum(0), "prod": whole.prod(0), "max": whole.amax(0)}[op]
        assert torch.equal(result, slow)
        return
    wide, eps = whole.double(), torch.finfo(whole.dtype).eps
    if op == "max":
        assert torch.equal(result.double(), wide.amax(0))
        return
    slow, room = (
        (wide.sum(0), wide.abs().sum(0)) if op == "sum" else (wide.prod(0), wide.prod(0).abs())
    )
    assert ((result.double() - slow).abs() <= 3 * ranks * eps * room).all()


@settings(max_examples=60)
@given(
    st.one_of(schedules(), in_one_shot()),
    hows,
    lengths,
    st.sampled_from(NAMES),
    st.sampled_from(["sum", "prod", "max"]),
)
def test_any_plan_gives_all_ranks_the_same_right_result(plan, how, length, name, op) -> None:
    run_all(plan, how, [length], getattr(torch, name), op)


@settings(max_examples=15)
@given(schedules(), hows, st.lists(st.sampled_from([1, 2, 8, 61, 193]), min_size=2, max_size=3))
def test_calls_follow_one_another_without_a_barrier(plan, how, several) -> None:
    """A rank that is done asks for the next call's messages while others are in this one."""
    run_all(plan, how, several, torch.float32, "sum")


def run_all(plan: Schedule, how: How, several: Sequence[int], dtype: Any, op: str) -> None:
    ranks, network = plan.ranks, Network(plan.ranks, *how)
    given = [fresh(ranks, length, dtype, how[0] + i) for i, length in enumerate(several)]
    # One tensor for each rank, so that the network knows what is the rank's own and what is room.
    whole = [torch.cat([rows[rank] for rows in given]) for rank in range(ranks)]
    network.own = [span(one) for one in whole]
    runners = [PlanRunner(Base(network, rank), PATIENCE) for rank in range(ranks)]
    combine = adding(*COMBINES[op])

    def work(rank: int) -> None:
        turns = PlannedRank(plan, rank).turns
        for call, part in enumerate(whole[rank].split(list(several))):
            runners[rank].run(turns, part, combine, call=call + 1, chunks=plan.chunks)
            network.over(rank)

    network.run(work)
    for one in whole[1:]:
        assert torch.equal(bytes_of(one), bytes_of(whole[0])), "ranks differ"
    for rows, part in zip(given, whole[0].split(list(several)), strict=True):
        check(rows, part, op)
    if any(several):
        assert network.posted


Shape = list["Shape"] | int


@st.composite
def trees(draw: st.DrawFn) -> NetworkTree:
    """Up to twelve hosts below up to three tiers of switches, with links of unequal rates."""
    nodes: list[Node] = []
    switches: list[str] = []
    links: list[Link] = []
    rates = draw(st.sampled_from([(1.0,), (1.0, 0.3), (1.0, 1.0005, 1.0), (0.1, 1.0, 1.0, 1.0)]))

    def add(count: int, depth: int, path: str) -> None:
        switches.append(path)
        cuts: list[int] = []
        if depth and count > 1:
            cuts = draw(st.lists(st.integers(1, count - 1), max_size=3, unique=True).map(sorted))
        if not cuts:
            for _ in range(count):
                name = f"n{len(nodes)}"
                links.append(link(name, path, rates[len(nodes) % len(rates)]))
                nodes.append(Node(name=name, device="cpu"))
            return
        for index, (begin, end) in enumerate(pairwise([0, *cuts, count])):
            links.append(link(f"{path}-{index}", path, draw(st.sampled_from([1.0, 10.0]))))
            add(end - begin, depth - 1, f"{path}-{index}")

    add(draw(st.integers(2, 12)), 2, "s")
    return NetworkTree.of_cluster(
        Cluster(nodes=tuple(nodes), switches=tuple(switches), links=tuple(links))
    )


def link(a: str, b: str, rate: float) -> Link:
    return Link(a=a, b=b, bandwidth_bytes_per_s=rate * 1e9, latency_s=0)


def planned(tree: NetworkTree, payload: float, order: Sequence[int] | None) -> Schedule:
    planner: Any = pytest.importorskip("trimtab.gentree")
    found: Schedule = planner.choose(tree, payload, CONSTANTS, order=order).schedule
    return found


CONSTANTS = Constants(alpha_s=1e-4, epsilon_ratio=1 / 16, delta_s_per_byte=1e-10)


@settings(max_examples=20)
@given(trees(), st.sampled_from([1e3, 1e5, 1e6, 1e9]), hows, lengths, st.data())
def test_the_planners_own_plans_for_any_network(tree, payload, how, length, data) -> None:
    order = data.draw(st.permutations(range(tree.size)))
    run_all(planned(tree, payload, order), how, [length], torch.float32, "sum")


@st.composite
def even(draw: st.DrawFn) -> Schedule:
    """Plans that leave each rank one N-th, as a rule."""
    count = draw(st.integers(2, 9))
    ranks = [parties(count)[rank] for rank in draw(st.permutations(range(count)))]
    factors = draw(st.sampled_from([(count,), (2, count), (3, count), (2, 2, count)]))
    steps = [ring(ranks)[0]] if draw(st.booleans()) else staged(ranks, factors)[0]
    return Schedule.of(count, steps)


@settings(max_examples=40)
@given(even(), hows, st.sampled_from([0, 1, 2, 7, 13, 211]), st.sampled_from(["float64", "int64"]))
def test_the_two_halves_of_a_plan_alone(plan, how, length, name) -> None:
    halves(plan, how, length, getattr(torch, name))


def halves(plan: Schedule, how: How, length: int, dtype: Any) -> bool:
    """Reduces and scatters, then gathers, by the two halves of a plan; says whether it has any."""
    ranks = [PlannedRank(plan, rank) for rank in range(plan.ranks)]
    places = ranks[0].places
    assert all(one.places == places for one in ranks)
    if places is None:
        return False
    assert sorted(places) == list(range(plan.ranks))
    given = fresh(plan.ranks, plan.ranks * length, dtype, how[0])
    for gathers in (False, True):
        whole = [row.clone() for row in given]
        network = Network(plan.ranks, *how)
        network.own = [span(one) for one in whole]
        run_half(network, ranks, whole, gathers=gathers)
        for rank, place in enumerate(places):
            block = slice(place * length, (place + 1) * length)
            if gathers:
                assert all(torch.equal(one[block], given[rank][block]) for one in whole)
            else:
                check([row[block] for row in given], whole[rank][block], "sum")
    return True


def run_half(
    network: Network, ranks: Sequence[PlannedRank], whole: Sequence[Any], *, gathers: bool
) -> None:
    runners = [PlanRunner(Base(network, rank), PATIENCE) for rank in range(len(ranks))]
    combine = adding(*COMBINES["sum"])

    def work(rank: int) -> None:
        turns = ranks[rank].gathering if gathers else ranks[rank].reducing
        runners[rank].run(turns, whole[rank], combine, call=1)
        network.over(rank)

    network.run(work)


BY_CHANCE: How = (0, None, None)


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8])
def test_rings_and_direct_exchanges_have_two_halves(count) -> None:
    for step in (ring(parties(count))[0], exchange(parties(count))[0]):
        assert halves(Schedule.of(count, [step]), BY_CHANCE, 11, torch.int64)


def test_parts_that_are_no_whole_units_still_are_whole_blocks() -> None:
    """The unit is no multiple of 49, so that stages of 7 cut a little before where they should."""
    assert halves(Schedule.of(49, staged(parties(49), (7, 7))[0]), BY_CHANCE, 3, torch.int64)


@pytest.mark.parametrize("weights", [(1001, 1000, 1000), (1, 1, 1)])
def test_shares_that_are_nearly_equal_count_as_unequal(weights) -> None:
    """Off by a thousandth, blocks of many elements would be cut at the wrong one."""
    plan = Schedule.of(3, [exchange(parties(3), weights)[0]])
    assert not halves(plan, BY_CHANCE, 200_000, torch.int64)


def test_what_ends_in_one_shot_has_no_halves() -> None:
    assert not halves(Schedule.of(4, staged(parties(4), (2, 2), 1)[0]), BY_CHANCE, 8, torch.int64)


@pytest.mark.parametrize("early", [True, False])
def test_the_next_round_is_asked_for_while_this_one_comes(early) -> None:
    """A ring of one message a round has two coming, and no more, however late they are."""
    network = Network(4, 0, early)
    plan = Schedule.of(4, [ring(parties(4))[0]])
    whole = fresh(4, 40, torch.float32, 0)
    network.own = [span(one) for one in whole]
    run_half(network, [PlannedRank(plan, rank) for rank in range(4)], whole, gathers=False)
    assert network.longest == 2


@pytest.mark.parametrize(
    ("several", "calls", "digests"),
    [((40, 36), (1, 1), (0, 0)), ((40, 40), (1, 2), (0, 0)), ((40, 40), (1, 1), (5, 6))],
)
def test_messages_of_calls_that_differ_do_not_meet(several, calls, digests) -> None:
    """A longer message than its receiver expects would end gloo, and every call after it."""
    network = Network(2, 0, None)
    plan = Schedule.of(2, [exchange(parties(2))[0]])
    whole = [torch.ones(length) for length in several]
    network.own = [span(one) for one in whole]
    runners = [PlanRunner(Base(network, rank), PATIENCE) for rank in range(2)]

    def work(rank: int) -> None:
        turns = PlannedRank(plan, rank).turns
        how = {"call": calls[rank], "what": digests[rank]}
        runners[rank].run(turns, whole[rank], adding(*COMBINES["sum"]), **how)

    with pytest.raises(AssertionError, match="no rank can go on"):
        network.run(work)


class Mute:
    """A base group whose peers are gone: when it is asked, or when it is waited for."""

    def __init__(self, at: str) -> None:
        self._at = at

    def _fail(self, at: str, peer: int) -> Any:
        if at == self._at:
            raise RuntimeError(f"\nrank {peer} closed\nand a trace")
        return self

    def send(self, tensors: Any, peer: int, tag: int) -> Any:
        return self._fail("send", peer)

    def recv(self, tensors: Any, peer: int, tag: int) -> Any:
        return self._fail("recv", peer)

    def wait(self, timeout: timedelta) -> bool:
        return bool(self._fail("wait", 2))


@pytest.mark.parametrize("at", ["send", "recv", "wait"])
def test_a_peer_that_is_gone_is_named(at) -> None:
    base: Any = Mute(at)
    plan = Schedule.of(3, [exchange([parties(3)[r] for r in (0, 2, 1)])[0]])
    runner, data = PlanRunner(base, PATIENCE), torch.ones(9)
    with pytest.raises(PeerLost, match=r"rank 2 does not answer: rank 2 closed$") as lost:
        runner.run(PlannedRank(plan, 0).turns, data, adding(*COMBINES["sum"]), call=1)
    assert lost.value.rank == 2


@settings(max_examples=20)
@given(st.integers(1, 9), st.sampled_from(NAMES), st.sampled_from(list(COMBINES)))
def test_operands_become_one_as_one_after_the_other_would(others, name, op) -> None:
    rows = fresh(others + 1, 17, getattr(torch, name), others)
    first = rows[0].clone()
    adding(*COMBINES[op])(first, torch.stack(rows[1:]))
    check(rows, first, op)


def test_half_precision_is_rounded_once() -> None:
    """Small operands would all be lost if each sum were rounded."""
    first = torch.tensor([256.0], dtype=torch.bfloat16)
    adding(*COMBINES["sum"])(first, torch.full((4, 1), 0.75, dtype=torch.bfloat16))
    assert first.item() == 260
