"""Whether the router itself kept time: what it was too busy to see is no server's silence."""

from __future__ import annotations

import asyncio
import time

_BEAT_S = 0.02
_KEPT = 0.5
"""Share of the beats that must have come in a span of time for its end to count."""


class Pulse:
    """Beats for as long as the event loop turns.

    A time limit that ends after the loop stood still ends before the loop has read its sockets, in
    which the answer may lie.

    Attributes:
        beats: how often it has beaten.
    """

    def __init__(self) -> None:
        self.beats = 0

    async def beat(self) -> None:
        """Beats until it is cancelled."""
        while True:
            await asyncio.sleep(_BEAT_S)
            self.beats += 1

    def span(self) -> Span:
        """A span of time that begins now."""
        return Span(self)


class Span:
    """The time since its making."""

    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse
        self._from_beat, self._from_s = pulse.beats, time.monotonic()

    @property
    def kept(self) -> bool:
        """Whether the loop has turned for most of it."""
        lasted_s = time.monotonic() - self._from_s
        return _BEAT_S * (1 + self._pulse.beats - self._from_beat) >= _KEPT * lasted_s
