"""Which workflows to save when not all can be in time."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

from trimtab.urgency.by_time import ByTime

W = TypeVar("W", bound=Hashable)

Candidate = tuple[float, float, W]
"""A workflow's deadline, its expected remaining work in seconds, and the workflow itself."""

_PERIOD_S = 0.25
_PERIOD_S_PER_WORKFLOW = 0.0005
"""A review looks at every workflow, so many are reviewed seldom: 0.75 s apart at 1,000."""

_FEWEST_STAGES = 8
_MOST_STAGES = 64


def savable(candidates: Iterable[Candidate[W]], now_s: float, rate: float) -> set[W]:
    """The most workflows that can all be in time; see `Selection`.

    Args:
        candidates: the workflows that could be in time if they were alone.
        now_s: the present.
        rate: seconds of work done per second, over all workflows together.
    """
    selection: Selection[W] = Selection(now_s, rate)
    for deadline_s, remaining_s, workflow in sorted(candidates, key=lambda c: c[0]):
        selection.consider(deadline_s, remaining_s, workflow)
    return {workflow for workflow in selection.considered if workflow not in selection.given_up}


class Selection(Generic[W]):
    """The most workflows that can all be in time: the algorithm of Moore and Hodgson (1968).

    Taken by deadline; whenever one would be late, the longest of those taken so far is given up.

    Args:
        now_s: the present.
        rate: seconds of work done per second, over all workflows together; infinite gives up none.
    """

    def __init__(self, now_s: float, rate: float) -> None:
        self.considered: deque[W] = deque()
        self.given_up: set[W] = set()
        self._now_s, self._rate = now_s, rate
        self._taken: list[tuple[float, int, W]] = []
        self._work_s = 0.0

    @property
    def drain_s(self) -> float:
        """How long the work of those taken takes; infinite while the rate is unknown."""
        return math.inf if math.isinf(self._rate) else self._work_s / self._rate

    def consider(self, deadline_s: float, remaining_s: float, workflow: W) -> None:
        """Takes a workflow in whose deadline is no earlier than those of all before it."""
        heapq.heappush(self._taken, (-remaining_s, len(self.considered), workflow))
        self.considered.append(workflow)
        self._work_s += remaining_s
        if self._now_s + self._work_s / self._rate > deadline_s:
            least_s, _, longest = heapq.heappop(self._taken)
            self._work_s += least_s
            self.given_up.add(longest)

    def take_verdicts(self, limit: int) -> list[tuple[W, bool]]:
        """Takes some workflows out, the earliest deadlines first, each with whether it is saved.

        Nothing may be considered afterwards: what is no longer needed goes with them, since to free
        thousands of entries at once takes a millisecond.
        """
        some = [self.considered.popleft() for _ in range(min(limit, len(self.considered)))]
        del self._taken[-limit:]
        verdicts = [(workflow, workflow not in self.given_up) for workflow in some]
        self.given_up.difference_update(some)
        return verdicts


class Triage(Generic[W]):
    """Reviews from time to time which workflows to save, at the pace the queue is seen to have.

    The pace is measured, not modelled: what slows the stages of timely workflows down (a full
    batch, siblings, what other calls take) is in it. Only periods count in which such calls queued
    throughout; until a few stages have ended in them, nothing is given up.

    A review is made in parts, so that no step of the engine waits for a long one: the workflows are
    looked at in the order of their deadlines, then what was decided is handed on.
    """

    def __init__(self) -> None:
        self.due_s = math.inf
        """When the next review, or its next part, is due."""
        self.drain_s = math.inf
        """In how long all work of the workflows to be saved could be done; infinite if unknown."""
        self.workflows: ByTime[W] = ByTime()
        self._selection: Selection[W] | None = None
        self._looked: tuple[float, float] | None = None
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
        self, now_s: float, part: int, *, queued: bool, rest_s: Callable[[W], float]
    ) -> list[tuple[W, bool]]:
        """Goes on with a review, or begins one.

        Args:
            now_s: the present.
            part: how many workflows to look at.
            queued: whether calls of timely workflows wait.
            rest_s: the expected remaining work of a workflow.

        Returns:
            Workflows, and whether each is to be saved.
        """
        if self._selection is None:
            self._close_period(now_s, queued)
            self._selection = Selection(now_s, self._rate())
            self._looked = (now_s, math.inf)
        selection = self._selection
        if self._looked is not None:
            part -= self._look(selection, self._looked, part, rest_s)
        verdicts: list[tuple[W, bool]] = []
        if self._looked is None:
            self.drain_s = selection.drain_s
            verdicts = selection.take_verdicts(2 * part)
        self._arm(now_s, selection)
        return verdicts

    def _look(
        self,
        selection: Selection[W],
        place: tuple[float, float],
        part: int,
        rest_s: Callable[[W], float],
    ) -> int:
        """Looks at a part of the workflows; returns how many there were."""
        entries = self.workflows.after(place, part)
        for deadline_s, _, workflow in entries:
            selection.consider(deadline_s, rest_s(workflow), workflow)
        self._looked = entries[-1][:2] if len(entries) == part else None
        return len(entries)

    def _arm(self, now_s: float, selection: Selection[W]) -> None:
        """Says when to go on."""
        if self._looked is not None or selection.considered:
            self.due_s = math.nextafter(now_s, math.inf)
            return
        self._selection = None
        self.due_s = math.inf
        if self.workflows:
            self.due_s = now_s + _PERIOD_S + _PERIOD_S_PER_WORKFLOW * len(self.workflows)

    def _rate(self) -> float:
        if self._stages < _FEWEST_STAGES or self._work_s <= 0 or self._elapsed_s <= 0:
            return math.inf
        return self._work_s / self._elapsed_s

    def _close_period(self, now_s: float, queued: bool) -> None:
        if self._began_s is not None and queued and not self._spare:
            self._work_s += self._new_work_s
            self._elapsed_s += max(0.0, now_s - self._began_s)
            self._stages += self._new_stages
            while self._stages > _MOST_STAGES:  # the recent past counts most
                self._work_s /= 2
                self._elapsed_s /= 2
                self._stages /= 2
        self._began_s = now_s if queued else None
        self._new_work_s, self._new_stages, self._spare = 0.0, 0, False
