"""A plan of AllReduce as flows that share links, event by event: GenModel formulated once more.

Each rank goes through its own programme. A message flows once both sides have come to it; the flows
on a link share it max-min fairly; a link's time for a byte grows with what meets in its queue at
that moment; a rank goes on when its messages are there and its sums are made. So no step waits for
the slowest of all ranks, as `trimtab.core.cost.PlanEvaluator` has it, and where all ranks do alike
both give the same time.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trimtab.core.collectives.network_tree import NetworkTree
from trimtab.core.collectives.programme import Turn, programme, waves
from trimtab.core.collectives.schedule import UNIT, Schedule
from trimtab.core.cost.plan_cost import Constants, memory_s_per_byte
from trimtab.core.errors import BadInput

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_SAME = 1e-9
"""What of a message may be left, and by what share two times may differ, to count as the same."""

_Key = tuple[int, ...]


def simulated_s(
    schedule: Schedule,
    tree: NetworkTree,
    constants: Constants,
    payload_bytes: float,
    *,
    order: Sequence[int] | None = None,
) -> float:
    """How long an AllReduce takes.

    Args:
        schedule: the plan, with the chunks that follow one another.
        tree: the network.
        constants: of GenModel.
        payload_bytes: on each rank.
        order: the leaf of each rank; the tree's own order by default.

    Raises:
        BadInput: the constants tell of processors that all ranks share, which is not simulated.
    """
    if constants.processors:
        raise BadInput("shared processors are not simulated", fix="leave out processors")
    leaves = list(range(tree.size)) if order is None else list(order)
    return _Simulation(schedule, tree, constants, payload_bytes, leaves).run()


@dataclass
class _Flow:
    """A message under way: the bytes left, and the links of its way from the sender on."""

    source: int
    to: int
    left: float
    way: Ints


@dataclass
class _Rank:
    """Where a rank is in its programme.

    Attributes:
        waves: the turns that are taken at the same time, each with its chunk.
        wave: which of them is under way.
        open: messages of the wave that are not over.
    """

    waves: list[list[tuple[int, Turn]]]
    wave: int = -1
    open: int = 0


@dataclass
class _Meeting:
    """The sides of a message that have come to it."""

    sides: set[str] = field(default_factory=set)


class _Simulation:
    def __init__(
        self,
        schedule: Schedule,
        tree: NetworkTree,
        constants: Constants,
        payload_bytes: float,
        leaves: Sequence[int],
    ) -> None:
        self._tree, self._constants, self._leaves = tree, constants, leaves
        self._bytes_per_unit = payload_bytes / schedule.chunks / UNIT
        self._ranks = [
            _Rank([[(c, turns[i]) for c, i in wave] for wave in waves(turns, schedule.chunks)])
            for turns in (programme(schedule, rank) for rank in range(schedule.ranks))
        ]
        self._memory = memory_s_per_byte(tree, constants)
        self._links = _Links(tree, constants)
        self._met: dict[_Key, _Meeting] = {}
        self._flows: list[_Flow] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = iter(range(1 << 60))
        self._now_s = self._end_s = 0.0

    def run(self) -> float:
        for rank in range(len(self._ranks)):
            self._begin(rank)
        while self._events or self._flows:
            rates = self._links.rates(self._flows)
            over_s = min(
                (f.left / rate for f, rate in zip(self._flows, rates, strict=True)), default=np.inf
            )
            next_s = self._events[0][0] if self._events else np.inf
            at_s = min(self._now_s + over_s, next_s)
            for flow, rate in zip(self._flows, rates, strict=True):
                flow.left -= rate * (at_s - self._now_s)
            self._now_s = at_s
            self._finish(rates)
            while self._events and self._events[0][0] <= at_s * (1 + _SAME):
                heapq.heappop(self._events)[2]()
        return self._end_s

    def _finish(self, rates: Floats) -> None:
        """Ends the flows that are over, or would be in less than a moment."""
        moment_s = _SAME * self._now_s
        over = [f.left <= rate * moment_s for f, rate in zip(self._flows, rates, strict=True)]
        ended = [flow for flow, done in zip(self._flows, over, strict=True) if done]
        self._flows = [flow for flow, done in zip(self._flows, over, strict=True) if not done]
        for flow in ended:
            self._close(flow.source)
            self._close(flow.to)

    def _after(self, delay_s: float, then: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now_s + delay_s, next(self._numbers), then))

    def _begin(self, number: int) -> None:
        """Goes on to a rank's next wave, if there is one."""
        rank = self._ranks[number]
        rank.wave += 1
        if rank.wave == len(rank.waves):
            self._end_s = max(self._end_s, self._now_s)
            return
        messages = sum(len(turn.sends) + len(turn.receives) for _, turn in rank.waves[rank.wave])
        begins_s = self._constants.alpha_s + messages * self._constants.message_s
        self._after(begins_s, lambda: self._post(number))

    def _post(self, number: int) -> None:
        rank = self._ranks[number]
        active = rank.waves[rank.wave]
        rank.open = sum(len(turn.sends) + len(turn.receives) for _, turn in active)
        for chunk, turn in active:
            gathers = int(turn.phase == "all-gather")
            at = (chunk, gathers, turn.step, turn.round)
            for send in turn.sends:
                self._meet("sends", (*at, number, send.peer, send.begin, send.end))
            for receive in turn.receives:
                self._meet("receives", (*at, receive.peer, number, receive.begin, receive.end))

    def _meet(self, side: str, key: _Key) -> None:
        """Notes that one side has come to a message; the second one sets it going."""
        meeting = self._met.setdefault(key, _Meeting())
        meeting.sides.add(side)
        if len(meeting.sides) < 2:
            return
        del self._met[key]
        source, to, begin, end = key[-4:]
        way, latency_s = self._links.way(self._leaves[source], self._leaves[to])
        flow = _Flow(source, to, (end - begin) * self._bytes_per_unit, way)
        self._after(latency_s, lambda: self._flows.append(flow))

    def _close(self, number: int) -> None:
        """Notes that a message of a rank is over; behind the last one come its sums."""
        rank = self._ranks[number]
        rank.open -= 1
        if rank.open == 0:
            sums_s = sum(self._sums_s(number, turn) for _, turn in rank.waves[rank.wave])
            self._after(sums_s, lambda: self._begin(number))

    def _sums_s(self, number: int, turn: Turn) -> float:
        gamma = self._constants.gamma_s_per_byte
        delta = float(self._memory[self._leaves[number]])
        per_unit = sum(
            (s.end - s.begin) * ((len(s.operands) - 1) * gamma + (len(s.operands) + 1) * delta)
            for s in turn.sums
        )
        return per_unit * self._bytes_per_unit


