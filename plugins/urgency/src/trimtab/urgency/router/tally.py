"""What an answer shows in passing: how many tokens it has, and how it ends."""

from __future__ import annotations

import re

_USAGE = re.compile(rb'"(?:completion|output)_tokens":\s*(\d{1,9})')
_TAIL_BYTES = 4096


class Tally:
    """Watches an answer's body go by; it changes nothing."""

    def __init__(self) -> None:
        self._events = 0
        self._tail = b""

    def note(self, chunk: bytes) -> None:
        """A piece of the body has come."""
        self._events += chunk.count(b"data:")
        self._tail = (self._tail + chunk)[-_TAIL_BYTES:]

    @property
    def output_tokens(self) -> int:
        """The output's length as the answer says, or else its number of events."""
        said = _USAGE.findall(self._tail)
        return int(said[-1]) if said else max(0, self._events - 1)

    @property
    def between_events(self) -> bool:
        """Whether the last event that passed was whole."""
        return self._tail.endswith((b"\n\n", b"\r\n\r\n"))
