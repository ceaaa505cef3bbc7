"""Guaranteed shares of the admissions, so that no kind of call starves."""

from __future__ import annotations

from trimtab.core.policy import Call
from trimtab.urgency.by_time import ByTime


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
        self._waiting: ByTime[Call] = ByTime()

    def join(self, call: Call, order_s: float) -> None:
        """A call waits in the lane, at its place in the lane's order."""
        self._waiting.put(call, order_s)

    def leave(self, call: Call) -> None:
        """A call waits in the lane no more."""
        self._waiting.discard(call)

    def note_other(self) -> None:
        """A call of another lane was admitted."""
        gain = self.share / (1 - self.share)
        self._credit = min(1.0 + gain, self._credit + gain)

    def take_due(self) -> Call | None:
        """Takes the lane's first call out, if the lane has had less than its share."""
        if self._credit < 1 - 1e-9 or not len(self._waiting):
            return None
        self._credit -= 1
        return self._waiting.pop()