class _Links:
    """The links of a tree: up from each point, and, behind those, down to each."""

    def __init__(self, tree: NetworkTree, constants: Constants) -> None:
        self._tree, self._constants = tree, constants
        beta = np.concatenate([tree.up_s_per_byte, tree.down_s_per_byte]) * constants.beta_ratio
        self._beta = np.maximum(beta, 1e-30)
        self._ways: dict[tuple[int, int], tuple[Ints, float]] = {}

    def way(self, source: int, to: int) -> tuple[Ints, float]:
        """The links between two leaves, and the latency of all of them."""
        if (source, to) not in self._ways:
            ups, downs = self._above(source), self._above(to)
            shared = set(ups) & set(downs)
            up = [point for point in ups if point not in shared]
            down = [point for point in reversed(downs) if point not in shared]
            latency_s = float(self._tree.latency_s[up + down].sum())
            links = [*up, *(point + len(self._tree.names) for point in down)]
            self._ways[source, to] = np.array(links, dtype=np.int64), latency_s
        return self._ways[source, to]

    def _above(self, leaf: int) -> list[int]:
        """A leaf's point and those above it, without the root."""
        point, chain = self._tree.leaves[leaf], []
        while self._tree.parents[point] >= 0:
            chain.append(point)
            point = self._tree.parents[point]
        return chain

    def rates(self, flows: Sequence[_Flow]) -> Floats:
        """The bytes per second of each flow: max-min fair shares of the links as they are now."""
        rates = np.zeros(len(flows))
        if not flows:
            return rates
        lengths = [len(flow.way) for flow in flows]
        flow_of = np.repeat(np.arange(len(flows)), lengths)
        link_of = np.concatenate([flow.way for flow in flows])
        capacity = 1 / self._seconds_per_byte(flows, flow_of, link_of)
        left = capacity
        going = np.ones(len(flows), dtype=np.bool_)
        while going.any():
            on = going[flow_of]
            sharing = np.bincount(link_of[on], minlength=len(left))
            share = np.divide(left, sharing, out=np.full(len(left), np.inf), where=sharing > 0)
            least = share.min()
            full = share <= least * (1 + _SAME)
            stopped = np.unique(flow_of[on & full[link_of]])
            rates[stopped] = least
            going[stopped] = False
            taken = np.bincount(link_of, rates[flow_of] * ~going[flow_of], minlength=len(left))
            left = np.maximum(capacity - taken, 1e-300)
        return rates

    def _seconds_per_byte(self, flows: Sequence[_Flow], flow_of: Ints, link_of: Ints) -> Floats:
        """What a byte takes on each link with the incast that is there now."""
        constants = self._constants
        widths = np.ones(len(self._beta))
        first = np.append(True, flow_of[1:] != flow_of[:-1])
        behind = ~first  # a rank's own link up has no queue before it
        before = np.roll(link_of, 1)
        if constants.width == "sources":
            senders = np.array([flow.source for flow in flows])[flow_of]
            pairs = np.unique(np.stack([link_of, senders])[:, behind], axis=1)
            np.add.at(widths, pairs[0], 1.0)
        else:
            pairs = np.unique(np.stack([link_of, before])[:, behind], axis=1)
            rate = self._beta[pairs[0]] / self._beta[pairs[1]]
            met = np.zeros(len(widths))
            np.add.at(met, pairs[0], np.ones(len(rate)) if constants.width == "ports" else rate)
            widths += np.ceil(met - 1e-9)
        excess = np.maximum(widths - constants.incast_threshold, 0)
        seconds: Floats = self._beta * (1 + excess * constants.epsilon_ratio)
        return seconds
