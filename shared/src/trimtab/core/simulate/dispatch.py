"""Which replica a request goes to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from trimtab.core.cost.step import EngineProfile
from trimtab.core.documents import nearest
from trimtab.core.errors import BadInput
from trimtab.core.workload import Request


class ReplicaView(Protocol):
    """What a dispatcher may know of a replica, as it is at the moment of the decision."""

    @property
    def replica(self) -> int:
        """The replica's number."""

    @property
    def profile(self) -> EngineProfile:
        """What the replica's steps cost."""

    @property
    def running(self) -> int:
        """Requests in the batch."""

    @property
    def waiting(self) -> int:
        """Requests in the queue."""

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens of the requests in the queue."""

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache's blocks in use, 0 to 1."""


class Dispatcher(Protocol):
    """Chooses a replica for each request. An instance serves one simulation: it may keep state."""

    def choose(self, request: Request, replicas: Sequence[ReplicaView], now_s: float) -> int:
        """The index in ``replicas`` (those that may serve the request) that gets it."""


Sends = Iterable[tuple[Request, int]]
"""Requests that leave the router now, each with the number of the replica that gets it."""


class Router(Protocol):
    """A dispatcher that may hold requests back, and is told what has become of those it sent.

    Each request that has arrived is sent once, at once or as the answer to a later event. An
    instance serves one simulation.
    """

    def on_arrival(self, request: Request, now_s: float) -> Sends:
        """A request has come."""

    def on_first_token(self, request: Request, now_s: float) -> Sends:
        """A request has given its first token, and gives more."""

    def on_end(self, request: Request, now_s: float) -> Sends:
        """A request has ended."""


class RoundRobin:
    """Each replica in turn."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, request: Request, replicas: Sequence[ReplicaView], now_s: float) -> int:
        """The next replica."""
        self._next += 1
        return (self._next - 1) % len(replicas)


class LeastRequests:
    """The replica with the fewest requests, running and waiting; the first of equals."""

    def choose(self, request: Request, replicas: Sequence[ReplicaView], now_s: float) -> int:
        """The least busy replica."""
        counts = [replica.running + replica.waiting for replica in replicas]
        return counts.index(min(counts))


class LeastPromptTokens:
    """The replica whose queue holds the fewest prompt tokens, then the fewest requests."""

    def choose(self, request: Request, replicas: Sequence[ReplicaView], now_s: float) -> int:
        """The replica with the shortest queue."""
        loads = [(r.waiting_tokens, r.running + r.waiting) for r in replicas]
        return loads.index(min(loads))


DISPATCHERS: Mapping[str, Callable[[], Dispatcher]] = {
    "round-robin": RoundRobin,
    "least-requests": LeastRequests,
    "least-prompt-tokens": LeastPromptTokens,
}


def dispatcher(name: str) -> Dispatcher:
    """A new dispatcher by its name.

    Raises:
        BadInput: none has this name.
    """
    if name not in DISPATCHERS:
        raise BadInput(f"there is no dispatcher {name!r}", fix=nearest(name, DISPATCHERS))
    return DISPATCHERS[name]()
