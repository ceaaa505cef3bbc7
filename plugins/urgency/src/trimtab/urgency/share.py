"""Guaranteed shares of the admissions, so that no kind of call starves."""

from __future__ import annotations

import heapq

from trimtab.core.policy import Call


class Share:
    """A lane's guaranteed share of the admissions while any of its calls wait.

    A bucket of at most one credit, which admissions of other lanes fill: so the lane's first call
    is promoted at once, and the next after its share's worth of others.

    Args:
        share: the guaranteed share, below 1.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._credit = 1.0 if share else 0.0
        self._joined = 0
        self._queue: list[tuple[float, int, Call]] = []
        self._members: dict[Call, int] = {}

    def join(self, call: Call, order_s: float) -> None:
        """A call waits in the lane, at its place in the lane's order."""
        self._joined += 1
        self._members[call] = self._joined
        heapq.heappush(self._queue, (order_s, self._joined, call))

    def leave(self, call: Call) -> None:
        """A call waits in the lane no more."""
        self._members.pop(call, None)
        if len(self._queue) > 2 * len(self._members) + 64:
            self._queue = [e for e in self._queue if self._members.get(e[2]) == e[1]]
            heapq.heapify(self._queue)

    def note_other(self) -> None:
        """A call of another lane was admitted."""
        gain = self.share / (1 - self.share)
        self._credit = min(1.0 + gain, self._credit + gain)

    def take_due(self) -> Call | None:
        """Takes the lane's first call out, if the lane has had less than its share."""
        if self._credit < 1 - 1e-9:
            return None
        while self._queue:
            _, joined, call = heapq.heappop(self._queue)
            if self._members.get(call) == joined:
                del self._members[call]
                self._credit -= 1
                return call
        return None
