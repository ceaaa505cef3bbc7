"""The serving policies of one simulated replica, driven as an engine host drives them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from trimtab.core.policy import Call, Load, Outcome, ServingPolicy

Key = tuple[float, ...]


class Policies:
    """Several policies as one; a policy that raises ends the simulation, so that it is seen.

    Args:
        policies: in the configuration's order: the first decides, the later ones break its ties.
    """

    def __init__(self, policies: Sequence[ServingPolicy]) -> None:
        def overriding(method: str) -> list[ServingPolicy]:
            base = getattr(ServingPolicy, method)
            return [p for p in policies if getattr(type(p), method) is not base]

        self._all = list(policies)
        self._ordering = overriding("key")
        self._admitting = overriding("admits")
        self._stepping = overriding("on_step")
        self._relieving = overriding("relieve")
        self._timed = overriding("next_timer_s")
        self.orders = bool(self._ordering)
        self.gates = bool(self._admitting)
        self.steps = bool(self._stepping)
        self.relieves = bool(self._relieving)
        self.timed = bool(self._timed)

    def __bool__(self) -> bool:
        return bool(self._all)

    def on_arrival(self, call: Call, now_s: float) -> None:
        """Tells every policy of a new call."""
        for policy in self._all:
            policy.on_arrival(call, now_s)

    def key(self, call: Call, now_s: float) -> tuple[Key, ...]:
        """The key of a waiting call."""
        keys = []
        for policy in self._ordering:
            key = policy.key(call, now_s)
            keys.append(key if isinstance(key, tuple) else (key,))
        return tuple(keys)

    def admits(self, call: Call, load: Load, now_s: float) -> bool:
        """Whether every policy lets the call into the batch."""
        return all(policy.admits(call, load, now_s) for policy in self._admitting)

    def on_step(self, progressed: Collection[Call], now_s: float) -> set[Call]:
        """The calls that some policy wants ended."""
        return {call for p in self._stepping for call in p.on_step(progressed, now_s)}

    def quiet_steps(self) -> int:
        """Steps that may pass before a policy that ends or refuses calls must be asked again."""
        return min(policy.quiet_steps() for policy in {*self._stepping, *self._admitting})

    def relieve(self, now_s: float) -> Call | None:
        """A call that the first policy that has one gives up."""
        for policy in self._relieving:
            call = policy.relieve(now_s)
            if call is not None:
                return call
        return None

    def on_admission(self, call: Call, now_s: float) -> None:
        """Tells every policy that a call got a place in the batch."""
        for policy in self._all:
            policy.on_admission(call, now_s)

    def on_finish(self, call: Call, outcome: Outcome, now_s: float) -> None:
        """Tells every policy that a call has left the engine."""
        for policy in self._all:
            policy.on_finish(call, outcome, now_s)
            policy.stale.discard(call)

    def next_timer_s(self) -> float:
        """When the first timer is due."""
        return min(policy.next_timer_s() for policy in self._timed)

    def has_stale(self) -> bool:
        """Whether some call's key has changed."""
        return any(policy.stale for policy in self._ordering)

    def take_stale(self, now_s: float) -> list[Call]:
        """Runs the timers that are due, then takes the calls whose keys have changed."""
        for policy in self._timed:
            if policy.next_timer_s() <= now_s:
                policy.on_timer(now_s)
        stale: dict[Call, None] = {}
        for policy in self._ordering:
            stale.update(dict.fromkeys(policy.stale))
            policy.stale.clear()
        return sorted(stale, key=lambda call: call.call_id)
