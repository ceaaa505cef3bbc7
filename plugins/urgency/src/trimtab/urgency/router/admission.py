"""The queue in front of all servers: bounded, ordered by urgency, and fair to the tenants.

A call waits here while every server is saturated, and not in a server's queue, where a more urgent
one that comes later could not pass it any more, nor could it go to whichever server is free first.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from trimtab.core.policy import Call, Outcome
from trimtab.urgency.dispatch import Rule
from trimtab.urgency.policy import Key, UrgencyPolicy
from trimtab.urgency.router.backends import Backend, PromptedCall
from trimtab.urgency.router.config import Limits
from trimtab.urgency.router.journeys import Journey
from trimtab.urgency.router.refusals import Refusal
from trimtab.urgency.router.tenants import Tenant

_OFFERS = 64
"""How many calls of the queue's head are offered in a round while a server has a free seat."""
_LEAST_CHARGE_S = 0.001
_PACE_WEIGHT = 0.1


@dataclass(slots=True, eq=False)
class Ticket:
    """A call's way through the router.

    Attributes:
        call: as the policy that orders the queue sees it.
        routed: as the dispatch rule sees it.
        tenant: whose it is.
        journey: the workflow it belongs to.
        number: in the order of arrival.
        key: its place in the queue.
        turn: how often it was given a place in the queue; former places are void.
        waits: whether it is in the queue.
        begun: whether its server has begun to answer.
        place: done when a server was found.
        backend: the server it was sent to.
        sent_s: when.
        avoided: servers that have failed it.
        charged_s: service that its tenant was charged in advance.
    """

    call: Call
    routed: PromptedCall
    tenant: Tenant
    journey: Journey
    number: int = 0
    key: Key = (0.0, 0.0)
    turn: int = 0
    waits: bool = False
    begun: bool = False
    place: asyncio.Future[Backend] | None = None
    backend: Backend | None = None
    sent_s: float = 0.0
    avoided: set[Backend] = field(default_factory=set)
    charged_s: float = 0.0


Entry = tuple[Key, int, int, Ticket]


class _Line:
    """The waiting calls of one tenant, the most urgent first."""

    def __init__(self) -> None:
        self._heap: list[Entry] = []

    def push(self, ticket: Ticket) -> None:
        ticket.turn += 1
        heapq.heappush(self._heap, (ticket.key, ticket.number, ticket.turn, ticket))

    def head(self) -> Ticket | None:
        """The most urgent call."""
        while self._heap:
            if _valid(self._heap[0]):
                return self._heap[0][3]
            heapq.heappop(self._heap)
        return None

    def tidy(self, waiting: int) -> None:
        """Drops the void places when they are many."""
        if len(self._heap) > 2 * waiting + 64:
            self._heap = [entry for entry in self._heap if _valid(entry)]
            heapq.heapify(self._heap)


def _valid(entry: Entry) -> bool:
    _, _, turn, ticket = entry
    return ticket.waits and ticket.turn == turn


