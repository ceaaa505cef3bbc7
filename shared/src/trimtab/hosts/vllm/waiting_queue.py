"""The waiting queue in a policy's order."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vllm.v1.core.sched.request_queue import RequestQueue, SchedulingPolicy
from vllm.v1.request import Request

_Entry = tuple[Any, tuple[Any, ...], int, Request]
"""``(key, engine's own order, serial, request)``: with a serial, so that requests are never
compared."""


class PolicyQueue(RequestQueue):
    """A sorted list of waiting requests: what leaves is out at once, so no step has to tidy up.

    A change moves a part of the list in memory, some microseconds for ten thousand requests.

    Args:
        key_of: the policies' sort key of a request.
        engine_order: vLLM's own policy, which breaks ties.
    """

    def __init__(
        self,
        key_of: Callable[[Request], tuple[Any, ...]],
        engine_order: SchedulingPolicy = SchedulingPolicy.FCFS,
    ) -> None:
        self._key_of = key_of
        self._by_priority = engine_order is SchedulingPolicy.PRIORITY
        self._sorted: list[_Entry] = []
        self._entries: dict[Request, _Entry] = {}
        self._refuses: Callable[[Request], bool] | None = None
        self._refused = 0
        self._first = 0
        self._last = 0
        self._serial = 0

    def open_step(self, refuses: Callable[[Request], bool] | None) -> None:
        """Starts a scheduling step: the calls refused in the last one are asked about again.

        Args:
            refuses: whether a request may not be admitted in this step; None admits all.
        """
        self._refuses = refuses
        self._refused = 0

    def rekey(self, requests: Iterable[Request]) -> None:
        """Asks for the keys of these requests again; those that do not wait are passed over."""
        for request in requests:
            entry = self._take_out(request)
            if entry is not None:
                self._put(request, entry[1])

    def _put(self, request: Request, order: tuple[Any, ...]) -> None:
        self._serial += 1
        entry = (self._key_of(request), order, self._serial, request)
        place = bisect_left(self._sorted, entry)
        self._sorted.insert(place, entry)
        self._entries[request] = entry
        self._refused = min(self._refused, place)

    def _take_out(self, request: Request) -> _Entry | None:
        entry = self._entries.pop(request, None)
        if entry is not None:
            place = bisect_left(self._sorted, entry)
            del self._sorted[place]
            self._refused -= place < self._refused
        return entry

    def _order(self, request: Request, sequence: int) -> tuple[Any, ...]:
        if self._by_priority:
            return (request.priority, request.arrival_time, request.request_id)
        return (sequence,)

    def _head(self) -> Request | None:
        """The first request that is not refused; those before it were refused in this step."""
        while self._refused < len(self._sorted):
            request = self._sorted[self._refused][3]
            if self._refuses is None or not self._refuses(request):
                return request
            self._refused += 1
        return None

    def add_request(self, request: Request) -> None:
        self._last += 1
        self._put(request, self._order(request, self._last))

    def prepend_request(self, request: Request) -> None:
        self._first -= 1
        self._put(request, self._order(request, self._first))

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
        self._take_out(request)
        return request

    def remove_request(self, request: Request) -> None:
        if self._take_out(request) is None:
            raise KeyError(request)

    def remove_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self._take_out(request)

    def __bool__(self) -> bool:
        return self._head() is not None

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Request]:
        return iter([entry[3] for entry in self._sorted])
