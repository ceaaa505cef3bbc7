"""The waiting queue in a policy's order."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vllm.v1.core.sched.request_queue import RequestQueue, SchedulingPolicy
from vllm.v1.request import Request

_Entry = list[Any]
"""``[key, engine's own order, serial, request or None once it has left]``: a list, so that it can
be voided in place; with a serial, so that requests are never compared."""


class PolicyQueue(RequestQueue):
    """A heap of waiting requests with lazy removal: O(log n) for each change, nothing a step.

    Args:
        key_of: the policies' sort key of a request.
        engine_order: vLLM's own policy, which breaks ties.
    """

    def __init__(
        self, key_of: Callable[[Request], tuple[Any, ...]], engine_order: SchedulingPolicy
    ) -> None:
        self._key_of = key_of
        self._by_priority = engine_order is SchedulingPolicy.PRIORITY
        self._heap: list[_Entry] = []
        self._entries: dict[Request, _Entry] = {}
        self._parked: list[_Entry] = []
        self._refuses: Callable[[Request], bool] | None = None
        self._first = 0
        self._last = 0
        self._serial = 0

    def open_step(self, refuses: Callable[[Request], bool] | None) -> None:
        """Starts a scheduling step: the calls refused in the last one are asked about again.

        Args:
            refuses: whether a request may not be admitted in this step; None admits all.
        """
        for entry in self._parked:
            if entry[3] is not None:
                heapq.heappush(self._heap, entry)
        self._parked.clear()
        self._refuses = refuses

    def rekey(self, requests: Iterable[Request]) -> None:
        """Asks for the keys of these requests again; those that do not wait are passed over."""
        for request in requests:
            entry = self._entries.get(request)
            if entry is not None:
                entry[3] = None
                self._push(request, entry[1])
        self._compact()

    def _push(self, request: Request, order: tuple[Any, ...]) -> None:
        self._serial += 1
        entry = [self._key_of(request), order, self._serial, request]
        self._entries[request] = entry
        heapq.heappush(self._heap, entry)

    def _order(self, request: Request, sequence: int) -> tuple[Any, ...]:
        if self._by_priority:
            return (request.priority, request.arrival_time, request.request_id)
        return (sequence,)

    def _compact(self) -> None:
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = [entry for entry in self._heap if entry[3] is not None]
            heapq.heapify(self._heap)

    def _head(self) -> Request | None:
        heap = self._heap
        while heap:
            request: Request | None = heap[0][3]
            if request is None:
                heapq.heappop(heap)
            elif self._refuses is not None and self._refuses(request):
                self._parked.append(heapq.heappop(heap))
            else:
                return request
        return None

    def add_request(self, request: Request) -> None:
        self._last += 1
        self._push(request, self._order(request, self._last))

    def prepend_request(self, request: Request) -> None:
        self._first -= 1
        self._push(request, self._order(request, self._first))

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.prepend_request(request)

    def peek_request(self) -> Request:
        request = self._head()
        if request is None:
            raise IndexError("peek from an empty queue")
        return request

    def pop_request(self) -> Request:
        request = self.peek_request()
        heapq.heappop(self._heap)
        del self._entries[request]
        return request

    def remove_request(self, request: Request) -> None:
        self._entries.pop(request)[3] = None
        self._compact()

    def remove_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            entry = self._entries.pop(request, None)
            if entry is not None:
                entry[3] = None
        self._compact()

    def __bool__(self) -> bool:
        return self._head() is not None

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Request]:
        return (entry[3] for entry in sorted(self._entries.values(), key=lambda e: e[:2]))