class AdmissionQueue:
    """The calls that wait, and the round in which servers are found for them.

    Args:
        policy: orders them.
        rule: chooses the servers.
        backends: all servers.
        tenants: all tenants.
        limits: what is bounded.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        policy: UrgencyPolicy,
        rule: Rule,
        backends: Sequence[Backend],
        tenants: Sequence[Tenant],
        limits: Limits,
        clock: Callable[[], float],
    ) -> None:
        self.rule = rule
        self._policy, self._backends, self._limits, self._clock = policy, backends, limits, clock
        self._lines = {tenant: _Line() for tenant in tenants}
        self._tickets: dict[Call, Ticket] = {}
        self._waiting: dict[Ticket, None] = {}
        self._numbers = count(1)
        self._pace_s = 1.0
        self._last_end_s = clock()
        self._out_since_s: float | None = None
        most = limits.queued if len(tenants) == 1 else limits.queued * limits.queued_share
        self._most_of_tenant = max(1, math.ceil(most))

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def waiting(self) -> list[Ticket]:
        """The calls that wait, the most urgent first."""
        return sorted(self._waiting, key=lambda ticket: (ticket.key, ticket.number))

    def retry_after_s(self) -> float:
        """When a place in a full queue may be free, by the pace of the last calls."""
        return min(60.0, max(1.0, self._pace_s * max(1.0, 0.1 * len(self._waiting))))

    def enter(self, ticket: Ticket) -> None:
        """Takes a call in; it may have found its server when this returns.

        Raises:
            Refusal: the queue is full, or its tenant has filled its part of it.
        """
        full = len(self._waiting) >= self._limits.queued
        if full or ticket.tenant.waiting >= self._most_of_tenant:
            whose = "The queue" if full else "Your part of the queue"
            raise Refusal(429, f"{whose} is full.", retry_after_s=self.retry_after_s())
        now_s = self._clock()
        ticket.number = next(self._numbers)
        self._policy.on_arrival(ticket.call, now_s)
        self._tickets[ticket.call] = ticket
        self._queue(ticket, now_s)
        self.pump()

    async def place(self, ticket: Ticket) -> Backend:
        """The server of a call, when one is found.

        Raises:
            Refusal: none was found in the time that is allowed.
        """
        assert ticket.place is not None
        if ticket.place.done():
            return ticket.place.result()
        try:
            async with asyncio.timeout(self._limits.wait_s):
                return await ticket.place
        except TimeoutError:
            message = f"No server was free within {self._limits.wait_s:g} s."
            raise Refusal(503, message, retry_after_s=self.retry_after_s()) from None

    def started(self, ticket: Ticket) -> None:
        """A call's server has read its prompt: another one may follow."""
        if ticket.backend is not None and not ticket.begun:
            ticket.begun = True
            ticket.backend.backlog.started(ticket.routed, self._clock())
            ticket.backend.saw_prompt(ticket.routed)
            if self._waiting:
                self.pump()

    def give_back(self, ticket: Ticket) -> None:
        """A call's server has failed it: it waits again, ahead of those that were never sent."""
        assert ticket.backend is not None
        ticket.avoided.add(ticket.backend)
        self._release(ticket, 0.0)
        ticket.call.admitted_s = None
        self._queue(ticket, self._clock())
        self.pump()

    def leave(self, ticket: Ticket, outcome: Outcome, output_tokens: int) -> None:
        """A call is over, wherever it was."""
        now_s = self._clock()
        self._unqueue(ticket)
        del self._tickets[ticket.call]
        if ticket.backend is not None:
            self._release(ticket, now_s - ticket.sent_s)
            self._pace_s += _PACE_WEIGHT * (now_s - self._last_end_s - self._pace_s)
            self._last_end_s = now_s
        ticket.call.output_tokens = output_tokens
        self._policy.on_finish(ticket.call, outcome, now_s)
        self.pump()

    def tick(self) -> None:
        """What time alone brings about: new keys, servers that are back, an outage too long."""
        now_s = self._clock()
        if any(backend.takes_calls or backend.backlog.own for backend in self._backends):
            self._out_since_s = None
        elif self._out_since_s is None:
            self._out_since_s = now_s
        if self.is_out(now_s):
            for ticket in list(self._waiting):
                self._refuse_outage(ticket)
        self.pump()

    def is_out(self, now_s: float) -> bool:
        """Whether no server was there for longer than calls are kept waiting."""
        return self._out_since_s is not None and now_s - self._out_since_s >= self._limits.outage_s

    def pump(self) -> None:
        """A round: the most urgent calls are offered to the servers that are up."""
        now_s = self._clock()
        if not self._waiting:
            self._policy.stale.clear()
            return
        if self._policy.next_timer_s() <= now_s:
            self._policy.on_timer(now_s)
        self._follow_keys(now_s)
        self.rule.begin_round()
        held: list[Ticket] = []
        while len(held) < _OFFERS and not self._closed(now_s):
            ticket = self._next()
            if ticket is None:
                break
            self._unqueue(ticket)
            if not self._send(ticket, now_s):
                held.append(ticket)
        for ticket in held:
            self._requeue(ticket)

    def _closed(self, now_s: float) -> bool:
        """Whether any call would be held."""
        able = [backend.backlog for backend in self._backends if backend.takes_calls]
        return not able or self.rule.closed(able, now_s)

    def _next(self) -> Ticket | None:
        """The most urgent call, or that of a tenant which has had too little of the service."""
        heads = [
            (tenant, head)
            for tenant, line in self._lines.items()
            if tenant.waiting and tenant.may_run and (head := line.head()) is not None
        ]
        if not heads:
            return None
        urgent = min(heads, key=lambda pair: (pair[1].key, pair[1].number))
        if len(heads) == 1:
            return urgent[1]
        least = min(heads, key=lambda pair: pair[0].served_s)
        behind = urgent[0].served_s - least[0].served_s > self._limits.fair_lag_s
        return least[1] if behind else urgent[1]

    def _send(self, ticket: Ticket, now_s: float) -> bool:
        """Sends a call to the server that the rule chooses, if it chooses one."""
        able = [backend for backend in self._backends if backend.takes_calls]
        if not able:
            return False
        # A server that has failed it is better than none.
        able = [backend for backend in able if backend not in ticket.avoided] or able
        chosen = self.rule.choose(ticket.routed, [b.backlog for b in able], now_s)
        if chosen is None:
            return False
        backend = able[chosen]
        expected_s = backend.backlog.predict(ticket.routed).total_s
        ticket.backend, ticket.sent_s, ticket.begun = backend, now_s, False
        ticket.charged_s = max(_LEAST_CHARGE_S, expected_s)
        ticket.call.admitted_s = now_s
        backend.backlog.sent(ticket.routed, now_s)
        backend.tickets[ticket] = None
        self._policy.on_admission(ticket.call, now_s)
        ticket.tenant.charge(ticket.charged_s)
        if ticket.place is not None and not ticket.place.done():
            ticket.place.set_result(backend)
        return True

    def _release(self, ticket: Ticket, service_s: float) -> None:
        """Takes a call off its server, and mends what its tenant was charged."""
        backend = ticket.backend
        assert backend is not None
        backend.backlog.ended(ticket.routed, self._clock())
        del backend.tickets[ticket]
        ticket.backend = None
        ticket.tenant.settle(ticket.charged_s, service_s)

    def _queue(self, ticket: Ticket, now_s: float) -> None:
        ticket.place = asyncio.get_running_loop().create_future()
        ticket.key = self._policy.key(ticket.call, now_s)
        if not ticket.tenant.is_here:
            ticket.tenant.arrive(self._lines)
        self._requeue(ticket)

    def _requeue(self, ticket: Ticket) -> None:
        ticket.waits = True
        ticket.tenant.waiting += 1
        self._waiting[ticket] = None
        self._lines[ticket.tenant].push(ticket)

    def _unqueue(self, ticket: Ticket) -> None:
        if ticket.waits:
            ticket.waits = False
            ticket.tenant.waiting -= 1
            del self._waiting[ticket]
            self._lines[ticket.tenant].tidy(ticket.tenant.waiting)

    def _follow_keys(self, now_s: float) -> None:
        """Moves the calls whose keys the policy has made anew."""
        for call in self._policy.stale:
            ticket = self._tickets.get(call)
            if ticket is not None and ticket.waits:
                ticket.key = self._policy.key(call, now_s)
                self._lines[ticket.tenant].push(ticket)
        self._policy.stale.clear()

    def _refuse_outage(self, ticket: Ticket) -> None:
        if ticket.place is not None and not ticket.place.done():
            message = "No server is up."
            refusal = Refusal(503, message, retry_after_s=self._limits.outage_s or 1.0)
            ticket.place.set_exception(refusal)
        self._unqueue(ticket)
