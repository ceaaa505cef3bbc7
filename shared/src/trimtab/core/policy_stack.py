"""Several serving policies driven as one, each fenced off so that its failure harms nobody."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from trimtab.core.policy import Call, Engine, Load, Outcome, ServingPolicy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

T = TypeVar("T")

Entry = tuple[str, ServingPolicy]
StackKey = tuple[tuple[float, ...], ...]


def _overriding(policies: Iterable[Entry], method: str) -> list[Entry]:
    """The policies that have their own version of a method: only those are ever called."""
    base = getattr(ServingPolicy, method)
    return [entry for entry in policies if getattr(type(entry[1]), method) is not base]


class PolicyStack:
    """The enabled policies in the configuration's order.

    A policy that raises is logged once and left out from then on; the host carries on with the
    others, or in the engine's own order when none is left. `reordered` then tells the host that
    every key must be asked for again.

    Args:
        policies: the policies with their plugins' names.
    """

    def __init__(self, policies: Sequence[Entry]) -> None:
        self._policies = list(policies)
        self.reordered = False
        self._index()

    def _index(self) -> None:
        self._on_arrival = _overriding(self._policies, "on_arrival")
        self._ordering = _overriding(self._policies, "key")
        self._admitting = _overriding(self._policies, "admits")
        self._reading = _overriding(self._policies, "wants_logprobs")
        self._stepping = _overriding(self._policies, "on_step")
        self._relieving = _overriding(self._policies, "relieve")
        self._on_admission = _overriding(self._policies, "on_admission")
        self._on_finish = _overriding(self._policies, "on_finish")
        self._timed = _overriding(self._policies, "next_timer_s")
        self.orders = bool(self._ordering)
        self.gates = bool(self._admitting)
        self.reads_logprobs = bool(self._reading)
        self.steps = bool(self._stepping)
        self.relieves = bool(self._relieving)
        self.watches_admissions = bool(self._on_admission)

    def __bool__(self) -> bool:
        return bool(self._policies)

    @property
    def names(self) -> list[str]:
        """The plugins whose policies are still at work."""
        return [name for name, _ in self._policies]

    def _ask(self, entry: Entry, method: str, *args: Any, otherwise: T) -> T:
        """What a policy says, or ``otherwise`` after leaving out a policy that raised."""
        try:
            answer: T = getattr(entry[1], method)(*args)
            return answer
        except Exception:
            self._leave_out(entry, f"its {method} raised")
            return otherwise

    def _leave_out(self, entry: Entry, reason: str) -> None:
        logger.error(
            "The policy of the plugin %r is switched off since %s; the engine goes on without it.",
            entry[0],
            reason,
            exc_info=sys.exc_info()[0] is not None,
        )
        self._policies.remove(entry)
        self.reordered |= entry in self._ordering
        self._index()

    def attach(self, engine: Engine) -> None:
        """Shows every policy the engine that it serves."""
        for entry in _overriding(self._policies, "attach"):
            self._ask(entry, "attach", engine, otherwise=None)

    def on_arrival(self, call: Call, now_s: float) -> None:
        """Tells every policy of a new call."""
        for entry in tuple(self._on_arrival):
            self._ask(entry, "on_arrival", call, now_s, otherwise=None)

    def on_admission(self, call: Call, now_s: float) -> None:
        """Tells every policy that a call got a place in the batch."""
        for entry in tuple(self._on_admission):
            self._ask(entry, "on_admission", call, now_s, otherwise=None)

    def on_finish(self, call: Call, outcome: Outcome, now_s: float) -> None:
        """Tells every policy that a call has left the engine."""
        for entry in tuple(self._on_finish):
            self._ask(entry, "on_finish", call, outcome, now_s, otherwise=None)
        for _, policy in self._policies:
            policy.stale.discard(call)

    def key(self, call: Call, now_s: float) -> StackKey:
        """The key of a waiting call: those of the ordering policies, in the stack's order."""
        keys: list[tuple[float, ...]] = []
        for entry in tuple(self._ordering):
            key: Any = self._ask(entry, "key", call, now_s, otherwise=None)
            parts = key if isinstance(key, tuple) else (key,)
            if all(isinstance(part, int | float) and not math.isnan(part) for part in parts):
                keys.append(parts)
            elif entry in self._ordering:
                self._leave_out(entry, f"its key {key!r} is not a number or a tuple of numbers")
        return tuple(keys)

    def admits(self, call: Call, load: Load, now_s: float) -> bool:
        """Whether every policy lets the call into the batch in this step."""
        return all(
            self._ask(entry, "admits", call, load, now_s, otherwise=True)
            for entry in tuple(self._admitting)
        )

    def watches(self, call: Call) -> int | None:
        """The fewest tokens that some policy waits for a call to have generated; None for none."""
        wanted: list[int] = []
        for entry in tuple(self._stepping):
            tokens: Any = self._ask(entry, "watches", call, otherwise=None)
            if isinstance(tokens, int) and not isinstance(tokens, bool):
                wanted.append(tokens)
            elif tokens is not None:
                self._leave_out(entry, f"its watches {tokens!r} is no number of tokens")
        return min(wanted, default=None)

    def wants_logprobs(self, call: Call) -> int | None:
        """The most logprobs of a call's tokens that some policy needs; None for none at all."""
        wanted: list[int | None] = [
            self._ask(entry, "wants_logprobs", call, otherwise=None)
            for entry in tuple(self._reading)
        ]
        return max((k for k in wanted if k is not None), default=None)

    def on_logprobs(self, calls: Sequence[Call], logprobs: NDArray[np.float32]) -> None:
        """Shows the step's logprobs to every policy that reads them."""
        for entry in tuple(self._reading):
            self._ask(entry, "on_logprobs", calls, logprobs, otherwise=None)

    def relieve(self, now_s: float) -> Call | None:
        """A call that the first policy that has one gives up, to make room in the KV cache."""
        for entry in tuple(self._relieving):
            call: Call | None = self._ask(entry, "relieve", now_s, otherwise=None)
            if call is not None:
                return call
        return None

    def on_step(self, progressed: Collection[Call], now_s: float) -> list[Call]:
        """The calls that some policy wants ended after this step, in the policies' order."""
        ended: dict[Call, None] = {}
        for entry in tuple(self._stepping):
            ended.update(
                dict.fromkeys(self._ask(entry, "on_step", progressed, now_s, otherwise=()))
            )
        return list(ended)

    def stale_calls(self, now_s: float) -> set[Call]:
        """Runs the timers that are due and takes the calls whose keys have changed."""
        for entry in tuple(self._timed):
            if self._ask(entry, "next_timer_s", otherwise=math.inf) <= now_s:
                self._ask(entry, "on_timer", now_s, otherwise=None)
        stale: set[Call] = set()
        for _, policy in self._ordering:
            if policy.stale:
                stale |= policy.stale
                policy.stale.clear()
        return stale
