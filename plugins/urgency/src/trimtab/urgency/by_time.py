"""Things in the order of a time of theirs, kept so with every change."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class ByTime(Generic[T]):
    """A sorted list: what leaves is taken out at once, so that no step pays for tidying up.

    A change moves a part of the list in memory, some microseconds for ten thousand entries.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, T]] = []
        self._places: dict[T, tuple[float, int, T]] = {}
        self._numbers = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: object) -> bool:
        return item in self._places

    @property
    def first_s(self) -> float:
        """The earliest time; infinite where there is nothing."""
        return self._entries[0][0] if self._entries else math.inf

    def put(self, item: T, time_s: float) -> None:
        """Puts something in, or moves it to its new time, behind those of the same time."""
        place = self._places.get(item)
        if place is not None:
            if place[0] == time_s:
                return
            self.discard(item)
        self._numbers += 1
        self._places[item] = entry = (time_s, self._numbers, item)
        insort(self._entries, entry)

    def discard(self, item: T) -> None:
        """Takes something out, if it is in."""
        place = self._places.pop(item, None)
        if place is not None:
            del self._entries[bisect_left(self._entries, place)]

    def pop(self) -> T:
        """Takes the first out; there must be one."""
        item = self._entries.pop(0)[2]
        del self._places[item]
        return item

    def after(self, place: tuple[float, float], limit: int) -> list[tuple[float, int, T]]:
        """The first entries, as ``(time, number, thing)``, behind a time and number.

        The number tells things of one time apart.
        """
        start = bisect_right(self._entries, place, key=lambda entry: entry[:2])
        return self._entries[start : start + limit]
