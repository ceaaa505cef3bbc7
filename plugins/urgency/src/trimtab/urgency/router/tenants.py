"""Who sends the calls, and how much of the service each tenant has had."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

from trimtab.core.policy import FieldValue
from trimtab.urgency.router.config import TenantOptions
from trimtab.urgency.router.refusals import Refusal

EVERYBODY = "everybody"
"""The tenant of all clients where the file names none."""


class Tenant:
    """One tenant, and the service it has had.

    Attributes:
        name: as in the file.
        min_deadline_s: a shorter deadline counts as this one.
        max_running: calls it may have in the servers at once.
        running: those it has there.
        waiting: those it has in the router's queue.
        settled_s: seconds of service that it has had, over its weight.
    """

    def __init__(self, options: TenantOptions | None = None) -> None:
        self.name = options.name if options else EVERYBODY
        self.min_deadline_s = options.min_deadline_s if options else 0.0
        self.max_running = options.max_running if options and options.max_running else math.inf
        self._weight = options.weight if options else 1.0
        self.running = 0
        self.waiting = 0
        self.settled_s = 0.0
        self._pending_s = 0.0

    @property
    def may_run(self) -> bool:
        """Whether another of its calls may be sent."""
        return self.running < self.max_running

    @property
    def is_here(self) -> bool:
        """Whether any of its calls waits or runs."""
        return bool(self.waiting or self.running)

    @property
    def served_s(self) -> float:
        """The service that it has had, and what its calls in the servers are expected to take."""
        return self.settled_s + self._pending_s

    def charge(self, expected_s: float) -> None:
        """A call of it was sent."""
        self.running += 1
        self._pending_s += expected_s / self._weight

    def settle(self, expected_s: float, service_s: float) -> None:
        """A call of it is over, and has taken ``service_s``."""
        self.running -= 1
        self._pending_s -= expected_s / self._weight
        self.settled_s += service_s / self._weight

    def arrive(self, others: Iterable[Tenant]) -> None:
        """Comes back from a pause, with no claim on the service of the past.

        It starts with what the one of the others that has had the least has had; where nobody is
        there, the past of all is forgotten.
        """
        others = [other for other in others if other is not self]
        here_s = [other.settled_s for other in others if other.is_here]
        if here_s:
            self.settled_s = max(self.settled_s, min(here_s))
        else:
            for tenant in (self, *others):
                tenant.settled_s = 0.0

    def fields_of(self, said: Mapping[str, FieldValue], *, known: bool) -> dict[str, FieldValue]:
        """What a call of the tenant says, as far as it may.

        Its deadline is no shorter than the tenant may ask for; and where the tenant is ``known`` by
        its key, it is the one whose call this is, whatever the call says.
        """
        fields = dict(said)
        deadline_s = fields.get("deadline_s")
        if deadline_s is not None:
            fields["deadline_s"] = max(float(deadline_s), self.min_deadline_s)
        if known:
            fields["tenant"] = self.name
        return fields


class Tenants:
    """The tenants by their API keys; without any, all clients are `EVERYBODY`."""

    def __init__(self, options: Iterable[TenantOptions]) -> None:
        self._by_key: dict[bytes, Tenant] = {}
        self.all: list[Tenant] = []
        for one in options:
            tenant = Tenant(one)
            self.all.append(tenant)
            self._by_key.update((_digest(key), tenant) for key in one.keys)
        self.have_keys = bool(self.all)
        if not self.all:
            self.all.append(Tenant())

    def of(self, headers: Mapping[str, str]) -> Tenant:
        """The tenant whose key a request bears.

        Raises:
            Refusal: it bears none, or an unknown one.
        """
        if not self.have_keys:
            return self.all[0]
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            key = headers.get("x-api-key", "")
        # Looked up by digest: the time that a comparison takes says nothing of the keys.
        tenant = self._by_key.get(_digest(key.strip()))
        if tenant is None:
            raise Refusal(
                401,
                "Give one of the router's API keys: Authorization: Bearer KEY.",
                param="api_key",
            )
        return tenant


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
