"""What the ranks of a group tell each other in its store once a call has failed.

A rank that waits in vain knows only whom it waited for, which may itself have waited for another.
So each says what it called and whom it lost, or what went wrong with itself, and reads what the
others say.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from trimtab.hosts.torch.plan_runner import PeerLost

_KEY = "trimtab/fault"
_BY_ITSELF = "itself"
"""The key of a rank that failed by itself, which is then everyone's reason."""

_WAIT_S = 1.0
"""How long a rank that loses a neighbour waits to hear whose fault it was at first."""

_POLL_S = 0.02
_SHOWN = 300


@dataclass(frozen=True, slots=True)
class Passed:
    """What a rank passed to a call.

    Attributes:
        call: its number, which all ranks give it; negative for one in a callback, from -1 down.
        what: kind of call, elements, dtype and operation, to be read.
        plan: a digest of the plan; 0 where there is none.
    """

    call: int
    what: str
    plan: int


@dataclass(frozen=True, slots=True)
class _Said:
    """What a rank says of its failure.

    Attributes:
        rank: who says it.
        passed: to the call that failed.
        lost: the rank it waited for in vain; None where it failed by itself.
        reason: what went wrong.
    """

    rank: int
    passed: Passed
    lost: int | None
    reason: str


class CallFaults:
    """Finds whose fault it is that a call failed.

    Args:
        store: of the group.
        rank: this one.
        names: what to call each rank, by its number in the group.
    """

    def __init__(self, store: Any, rank: int, names: Sequence[str]) -> None:
        self._store, self._rank, self._names = store, rank, list(names)

    def own(self, passed: Passed, error: Exception) -> str:
        """Says that this rank failed by itself; returns what it says."""
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        said = _Said(self._rank, passed, None, reason[:_SHOWN])
        with suppress(Exception):  # the store may be gone with the rank that had it
            self._say(said, str(self._rank))
            self._say(said, _BY_ITSELF)
        return self._failed(said)

    def others(self, passed: Passed, lost: PeerLost) -> str:
        """Says that this rank lost another; returns whose fault it is, as far as they say.

        It never names this rank: what it passed is right to itself.
        """
        odd, seen, blamed = None, {self._rank}, lost.rank
        until_s, store_is_gone = time.monotonic() + _WAIT_S, True
        with suppress(Exception):
            self._say(_Said(self._rank, passed, lost.rank, lost.reason), str(self._rank))
            while True:
                failed = self._heard(_BY_ITSELF)
                if failed is not None:
                    return self._failed(failed)
                if blamed in seen or time.monotonic() > until_s:
                    break
                said = self._heard(str(blamed))
                if said is None:
                    time.sleep(_POLL_S)
                    continue
                if said.passed.call != passed.call:
                    odd = odd or said
                elif said.passed != passed:
                    return self._differs(said, passed)
                seen.add(blamed)
                blamed = lost.rank if said.lost is None else said.lost
            store_is_gone = False
        if blamed in seen:  # they wait for one another
            if odd is not None:
                return self._differs(odd, passed)
            blamed = lost.rank
        told = f"{self._names[blamed]} failed or did not take part in time ({lost.reason})"
        if store_is_gone:
            told += ", or another one before it: the store does not answer"
        return told

    def _failed(self, said: _Said) -> str:
        return f"{self._names[said.rank]} failed in {said.passed.what}: {said.reason}"

    def _differs(self, said: _Said, own: Passed) -> str:
        its, name, me = said.passed, self._names[said.rank], self._names[self._rank]
        if its.call != own.call:
            return (
                f"{name} called {its.what} as call {abs(its.call)} of the group where {me} called"
                f" {own.what} as call {abs(own.call)}"
            )
        if its.what != own.what:
            return f"{name} called {its.what} where {me} called {own.what}"
        return f"{name} has another plan for {its.what} than {me}"

    def _say(self, said: _Said, key: str) -> None:
        passed = said.passed
        words = [said.rank, passed.call, passed.what, passed.plan, said.lost, said.reason]
        self._store.set(f"{_KEY}/{key}", json.dumps(words))

    def _heard(self, key: str) -> _Said | None:
        if not self._store.check([f"{_KEY}/{key}"]):
            return None
        rank, call, what, plan, lost, reason = json.loads(self._store.get(f"{_KEY}/{key}"))
        return _Said(rank, Passed(call, what, plan), lost, reason)
