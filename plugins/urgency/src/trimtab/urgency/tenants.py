"""A cap on each tenant's share of the admissions: a greedy one cannot crowd out the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

C = TypeVar("C")

_BURST = 2.0
_HIGHEST = 4.0
_MOST_TENANTS = 1024
_MOST_PASSED_OVER = 64


@dataclass(slots=True)
class _Tenant(Generic[C]):
    """A tenant's waiting calls by arrival, and how far it is above its share.

    The level is a leaky bucket: each of its admissions adds 1, each of all takes the cap away.
    """

    waiting: dict[C, None] = field(default_factory=dict)
    level: float = 0.0
    counted: int = 0


class Tenants(Generic[C]):
    """Says when a tenant has had more than its share while others wait, and whose turn it is.

    Args:
        max_share: the most that one tenant gets of the admissions while others wait; 1: no cap.
    """

    def __init__(self, max_share: float) -> None:
        self.max_share = max_share
        self._tenants: dict[str, _Tenant[C]] = {}
        self._admissions = 0

    def join(self, tenant: str, call: C) -> None:
        """A tenant's call waits."""
        entry = self._tenants.get(tenant)
        if entry is None:
            self._make_room()
            entry = self._tenants[tenant] = _Tenant(counted=self._admissions)
        entry.waiting[call] = None

    def leave(self, tenant: str, call: C) -> None:
        """A tenant's call waits no more."""
        entry = self._tenants.get(tenant)
        if entry is not None:
            entry.waiting.pop(call, None)

    def admitted(self, tenant: str) -> list[C]:
        """Counts an admission.

        Returns:
            If the tenant is above its share: a few of the waiting calls of the tenant that has had
            the least of late, one of which should be next.
        """
        self._admissions += 1
        entry = self._tenants.get(tenant)
        if entry is None or len(self._tenants) < 2 or self.max_share >= 1:
            return []
        level = min(_HIGHEST, self._level(entry) + 1.0)
        entry.level, entry.counted = level, self._admissions
        if level < _BURST:
            return []
        others = [e for e in self._tenants.values() if e is not entry and e.waiting]
        if not others:
            entry.level = _BURST  # what nobody else wanted is not held against it
            return []
        last = min(others, key=lambda other: (self._level(other), other.counted))
        return list(islice(last.waiting, _MOST_PASSED_OVER))

    def _level(self, entry: _Tenant[C]) -> float:
        leaked = self.max_share * (self._admissions - entry.counted)
        return max(0.0, entry.level - leaked)

    def _make_room(self) -> None:
        """Forgets tenants of whom nothing waits, once there are many."""
        if len(self._tenants) >= _MOST_TENANTS:
            idle = [name for name, entry in self._tenants.items() if not entry.waiting]
            for name in idle:
                del self._tenants[name]
