"""The workflows that pass through the router: when each began, where it was, when it seems over."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from trimtab.urgency.fields import CallFields
from trimtab.urgency.router.tenants import Tenant

_MOST = 10_000


@dataclass(slots=True, eq=False)
class Journey:
    """One workflow, or a single call that named none.

    Attributes:
        tenant: whose it is.
        name: what its client calls it; None for a single call.
        class_: the kind of workflow.
        began_s: when its first call arrived.
        allowed_s: seconds it may take in all; None without a deadline.
        calls: those that wait or run.
        answered: how many have been.
        depth: how many stages have begun.
        between: whether a call has ended and none has followed.
        ended_s: when its last call ended.
        sent_s: by server's number, when its first call was sent there.
    """

    tenant: Tenant
    name: str | None
    class_: str
    began_s: float
    allowed_s: float | None = None
    calls: int = 0
    answered: int = 0
    depth: int = 0
    between: bool = True
    ended_s: float = 0.0
    sent_s: dict[int, float] = field(default_factory=dict)

    @property
    def deadline_s(self) -> float:
        """When it should be over; infinite without a deadline."""
        return math.inf if self.allowed_s is None else self.began_s + self.allowed_s

    @property
    def scoped_name(self) -> str | None:
        """A name that no other tenant's workflow has, whatever its clients call it."""
        if self.name is None:
            return None
        return hashlib.sha256(f"{self.tenant.name}\0{self.name}".encode()).hexdigest()[:32]

    def enter(self, said: CallFields) -> str:
        """A call begins; returns its stage."""
        if self.between:
            self.depth += 1
        self.between = False
        self.calls += 1
        if said.deadline_s is not None:
            self.allowed_s = said.deadline_s
        return said.stage if said.stage is not None else f"#{self.depth}"

    def leave(self, now_s: float) -> None:
        """A call is over."""
        self.calls -= 1
        self.between = True
        self.ended_s = now_s

    def allowed_at_s(self, number: int, now_s: float) -> float | None:
        """The deadline as a server must be told it: from when it first heard of the workflow."""
        if self.allowed_s is None:
            return None
        heard_s = now_s if self.name is None else self.sent_s.setdefault(number, now_s)
        return self.deadline_s - heard_s


class Journeys:
    """The workflows, the longest idle first.

    Args:
        quiet_s: one without calls for so long counts as over.
        ended: told of each workflow that is over, once.
    """

    def __init__(self, quiet_s: float, ended: Callable[[Journey], None]) -> None:
        self._quiet_s, self._ended = quiet_s, ended
        self._named: OrderedDict[tuple[str, str], Journey] = OrderedDict()

    def __len__(self) -> int:
        return len(self._named)

    def of(self, tenant: Tenant, said: CallFields, now_s: float) -> Journey:
        """The workflow of a call, begun now where it is new."""
        if said.workflow is None:
            return Journey(tenant, None, said.class_, now_s)
        self.close_quiet(now_s)
        key = (tenant.name, said.workflow)
        journey = self._named.get(key)
        if journey is None:
            journey = self._named[key] = Journey(tenant, said.workflow, said.class_, now_s)
        self._named.move_to_end(key)
        return journey

    def leave(self, journey: Journey, now_s: float) -> None:
        """A call of a workflow is over."""
        journey.leave(now_s)
        if journey.name is None:
            self._ended(journey)
        elif (key := (journey.tenant.name, journey.name)) in self._named:
            self._named.move_to_end(key)

    def close_quiet(self, now_s: float) -> None:
        """Ends the workflows that have been quiet for long, and the longest idle of too many."""
        while self._named:
            key, oldest = next(iter(self._named.items()))
            if oldest.calls:
                if len(self._named) <= _MOST:
                    return
                self._named.move_to_end(key)
                return
            if oldest.ended_s + self._quiet_s > now_s and len(self._named) <= _MOST:
                return
            del self._named[key]
            self._ended(oldest)
