"""Which workflows to save when not all can be in time."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Hashable, Iterable
from typing import TypeVar

W = TypeVar("W", bound=Hashable)

Candidate = tuple[float, float, W]
"""A workflow's deadline, its expected remaining work in seconds, and the workflow itself."""

_PERIOD_S = 0.25
_PERIOD_S_PER_CALL = 0.0005
"""A review looks at every call, so many calls are reviewed seldom: 0.75 s apart at 1,000."""

_FEWEST_STAGES = 8
_MOST_STAGES = 64


def savable(candidates: Iterable[Candidate[W]], now_s: float, rate: float) -> set[W]:
    """The most workflows that can all be in time: the algorithm of Moore and Hodgson (1968).

    Taken by deadline; whenever one would be late, the longest of those taken so far is given up.

    Args:
        candidates: the workflows that could be in time if they were alone.
        now_s: the present.
        rate: seconds of work done per second, over all workflows together.
    """
    taken: list[tuple[float, int, W]] = []
    work_s = 0.0
    by_deadline = sorted(candidates, key=lambda candidate: candidate[0])
    for number, (deadline_s, remaining_s, workflow) in enumerate(by_deadline):
        heapq.heappush(taken, (-remaining_s, number, workflow))
        work_s += remaining_s
        if now_s + work_s / rate > deadline_s:
            work_s += heapq.heappop(taken)[0]
    return {workflow for _, _, workflow in taken}


class Triage:
    """Reviews from time to time which workflows to save, at the pace the queue is seen to have.

    The pace is measured, not modelled: what slows the stages of timely workflows down (a full
    batch, siblings, what other calls take) is in it. Only periods count in which such calls queued
    throughout; until a few stages have ended in them, nothing is given up.
    """

    def __init__(self) -> None:
        self.due_s = math.inf
        """When the next review is due."""
        self._work_s = self._elapsed_s = self._stages = 0.0
        self._began_s: float | None = None
        self._new_work_s = 0.0
        self._new_stages = 0
        self._spare = False

    def expect(self, now_s: float) -> None:
        """There is something to review."""
        self.due_s = min(self.due_s, now_s + _PERIOD_S)

    def note_stage(self, expected_s: float) -> None:
        """A stage of a timely workflow has ended."""
        self._new_work_s += expected_s
        self._new_stages += 1

    def note_spare(self) -> None:
        """A place in the batch went to a call that gives way to timely ones: none was waiting."""
        self._spare = True

    def review(
        self, candidates: Collection[Candidate[W]], now_s: float, *, calls: int, queued: bool
    ) -> set[W]:
        """The workflows to save.

        Args:
            candidates: see `savable`.
            now_s: the present.
            calls: how many calls were looked at for this review.
            queued: whether calls of timely workflows wait.
        """
        self._close_period(now_s, queued)
        self.due_s = math.inf
        if candidates:
            self.due_s = now_s + _PERIOD_S + _PERIOD_S_PER_CALL * calls
        if self._stages < _FEWEST_STAGES or self._work_s <= 0:
            return {workflow for _, _, workflow in candidates}
        return savable(candidates, now_s, self._work_s / self._elapsed_s)

    def _close_period(self, now_s: float, queued: bool) -> None:
        if self._began_s is not None and queued and not self._spare:
            self._work_s += self._new_work_s
            self._elapsed_s += now_s - self._began_s
            self._stages += self._new_stages
            while self._stages > _MOST_STAGES:  # the recent past counts most
                self._work_s /= 2
                self._elapsed_s /= 2
                self._stages /= 2
        self._began_s = now_s if queued else None
        self._new_work_s, self._new_stages, self._spare = 0.0, 0, False
