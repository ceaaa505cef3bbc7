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
        self._wanted: dict[Call, tuple[int, int]] = {}
        """Of each call the tokens that are waited for, and the step in which it is looked at."""
        self._calendar: defaultdict[int, dict[Call, None]] = defaultdict(dict)

    def expect(self, call: Call, tokens: int) -> None:
        """Waits for a call to have generated so many tokens; one that is waited for is not yet."""
        steps = -(-(tokens - call.output_tokens) // self._most_tokens)
        step = self._step + max(1, steps)
        self._wanted[call] = tokens, step
        self._calendar[step][call] = None

    def forget(self, call: Call) -> None:
        """Waits for a call no more."""
        if call in self._wanted:
            _, step = self._wanted.pop(call)
            del self._calendar[step][call]
            if not self._calendar[step]:
                del self._calendar[step]

    def due(self) -> list[Call]:
        """A step has been taken: the calls that have come so far, each waited for no more."""
        self._step += 1
        found = []
        for call in self._calendar.pop(self._step, ()):
            tokens, _ = self._wanted.pop(call)
            if call.output_tokens >= tokens:
                found.append(call)
            else:
                self.expect(call, tokens)
        return found
