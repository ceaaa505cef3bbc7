"""When policies are to look at calls: a calendar, so that a step costs only what is due in it."""

from __future__ import annotations

from collections import defaultdict

from trimtab.core.policy import Call


class Looks:
    """The calls that policies wait for to have come so far.

    Args:
        most_tokens: the most that a call can generate in one step.
    """

    def __init__(self, most_tokens: int = 1) -> None:
        self._most_tokens = most_tokens
        self._step = 0
        self._wanted: dict[Call, int] = {}
        self._calendar: defaultdict[int, list[Call]] = defaultdict(list)

    def expect(self, call: Call, tokens: int) -> None:
        """Waits for a call to have generated so many tokens; one that is waited for is not yet."""
        self._wanted[call] = tokens
        self._enter(call, tokens)

    def forget(self, call: Call) -> None:
        """Waits for a call no more."""
        self._wanted.pop(call, None)

    def due(self) -> list[Call]:
        """A step has been taken: the calls that have come so far, each waited for no more."""
        self._step += 1
        found = []
        for call in self._calendar.pop(self._step, ()):
            tokens = self._wanted.get(call)
            if tokens is None:
                continue
            if call.output_tokens < tokens:
                self._enter(call, tokens)
                continue
            del self._wanted[call]
            found.append(call)
        return found

    def _enter(self, call: Call, tokens: int) -> None:
        """Looks again at the first step in which the call can have come so far."""
        steps = -(-(tokens - call.output_tokens) // self._most_tokens)
        self._calendar[self._step + max(1, steps)].append(call)
