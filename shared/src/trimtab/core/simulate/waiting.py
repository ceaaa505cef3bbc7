"""A replica's waiting calls: first come first served, or in the order of its policies."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from trimtab.core.simulate.job import Job


class FifoQueue:
    """First come, first served; a preempted job comes before all others."""

    __slots__ = ("_jobs",)

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def push(self, job: Job) -> None:
        """Adds a job that has arrived."""
        self._jobs.append(job)

    def push_front(self, job: Job) -> None:
        """Adds a preempted job."""
        self._jobs.appendleft(job)

    def head(self) -> Job | None:
        """The job that is served next."""
        return self._jobs[0] if self._jobs else None

    def pop(self) -> None:
        """Removes the head."""
        self._jobs.popleft()

    def remove(self, job: Job) -> None:
        """Takes out a job, wherever it is."""
        self._jobs.remove(job)

    def rekey(self, jobs: Iterable[Job]) -> None:
        """Does nothing: the order does not depend on keys."""

    def open_step(self, refuses: Callable[[Job], bool] | None) -> None:
        """Does nothing: no job is refused."""


class KeyQueue:
    """In the order of a key, ties by arrival; jobs refused in a step let those behind them pass."""

    __slots__ = (
        "_entries",
        "_first",
        "_heap",
        "_key_of",
        "_last",
        "_parked",
        "_pushes",
        "_refuses",
    )

    def __init__(self, key_of: Callable[[Job], tuple[Any, ...]]) -> None:
        self._key_of = key_of
        self._heap: list[list[Any]] = []
        self._entries: dict[Job, list[Any]] = {}
        self._parked: list[list[Any]] = []
        self._refuses: Callable[[Job], bool] | None = None
        self._first = self._last = self._pushes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def push(self, job: Job) -> None:
        """Adds a job that has arrived."""
        self._last += 1
        self._add(job, self._last)

    def push_front(self, job: Job) -> None:
        """Adds a preempted job; it comes before all others of its key."""
        self._first -= 1
        self._add(job, self._first)

    def head(self) -> Job | None:
        """The job that is served next, after setting aside those that are refused."""
        heap = self._heap
        while heap:
            job: Job | None = heap[0][3]
            if job is None:
                heapq.heappop(heap)
            elif self._refuses is not None and self._refuses(job):
                self._parked.append(heapq.heappop(heap))
            else:
                return job
        return None

    def pop(self) -> None:
        """Removes the head."""
        del self._entries[heapq.heappop(self._heap)[3]]

    def remove(self, job: Job) -> None:
        """Takes out a job, wherever it is."""
        self._entries.pop(job)[3] = None

    def rekey(self, jobs: Iterable[Job]) -> None:
        """Asks for the keys of these jobs again; those that do not wait are passed over."""
        for job in jobs:
            entry = self._entries.get(job)
            if entry is not None:
                entry[3] = None
                self._add(job, entry[1])

    def open_step(self, refuses: Callable[[Job], bool] | None) -> None:
        """Starts a step: the calls refused in the last one are asked about again."""
        for entry in self._parked:
            if entry[3] is not None:
                heapq.heappush(self._heap, entry)
        self._parked.clear()
        self._refuses = refuses

    def _add(self, job: Job, order: int) -> None:
        # A voided entry may equal its job's new one: the number tells them apart.
        self._pushes += 1
        entry = [self._key_of(job), order, self._pushes, job]
        self._entries[job] = entry
        heapq.heappush(self._heap, entry)
