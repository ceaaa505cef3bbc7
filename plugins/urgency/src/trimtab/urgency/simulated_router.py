"""A router on the simulator: a dispatch rule, and the order of the calls that it holds."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import replace

from trimtab.core.policy import Call, Outcome, ServingPolicy
from trimtab.core.simulate.dispatch import Sends
from trimtab.core.workload import Request
from trimtab.urgency.dispatch import Backlog, RoutedCall, Rule

_LOOKAHEAD = 32
"""Held calls that a round may leave held before it ends."""

_Entry = tuple[tuple[float, ...], int]


class HoldingRouter:
    """Sends calls where its rule says, and offers held ones in the order of its policy.

    Args:
        rule: chooses the instances.
        backlogs: the instances by number.
        estimate: what the router expects of a request; when its workflow is due is added.
        order: the order of held calls; by arrival without one.
    """

    def __init__(
        self,
        rule: Rule,
        backlogs: Sequence[Backlog],
        estimate: Callable[[Request], RoutedCall],
        order: ServingPolicy | None = None,
    ) -> None:
        self._rule, self._backlogs = rule, backlogs
        self._estimate, self._order = estimate, order
        self._calls: dict[str, tuple[Request, RoutedCall, Call]] = {}
        self._numbers: dict[Call, int] = {}
        self._requests: list[Request] = []
        self._held: list[_Entry] = []
        self._entries: dict[int, _Entry] = {}
        self._sent_to: dict[str, Backlog] = {}
        self._began_s: dict[str, float] = {}

    def on_arrival(self, request: Request, now_s: float) -> Sends:
        """Puts the request with the held ones and begins a round."""
        said = {
            "workflow": request.workflow,
            "stage": request.stage,
            "deadline_s": request.deadline_s,
        }
        fields = {name: value for name, value in said.items() if value is not None}
        call = Call(request.request_id, now_s, request.prompt_tokens, 0, fields)
        routed = replace(self._estimate(request), due_s=self._due_s(request, now_s))
        self._calls[request.request_id] = (request, routed, call)
        self._numbers[call] = len(self._requests)
        self._requests.append(request)
        if self._order is not None:
            self._order.on_arrival(call, now_s)
        self._hold(call, now_s)
        return self._round(now_s)

    def on_first_token(self, request: Request, now_s: float) -> Sends:
        """Notes that its prompt is done."""
        self._sent_to[request.request_id].started(self._calls[request.request_id][1], now_s)
        return self._round(now_s)

    def on_end(self, request: Request, now_s: float) -> Sends:
        """Notes that it is done."""
        _, routed, call = self._calls.pop(request.request_id)
        self._sent_to.pop(request.request_id).ended(routed, now_s)
        if self._order is not None:
            call.output_tokens = request.output_tokens
            self._order.on_finish(call, Outcome.COMPLETED, now_s)
        del self._numbers[call]
        return self._round(now_s)

    def _due_s(self, request: Request, now_s: float) -> float:
        if request.deadline_s is None:
            return math.inf
        name = request.workflow or request.request_id
        return self._began_s.setdefault(name, now_s) + request.deadline_s

    def _round(self, now_s: float) -> Sends:
        if not self._held:
            return []
        self._follow_order(now_s)
        self._rule.begin_round()
        sends: list[tuple[Request, int]] = []
        refused = 0
        for entry in list(self._held):
            if self._rule.closed(self._backlogs, now_s):
                break
            request, routed, call = self._calls[self._requests[entry[1]].request_id]
            chosen = self._rule.choose(routed, self._backlogs, now_s)
            if chosen is None:
                refused += 1
                if refused == _LOOKAHEAD:
                    break
                continue
            self._send(request, routed, call, self._backlogs[chosen], now_s)
            sends.append((request, self._backlogs[chosen].number))
        return sends

    def _send(
        self, request: Request, routed: RoutedCall, call: Call, backlog: Backlog, now_s: float
    ) -> None:
        self._release(call)
        backlog.sent(routed, now_s)
        self._sent_to[request.request_id] = backlog
        call.admitted_s = now_s
        if self._order is not None:
            self._order.on_admission(call, now_s)

    def _follow_order(self, now_s: float) -> None:
        """Runs the policy's timers and asks again for the keys that have changed."""
        order = self._order
        if order is None:
            return
        if order.next_timer_s() <= now_s:
            order.on_timer(now_s)
        for call in order.stale:
            if self._numbers.get(call) in self._entries:
                self._release(call)
                self._hold(call, now_s)
        order.stale.clear()

    def _hold(self, call: Call, now_s: float) -> None:
        key = () if self._order is None else self._order.key(call, now_s)
        number = self._numbers[call]
        entry = (key if isinstance(key, tuple) else (key,), number)
        self._entries[number] = entry
        insort(self._held, entry)

    def _release(self, call: Call) -> None:
        entry = self._entries.pop(self._numbers[call])
        del self._held[bisect_left(self._held, entry)]
